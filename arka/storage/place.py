"""Whether a data directory lies where its warehouse and its catalog say that it lies (R29).

Owns: the refusal of a directory that was moved or copied, and the order of ``--adopt-warehouse``. Does not own what is
written then (``arka.iceberg.adopt``) nor the marker's form (``arka.storage.warehouse``).

Paths stand in Iceberg's metadata. A copy that was started would write to the original's tables and delete their files.
So nothing starts whose marker names another real path. Nothing is changed before that is settled.

Where the warehouse lies elsewhere no path of it changes with the directory's. There a directory remembers its own real
path, and does not start at another one while the directory that it was copied from is still there. Whatever a copy does
that this cannot see, on another machine or in another container, ``arka.lineage`` tells by the tables' marks.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import structlog

from arka.errors import ConfigurationError
from arka.iceberg.config import JOINED_FILE, MARKER_FILE, CatalogConfig
from arka.storage.catalogfile import read_pointers
from arka.storage.ports import CatalogUnavailable, Disk
from arka.storage.warehouse import Marker, holds, local_root, read_marker_file, write_file, write_joined
from arka.wal.logstate import LogState

log = structlog.get_logger(__name__)

#: ``<namespace>/<table>/metadata/<file>``: the part of a metadata file's path that a warehouse gives it.
_TABLE_PARTS = 4
#: Files of a data directory that are changed where they lie; all others are created once, or replaced.
_CHANGED_IN_PLACE = ("wal/log", "wal/sealed", "catalog.db")


@dataclass(frozen=True, slots=True)
class Moved:
    """A data directory that is not where its warehouse says.

    Attributes:
        old_dir: the real path that it had; empty if only its warehouse's old path is known.
        old_url: how paths in its tables begin.
        is_copy: the old place holds the same warehouse still.
    """

    old_dir: str
    old_url: str
    is_copy: bool


def find_move(config: CatalogConfig, data_dir: Path) -> Moved | None:
    """Say whether a data directory that holds its warehouse was moved or copied; reads only.

    Raises:
        ConfigurationError: its marker cannot be read.
    """
    root = local_root(config.warehouse)
    if root is None or config.is_rest or not holds(data_dir, root):
        return None
    try:
        marker = read_marker_file(root)
    except CatalogUnavailable as error:
        raise ConfigurationError(f"{error}: restore it from a backup of the warehouse") from error
    if marker is None:
        return _find_unmarked(config, data_dir, root)
    if not marker.data_dir or marker.data_dir == os.path.realpath(data_dir):
        return None
    old_root = local_root(marker.url) or Path(marker.data_dir, "warehouse")
    return Moved(marker.data_dir, marker.url, _is_same_elsewhere(old_root / MARKER_FILE, root / MARKER_FILE))


def _find_unmarked(config: CatalogConfig, data_dir: Path, root: Path) -> Moved | None:
    """Look at the pointers of an embedded catalog from before there were markers."""
    for location in _pointers(config, data_dir):
        if location.startswith(config.warehouse + "/"):
            continue
        parts = location.split("/")
        here = root.joinpath(*parts[-_TABLE_PARTS:])
        if not here.exists():
            # A table that lies elsewhere by somebody's will.
            continue
        old_url = "/".join(parts[:-_TABLE_PARTS])
        old_root = local_root(old_url)
        inside = Path(os.path.realpath(root)).relative_to(os.path.realpath(data_dir))
        old_dir = "" if old_root is None else str(old_root).removesuffix(f"/{inside}")
        there = local_root(location)
        return Moved(old_dir, old_url, there is not None and _is_same_elsewhere(there, here))
    return None


def _catalog_file(config: CatalogConfig) -> Path | None:
    if not config.uri.startswith("sqlite:"):
        return None
    path = unquote(urlsplit(config.uri).path)
    return Path(path.removeprefix("/")) if path else None


def _pointers(config: CatalogConfig, data_dir: Path) -> list[str]:
    """The metadata files that an embedded SQLite catalog names; none for any other catalog."""
    return [location for _, location in _named_pointers(config, data_dir)]


def _named_pointers(config: CatalogConfig, data_dir: Path) -> list[tuple[str, str]]:
    """The tables that an embedded SQLite catalog names, each with its metadata file."""
    file = _catalog_file(config)
    if file is None or not holds(data_dir, file) or not file.exists():
        return []
    try:
        return read_pointers(file)
    except sqlite3.Error as error:
        raise ConfigurationError(f"the catalog {file} cannot be read ({error}), so that nothing was changed") from error


def _is_same_elsewhere(there: Path, here: Path) -> bool:
    """Whether a file with the same bytes is in two folders; a hard link in another folder is a copy too."""
    try:
        return not os.path.samefile(there.parent, here.parent) and there.read_bytes() == here.read_bytes()
    except OSError:
        return False


def _check_no_links(old_dir: str, data_dir: Path) -> None:
    """Refuse a copy that was made of hard links: both would write into the same files, whatever else is settled.

    Raises:
        ConfigurationError: a file that is changed in its place is one file in both directories.
    """
    for name in _CHANGED_IN_PLACE:
        with suppress(OSError):
            if os.path.samefile(Path(old_dir, name), data_dir / name):
                raise ConfigurationError(
                    f"{data_dir / name} and {Path(old_dir, name)} are one file: {data_dir} is a copy that was made of "
                    "hard links, and both directories would write into it. Nothing was changed. Remove it, and copy "
                    "with `cp -a`"
                )


async def settle_place(
    config: CatalogConfig,
    data_dir: Path,
    disk: Disk,
    wal_dir: Path,
    adopt: Callable[[str, str, tuple[tuple[str, str], ...]], Awaitable[list[str]]],
    *,
    adopting: bool,
    take_over: bool,
) -> None:
    """See to it that a data directory lies where its warehouse says; to be called before anything else is opened.

    Args:
        config: the warehouse and the catalog.
        data_dir: the data directory.
        disk: where the log lies.
        wal_dir: the log's folder.
        adopt: rewrites the tables' paths from one URL to another, of tables beside the warehouse by further pairs of
            them; see ``arka.iceberg.adopt.Move``.
        adopting: ``--adopt-warehouse`` was given.
        take_over: ``--take-over`` was given.

    Raises:
        ConfigurationError: it was moved or copied and is not to be adopted; or it cannot be.

    Durability: with a return, what is said of the place is durable. A crash before changes nothing that counts.
    """
    moved = find_move(config, data_dir)
    if moved is None:
        if _is_taken_over(config, data_dir, take_over=take_over):
            await _take_block(disk, wal_dir)
        _remember_place(data_dir)
        return
    if moved.is_copy and moved.old_dir:
        _check_no_links(moved.old_dir, data_dir)
    new_dir = _real(data_dir)
    old = moved.old_dir or moved.old_url
    if not adopting:
        raise ConfigurationError(_refusal(old, new_dir, config, moved))
    if moved.is_copy and not take_over:
        raise ConfigurationError(
            f"{old} still holds the warehouse of this data directory, so {new_dir} is a copy of it: with --take-over "
            "beside --adopt-warehouse the copy becomes a log of its own, with LSNs of a block of its own. Nothing in "
            f"{old} is changed. To go on with the original, start {old} instead"
        )
    if moved.is_copy:
        _check_own_tables(config, data_dir, moved)
    log.warning("warehouse.adopting", before=old, now=new_dir, copy=moved.is_copy)
    await _take_block(disk, wal_dir)
    names = await adopt(moved.old_url, config.warehouse, _beside(config, data_dir, moved))
    root = local_root(config.warehouse)
    assert root is not None
    before = read_marker_file(root)
    if before is not None:
        marker = Marker(before.uuid, new_dir, config.warehouse)
        write_joined(config, data_dir, marker.uuid, marked=True)
        write_file(root / MARKER_FILE, marker.to_bytes(), replace=True, shared=True)
    log.warning("warehouse.adopted", before=old, now=new_dir, tables=names)


def _real(data_dir: Path) -> str:
    return os.path.realpath(data_dir)


def _refusal(old: str, new_dir: str, config: CatalogConfig, moved: Moved) -> str:
    how = "copied" if moved.is_copy else "moved or copied"
    flags = "--adopt-warehouse --take-over" if moved.is_copy else "--adopt-warehouse"
    back = f"start {old} instead" if moved.is_copy else f"move it back to {old}"
    return (
        f"The warehouse {config.warehouse} belongs to the data directory {old}, and this one is {new_dir}: it was "
        f"{how}, and the paths in its tables lead to {moved.old_url}. Nothing was changed. Either {back}, or start "
        f"with {flags}, which writes the paths of all tables in {new_dir} again"
        + (f" and leaves {old} as it is" if moved.is_copy else "")
    )


def _beside(config: CatalogConfig, data_dir: Path, moved: Moved) -> tuple[tuple[str, str], ...]:
    """How paths beside the warehouse begin, in the old data directory and in this one; its tables move with it."""
    pairs = []
    root = local_root(config.warehouse)
    assert root is not None
    inside = os.path.relpath(os.path.realpath(root), _real(data_dir))
    if moved.old_url.endswith(f"/{inside}") and config.warehouse.endswith(f"/{inside}"):
        # As the directory was spelled, links in its path included.
        pairs.append((moved.old_url.removesuffix(f"/{inside}"), config.warehouse.removesuffix(f"/{inside}")))
    if moved.old_dir:
        pairs.append((f"file://{moved.old_dir}", f"file://{_real(data_dir)}"))
    return tuple(dict.fromkeys(pairs))


def _check_own_tables(config: CatalogConfig, data_dir: Path, moved: Moved) -> None:
    """Refuse to adopt a copy that would share tables with its original even then.

    Raises:
        ConfigurationError: the catalog is the original's too, or both catalogs would name the same tables.
    """
    file = _catalog_file(config)
    if file is None or not holds(data_dir, file):
        raise ConfigurationError(
            f"{data_dir} is a copy of {moved.old_dir or moved.old_url}, and both have one catalog: its tables cannot "
            "lie in two places. Nothing was changed. Give the copy a catalog of its own, or remove the original"
        )
    own = tuple(f"{old}/" for old in (moved.old_url, *(old for old, _ in _beside(config, data_dir, moved))))
    shared = [name for name, location in _named_pointers(config, data_dir) if not location.startswith(own)]
    if shared:
        raise ConfigurationError(
            f"{', '.join(sorted(shared))} lie outside of {moved.old_dir or moved.old_url}, so that the original's "
            "catalog and the copy's would name the same files: each server would delete files of the other's. Nothing "
            "was changed. Remove these tables from one of the two catalogs first, without their files"
        )


def _read_joined(data_dir: Path) -> dict[str, object]:
    try:
        joined = json.loads((data_dir / JOINED_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return joined if isinstance(joined, dict) else {}


def _is_taken_over(config: CatalogConfig, data_dir: Path, *, take_over: bool) -> bool:
    """Refuse a copy whose tables are its original's too; returns whether it may be one that goes on all the same.

    Raises:
        ConfigurationError: the original is there.
    """
    old, new = str(_read_joined(data_dir).get("data_dir", "")), _real(data_dir)
    if not old or old == new or not _is_same_elsewhere(Path(old, "disk-id"), data_dir / "disk-id"):
        return False
    _check_no_links(old, data_dir)
    if not take_over:
        raise ConfigurationError(
            f"The data directory {new} is a copy of {old}, which is still there. Both would write to the same tables, "
            f"of the warehouse {config.warehouse}, and one would delete the other's files. Nothing was changed. Either "
            f"start {old} instead, or, if that one is never started again, start this one with --take-over"
        )
    log.warning("place.taken_over", before=old, now=new)
    return True


def _remember_place(data_dir: Path) -> None:
    """Record where the data directory lies, for the start of a copy."""
    joined, new = _read_joined(data_dir), _real(data_dir)
    if joined.get("data_dir") != new:
        data = json.dumps({**joined, "data_dir": new}, indent=1).encode() + b"\n"
        write_file(data_dir / JOINED_FILE, data, replace=True)


async def _take_block(disk: Disk, wal_dir: Path) -> None:
    """Give up what is left of the log's reserved LSNs: the next start takes a block that nobody gave any of (R2)."""
    state = await LogState.read(wal_dir, disk)
    if state is not None and state.lsn_ceiling < state.store_ceiling:
        await replace(state, lsn_ceiling=state.store_ceiling).write(wal_dir, disk)


__all__ = ["Moved", "find_move", "settle_place"]
