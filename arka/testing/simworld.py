"""The world around a simulated engine: machines that lose power or freeze, and what their requests meet.

Owns: one seed's time, randomness and trace, and the lives of processes: what a dead or frozen one can no longer do.
Does not own what a disk, a store or a catalog is (``simdisk``, ``simstore``, ``simcatalog``).

Whatever the engine takes from outside comes from the seed here: the wall clock, ``os.urandom``, trio's scheduling.
"""

from __future__ import annotations

import copy
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from unittest import mock
from uuid import UUID

import pyarrow as pa
import structlog
import trio

from arka._core.framing import KIND_BATCH, FrameError, FrameHeader, Group, verify_frame
from arka.errors import DataCorruption
from arka.iceberg.frames import FrameRows
from arka.records import TableDefinition, TableInfo, TableName
from arka.storage.ports import (
    Buffer,
    CatalogListing,
    CatalogTable,
    CatalogUnavailable,
    CommitJob,
    CommitOutcome,
    CommitResult,
    DeadlineMissed,
    DiskFile,
    ObjectExists,
    ObjectMeta,
    ReadJob,
    SegmentSlice,
    StagedFiles,
    StoreUnavailable,
    TableExists,
    TableFrames,
    TableMissing,
)
from arka.testing.simcatalog import SimCatalog
from arka.testing.simdisk import PowerCut, SimDisk
from arka.testing.simstore import SimStore
from arka.testing.simwarehouse import URL, SimWarehouse
from arka.wal.segment import FRAME_HEADER_BYTES, HEADER_BYTES, SegmentHeader, corruption, parse_segment_name

T = TypeVar("T")

#: What the simulated wall clock shows at the start: 2026-01-01, in nanoseconds.
_WALL_NS: Final = 1_767_225_600 * 10**9

WAL: Final = Path("/data/wal")

#: Before every moment of trio's clock: a cancelled scope's deadline is earlier.
_NEVER: Final = -1e18
#: How long an encode job takes that misses its deadline, in seconds.
_DEADLINE_S: Final = 5.0
#: What a restored catalog brings back of a table; what others made of its columns stays.
_RESTORED: Final = ("marks", "snapshots", "times", "commits", "changes", "ends")
#: Of an offset in a slice.
_OFFSET_BYTES: Final = 8


