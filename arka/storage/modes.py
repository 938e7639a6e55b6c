"""The modes of what a data directory, a warehouse and a catalog hold already.

Owns: which of them others can open that should not, and one line for the operator. Changes nothing: what exists may be
open on purpose. Does not own the modes of what is new (``arka.privacy``).
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import structlog

log = structlog.get_logger(__name__)

#: Names at the top of a data directory that are nobody else's business, whatever is shared.
_PRIVATE: Final = (
    "wal", "objects", "keyindex", "spill", "checkpoints", "attempts", "lock", "server.json", "disk-id",
    "warehouse.json", "backup.hold",
)  # fmt: skip
_CATALOG: Final = ("", "-wal", "-shm", "-journal")
#: Files and folders looked at below one name: a start must not wait for a large warehouse.
_LOOKS: Final = 200
#: Paths that one line names.
_NAMED: Final = 4
#: Rights of others in the order of how bad they are.
_SEVERITY: Final = (stat.S_IWOTH, stat.S_IWGRP, stat.S_IROTH, stat.S_IXOTH, stat.S_IRGRP, stat.S_IXGRP)


class OpenPaths(NamedTuple):
    """What others can open.

    Attributes:
        worst: some of the paths with their modes, the worst first.
        more: how many more were found.
        command: a shell command that closes them.
    """

    worst: tuple[str, ...]
    more: int
    command: str


class Places(NamedTuple):
    """Where a server's files lie.

    Attributes:
        data_dir: the data directory.
        objects: the folder of a local object store, or None.
        warehouse: a local warehouse's folder, or None.
        catalog: the file of an SQLite catalog, or None.
    """

    data_dir: Path
    objects: Path | None
    warehouse: Path | None
    catalog: Path | None


def warn_of_modes(places: Places, group: int | None) -> None:
    """Log what others can open that should not, and what a shared group cannot read that it should.

    Args:
        places: where to look.
        group: the group that may read the warehouse and the catalog, or None.
    """
    found = find_open(places, group)
    if found is not None:
        log.warning(
            "data_dir.open_modes", paths=", ".join(found.worst), more=found.more, hint=f"close them: {found.command}"
        )
    closed = None if group is None else find_closed(places, group)
    if closed is not None:
        path = shlex.quote(str(closed))
        rights = "g=x" if closed == places.data_dir else "g+rX"
        log.warning(
            "data_dir.not_shared",
            path=str(closed),
            hint=f"it was made before server.shared_group was set: chgrp -R {group} {path} && chmod -R {rights} {path}"
            if closed != places.data_dir
            else f"the group cannot pass: chgrp {group} {path} && chmod {rights},g+s {path}",
        )


def find_open(places: Places, group: int | None) -> OpenPaths | None:
    """Find what others than the owner can open; None if nothing is.

    Args:
        places: where to look.
        group: the group that may read the warehouse and the catalog, or None.

    Returns:
        A bounded look: below each name the first entries alone.
    """
    data_dir = places.data_dir
    found: list[tuple[int, Path, int]] = []
    #: What to close, and whether the group keeps its rights.
    tops: dict[Path, bool] = {}

    def look(top: Path, group: int | None) -> None:
        for path, mode, owner in _below(top):
            rights = mode & 0o077
            if owner == group:
                rights &= ~(stat.S_IRGRP | stat.S_IXGRP)
            if rights:
                found.append((_severity(rights), path, mode))
                tops[top] = group is not None

    for path in dict.fromkeys([*(data_dir / name for name in _PRIVATE), places.objects]):
        if path is not None:
            look(path, None)
    if places.warehouse is not None:
        look(places.warehouse, group)
    for suffix in _CATALOG if places.catalog is not None else ():
        look(Path(f"{places.catalog}{suffix}"), group)
    # Whoever may write to the directory itself replaces what lies in it; its names alone are no secret.
    for path, mode, _ in _entry(data_dir):
        if mode & 0o022:
            found.append((_severity(mode & 0o022), path, mode))
            tops[data_dir] = False
    if not found:
        return None
    found.sort(key=lambda entry: (entry[0], len(entry[1].parts), str(entry[1])))
    worst = tuple(f"{path} ({stat.filemode(mode)})" for _, path, mode in found[:_NAMED])
    return OpenPaths(worst, len(found) - len(worst), _closing(tops, data_dir))


def find_closed(places: Places, group: int) -> Path | None:
    """Return the first folder or file that the group is to be let into and cannot enter or read, or None."""
    shared = [path for path in (places.warehouse, places.catalog) if path is not None]
    above = [places.data_dir] if any(path.is_relative_to(places.data_dir) for path in shared) else []
    for path in (*above, *shared):
        for _, mode, owner in _entry(path):
            wanted = stat.S_IXGRP if stat.S_ISDIR(mode) else stat.S_IRGRP
            if owner != group or not mode & wanted:
                return path
    return None


def _closing(tops: dict[Path, bool], data_dir: Path) -> str:
    commands = []
    for rights, shared in (("go=", False), ("g-w,o=", True)):
        below = sorted(shlex.quote(str(top)) for top, kept in tops.items() if top != data_dir and kept == shared)
        if below:
            commands.append(f"chmod -R {rights} {' '.join(below)}")
    if data_dir in tops:
        commands.append(f"chmod go-w {shlex.quote(str(data_dir))}")
    return " && ".join(commands)


def _severity(rights: int) -> int:
    return next(place for place, bit in enumerate(_SEVERITY) if rights & bit)


def _entry(path: Path) -> Iterator[tuple[Path, int, int]]:
    """Yield a path with its mode and group, those of what a link leads to; nothing where that cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return
    yield path, status.st_mode, status.st_gid


def _below(top: Path) -> Iterator[tuple[Path, int, int]]:
    """Yield a path and the first entries below it."""
    looks = 0
    folders = [top]
    for entry in _entry(top):
        yield entry
        if not stat.S_ISDIR(entry[1]):
            return
    while folders and looks < _LOOKS:
        try:
            with os.scandir(folders.pop()) as names:
                for name in names:
                    looks += 1
                    if name.is_symlink():
                        continue
                    for entry in _entry(Path(name.path)):
                        yield entry
                        if stat.S_ISDIR(entry[1]):
                            folders.append(entry[0])
                    if looks >= _LOOKS:
                        break
        except OSError:
            continue


__all__ = ["OpenPaths", "find_closed", "find_open"]
