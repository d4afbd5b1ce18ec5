"""What everything else runs on: greenlets that are kept warm, and the way into a hub from other threads."""

from puff_patch.runtime.greenlets import WarmPool
from puff_patch.runtime.mailbox import Mailbox

__all__ = ["Mailbox", "WarmPool"]