class Trace:
    """What happened, in order: the same for the same seed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()
        #: Seconds that clock jumps have added to the wall clock.
        self.wall_offset_s = 0.0
        #: The life whose task is running; for the engine's own log.
        self.on_event: Callable[[str, MutableMapping[str, Any]], None] = lambda event, fields: None

    def note(self, what: str) -> None:
        """Add a line."""
        self.lines.append(f"{self._now_s():.6f} {what}")

    def count(self, fault: str) -> None:
        """Count and note an injected fault."""
        self.counts[fault] += 1
        self.note(f"fault: {fault}")

    def wall_ns(self) -> int:
        """What the wall clock shows."""
        return _WALL_NS + int((self._now_s() + self.wall_offset_s) * 1e9)

    def _now_s(self) -> float:
        """The virtual time; outside of a history 0."""
        try:
            return trio.current_time()
        except RuntimeError:
            return 0.0

    def take_event(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        """Take what the engine logs, as a structlog processor."""
        del logger, method
        name = str(event.pop("event"))
        self.note(f"log: {name} " + " ".join(f"{key}={event[key]}" for key in sorted(event)))
        self.on_event(name, event)
        raise structlog.DropEvent


@contextmanager
def deterministic(seed: int, trace: Trace) -> Iterator[None]:
    """Take the wall clock, the kernel's randomness, trio's scheduling and the log from one seed."""
    entropy = random.Random(f"entropy {seed}")
    kept = structlog.get_config() if structlog.is_configured() else None
    with (
        mock.patch.object(os, "urandom", entropy.randbytes),
        mock.patch.object(random, "_urandom", entropy.randbytes),
        mock.patch.object(time, "time_ns", trace.wall_ns),
        mock.patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", new=True),
        mock.patch("trio._core._run._r", random.Random(f"schedule {seed}")),
    ):
        structlog.configure(processors=[trace.take_event], cache_logger_on_first_use=False)
        try:
            yield
        finally:
            structlog.reset_defaults()
            if kept is not None:
                structlog.configure(**kept)


class ProcessEnded(BaseException):
    """A task of a dead process asked something of the world."""


class Process:
    """One process's life, as far as the world sees it: it runs, it may freeze and wake, it dies.

    Attributes:
        name: for the trace.
        alive: whether it runs, or may wake.
        cut_off: whether it reaches neither store nor catalog, while others do.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.cut_off = False
        self.scope = trio.CancelScope()
        self._inside = False
        self._thawed: trio.Event | None = None
        self._shields: dict[trio.CancelScope, None] = {}

    @property
    def frozen(self) -> bool:
        """Whether it gets no time now."""
        return self._thawed is not None and not self._thawed.is_set()

    @contextmanager
    def life(self) -> Iterator[None]:
        """Live inside this block: it is left when the process dies."""
        self._inside = True
        with self.scope:
            yield

    def freeze(self) -> None:
        """Give it no more time: nothing it asks for is asked, nothing it was answered is heard."""
        self._thawed = trio.Event()

    def thaw(self) -> None:
        """Let it go on as if nothing had happened."""
        self.cut_off = False
        if self._thawed is not None:
            self._thawed.set()

    def die(self) -> None:
        """End it in this instant: no later effect of it reaches the world."""
        self.alive = False
        self.scope.cancel()
        for shield in tuple(self._shields):
            shield.cancel()

    async def gate(self) -> None:
        """Pass while the process runs; wait while it is frozen; its task ends once it is dead."""
        while self.frozen:
            assert self._thawed is not None
            await self._thawed.wait()
        if not self.alive:
            await self._end()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def sleep_shielded(self, seconds: float) -> None:
        """Sleep although a cancellation waits, and pass the gate; the process's death ends it."""
        with trio.CancelScope(shield=True) as shield:
            self._shields[shield] = None
            try:
                await trio.sleep(seconds)
                while self.frozen:
                    assert self._thawed is not None
                    await self._thawed.wait()
            finally:
                del self._shields[shield]
        if not self.alive:
            await self._end()

    async def _end(self) -> None:
        """End the task: it belongs to a dead process.

        Raises:
            ProcessEnded: behind a shield of the engine, through which the cancellation of all its tasks does not come.
        """
        if self._inside and trio.current_effective_deadline() > _NEVER:
            raise ProcessEnded
        await trio.sleep_forever()


class MachineDisk(SimDisk):
    """A SimDisk that remembers that its machine went off, can be copied, and knows what is on its platter.

    Attributes:
        uuid: the identity of its data directory; a copy has the same.
        checkpoints: the folder of checkpoints on it.
        warehouse: the marker of the warehouse that its log was joined to; None if it was to none.
        has_log: a process has opened its log on it.
    """

    def __init__(self, rng: random.Random, uuid: UUID) -> None:
        super().__init__(rng)
        self.uuid = uuid
        self.checkpoints = SimStore()
        self.warehouse: UUID | None = None
        self.has_log = False
        self.power_lost = False
        # By file: how far it was read, and which LSNs were found; an LSN that was durable once stays so.
        self._read: dict[object, int] = {}
        self._platter: set[int] = set()

    def kill(self) -> None:
        """Kill the process; see ``SimDisk.kill``."""
        super().kill()
        self.power_lost = False

    def fork(self) -> MachineDisk:
        """The disk of another machine that got what is on this platter, as after a power cut."""
        other = MachineDisk(self._rng, self.uuid)
        other.checkpoints.objects.update(self.checkpoints.objects)
        other._directories = copy.deepcopy(self._directories)
        other._platter = set(self._platter)
        other.warehouse = self.warehouse
        other.has_log = self.has_log
        other.crash()
        return other

    def remove(self, path: Path) -> None:
        """Unlink; what was durable in it is remembered."""
        self._read_platter()
        super().remove(path)

    def on_platter(self, lsn: int) -> bool:
        """Whether the frame with this LSN was ever durable here, with its segment's name."""
        if lsn not in self._platter:
            self._read_platter()
        return lsn in self._platter

    def _read_platter(self) -> None:
        directory = self._directories.get(WAL)
        for name, inode in directory.durable.items() if directory is not None else ():
            if parse_segment_name(name) is None or len(inode.durable) < HEADER_BYTES:
                continue
            data = memoryview(bytes(inode.durable))
            try:
                seed = SegmentHeader.from_bytes(name, data).seed
            except DataCorruption:
                continue
            offset = self._read.get(inode, HEADER_BYTES)
            while offset < len(data):
                try:
                    header = verify_frame(data, offset, seed)
                except FrameError:
                    break
                offset += header.frame_bytes
                if header.lsn:
                    self._platter.add(header.lsn)
            self._read[inode] = offset

    def _step(self, operation: str) -> OSError | None:
        try:
            return super()._step(operation)
        except PowerCut:
            self.power_lost = True
            raise


