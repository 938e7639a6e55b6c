"""A copy of an embedded data directory, made while its server may be running, and its first start (R2, R38).

Owns: in which order what is copied, when a copy is consistent, and the LSNs that a restored one begins at. Does not own
the formats of what it copies, nor where a data directory may lie (``arka.storage.place``).

A copy must be a state that a crash could have left: then an ordinary start brings it up. Files are created once and
not changed, but for the catalog, the seal mark, the log's state and the last segment. So the order does it:

1. The catalog, by SQLite's own backup. What it names was written before.
2. The warehouse. Superseded metadata files, manifests and manifest lists stay for ten minutes (R30), so what the
   catalog names is all there, if this takes less.
3. The object store. A commit holds only what the store has (R4), so the store's copy has at least what the catalog's
   has. WAL objects are listed twice: below the highest of the first listing, the second lacks none that was acked.
4. The log, last: only what the disk has is uploaded (R4), so it reaches as far as the store's copy, keys included. Of
   the segments the newest comes first, so that none has a successor in the copy without having its footer. Of a
   segment that is written to, the intact frames are copied. The seal mark must be the same before and after.

In between nothing may be let go of (R12): rows that the catalog's copy lacks must still be in the log's. So an attempt
counts only if no segment, checkpoint or object went, no checkpoint was added, and the epoch is the same. Else there is
another one, which copies only what is new. In the end the copy's log is judged as a start would judge it.

Rows that had no more than a memory ack when the log was copied may be missing. Indexes of keys, spill files and
journals of attempts are not copied: the first are made again, and the others are of the running process.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID

import structlog

from arka._core.framing import KIND_FOOTER
from arka._core.lsn import LSN_END
from arka.errors import ArkaError, ConfigurationError, Unavailable
from arka.iceberg.config import JOINED_FILE, CatalogConfig
from arka.options import IcebergOptions
from arka.privacy import make_file, make_folder, make_folders
from arka.storage.backuphold import hold
from arka.storage.catalogfile import open_catalog_file, read_pointers
from arka.storage.filecopy import FileCopies, copy_file, files_below, sync_file, write_whole
from arka.storage.ports import Disk
from arka.wal.committed import COMMITTED_NAME
from arka.wal.dump import verify_log
from arka.wal.logstate import STATE_NAME, LogState, newest_slot, read_slots
from arka.wal.seal import SEAL_NAME, read_seal, write_seal
from arka.wal.segment import HEADER_BYTES, SegmentHeader
from arka.wal.walk import FoundFrame, list_segments, walk_frames

log = structlog.get_logger(__name__)

#: The file in a copy that says when it was made; the first start of a restored copy removes it.
BACKUP_FILE: Final = "backup.json"

#: Attempts at a consistent copy. All but the first copy only what is new.
_ATTEMPTS: Final = 50
#: Attempts at the log alone, within one of those.
_LOG_ATTEMPTS: Final = 50
#: LSNs that a restored copy leaves out, of 2**53: 16 starts on an empty disk, or 4096 restarts after a crash.
_LEFT_OUT: Final = 2**36
#: And so many for each microsecond since the backup, as nearly four such restarts in each second take: also what two
#: restores of one backup are apart by. A day costs 0.06 % of all LSNs, a year 22 %.
_LEFT_OUT_PER_US: Final = 64
#: An attempt that takes longer may lack files whose grace of ten minutes is over, in seconds.
_ATTEMPT_S: Final = 540.0
#: Segments at the log's end that may still be written to: the active one and the one before it.
_UNSETTLED: Final = 2
#: What the object store's folder holds of a running process only.
_STAGING: Final = ".staging"
_BEATS: Final = "heartbeat"


@dataclass(frozen=True, slots=True)
class BackedUp:
    """A finished copy.

    Attributes:
        files: how many it has.
        bytes: in all of them.
        through_lsn: the last LSN that its log holds; 0 for none.
        attempts: how often it was begun.
        outside: tables that lie outside of the data directory; their files are not in the copy.
    """

    files: int
    bytes: int
    through_lsn: int
    attempts: int
    outside: tuple[str, ...]


class _Held(NamedTuple):
    """What the log holds on to.

    Attributes:
        epoch: of its last start.
        oldest: number of its oldest segment; 0 for none.
        objects: what the object store has, by its key.
        checkpoints: those of them that are checkpoints.
    """

    epoch: int
    oldest: int
    objects: frozenset[str]
    checkpoints: frozenset[str]


class _Again(Exception):
    """Why an attempt does not count."""


def back_up(data_dir: Path, out: Path, disk: Disk) -> BackedUp:
    """Copy a data directory whose catalog, warehouse and object store all lie in it. Blocking.

    Args:
        data_dir: the data directory; its server may be running, and may be written to.
        out: the copy; must not exist. It is made as ``<out>.partial`` and renamed in the end.
        disk: the file system of both.

    Raises:
        ConfigurationError: there is nothing to copy, a part of it lies elsewhere, or ``out`` cannot be used.
        Unavailable: the server let go of parts of the log during every attempt.
        OSError: the disk failed.

    Durability: everything is fsynced on return.
    """
    data_dir, out = data_dir.absolute(), out.absolute()
    _check_embedded(data_dir, disk)
    staged = out.with_name(f"{out.name}.partial")
    for path in (out, staged):
        if path.exists():
            raise ConfigurationError(f"{path} exists already: choose a new folder, or remove it")
    if out.resolve().is_relative_to(data_dir.resolve()):
        raise ConfigurationError(f"{out} lies in the data directory itself: choose a folder elsewhere")
    make_folders(staged)
    copy = _Copy(data_dir, staged, disk)
    reason = ""
    with hold(data_dir):
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                taken_us, through_lsn = copy.attempt()
            except _Again as error:
                reason = str(error)
                log.info("backup.again", attempt=attempt, reason=reason)
                continue
            break
        else:
            raise Unavailable(f"No attempt of {_ATTEMPTS} led to a consistent copy; the last one: {reason}")
    about = {"version": 1, "data_dir": os.path.realpath(data_dir), "taken_us": taken_us, "through_lsn": through_lsn}
    write_whole(staged / BACKUP_FILE, json.dumps(about, indent=1).encode() + b"\n")
    files = [path for path in staged.rglob("*") if path.is_file()]
    for folder in [staged, *(path for path in staged.rglob("*") if path.is_dir())]:
        disk.sync_directory(folder)
    staged.rename(out)
    disk.sync_directory(out.parent)
    size = sum(path.stat().st_blocks * 512 for path in (out / path.relative_to(staged) for path in files))
    return BackedUp(len(files), size, through_lsn, attempt, copy.outside)


async def settle_restored(
    data_dir: Path, disk: Disk, wal_dir: Path, skip_epochs: Callable[[UUID, int], Awaitable[None]]
) -> None:
    """Let a restored copy begin at LSNs and epochs that nobody has given, before anything else is used (R2, R38).

    The original may have gone on after the copy was made, and the same copy may have been restored before. Both gave
    LSNs from what the copy knew as reserved, or from blocks after it. Writes take less than one in a microsecond, but a
    restart after a crash leaves out 2**24 and a start on an empty disk 2**32. So a restored copy begins above all that
    it knows by ``_LEFT_OUT`` and ``_LEFT_OUT_PER_US`` for each microsecond since.

    So it is with epochs, of which no disk takes two in a second. An epoch that both had would let ``arka wal salvage
    --resubmit`` take the copy's commits for those of the log that is salvaged, and leave out its writes.

    What it knew of tables without writers holds no more: they may have been written to since (R37). Nor is its log
    known to be whole, although the original had closed it: LSNs may have been given since, and are lost (R3).

    Args:
        data_dir: the data directory.
        disk: the file system.
        wal_dir: the log's folder.
        skip_epochs: records in the object store that epochs through this one are taken.

    Raises:
        ConfigurationError: the file that says so cannot be read, or names a moment that is still to come.
        OSError: the disk failed.

    Durability: the LSNs are on the disk on return. A crash before makes the next start do it again.
    """
    path = data_dir / BACKUP_FILE
    try:
        taken_us = int(json.loads(path.read_bytes())["taken_us"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): copy it from the backup again") from error
    state = await LogState.read(wal_dir, disk)
    if state is not None:
        passed_us = time.time_ns() // 1000 - taken_us
        if passed_us < 0:
            raise ConfigurationError(
                f"{path} says that the backup was made {-passed_us // 1_000_000 + 1} s from now: the time since then "
                "decides at which LSN its log goes on. Set the clock, or start when that time has come"
            )
        first_lsn = min(state.store_ceiling + _LEFT_OUT + _LEFT_OUT_PER_US * passed_us, LSN_END)
        epoch = state.epoch + passed_us // 1_000_000 + 1
        # The store first: a disk that knows of an epoch which its store lacks is refused.
        await skip_epochs(state.log_uuid, epoch)
        await replace(state, epoch=epoch, lsn_ceiling=first_lsn, store_ceiling=first_lsn, birth=0).write(wal_dir, disk)
        seal = read_seal(disk, wal_dir)
        if seal is not None and seal.closed:
            write_seal(disk, wal_dir, replace(seal, closed=False))
        log.warning("log.backup_restored", age_s=passed_us // 1_000_000, epoch=epoch, first_lsn=first_lsn)
    disk.remove(path)
    disk.sync_directory(data_dir)


def _check_embedded(data_dir: Path, disk: Disk) -> None:
    """Refuse a directory that is none, or of which a part lies elsewhere.

    Raises:
        ConfigurationError: see above.
    """
    state = newest_slot(read_slots(data_dir / "wal", disk) or [])
    if state is None or not state.started_epoch:
        raise ConfigurationError(f"{data_dir} is no data directory of a server that has served: there is no log in it")
    if (data_dir / BACKUP_FILE).exists():
        raise ConfigurationError(f"{data_dir} is a backup that was not started since: copy it with cp -a")
    config = CatalogConfig.from_options(IcebergOptions(), data_dir, {})
    joined: object = None
    with suppress(OSError, ValueError):
        joined = json.loads((data_dir / JOINED_FILE).read_bytes())
    if not isinstance(joined, dict):
        joined = {}
    elsewhere: list[str] = []
    missing: list[str] = []
    catalog, warehouse = joined.get("catalog", config.catalog_digest), joined.get("url", config.warehouse)
    for name, there, known in (
        ("the catalog", (data_dir / "catalog.db").is_file(), catalog == config.catalog_digest),
        ("the warehouse", (data_dir / "warehouse").is_dir(), warehouse == config.warehouse),
        ("the object store", any((data_dir / "objects").glob(f"*/epoch/{state.epoch:010d}")), True),
    ):
        if there and known:
            continue
        # A server that joined no warehouse was stopped within its first start.
        (missing if known and not joined else elsewhere).append(name)
    if missing and not elsewhere:
        raise ConfigurationError(
            f"{' and '.join(missing)} of {data_dir} {'is' if len(missing) == 1 else 'are'} not there: its server was "
            "stopped before it had made them, or they lie elsewhere. Start it, wait until it is ready, and try again"
        )
    if elsewhere or missing:
        raise ConfigurationError(
            f"{' and '.join(elsewhere + missing)} of {data_dir} lie elsewhere: a backup is of a data directory that "
            "holds all three. With a store outside, an empty data directory brings back what was acknowledged "
            "object_storage"
        )


class _Copy:
    """One copy and its attempts. Blocking."""

    def __init__(self, source: Path, target: Path, disk: Disk) -> None:
        self._source = source
        self._target = target
        self._disk = disk
        # Numbers of segments whose copy has their footer: they do not change.
        self._settled: set[int] = set()
        self._copies = FileCopies(target)
        # Files that a table needed and an earlier attempt did not find. A file that is gone does not come back.
        self._lacked: set[str] = set()
        self.outside: tuple[str, ...] = ()

    def attempt(self) -> tuple[int, int]:
        """Copy what is new, and check that it fits together.

        Returns:
            When the log's state was read, in microseconds since the Unix epoch, and the last LSN of the copy.

        Raises:
            _Again: it does not.
        """
        began = time.monotonic()
        taken_us = time.time_ns() // 1000
        before = self._held()
        make_folder(self._target / "wal")
        # Before the catalog: no table of the copy stands below what its log says was committed (R20).
        for name in ("disk-id", JOINED_FILE, f"wal/{COMMITTED_NAME}"):
            with suppress(FileNotFoundError):
                write_whole(self._target / name, (self._source / name).read_bytes())
        pointers = self._copy_catalog()
        first = set(self._objects())
        self._copy_all("warehouse", files_below(self._source / "warehouse"))
        self._check_tables(pointers)
        self._copy_objects(first)
        checkpoints = list(files_below(self._source / "checkpoints", without=(_STAGING,)))
        self._copy_all("checkpoints", checkpoints)
        self._remove_others("checkpoints", set(checkpoints))
        self._copy_log()
        self._check_held(before, self._held())
        if time.monotonic() - began > _ATTEMPT_S:
            raise _Again(f"it took longer than {_ATTEMPT_S:.0f} s, while superseded metadata files stay for 600 s")
        if {name for name, _ in pointers} != {name for name, _ in read_pointers(self._source / "catalog.db")}:
            raise _Again("tables were made or dropped")
        report = verify_log(self._target / "wal", self._disk)
        if not report.ok:
            raise _Again(report.problems[0])
        return taken_us, max((segment.last_lsn for segment in report.segments), default=0)

    # -- what must not change meanwhile ---------------------------------------------------------

    def _held(self) -> _Held:
        wal_dir = self._source / "wal"
        try:
            state = newest_slot(read_slots(wal_dir, self._disk) or [])
            seal = read_seal(self._disk, wal_dir)
        except ArkaError as error:
            # It is just being written, or damaged: the last attempt's reason says which.
            raise _Again(error.detail) from error
        if state is None:
            raise _Again("the log's state cannot be read")
        objects = frozenset(self._objects())
        checkpoints = frozenset(name for name in objects if "/checkpoint/" in name)
        oldest = 0 if seal is None or seal.kept is None else seal.kept.oldest
        return _Held(state.epoch, oldest, objects, checkpoints)

    @staticmethod
    def _check_held(before: _Held, after: _Held) -> None:
        if before.epoch != after.epoch:
            raise _Again("a server was started")
        if before.checkpoints != after.checkpoints:
            raise _Again("the log wrote a checkpoint")
        if before.objects - after.objects:
            raise _Again("objects were let go of")
        if before.oldest not in (0, after.oldest):
            raise _Again("segments were let go of")

    def _objects(self) -> Iterator[str]:
        return files_below(self._source / "objects", without=(_STAGING, _BEATS))

    # -- the parts ------------------------------------------------------------------------------

    def _copy_catalog(self) -> list[tuple[str, str]]:
        """Copy the catalog as of one moment; returns its tables and their metadata files."""
        new = self._target / "catalog.db"
        new.unlink(missing_ok=True)
        # Before SQLite makes it: an empty file is a new database to it.
        make_file(new)
        with closing(open_catalog_file(self._source / "catalog.db")) as catalog, closing(sqlite3.connect(new)) as copy:
            catalog.backup(copy)
        sync_file(new)
        return read_pointers(new)

    def _check_tables(self, pointers: list[tuple[str, str]]) -> None:
        """Check that the copy has what the tables of the catalog's copy need.

        Raises:
            _Again: a file is not there, or not as it should be.
            Unavailable: that was so at an earlier attempt: the catalog was copied since, and still needs the file.
        """
        # What reads tables is heavy, and a server that only looks for BACKUP_FILE does without.
        from arka.storage.backuptables import CopiedTables, FileLacking

        try:
            self.outside = CopiedTables(self._source, self._target, self._copies).check(pointers)
        except FileLacking as error:
            if error.location in self._lacked:
                raise Unavailable(
                    f"The backup would not be whole: {error}. Put the file back, or expire the snapshots that need it "
                    "or drop the table with the client that owns it, and begin the backup again: docs/recovery.md, A "
                    "data file"
                ) from error
            self._lacked.add(error.location)
            raise _Again(str(error)) from error

    def _copy_objects(self, first: set[str]) -> None:
        """Copy the object store; of WAL objects those that are no newer than the newest of an earlier listing."""
        newest: dict[str, str] = {}
        for name in first:
            folder = name.rpartition("/")[0]
            newest[folder] = max(newest.get(folder, ""), name)
        names = {
            name for name in self._objects() if "/wal/" not in name or name <= newest.get(name.rpartition("/")[0], "")
        }
        self._copy_all("objects", sorted(names))
        self._remove_others("objects", names)

    def _copy_log(self) -> None:
        """Copy the log's state, seal mark and segments."""
        source, target = self._source / "wal", self._target / "wal"
        make_folder(target)
        for _ in range(_LOG_ATTEMPTS):
            seal = (source / SEAL_NAME).read_bytes()
            segments = list_segments(source, self._disk)
            for place, (number, path) in enumerate(reversed(segments)):
                with suppress(FileNotFoundError):
                    if number not in self._settled:
                        self._copy_segment(number, path, target / path.name, settled=place >= _UNSETTLED)
            write_whole(target / SEAL_NAME, seal)
            write_whole(target / STATE_NAME, (source / STATE_NAME).read_bytes())
            if (source / SEAL_NAME).read_bytes() == seal:
                names = {path.name for _, path in segments} | {SEAL_NAME, STATE_NAME, COMMITTED_NAME}
                self._remove_others("wal", names)
                return
        raise _Again("segments were begun faster than they were copied")

    def _copy_segment(self, number: int, path: Path, target: Path, *, settled: bool) -> None:
        if settled:
            copy_file(path, target, path.stat().st_size)
            self._settled.add(number)
            return
        data = self._disk.map(path)
        try:
            header = SegmentHeader.from_bytes(str(path), data)
        except ArkaError:
            # It has none yet: nothing is in it.
            return
        end, finished = HEADER_BYTES, False
        for found in walk_frames(data, header):
            if not isinstance(found, FoundFrame):
                break
            end = found.offset + found.header.frame_bytes
            finished = found.header.kind == KIND_FOOTER
        # What is intact does not change any more: it may be read again now.
        copy_file(path, target, end)
        if finished:
            self._settled.add(number)

    def _copy_all(self, folder: str, names: Iterable[str]) -> None:
        """Copy files below a folder that the copy does not have yet, or not as they are now."""
        for name in names:
            self._copies.copy(self._source / folder / name, self._target / folder / name)
        make_folder(self._target / folder)

    def _remove_others(self, folder: str, names: set[str]) -> None:
        """Remove from the copy what an earlier attempt copied and is gone since."""
        for name in set(files_below(self._target / folder)) - names:
            (self._target / folder / name).unlink()


__all__ = ["BACKUP_FILE", "BackedUp", "back_up", "settle_restored"]
