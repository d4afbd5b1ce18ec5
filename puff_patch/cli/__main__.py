"""``python -m puff_patch.cli``: the ``puff`` command where its script is not on PATH."""

from __future__ import annotations

import sys

from puff_patch.cli import main

sys.exit(main())
