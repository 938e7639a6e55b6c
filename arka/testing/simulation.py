"""Deterministic simulation: the whole engine below the transport in a world that fails, from one seed.

Owns: what a run is made of: lives of servers, faults, writers, table changes, and a quiet last life after which every
promise is checked. The same seed gives the same run, event by event, in any process.

Use ``simulate(seed)``, or run many: ``python -m arka.testing.simulation --seeds 10000``.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from unittest import mock
from uuid import UUID

import pyarrow as pa
import trio
from trio.testing import MockClock

from arka.errors import ArkaError, ErrorCode, Fenced, Unavailable
from arka.iceberg.frames import FrameRows
from arka.options import (
    KIB,
    MIB,
    IcebergOptions,
    IdempotencyOptions,
    Limits,
    ObjectStoreOptions,
    ServerOptions,
    Settings,
    WalOptions,
)
from arka.records import TableDefinition, TableName, TableType
from arka.storage.ports import CommitJob, StoreUnavailable
from arka.testing.answers import CollectedAnswer
from arka.testing.simpromises import PromiseBroken, Promises
from arka.testing.simschemas import change_schema, wide_definition
from arka.testing.simstore import SimStore
from arka.testing.simworld import (
    CatalogWeather,
    MachineDisk,
    Process,
    ProcessCatalog,
    ProcessDisk,
    ProcessStore,
    ProcessWarehouse,
    Trace,
    compute_inline,
    deterministic,
)
from arka.testing.simwriters import Writer
from arka.testing.steplimit import StepLimit
from arka.tiers.admission import Ledger
from arka.tiers.assembly import OpenLog, Surroundings
from arka.tiers.decoderoom import DecodeRoom
from arka.tiers.effects import Effects
from arka.tiers.pipeline import Pipeline
from arka.tiers.reads import ReadRequest, read_table
from arka.tiers.startup import open_pipeline
from arka.tiers.table import Table, TableState
from arka.tiers.watch import PATIENCE_S

_DATA: Final = Path("/data")
#: Longest virtual time that a quiet engine may take to bring everything down, in seconds.
_DRAIN_S: Final = 900.0
#: What may lack for a while, and is never the error of a write or fsync here.
_LACKS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
#: Longest time for which a table may stand still without a word, in seconds.
_SILENCE_S: Final = PATIENCE_S + 3.0
#: What happens to a life, as ``_Life._inject`` draws it: twice what is to be more likely.
FAULTS: Final = (
    "power cut",
    "kill",
    "power cut in a job",
    *("disk", "store", "catalog") * 2,
    "clock",
    "freeze",
    "foreign commit",
    "vanish",
    "rename",
    "bring back",
    "cut off",
    "shortage",
)
#: Faults that are not drawn one by one: a seed has them or not.
_RESTORE: Final = "catalog restored"
_SLOW: Final = "slow store"
_UNMARKED: Final = "marks removed"
#: What the counts of those faults begin with that may keep the catalog from answering.
_TROUBLES: Final = ("catalog ", "warehouse ", "table held up", "file of a table")
#: How a server says that a table stands below what was committed.
_LOWER: Final = "stands at LSN"
#: How old an answer of the catalog's may be that somebody acts on, in seconds.
_CHANGED_S: Final = 10.0
#: How long a start is kept from finishing by outages that follow each other, in seconds.
_START_S: Final = 600.0
#: Longest virtual time that the start of a process on its own disk may take, whatever store and catalog do, in seconds:
#: 30 for all answers of the store together, and 60 for the catalog's.
_LONGEST_START_S: Final = 120.0
#: The longest that a request to a slow store takes, and its answer, in seconds.
_SLOW_S: Final = (10.0, 40.0)
#: How many lines of a failed run are shown.
_TAIL_LINES: Final = 60


@dataclass(frozen=True, slots=True)
class _Pace:
    """How much happens in a history, and how fast: where everything fails at once, little gets far.

    Attributes:
        faults: those that occur; see ``FAULTS``.
        faults_per_s: how many of them, and of those that do not occur, there are in a second.
        lives_s: how long a life may last that no fault ends.
        shares: of requests to store and catalog that fail.
        delays_s: the longest that a request to the catalog takes.
        rest_s: the longest that a client pauses between two streams.
    """

    faults: frozenset[str] = frozenset(FAULTS)
    faults_per_s: float = 1.0
    lives_s: tuple[float, ...] = (0.3, 3.0, 12.0)
    shares: tuple[float, ...] = (0.0, 0.05, 0.3)
    delays_s: tuple[float, ...] = (0.0, 0.05, 1.0)
    rest_s: float = 0.5


def _choose_pace(rng: random.Random, faults: Collection[str]) -> _Pace:
    """Let many of the histories be calmer, with few kinds of faults each; all of them where ``faults`` are given."""
    calm = rng.random() < 0.35
    if not calm and not faults:
        return _Pace()
    chosen = frozenset(faults or rng.sample(sorted(set(FAULTS)), rng.randint(3, 9)))
    lives_s, rest_s = rng.choice((((3.0, 12.0), 2.0), ((12.0, 40.0), 15.0)))
    return _Pace(chosen, rng.choice((0.3, 0.6, 1.0)), lives_s, (0.0, 0.0, 0.05), (0.0, 0.05, 0.05, 1.0), rest_s)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one seed.

    Attributes:
        seed: the seed.
        broken: the promise that was broken, or the engine's own failure; None if all held.
        trace: what happened.
        counts: faults injected, acks, lives.
    """

    seed: int
    broken: str | None
    trace: tuple[str, ...]
    counts: Counter[str]

    def describe(self) -> str:
        """The failure and the end of the trace, for people."""
        tail = "\n".join(line[:300] for line in self.trace[-_TAIL_LINES:])
        return f"seed {self.seed}: {self.broken}\n{tail}\nreplay: pytest tests/simulation --seed {self.seed}"


