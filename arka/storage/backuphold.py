"""The lock by which a backup keeps a running server from letting go of what it copies (R38).

Owns: the file of the lock, and for how long it is heeded. Does not own the copy (``arka.storage.backup``) nor what the
log lets go of (``arka.tiers.release``).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog

from arka.privacy import private_opener

log = structlog.get_logger(__name__)

#: Locked while a backup is made.
_HOLD_FILE: Final = "backup.hold"
#: How long the server heeds one backup, and how long a backup waits for the server's next look, in seconds.
_HOLD_S: Final = 3600.0
_HOLD_WAIT_S: Final = 2.5


@contextmanager
def hold(data_dir: Path) -> Iterator[None]:
    """Have the server keep what it would let go of, for as long as this process is in the block.

    The lock ends with the process, however it ends. Without leave to write there the copy is made all the same.
    """
    try:
        file = open(data_dir / _HOLD_FILE, "ab", opener=private_opener)  # noqa: SIM115 (closed below)
    except OSError as error:
        log.warning("backup.not_held", reason=str(error))
        yield
        return
    with file:
        if os.geteuid() == 0:
            # The server, which may be another user's, has to open it.
            owner = data_dir.stat()
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(file.fileno())
        # Its next look is a second away, and what it has begun takes a moment.
        time.sleep(_HOLD_WAIT_S)
        yield


def is_held(data_dir: Path) -> bool:
    """Whether a backup is being made: the log lets go of nothing meanwhile (R38).

    One that takes longer than ``_HOLD_S`` is not waited for: the log would fill the disk.
    """
    try:
        with (data_dir / _HOLD_FILE).open("rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _HOLD_S:
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        return False
    return False


__all__ = ["hold", "is_held"]
