"""File modes: what Arka makes is private to its user; warehouse and catalog may be opened to one group.

Owns: the modes of new files and folders, and the group of this process's shared ones. Does not own what lies where, nor
the modes of what exists already (``arka.storage.modes`` reports those).

The call that makes a file or folder makes it private: at no moment can others open it. What is shared is opened after
it was made. Libraries that make files by themselves, such as SQLite, make private ones because of the umask.
"""

from __future__ import annotations

import errno
import grp
import os
from pathlib import Path
from typing import Final

from arka.errors import ConfigurationError

#: What ``umask`` takes from the modes of files that libraries make.
PRIVATE_MASK: Final = 0o077
FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700
SHARED_FILE_MODE: Final = 0o640
#: Files below inherit the group, also those that SQLite makes.
SHARED_FOLDER_MODE: Final = 0o2750
#: A folder through which the group passes to shared files, without a list of its names.
PASSAGE_MODE: Final = 0o2710

#: The group that may read the warehouse and the catalog; None: nobody else may.
_group: int | None = None


def keep_private() -> None:
    """Take every right of others from the files that this process will make, whatever its umask was."""
    os.umask(PRIVATE_MASK)


def find_group(name: str) -> int | None:
    """Return the id of the group that a setting names; None for an empty name.

    Args:
        name: a group's name or number.

    Raises:
        ConfigurationError: there is no such group, or this process cannot give files to it.
    """
    if not name:
        return None
    try:
        found = int(name) if name.isascii() and name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigurationError(f"server.shared_group = {name!r}: this machine has no such group") from None
    if os.geteuid() != 0 and found not in {os.getegid(), *os.getgroups()}:
        raise ConfigurationError(
            f"server.shared_group = {name!r}: the server's user is not a member, so it cannot give files to the group"
        )
    return found


def share_with(group: int | None) -> None:
    """Choose the group that may read what this process shares from now on; None: nobody else may."""
    global _group
    _group = group


def shared_group() -> int | None:
    """Return the group that this process shares with; None: nobody else may read anything."""
    return _group


def make_folder(path: str | Path) -> bool:
    """Make one private folder; returns False if it is there already.

    Raises:
        OSError: as ``os.mkdir``, but for a folder that is there.
    """
    try:
        os.mkdir(path, FOLDER_MODE)
    except FileExistsError:
        return False
    return True


def make_folders(path: str | Path) -> None:
    """Make a private folder and its missing parents, which are private too.

    Raises:
        OSError: one of them cannot be made, or is not a folder.
    """
    path = Path(path)
    if path.is_dir():
        return
    if path.parent != path:
        make_folders(path.parent)
    if not make_folder(path) and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def private_opener(path: str, flags: int) -> int:
    """Open a file for ``open(..., opener=private_opener)``; one that is made is private."""
    return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)


def make_file(path: str | Path) -> None:
    """Make an empty private file, or empty the one that is there, for a library that opens files by itself.

    Raises:
        OSError: it cannot be made.
    """
    os.close(private_opener(os.fspath(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC))


def share_file(descriptor: int) -> None:
    """Let the group read a file that this process has made; does nothing where there is no group."""
    if _group is not None:
        os.fchown(descriptor, -1, _group)
        os.fchmod(descriptor, SHARED_FILE_MODE)


def share_folder(path: str | Path, *, passage: bool = False) -> None:
    """Let the group into a folder that this process has made; does nothing where there is no group.

    Args:
        path: the folder.
        passage: the group may pass, and may not list its names.
    """
    if _group is not None:
        os.chown(path, -1, _group)
        os.chmod(path, PASSAGE_MODE if passage else SHARED_FOLDER_MODE)


__all__ = [
    "FILE_MODE",
    "FOLDER_MODE",
    "PASSAGE_MODE",
    "PRIVATE_MASK",
    "SHARED_FILE_MODE",
    "SHARED_FOLDER_MODE",
    "find_group",
    "keep_private",
    "make_file",
    "make_folder",
    "make_folders",
    "private_opener",
    "share_file",
    "share_folder",
    "share_with",
    "shared_group",
]