class ProcessDisk:
    """A disk as one process uses it: ``Disk``, with time, and without effect once the process is dead."""

    def __init__(
        self,
        process: Process,
        disk: MachineDisk,
        rng: random.Random,
        *,
        max_delay_s: float,
        on_power_cut: Callable[[], None],
    ) -> None:
        self._process = process
        self.disk = disk
        self._rng = rng
        self._max_delay_s = max_delay_s
        self._on_power_cut = on_power_cut

    async def run(self, job: Callable[[], T]) -> T:
        """Run a job: at once, at some moment of its duration."""
        await trio.lowlevel.checkpoint()
        await self._process.sleep_shielded(self._rng.uniform(0, self._max_delay_s))
        await self._process.gate()
        try:
            result = job()
        except BaseException:
            if self.disk.power_lost:
                self._on_power_cut()
                await self._process.gate()
            raise
        await self._process.sleep_shielded(self._rng.uniform(0, self._max_delay_s))
        return result

    async def commit(self, file: DiskFile, group: Group) -> None:
        """See ``Disk``; it takes the time of a job."""
        await self.run(lambda: file.commit(group))

    def make_directory(self, directory: Path) -> None:
        """See ``Disk``."""
        self.disk.make_directory(directory)

    def list_names(self, directory: Path) -> list[str]:
        """See ``Disk``."""
        return self.disk.list_names(directory)

    def create(self, path: Path, size: int) -> DiskFile:
        """See ``Disk``."""
        return self.disk.create(path, size)

    def open(self, path: Path) -> DiskFile:
        """See ``Disk``."""
        return self.disk.open(path)

    def map(self, path: Path) -> memoryview:
        """See ``Disk``."""
        return self.disk.map(path)

    def rename(self, old: Path, new: Path) -> None:
        """See ``Disk``."""
        self.disk.rename(old, new)

    def remove(self, path: Path) -> None:
        """See ``Disk``."""
        self.disk.remove(path)

    def sync_directory(self, directory: Path) -> None:
        """See ``Disk``."""
        self.disk.sync_directory(directory)

    def free_bytes(self, directory: Path) -> int:
        """See ``Disk``."""
        return self.disk.free_bytes(directory)

    async def read_range(self, path: Path, start: int, end: int) -> bytes:
        """Read a piece of a segment, as ``arka.storage.objects.read_range`` does."""
        return await self.run(lambda: bytes(self.disk.map(path)[start:end]))

    def read_slice(self, piece: SegmentSlice, log_uuid: UUID) -> Iterator[tuple[FrameHeader, pa.Buffer]]:
        """Read batch frames, as ``arka.wal.segment.read_slice`` does."""
        try:
            data = self.disk.map(Path(piece.path))
        except FileNotFoundError as error:
            raise DataCorruption(piece.path, 0, "a file with frames", "no file") from error
        header = SegmentHeader.from_bytes(piece.path, data)
        header.check_is(piece.path, log_uuid, piece.segment, piece.epoch)
        for offset in memoryview(piece.offsets).cast("Q"):
            try:
                frame = verify_frame(data, offset, header.seed)
            except FrameError as error:
                raise corruption(piece.path, error) from error
            if frame.kind != KIND_BATCH:
                raise DataCorruption(piece.path, offset, "a batch frame", f"a frame of kind {frame.kind}")
            start = offset + FRAME_HEADER_BYTES
            # A copy of its own: the view's alignment is the bytes object's, not the file's.
            yield frame, pa.py_buffer(bytes(data[start : start + frame.payload_bytes]))


