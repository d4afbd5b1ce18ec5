"""Run by ../test_project.py; ENGINE and TAG are in the environment."""

import os
import sys

import puff_patch

puff_patch.patch_all()

from django.core.management import execute_from_command_line  # noqa: E402

os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
execute_from_command_line(sys.argv)
