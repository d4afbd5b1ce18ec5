"""Where the servers listen: unix sockets in a private directory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path

from puff_patch.embedded.account import Account, let_pass, user_name
from puff_patch.embedded.errors import EmbeddedError

POSTGRES_SOCKET = ".s.PGSQL.5432"
REDIS_SOCKET = "redis.sock"
# sun_path holds 108 bytes on Linux and 104 on BSD and macOS, a final NUL included.
_PATH_LIMIT = 103


def socket_dir(data_dir: Path, account: Account | None) -> Path:
    """A private directory for the sockets: in the data directory, or, if that makes too long a path, elsewhere.

    Args:
        data_dir: the resolved data directory, which exists.
        account: whom the servers run as.

    Raises:
        EmbeddedError: something else is in its place.
    """
    longest = max(len(POSTGRES_SOCKET), len(REDIS_SOCKET)) + 1
    path = data_dir / "run"
    # libpq takes a comma for the end of one host and the start of the next.
    if len(os.fsencode(path)) + longest > _PATH_LIMIT or "," in str(path):
        # The inode too: a removed and newly made directory must not meet the servers of the old one.
        name = hashlib.sha256(f"{data_dir}:{data_dir.stat().st_ino}".encode()).hexdigest()[:12]
        base = tempfile.gettempdir()
        if len(os.fsencode(base)) > 40 or "," in base:
            base = "/tmp"
        path = Path(base, f"puff-{os.geteuid()}-{name}")
    uid, gid = (account.uid, account.gid) if account else (os.geteuid(), -1)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        if account:
            os.chown(path, uid, gid, follow_symlinks=False)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        raise EmbeddedError(
            f"{path}, the directory for the sockets, must be a directory of user {user_name(uid)} with mode 700. "
            f"Remove it, or use a data directory with a short path (PUFF_DATA_DIR)."
        )
    let_pass(account, path)
    return path