class ProcessStore:
    """The object store as one process uses it: ``ObjectStore``."""

    def __init__(self, process: Process, store: SimStore, *, local: bool = False) -> None:
        """Join them.

        Args:
            process: who asks.
            store: what is asked.
            local: it is on the process's own machine.
        """
        self._process = process
        self._store = store
        self._local = local

    @property
    def url(self) -> str:
        """See ``ObjectStore``."""
        return self._store.url

    async def put_new(self, key: str, parts: Sequence[Buffer]) -> None:
        """See ``ObjectStore``."""
        await self._ask(partial(self._store.put_new, key, parts))

    async def get(self, key: str) -> bytes:
        """See ``ObjectStore``."""
        return await self._ask(partial(self._store.get, key))

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """See ``ObjectStore``."""
        return await self._ask(partial(self._store.get_range, key, start, length))

    async def list_keys(self, prefix: str, *, start_after: str | None = None) -> list[ObjectMeta]:
        """See ``ObjectStore``."""
        return await self._ask(partial(self._store.list_keys, prefix, start_after=start_after))

    async def delete(self, keys: Sequence[str]) -> None:
        """See ``ObjectStore``."""
        await self._ask(partial(self._store.delete, keys))

    async def _ask(self, request: Callable[[], Awaitable[T]]) -> T:
        await self._process.gate()
        if self._process.cut_off and not self._local:
            raise StoreUnavailable(f"{self.url}: no way there")
        try:
            answer = await request()
        except (StoreUnavailable, ObjectExists, KeyError):
            await self._process.gate()
            raise
        await self._process.gate()
        return answer


class ProcessWarehouse:
    """The warehouse's marker as one process finds it: ``Warehouse``; what it remembers is on its machine's disk."""

    url = URL

    def __init__(self, process: Process, warehouse: SimWarehouse, disk: MachineDisk) -> None:
        self._process = process
        self._warehouse = warehouse
        self._disk = disk

    async def read_marker(self) -> UUID | None:
        """See ``Warehouse``."""
        return await self._ask(self._warehouse.read_marker)

    async def make_marker(self, uuid: UUID) -> UUID | None:
        """See ``Warehouse``."""
        return await self._ask(partial(self._warehouse.make_marker, uuid))

    async def known(self) -> UUID | None:
        """See ``Warehouse``."""
        await self._process.gate()
        return self._disk.warehouse

    async def know(self, uuid: UUID) -> None:
        """See ``Warehouse``."""
        await self._process.gate()
        self._disk.warehouse = uuid

    async def _ask(self, request: Callable[[], T]) -> T:
        await self._process.gate()
        if self._process.cut_off:
            raise CatalogUnavailable(f"{self.url}: no way there")
        return request()


