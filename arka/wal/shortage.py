"""Running short is not failing: which errors of the disk mean that something lacks for now (R31).

Owns: the list of such errors. Does not own what waits nor for how long.

A failed write or fsync of the log poisons it, since nobody knows what is on the disk. A file that could not be opened
or made for lack of descriptors, memory or room has written nothing: the caller tries again.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Not enough descriptors: an open failed, and nothing else can have happened.
DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE})
#: What may be enough a moment later.
SHORTAGES: Final = DESCRIPTORS | {errno.ENOMEM, errno.ENOSPC, errno.EDQUOT}

#: Pause before another attempt, in seconds.
RETRY_S: Final = 0.2


class Shortage(OSError):
    """Something lacks for now, and nothing was written: the same call may be made again."""


def is_shortage(error: BaseException) -> bool:
    """Say whether an error of opening or making a file passes by itself."""
    return isinstance(error, OSError) and error.errno in SHORTAGES


@contextmanager
def short_of(numbers: frozenset[int] = SHORTAGES) -> Iterator[None]:
    """Turn errors with these numbers into ``Shortage``. Only around calls that write nothing.

    Raises:
        Shortage: one of them.
        OSError: any other.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise
        raise Shortage(error.errno, error.strerror, error.filename) from error


__all__ = ["DESCRIPTORS", "RETRY_S", "SHORTAGES", "Shortage", "is_shortage", "short_of"]