class _Life:
    """One server process and its machine. Satisfies ``simwriters.Server``."""

    def __init__(self, world: _World, number: int, *, quiet: bool) -> None:
        self.name = f"life {number}"
        self.world = world
        self.quiet = quiet
        self.process = Process(self.name)
        self.disk = world.disk
        self.superseded = False
        self.draining = False
        self.limits = world.settings.limits
        self.ledger = Ledger(world.rng.choice((6 * KIB, 64 * KIB)))
        # So little that batches which are rewritten go one by one.
        self.decode_room = DecodeRoom(MIB)
        self.opened = trio.Event()
        self.left = trio.Event()
        self.broken: BaseException | None = None
        self._rng = world.rng
        self._log: OpenLog | None = None
        self._forked = trio.Event()
        # How many DropTables of clients run.
        self._dropping = 0
        self._effects = Effects(64)
        # By number, what those actions are about that were asked for and have no outcome yet (R41).
        self._owed: dict[int, str] = {}
        self._asked = 0
        self._began = trio.current_time()
        self._has_tables = False

    @property
    def pipeline(self) -> Pipeline:
        """The running pipeline."""
        assert self._log is not None
        return self._log.pipeline

    async def run(self, writers: list[Writer], nursery: trio.Nursery) -> None:
        """Live: start, serve, end by a fault, a stop or a failure; ``left`` is set when the next life may begin."""
        try:
            with self.process.life():
                await self._live(writers)
        except BaseException as error:
            self._judge(error)
        finally:
            self._bury()
        del nursery

    async def _live(self, writers: list[Writer]) -> None:
        world, rng = self.world, self._rng
        delay_s = 0.0 if self.quiet else rng.choice((0.0, 0.002, 0.05))
        disk = ProcessDisk(self.process, self.disk, rng, max_delay_s=delay_s, on_power_cut=self.crash)
        async with trio.open_nursery() as nursery:
            if not self.quiet:
                nursery.start_soon(self._inject)
            surroundings = Surroundings(
                disk=disk,
                disk_uuid=self.disk.uuid,
                store=ProcessStore(self.process, world.store),
                checkpoints=ProcessStore(self.process, self.disk.checkpoints, local=True),
                catalog=ProcessCatalog(self.process, world.weather, disk, self._take_drop),
                read_range=disk.read_range,
                read_free=lambda: 1 << 40,
                survival={},
                rng=random.Random(rng.random()),
                compute=compute_inline,
                warehouse=ProcessWarehouse(self.process, world.weather.warehouse, self.disk),
            )
            began_s, has_log = trio.current_time(), self.disk.has_log
            self._log = await open_pipeline(world.settings, _DATA, surroundings)
            if has_log and trio.current_time() - began_s > _LONGEST_START_S and not world.short:
                world.promises.fail(f"the start of {self.name} took {trio.current_time() - began_s:.0f} s")
            self.disk.has_log = True
            self._take_start(self._log)
            nursery.start_soon(self._take_epoch, self._log.pipeline)
            await nursery.start(self._log.pipeline.run)
            nursery.start_soon(self._log.reservation.run)
            await nursery.start(self._effects.run)
            await self._make_tables()
            self._has_tables = True
            async with trio.open_nursery() as streams:
                for writer in writers:
                    streams.start_soon(writer.run, self)
                streams.start_soon(self._watch_memory)
                streams.start_soon(self._watch_stalls)
                streams.start_soon(self._watch_room)
                if world.short and not self.quiet:
                    streams.start_soon(self._hold_up_tables)
                if self.quiet:
                    await self._drain()
                    streams.cancel_scope.cancel()
                else:
                    streams.start_soon(self._change_tables)
                    streams.start_soon(self._read_tables)
                    await trio.sleep(rng.choice(world.pace.lives_s) * (0.2 + rng.random()))
                    streams.cancel_scope.cancel()
            await self._stop()
            nursery.cancel_scope.cancel()

    def troubles(self) -> int | None:
        """How much befell the catalog so far; None while it may not answer this process in time."""
        weather, trace = self.world.weather, self.world.trace
        unanswered = weather.away or weather.max_delay_s > 0.05 or not weather.warehouse.is_own
        unanswered = unanswered or bool(weather.tables.unreadable or weather.warehouse.gone)
        if unanswered or self.process.cut_off or self.process.frozen or self.superseded:
            return None
        return sum(count for fault, count in trace.counts.items() if fault.startswith(_TROUBLES))

    def _take_start(self, opened: OpenLog) -> None:
        self.world.promises.take_start(
            self.name, log_uuid=opened.log_uuid, next_lsn=opened.next_lsn, disk=opened.recovered_lsn
        )
        self.opened.set()

    async def _take_epoch(self, pipeline: Pipeline) -> None:
        """Check what the process finds in the store, at the start or when the store is back."""
        if not pipeline.uplink.connected:
            self.world.trace.count("offline start")
        epoch = await pipeline.uplink.wait_connected()
        self.world.promises.take_epoch(self.name, epoch=epoch, objects=pipeline._marks.objects.lsn)

    # -- tables -----------------------------------------------------------------------------------

    async def _make_tables(self) -> None:
        for name in self.world.tables:
            await self.make_table(name)

    async def make_table(self, name: TableName) -> None:
        """Create a table, however long that takes; does nothing if there is one of that name."""
        create = partial(self.pipeline.tables.create, self.world.definition(name))
        try:
            # The first client does not wait; what the second one asks for comes behind that.
            patience_s = self._rng.choice((0.0, 0.001, 0.05))
            await self._persist(partial(self._ask, "CreateTable", name, create, patience_s=patience_s))
            await self._persist(partial(self._ask, "CreateTable", name, create))
            self._check_owed(str(name))
        except ArkaError as error:
            if error.code not in (ErrorCode.TABLE_STOPPED, ErrorCode.TABLE_EXISTS):
                raise
            if _LOWER in error.detail:
                # It waits for a person.
                return
            if self.quiet and error.code is ErrorCode.TABLE_STOPPED:
                # Dropped by a process whose disk is gone, and the drop's record with it.
                try:
                    await self._persist(partial(self.pipeline.tables.drop, name, purge=False))
                except ArkaError as gone:
                    # Renamed, and heard of only now: the name is free.
                    if gone.code is not ErrorCode.TABLE_NOT_FOUND:
                        raise
                await self._persist(partial(self.pipeline.tables.create, self.world.definition(name)))

    async def _persist(self, request: Callable[[], Any]) -> None:
        while True:
            try:
                await request()
            except Unavailable as error:
                self.world.trace.note(f"tables: {self.name}: {error.detail}")
                await trio.sleep(0.3)
            else:
                return

    async def _change_tables(self) -> None:
        """Drop and create a table now and then."""
        rng, world = self._rng, self.world
        while True:
            await trio.sleep(rng.uniform(0.5, 8))
            if self.left.is_set():
                return
            if rng.random() > 0.3:
                continue
            name = rng.choice(world.tables)
            try:
                world.trace.note(f"tables: {self.name} drops {name}")
                patience_s = rng.choice((0.001, 0.05, 1000.0))
                await self._persist(
                    partial(self._ask, "DropTable", name, partial(self._drop, name), patience_s=patience_s)
                )
                create = partial(self.pipeline.tables.create, self.world.definition(name))
                await self._persist(partial(self._ask, "CreateTable", name, create))
                self._check_owed(str(name))
            except ArkaError as error:
                expected = (
                    ErrorCode.TABLE_NOT_FOUND,
                    ErrorCode.TABLE_STOPPED,
                    ErrorCode.TABLE_DROPPED,
                    # Others have changed its columns.
                    ErrorCode.TABLE_EXISTS,
                )
                if error.code not in expected and not isinstance(error, Unavailable):
                    raise

    async def _ask(
        self, action: str, name: TableName, effect: Callable[[], Any], *, patience_s: float = 100_000.0
    ) -> None:
        """Ask for an action as a client does that leaves after a while, with or without the answer (R41)."""
        self._asked = number = self._asked + 1

        async def carry_out() -> None:
            try:
                await effect()
            except ArkaError:
                self._owed.pop(number)
                raise
            self._owed.pop(number)

        self._owed[number] = str(name)
        with trio.move_on_after(patience_s) as patience:
            try:
                await self._effects.do(action, str(name), carry_out)
            except ArkaError:
                self._owed.pop(number, None)
                raise
        if patience.cancelled_caught:
            self.world.trace.count("action without a client")

    def _check_owed(self, name: str) -> None:
        """Check that the actions on a table have an outcome; one that was asked for behind them has."""
        if self.process.alive and name in self._owed.values():
            self.world.promises.fail(f"{self.name}: an action on {name} has no outcome: its client left")

    def _start_outage(self, what: str, seconds: float) -> None:
        """Let store or catalog be away, but for a start that has waited for long: outages would follow each other."""
        if self._has_tables or trio.current_time() - self._began < _START_S:
            self.world.start_outage(what, seconds)

    async def _drop(self, name: TableName) -> None:
        """Drop what has a name: after an outage that may be another table than before it."""
        promises, tables = self.world.promises, self.pipeline.tables
        table = await tables.find(name)
        promises.drop_asked.add(table.info.uuid)
        self._dropping += 1
        try:
            await tables.drop(name, purge=False)
        finally:
            self._dropping -= 1
            # Also one that took the name since: the next process may finish it.
            promises.drop_asked.update(other.info.uuid for other in tables.all() if other.drop_lsn is not None)
        if table.state is TableState.DROPPED:
            promises.drop_confirmed.add(table.info.uuid)

    def _take_drop(self, uuid: UUID) -> None:
        """Hear of a table that this process has dropped: somebody asked for it, here and now or earlier."""
        promises = self.world.promises
        if not self._dropping and uuid not in promises.drop_asked:
            promises.fail(f"{self.name} dropped table {uuid}, and nobody asked for it")
        promises.drop_asked.add(uuid)

    async def _read_tables(self) -> None:
        """Read a table now and then."""
        rng, world = self._rng, self.world
        while True:
            await trio.sleep(rng.uniform(0.01, 0.5))
            try:
                await self._read(await self.pipeline.tables.find(rng.choice(world.tables)))
            except ArkaError as error:
                world.trace.note(f"read: {self.name}: {error}")
                # A limit of a few frames is passed by control frames alone, and leaves nothing to an answer.
                full = world.short and error.code is ErrorCode.OVERLOADED
                # Others undid what this process knows to be committed (R20): which rows wait cannot be said.
                undone = error.code is ErrorCode.TABLE_STOPPED and _LOWER in error.detail
                undone = undone and bool(world.trace.counts[_RESTORE] or world.trace.counts[_UNMARKED])
                if error.code not in (ErrorCode.TABLE_NOT_FOUND, ErrorCode.UNAVAILABLE) and not full and not undone:
                    raise

    async def _read(self, table: Table) -> None:
        through_lsn, refused = table.last_lsn, self.world.promises.refused()
        answer = CollectedAnswer()
        await read_table(self.pipeline, table, ReadRequest(("id", "part")), answer)
        await self.process.gate()
        if table.state is TableState.ACTIVE and not self.superseded:
            self.world.trace.counts["reads"] += 1
            keys = [(row["id"], row["part"]) for row in answer.rows()]
            self.world.promises.take_read(self, table.info.uuid, through_lsn, keys, refused)

    # -- faults -----------------------------------------------------------------------------------

    async def _inject(self) -> None:
        """Let things happen to this life."""
        rng = self._rng
        if rng.random() < 0.2:
            self._cut_power_soon()
        while True:
            await trio.sleep(rng.expovariate(self.world.pace.faults_per_s))
            if self.left.is_set():
                # The world is the next life's now.
                return
            if rng.random() < 0.8:
                self.world.change_schema()
            fault = rng.choice(FAULTS)
            match fault if fault in self.world.pace.faults else None:
                case "power cut":
                    self.crash()
                case "kill":
                    self.world.trace.count("kill")
                    self._end(lambda: self.disk.kill())
                case "power cut in a job":
                    self._cut_power_soon()
                case "disk":
                    operation = rng.choice(("sync", "sync", "write", "create", "rename", "sync_directory"))
                    self.world.trace.count(f"disk {operation} fails")
                    self.disk.fail_next(operation, rng.choice((errno.EIO, errno.ENOSPC)), after=rng.randint(0, 3))
                case "store":
                    self._start_outage("store", rng.choice((2.0, 20.0, 180.0)) * rng.random())
                case "catalog":
                    self._start_outage("catalog", rng.choice((2.0, 20.0, 180.0)) * rng.random())
                case "clock":
                    self.world.trace.count("clock jump")
                    self.world.trace.wall_offset_s += rng.choice((-3600.0, -5.0, 0.5, 3600.0))
                case "freeze" if self.opened.is_set():
                    self._freeze()
                case "foreign commit":
                    self.world.append_foreign()
                case "vanish":
                    self.world.trace.count("table vanishes")
                    self.world.weather.vanish(rng.choice(self.world.tables))
                case "rename":
                    self.world.trace.count("table renamed")
                    self.world.weather.rename(rng.choice(self.world.tables))
                case "bring back":
                    self.world.weather.bring_back(self.world.promises.drop_asked)
                case "cut off" if self.opened.is_set():
                    self._cut_off()
                case "shortage" if self.opened.is_set():
                    self._run_short()
                case _:
                    pass

    def _run_short(self) -> None:
        """Let descriptors or memory lack for a while: files can neither be made nor opened (R31)."""
        error = self._rng.choice(_LACKS)
        self.world.trace.count("shortage")
        for _ in range(self._rng.randint(1, 40)):
            self.disk.fail_next("create", error)
            self.disk.fail_next("open", error)

    def _cut_power_soon(self) -> None:
        self.world.trace.count("power cut inside a disk job")
        self.disk.cut_power_after(self._rng.randrange(25))

    def crash(self) -> None:
        """Cut this machine's power now."""
        if self.process.alive:
            self.world.trace.count("power cut")
            self._end(self.disk.crash)

    def _end(self, effect: Callable[[], None]) -> None:
        if self.process.alive:
            self.process.die()
            effect()

    def _freeze(self) -> None:
        """Freeze the machine; the log goes on in another one, and it wakes when that one has taken over."""
        self.world.trace.count("freeze")
        self.process.freeze()
        self.superseded = True
        if self._rng.random() < 0.6:
            self.world.disk = self.disk.fork()
        else:
            self.world.lose_disk()
        self.left.set()

    def _cut_off(self) -> None:
        """Cut the machine off from store and catalog; it goes on, while another one takes the log over."""
        self.world.trace.count("cut off")
        self.process.cut_off = True
        self.superseded = True
        self.world.lose_disk()
        self.left.set()

    def _judge(self, error: BaseException) -> None:
        """Tell what a process may end with from what it may not."""
        for leaf in _leaves(error):
            if isinstance(leaf, PromiseBroken):
                raise leaf
            allowed: tuple[type[BaseException], ...] = (trio.Cancelled,)
            if not self.quiet:
                # What the disk and the store do to a process, and what the next owner does to a frozen one.
                allowed += (OSError, StoreUnavailable)
            cause = leaf.__cause__ if leaf.__cause__ is not None else leaf
            if self.opened.is_set() and isinstance(cause, OSError) and cause.errno in _LACKS:
                raise PromiseBroken(f"{self.name} ended for lack of something: {leaf!r}") from leaf
            poisoned = isinstance(leaf, ArkaError) and leaf.code is ErrorCode.OUTCOME_UNKNOWN and not self.quiet
            fenced = isinstance(leaf, Fenced) and self.superseded
            if not self.process.alive or isinstance(leaf, allowed) or poisoned or fenced:
                self.world.trace.note(f"end: {self.name}: {type(leaf).__name__}: {leaf}")
                if fenced:
                    self.world.trace.counts["fenced"] += 1
                continue
            self.world.trace.note(f"BROKEN: {self.name} ended with {leaf!r}")
            where = "".join(traceback.format_exception(leaf)[-6:])
            raise PromiseBroken(f"{self.name} ended with {leaf!r}\n{where}") from leaf

    def take_told(self) -> None:
        """Note how far this process has called its tables committed, if its disk is the log's."""
        if self._log is not None and not self.superseded:
            for table in self._log.pipeline.tables.all():
                self.world.promises.take_told(table.info.uuid, table.committed.lsn)

    def _bury(self) -> None:
        if self._log is not None:
            self.world.promises.take_given(self._log.pipeline.memory.last_lsn)
            self.take_told()
        if self.process.alive:
            # It ended by itself: the page cache stays.
            self._end(self.disk.kill)
        self.world.trace.note(f"end: {self.name}")
        self.left.set()

    # -- the end ----------------------------------------------------------------------------------

    async def _watch_room(self) -> None:
        """Look for room that nobody can overlook: half of the disk's limit is free, and the table has little in it."""
        limit = self.limits.disk_bytes
        while True:
            tables = self.pipeline.tables
            used = self.pipeline._space.used_bytes + self.pipeline.unwritten_bytes()
            for table in tables.all():
                waiting = table.backlog.frame_bytes + tables.apart.behind_bytes(table)
                if used < limit // 2 and waiting < limit // 4:
                    self.world.promises.note_room(self.name, table.info.uuid)
            await trio.sleep(0.25)

    async def _hold_up_tables(self) -> None:
        """Let the commits of one table fail for a while, beside others that go on (R33)."""
        rng, world = self.world.shortage_rng, self.world
        while True:
            await trio.sleep(rng.uniform(0.1, 3))
            name = rng.choice(world.tables)
            world.trace.count("table held up")
            world.weather.tables.unreadable.add(name)
            try:
                await trio.sleep(rng.choice((1.0, 10.0, 60.0)) * rng.random())
            finally:
                world.weather.tables.unreadable.discard(name)

    async def _watch_memory(self) -> None:
        """Hold the ledger against what it counts."""
        while True:
            await trio.sleep(0.25)
            charged = self.ledger.statistics().charged_bytes + self.decode_room.used_bytes
            # Control frames and TABLE frames are nobody's message.
            if self.pipeline.memory.queued_bytes > charged + 16 * KIB:
                self.world.promises.fail(
                    f"{self.pipeline.memory.queued_bytes} bytes wait for the disk, {charged} are charged"
                )

    async def _watch_stalls(self) -> None:
        """Check that what stands still is said: no stall without a word (R35)."""
        since: dict[Table, tuple[tuple[int, ...], float]] = {}
        while True:
            await trio.sleep(1.0)
            for table in self.pipeline.tables.all():
                marks = tuple(self.pipeline.table_marks(table).values())[1:]
                waits = table.state is TableState.ACTIVE and table.last_lsn > table.committed.lsn
                known, started = since.get(table, ((), 0.0))
                if not waits or marks != known or not self.process.alive:
                    since[table] = (marks, trio.current_time())
                elif trio.current_time() - started > _SILENCE_S and self.pipeline.stalled(table) is None:
                    self.world.promises.fail(f"{table.info.name} stands still at {marks}, and nobody says so")

    async def _drain(self) -> None:
        """Let every writer finish and everything come down."""
        with trio.move_on_after(_DRAIN_S) as scope:
            await trio.sleep(2.0)
            await self._give_up_nameless()
            self.draining = True
            await self.world.wait_writers(self)
            self.pipeline.start_drain()
            await self.pipeline.wait_drained()
        if scope.cancelled_caught:
            self.world.promises.fail(f"a quiet engine did not drain in {_DRAIN_S:g} s")

    async def _give_up_nameless(self) -> None:
        """Drop, as a person does, tables that are gone and whose names others have now: what is parked takes room."""
        tables = self.pipeline.tables
        named = {table.info.name for table in tables.all() if table.state is TableState.ACTIVE}
        for table in tables.all():
            if table.state is TableState.STOPPED and table.info.name in named and _LOWER not in table.ending_detail:
                self.world.trace.count("nameless table dropped")
                await self._persist(partial(tables.drop, table.info.name, purge=False, uuid=table.info.uuid))

    async def _stop(self) -> None:
        """Stop as ``arka.server`` does."""
        await self.pipeline.close()
        charged = self.ledger.statistics().charged_bytes + self.decode_room.used_bytes
        if charged and self.process.alive and not self.process.frozen:
            self.world.promises.fail(f"{charged} bytes are charged and all streams have ended")