class CatalogWeather:
    """The catalog that all processes share: its tables, and what befalls requests to it.

    Attributes:
        warehouse: where the tables' files lie.
        away: while set, every request fails; those that change something may still have done so.
        fault_share: the share of requests that fail.
        max_delay_s: the longest that a request takes.
        most_frames: cuts of more frames miss their deadline; 0 for none.
        cleared_share: before so many of all commits others delete every file that no snapshot names.
        clear_rng: chooses those commits.
        most_written: an encode job writes so many frames of its cut at most; 0 for any number.
    """

    def __init__(self, rng: random.Random, trace: Trace) -> None:
        self.rng = rng
        self.trace = trace
        self.away = False
        self.fault_share = 0.0
        self.max_delay_s = 0.0
        self.most_frames = 0
        self.clear_rng = random.Random(0)
        self.cleared_share = 0.0
        self.warehouse = SimWarehouse()
        self.most_written = 0
        self.tables = SimCatalog(lambda piece, log_uuid: ())
        # Tables that somebody took out of the catalog, with the name that each had.
        self._vanished: list[tuple[TableName, Any]] = []
        #: The UUIDs of all tables that were ever taken out.
        self.vanished: set[UUID] = set()
        #: When a table was last taken out or put back (trio's clock).
        self.changed_s = -1e18
        #: Told what each commit changes, in the step that applies it.
        self.on_commit: Callable[[CommitJob, list[FrameRows]], None] = lambda job, changes: None
        self._late: list[tuple[float, Callable[[], object]]] = []

    def calm(self) -> None:
        """No faults from here on; what is on its way still comes."""
        self.away, self.fault_share, self.max_delay_s = False, 0.0, 0.0

    def vanish(self, name: TableName) -> None:
        """Take a table out of the catalog, as somebody does who means another one."""
        table = self.tables._tables.pop(name, None)
        if table is not None:
            self.vanished.add(table.info.uuid)
            self._vanished.append((name, table))
            self.changed_s = trio.current_time()

    def bring_back(self, dropped: Container[UUID]) -> None:
        """Put the tables back that were taken out and not dropped since; where a name is taken, under another one."""
        while self._vanished:
            name, table = self._vanished.pop()
            if table.info.uuid not in dropped:
                self._put(name, table)

    def back_up(self) -> dict[UUID, dict[str, Any]]:
        """Copy what the catalog says of each table's data, by UUID."""
        return {
            table.info.uuid: {part: copy.copy(getattr(table, part)) for part in _RESTORED}
            for table in self.tables._tables.values()
        }

    def restore(self, backup: dict[UUID, dict[str, Any]]) -> dict[UUID, list[FrameRows]]:
        """Put tables back to what they held at a backup; returns what each holds now that stood higher before."""
        restored = {}
        for table in self.tables._tables.values():
            saved = backup.get(table.info.uuid)
            if saved is not None and saved["snapshots"] != table.snapshots:
                for part in _RESTORED:
                    setattr(table, part, copy.copy(saved[part]))
                restored[table.info.uuid] = table.changes
        return restored

    def rename(self, name: TableName) -> None:
        """Give a table another name."""
        table = self.tables._tables.pop(name, None)
        if table is not None:
            self._put(TableName(name.namespace, f"{name.name}_x"), table)

    def _put(self, name: TableName, table: Any) -> None:
        while name in self.tables._tables:
            name = TableName(name.namespace, f"{name.name}_x")
        table.info = replace(table.info, name=name)
        self.tables._tables[name] = table
        self.changed_s = trio.current_time()

    def postpone(self, effect: Callable[[], object]) -> None:
        """Let a request that was given up take effect later."""
        self._late.append((trio.current_time() + self.rng.uniform(0, 5 * self.max_delay_s), effect))

    @property
    def is_late(self) -> bool:
        """Whether a request that was given up may still take effect."""
        return bool(self._late)

    def arrive(self) -> None:
        """Let those take effect whose time has come."""
        now = trio.current_time()
        due = [effect for due_s, effect in self._late if due_s <= now]
        self._late = [late for late in self._late if late[0] > now]
        for effect in due:
            self.trace.note("catalog: a late request takes effect")
            effect()