class _World:
    """One seed's run."""

    def __init__(self, seed: int, trace: Trace, faults: Collection[str]) -> None:
        self.rng = rng = random.Random(f"world {seed}")
        self.trace = trace
        self.disk = MachineDisk(rng, UUID(int=0xD15C))
        self.store = SimStore(rng)
        self.weather = CatalogWeather(rng, trace)
        self.weather.on_commit = self._take_commit
        self.promises = Promises(trace, self.store.objects)
        self.store.on_delete = self.promises.take_object
        odd = random.Random(f"unwritable {seed}")
        self.promises.poison_every = odd.choice((0, 0, 0, 5, 17))
        self.promises.poison = self.weather.tables.poison
        self.weather.most_frames = odd.choice((0, 0, 0, 2, 9))
        self.weather.most_written = odd.choice((0, 0, 0, 1, 3))
        self.pace = _choose_pace(random.Random(f"pace {seed}"), faults)
        self.tables = [TableName("default", f"t{number}") for number in range(rng.randint(1, 3))]
        self._keyed = {name for name in self.tables if rng.random() < 0.4}
        self.writers = [
            Writer(number, rng.choice(self.tables), self.promises, random.Random(rng.random()))
            for number in range(rng.randint(1, 4))
        ]
        for writer in self.writers:
            writer.rest_s = self.pace.rest_s
        # Of its own, so that a seed's history without shortage stays what it is.
        self.shortage_rng = shortage = random.Random(f"shortage {seed}")
        #: Whether the disk has little room, and tables fall behind one by one.
        self.short = shortage.random() < 0.3
        self.weather.clear_rng = clear = random.Random(f"clear {seed}")
        self.weather.cleared_share = clear.choice((0.0, 0.0, 0.0, 0.02, 0.2))
        limits = replace(Limits(), disk_free_bytes=0)
        if self.short:
            limits = replace(limits, disk_bytes=shortage.choice((48, 160)) * KIB, stall_s=shortage.choice((3.0, 20.0)))
        self.promises.stall_s = limits.stall_s
        self.settings = Settings(
            server=ServerOptions(node_id="sim"),
            limits=limits,
            wal=WalOptions(
                segment_bytes=rng.choice((8, 32, 256)) * KIB,
                group_bytes=rng.choice((1, 64)) * KIB,
                release_grace_s=rng.choice((0.0, 1.0)),
            ),
            object_store=ObjectStoreOptions(
                linger_s=rng.choice((0.0, 0.05)), bytes=rng.choice((4, 64)) * KIB, uploads=rng.randint(1, 4)
            ),
            iceberg=IcebergOptions(commit_interval_s=rng.choice((0.02, 0.5)), commit_bytes=rng.choice((4, 64)) * KIB),
            # Longer than a run, shorter than what the wall clock jumps.
            idempotency=IdempotencyOptions(retention_s=3599.0),
        )
        # Of its own, too.
        self._hiding_rng = hiding = random.Random(f"warehouse {seed}")
        #: Whether the warehouse, or a file in it, is hidden at times (R28).
        self._hides = hiding.random() < 0.4
        warehouse = self.weather.warehouse
        warehouse.local = hiding.random() < 0.6
        warehouse.on_marker = self._take_marker
        self.promises.shows = warehouse.shows
        # Of its own, too.
        self._backup_rng = backups = random.Random(f"backup {seed}")
        #: Whether somebody restores the catalog from a backup at times (R28).
        self._restores = backups.random() < 0.25 or _RESTORE in faults
        # Of its own, too.
        self._slow_rng = slow = random.Random(f"slow {seed}")
        #: Whether the store is slow in some lives (R35).
        self._slows = slow.random() < 0.25 or _SLOW in faults
        # Of its own, too.
        self._unmarking_rng = unmarking = random.Random(f"marks {seed}")
        #: Whether others remove marks, and expire snapshots, while no server runs (R15, R20).
        self._unmarks = not self._restores and (unmarking.random() < 0.25 or _UNMARKED in faults)
        # The marks that others removed, by table; and tables that they put back below what was acknowledged.
        self._unmarked: dict[UUID, dict[UUID, Any]] = {}
        self._undone: set[UUID] = set()
        # What tables that were put back to a backup held before that, and then, by UUID.
        self._newest: dict[UUID, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._life: _Life | None = None
        self._outages: Counter[str] = Counter()
        self._nursery: trio.Nursery | None = None
        trace.on_event = self._take_event

    async def run(self, scope: trio.CancelScope) -> None:
        """Some lives with faults, then a quiet one, then one that finds everything in order.

        Args:
            scope: is cancelled when the run takes more steps than any may.
        """
        with scope:
            async with trio.open_nursery() as nursery:
                await self._live(nursery)

    async def _live(self, nursery: trio.Nursery) -> None:
        rng = self.rng
        self._nursery = nursery
        frozen: list[_Life] = []
        hiding, restoring = trio.CancelScope(), trio.CancelScope()
        if self._hides:
            nursery.start_soon(self._hide, hiding)
        if self._restores:
            nursery.start_soon(self._restore, restoring)
        lives = rng.randint(1, 5)
        for number in range(3 * lives):
            self.store.fault_share = rng.choice(self.pace.shares)
            self.store.max_delay_s = rng.choice((0.0, 0.05, 1.0))
            if self._slows and self._slow_rng.random() < 0.5:
                self.trace.count(_SLOW)
                self.store.max_delay_s = self._slow_rng.choice(_SLOW_S)
            self.weather.fault_share = rng.choice(self.pace.shares)
            self.weather.max_delay_s = rng.choice(self.pace.delays_s)
            life = await self._begin(number, quiet=False)
            nursery.start_soon(self._wake, list(frozen), life)
            await life.left.wait()
            for old in frozen:
                old.crash()
            frozen = [life] if life.process.alive else []
            if not frozen and rng.random() < 0.1:
                self.lose_disk()
            lives -= life.opened.is_set()
            if not lives:
                break
            await trio.sleep(rng.uniform(0, 2 if life.opened.is_set() else 60))
            if self._unmarks and life.disk.uuid == self.disk.uuid:
                self._remove_marks()
        hiding.cancel()
        restoring.cancel()
        self._show()
        self.store.calm()
        self.weather.calm()
        self.weather.bring_back(self.promises.drop_asked)
        self._return()
        for number, after_s in ((90, 0.0), (91, 3.0)):
            life = await self._begin(number, quiet=True)
            nursery.start_soon(self._wake, list(frozen), life)
            await life.left.wait()
            for old in frozen:
                old.crash()
            frozen = []
            await trio.sleep(after_s)
            for found in self.weather.tables._tables.values():
                if any(later <= earlier for earlier, later in pairwise(found.times)):
                    self.promises.fail(f"{found.info.name}: the times of its snapshots go back: {found.times}")
            self.promises.check_end({table.info.uuid for table in self.weather.tables._tables.values()})
            self._check_keyed()
        nursery.cancel_scope.cancel()

    def definition(self, name: TableName) -> TableDefinition:
        """What the table of this name is made as."""
        return wide_definition(name, keyed=name in self._keyed)

    def _check_keyed(self) -> None:
        for name, table in self.weather.tables._tables.items():
            if table.info.table_type is TableType.PRIMARY_KEY:
                rows = self.weather.tables.rows(name).to_pylist()
                self.promises.check_keyed(table.info.uuid, [(row["id"], row["part"]) for row in rows])

    async def _begin(self, number: int, *, quiet: bool) -> _Life:
        assert self._nursery is not None
        life = self._life = _Life(self, number, quiet=quiet)
        self.trace.counts["lives"] += 1
        self._nursery.start_soon(life.run, self.writers, self._nursery)
        return life

    async def _wake(self, frozen: Iterable[_Life], life: _Life) -> None:
        """Wake frozen machines some time after another one has taken their log over."""
        await life.opened.wait()
        # A start without the store has taken nothing over: of two copies of one disk under one epoch, nobody can tell
        # which is the log (docs/durability.md). Polled on virtual time.
        while not life.pipeline.uplink.connected and life.process.alive:  # noqa: ASYNC110
            await trio.sleep(0.5)
        if not life.pipeline.uplink.connected:
            return
        await trio.sleep(self.rng.uniform(0, 2))
        for old in frozen:
            self.trace.note(f"thaw: {old.name}")
            old.process.thaw()

    async def wait_writers(self, life: _Life) -> None:
        """Wait until each client has nothing left to send."""
        # Polled on virtual time: nothing but the writers' own bookkeeping changes.
        while any(self._expects(writer) for writer in self.writers) and life.process.alive:  # noqa: ASYNC110
            await trio.sleep(0.5)

    def _expects(self, writer: Writer) -> bool:
        """Whether a client still has something to send; what it sent to a table that is dropped has no end."""
        return any(write.table not in self.promises.drop_asked for write in writer.unfinished)

    def lose_disk(self) -> None:
        """Let the log go on with an empty disk."""
        self.trace.count("node loss")
        # A log that is joined to nothing cannot tell; what it does then is a unit test's.
        self._show()
        # What the lost disk knew of removed marks is gone with it: a limit.
        self._mark_again()
        self.disk = MachineDisk(self.rng, UUID(int=self.disk.uuid.int + 1))
        self.promises.take_node_loss()
        self._undone.clear()

    def _remove_marks(self) -> None:
        """Let others remove a table's mark, and all that says how far it is, while no server runs; its rows stay."""
        log_uuid, told = self.promises.log_uuid, self.promises.told_committed
        if log_uuid is None or self.weather.is_late:
            # A request that comes late would be another process's doing.
            return
        for table in self.weather.tables._tables.values():
            mark = table.marks.get(log_uuid)
            # What was not acknowledged may have been recorded or not.
            known = mark is not None and mark.committed_lsn <= told.get(table.info.uuid, 0)
            if known and self._unmarking_rng.random() < 0.5:
                self.trace.count(_UNMARKED)
                self._unmarked[table.info.uuid] = dict(table.marks)
                table.marks.clear()

    async def _hide(self, scope: trio.CancelScope) -> None:
        """Exchange or empty the warehouse for a while, or take a file of one table away until then (R28, R33)."""
        rng, warehouse = self._hiding_rng, self.weather.warehouse
        with scope:
            while True:
                await trio.sleep(rng.uniform(0.3, 6))
                tables = [table.info.uuid for table in self.weather.tables._tables.values()]
                if not tables or self.disk.warehouse is None:
                    # Before it is joined, nothing tells another warehouse from the own one.
                    continue
                self.promises.take_hidden()
                if rng.random() < 0.3:
                    self.trace.count("file of a table gone")
                    warehouse.lose_file(rng.choice(tables))
                else:
                    marker = rng.choice((None, UUID(int=rng.getrandbits(128))))
                    self.trace.count("warehouse emptied" if marker is None else "warehouse exchanged")
                    warehouse.exchange(marker)
                await trio.sleep(rng.choice((0.2, 3.0, 40.0)) * rng.random())
                self._show()

    async def _restore(self, scope: trio.CancelScope) -> None:
        """Restore the catalog from a backup that is older than what servers have committed since (R28)."""
        rng = self._backup_rng
        with scope:
            while True:
                await trio.sleep(rng.uniform(0.3, 4))
                backup = self.weather.back_up()
                await trio.sleep(rng.choice((0.3, 3.0, 30.0)) * rng.random())
                newest = self.weather.back_up()
                if self._life is not None:
                    self._life.take_told()
                # A table that was put back once stays so: nobody commits to it.
                restored = self.weather.restore({t: data for t, data in backup.items() if t not in self._newest})
                if restored:
                    self.trace.count(_RESTORE)
                for table, changes in restored.items():
                    self._newest[table] = newest[table], backup[table]
                    marks = backup[table]["marks"].values()
                    lsn = max((mark.committed_lsn for mark in marks), default=0)
                    if lsn < self.promises.told_committed.get(table, 0) and not self.weather.is_late:
                        self._undone.add(table)
                    self.promises.take_restore(table, changes)

    def _return(self) -> None:
        """Put tables of a restored catalog where they were before, as servers ask for.

        To those that went on from the backup nobody does that: their server knew of no later commit, since its disk was
        lost or nothing was acknowledged, and replayed all.
        """
        self._mark_again()
        marks = {table.info.uuid: table.marks for table in self.weather.tables._tables.values()}
        stopped = {t: newest for t, (newest, put_back) in self._newest.items() if marks.get(t) == put_back["marks"]}
        for table in self._undone & marks.keys() - stopped.keys():
            self.promises.fail(f"table {table} went on below what was acknowledged, which others had undone")
        for table, changes in self.weather.restore(stopped).items():
            self.promises.take_return(table, changes)

    def _mark_again(self) -> None:
        """Put the marks that others removed where they were."""
        for found in (*self.weather.tables._tables.values(), *(table for _, table in self.weather._vanished)):
            if found.info.uuid in self._unmarked and not found.marks:
                found.marks.update(self._unmarked[found.info.uuid])

    def _show(self) -> None:
        """Let everything be in the warehouse again."""
        warehouse = self.weather.warehouse
        warehouse.bring_back()
        warehouse.gone.clear()

    def _take_marker(self) -> None:
        """Hear of a marker in a warehouse that is not the log's own: the catalog may hold no table then (R28)."""
        if self.weather.tables._tables and trio.current_time() - self.weather.changed_s > _CHANGED_S:
            self.promises.fail("a marker was made in a warehouse that lacks our tables")

    def start_outage(self, what: str, seconds: float) -> None:
        """Let the store or the catalog be away for a while."""
        assert self._nursery is not None
        self.trace.count(f"{what} outage")
        self._nursery.start_soon(self._outage, what, seconds)

    async def _outage(self, what: str, seconds: float) -> None:
        self._outages[what] += 1
        self._set_away(what)
        await trio.sleep(seconds)
        self._outages[what] -= 1
        self._set_away(what)

    def _set_away(self, what: str) -> None:
        away = self._outages[what] > 0
        if what == "store":
            self.store.away = away
        else:
            self.weather.away = away

    def change_schema(self) -> None:
        """Let others change the columns of a table of ours."""
        name = self.rng.choice(self.tables)
        what, change = change_schema(self.rng)
        table = self.weather.tables._tables.get(name)
        if table is not None:
            self.trace.count(f"schema {what}")
            self.weather.tables.foreign_schema(name, change)
            self.promises.take_schema(table.info.uuid, table.info.schema_id)

    def append_foreign(self) -> None:
        """Let another writer add a snapshot to a table of ours."""
        name = self.rng.choice(self.tables)
        if name in self.weather.tables._tables:
            self.trace.count("foreign commit")
            table = self.weather.tables._tables[name]
            self.weather.tables.foreign_append(name, pa.RecordBatch.from_pylist([], schema=table.info.schema))
            self.promises.take_snapshot(table.info.uuid, table.snapshots[-1])

    def _take_commit(self, job: CommitJob, changes: list[FrameRows]) -> None:
        table = self.weather.tables._tables[job.table.name]
        self.promises.take_commit(job, changes, table.snapshots[-1])

    def _take_event(self, event: str, fields: Any) -> None:
        if event == "table.stopped":
            # A process that was cut off may drop a table whose drop its successor never hears of.
            if _LOWER in fields["reason"] and (self._newest or self._unmarked):
                return
            missed = self.weather.vanished | self.promises.drop_asked | self.weather.warehouse.was_gone
            if not any(str(uuid) in fields["reason"] for uuid in missed):
                self.promises.fail(f"a table was stopped: {fields}")
        if event == "table.parked":
            self.trace.counts["parked"] += 1
        if event in ("table.set_apart", "disk.refusing", "table.refusing"):
            self.trace.counts[event] += 1


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    elif isinstance(error, trio.TrioInternalError) and error.__cause__ is not None:
        # What a signal handler raised, such as a test's deadline, may come wrapped.
        yield from _leaves(error.__cause__)
    else:
        yield error


def simulate(seed: int, faults: Collection[str] = ()) -> Outcome:
    """Run one seed.

    Args:
        seed: decides everything.
        faults: of ``FAULTS``, those that may happen to a server, and "catalog restored", "slow store" and "marks
            removed", which then do; none given: the seed chooses.

    Returns:
        What became of it; never raises for a broken promise.
    """
    trace = Trace()
    broken: str | None = None
    blocks = random.Random(f"blocks {seed}")
    disk_block, store_block = blocks.choice(((64, 256), (1 << 24, 1 << 32)))
    with (
        deterministic(seed, trace),
        mock.patch("arka.tiers.startup.DISK_BLOCK", disk_block),
        mock.patch("arka.tiers.reservation.DISK_BLOCK", disk_block),
        mock.patch("arka.tiers.epochs.STORE_BLOCK", store_block),
        mock.patch("arka.tiers.memory.LEFT_FOR_OUTCOMES", min(128, disk_block // 8)),
        # Each commit looks: how old a look may be is a bound, and no promise of a moment.
        mock.patch("arka.tiers.warehouse.SEEN_S", 0.0),
    ):
        try:
            world = _World(seed, trace, faults)
            limit = StepLimit()
            trio.run(world.run, limit.scope, clock=MockClock(autojump_threshold=0), instruments=[limit])
            if limit.broken is not None:
                broken = limit.broken
            trace.counts.update({f"acks {word}": count for word, count in world.promises.acks.items()})
            trace.counts["writes"] += len(world.promises.writes)
            trace.counts["commits"] += sum("commit: " in line for line in trace.lines)
        except BaseException as error:
            leaves = list(_leaves(error))
            if not all(isinstance(leaf, Exception) for leaf in leaves):
                raise
            named = [leaf for leaf in leaves if isinstance(leaf, PromiseBroken)] or leaves
            broken = (
                str(named[0])
                if isinstance(named[0], PromiseBroken)
                else "".join(traceback.format_exception(named[0])[-8:])
            )
    return Outcome(seed, broken, tuple(trace.lines), trace.counts)


def simulate_many(seeds: Iterable[int], processes: int) -> Iterator[Outcome]:
    """Run many seeds in processes of their own; passing ones come back without their trace."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_simulate_short, seeds, chunksize=4)


def _simulate_short(seed: int) -> Outcome:
    outcome = simulate(seed)
    return outcome if outcome.broken is not None else replace(outcome, trace=())


def main() -> int:
    """Run seeds from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=300, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    started = time.monotonic()
    counts: Counter[str] = Counter()
    failed = []
    for outcome in simulate_many(range(options.first, options.first + options.seeds), options.processes):
        counts.update(outcome.counts)
        if outcome.broken is not None:
            failed.append(outcome.seed)
            sys.stdout.write(outcome.describe() + "\n\n")
    for name in sorted(counts):
        sys.stdout.write(f"{name:40} {counts[name]:10,}\n")
    seconds = time.monotonic() - started
    sys.stdout.write(
        f"{options.seeds} seeds, {len(failed)} failed {sorted(failed)[:50]}, {options.seeds / seconds:.1f} seeds/s\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

__all__ = ["FAULTS", "Outcome", "simulate", "simulate_many"]