class ProcessCatalog(SimCatalog):
    """The catalog as one process uses it; reads frames from that process's disk.

    Args:
        process: whose requests these are.
        weather: what befalls them.
        disk: where frames are read.
        on_drop: told of each table that the process drops.
    """

    def __init__(
        self,
        process: Process,
        weather: CatalogWeather,
        disk: ProcessDisk,
        on_drop: Callable[[UUID], None] = lambda _: None,
    ) -> None:
        super().__init__(disk.read_slice)
        self._on_drop = on_drop
        self._process = process
        self._weather = weather
        self._tables = weather.tables._tables
        self._staged = weather.tables._staged
        self._snapshot_ids = weather.tables._snapshot_ids
        self.unreadable = weather.tables.unreadable
        self.unusable = weather.tables.unusable
        self.poison = weather.tables.poison
        self.most_written = weather.most_written

    async def encode(self, job: TableFrames, *, fresh: bool = False) -> StagedFiles:
        """See ``Catalog.encode``; cuts of too many frames are late in some worlds (R32)."""
        most = self._weather.most_frames
        if most and sum(len(piece.offsets) // _OFFSET_BYTES for piece in job.slices) > most:
            await self._process.gate()
            await trio.sleep(_DEADLINE_S)
            self._weather.trace.count("catalog encode late")
            await self._process.gate()
            raise DeadlineMissed("encode: it finished no file for too long")
        return await super().encode(job, fresh=fresh)

    async def commit(self, job: CommitJob) -> CommitResult:
        """See ``Catalog.commit``; where the warehouse is local, it looks for the table's files at its end (R28)."""
        weather = self._weather
        if weather.cleared_share and weather.clear_rng.random() < weather.cleared_share and self.clear_staged():
            weather.trace.count("waiting files cleared away")
        result = await super().commit(job)
        warehouse = self._weather.warehouse
        if not warehouse.local or result.outcome is not CommitOutcome.COMMITTED:
            return result
        warehouse.check_files(job.table.uuid)
        return replace(result, seen=True)

    def _check_readable(self, name: TableName) -> None:
        super()._check_readable(name)
        self._weather.warehouse.check_place()

    def _list(self) -> CatalogListing:
        listing = super()._list()
        if self._weather.warehouse.is_own:
            return listing
        return CatalogListing((), frozenset(self._tables), listing.unusable)

    def _create(self, definition: TableDefinition, location_suffix: str) -> CatalogTable:
        self._weather.warehouse.check_place()
        return super()._create(definition, location_suffix)

    def _look_at(self, table: TableInfo) -> None:
        super()._look_at(table)
        self._weather.warehouse.check_files(table.uuid)

    def _encode(self, job: TableFrames) -> StagedFiles:
        self._weather.warehouse.check_place()
        made = super()._encode(job)
        if made.through_lsn < job.through_lsn:
            self._weather.trace.count("catalog encode part")
        return made

    def _scan(self, job: ReadJob, tail: Sequence[FrameRows]) -> pa.Table:
        if not self._weather.warehouse.shows(job.table.uuid):
            raise CatalogUnavailable(f"{job.table.name}: its files are not there")
        return super()._scan(job, tail)

    async def _call(self, name: str, effect: Callable[[], T]) -> T:
        weather, rng = self._weather, self._weather.rng
        await self._process.gate()
        if self._process.cut_off:
            raise CatalogUnavailable(f"{name}: no way there")
        fails = weather.away or rng.random() < weather.fault_share
        applied = fails and rng.random() < 0.5
        late = fails and not applied and name == "commit" and rng.random() < 0.5
        try:
            await trio.sleep(rng.uniform(0, weather.max_delay_s))
        except trio.Cancelled:
            if name == "commit" and rng.random() < 0.5:
                weather.postpone(effect)
            raise
        weather.arrive()
        result: T | None = None
        if applied:
            # Whatever came of it is lost with the response.
            with suppress(TableExists, TableMissing):
                effect()
        elif not fails:
            result = effect()
        if late:
            weather.postpone(effect)
        await trio.sleep(rng.uniform(0, weather.max_delay_s))
        await self._process.gate()
        if fails:
            fate = "response lost" if applied else "late" if late else "refused"
            weather.trace.count(f"catalog {name} {fate}")
            raise CatalogUnavailable(f"{name}: {fate}")
        return result  # type: ignore[return-value]

    def _drop(self, name: TableName, uuid: UUID) -> None:
        super()._drop(name, uuid)
        self._on_drop(uuid)

    def _commit(self, job: CommitJob) -> CommitResult:
        table = self._tables.get(job.table.name)
        before = len(table.changes) if table is not None else 0
        # A commit past a write that is set aside changes nothing.
        snapshots = len(table.snapshots) if table is not None else 0
        result = super()._commit(job)
        if table is not None and result.outcome is CommitOutcome.COMMITTED and len(table.snapshots) > snapshots:
            self._weather.on_commit(job, table.changes[before:])
        return result


async def compute_inline(function: Callable[..., T], *args: object) -> T:
    """Run what the engine would run in a thread."""
    await trio.lowlevel.checkpoint()
    return function(*args)


__all__ = [
    "WAL",
    "CatalogWeather",
    "MachineDisk",
    "Process",
    "ProcessCatalog",
    "ProcessDisk",
    "ProcessStore",
    "ProcessWarehouse",
    "Trace",
    "compute_inline",
    "deterministic",
]
