"""Setting tables apart: one that is far behind does not hold the shared log (R33).

Owns: when a table is set apart, the way of its frames from the store back into its commits, and its room for new
writes. Does not own the objects' form (``arka.tiers.parking``), commits (``arka.tiers.committer``) nor the disk's room.

The frames of a table that is set apart lie below ``behind/<table uuid>/`` in the object store, one object after the
other. While there are any, commits take from those alone, in LSN order; what was accepted since waits in the log. A
table is in no other respect different: it takes writes while it is below its share, and ends as other tables do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Final
from uuid import UUID

import structlog
import trio

from arka.errors import AdmissionRejected
from arka.records import HeldObject
from arka.slices import slices_of
from arka.tiers.backlog import Backlog
from arka.tiers.parking import Parking
from arka.tiers.table import Table, TableState
from arka.tiers.watermarks import Watermark

log = structlog.get_logger(__name__)

#: How often tables are compared, in seconds.
_POLL_S: Final = 1.0
#: A table commits if it did so in so many seconds.
_COMMITS_S: Final = 15.0
#: The share of ``limits.disk_bytes`` that one table's frames may take of the log where there are others: those find
#: room to commit, which is what shows that this one is behind.
_MOST_SHARE: Final = 0.6


@dataclass(slots=True)
class _State:
    """What is known of one table.

    Attributes:
        committed_lsn: at the last look.
        committed_at: when it last rose (trio's clock).
        wanted: it is to be set apart.
        commits: the scope in which it commits.
    """

    committed_lsn: int
    committed_at: float = -1e9
    wanted: bool = False
    commits: trio.CancelScope | None = field(default=None)


class Apart:
    """The tables of one log that are set apart. Used from trio's thread only."""

    def __init__(
        self,
        behind: Parking,
        objects: Watermark,
        *,
        limit_bytes: int,
        share: float,
        log_bytes: Callable[[int], int],
    ) -> None:
        """Say what a table may take.

        Args:
            behind: keeps the frames; its folder is ``behind``.
            objects: the ``object_storage`` mark; nothing above it is moved (R4).
            limit_bytes: ``limits.disk_bytes``.
            share: ``limits.table_disk_share``.
            log_bytes: returns how many bytes of the log are held from an LSN on.
        """
        self._unwritten_bytes: Callable[[], int] = int
        self._copying = trio.Lock()
        self._behind = behind
        self._objects = objects
        self._limit_bytes = limit_bytes
        self._share_bytes = int(limit_bytes * share)
        self._most_bytes = int(limit_bytes * max(share, _MOST_SHARE))
        self._log_bytes = log_bytes
        self._states: dict[UUID, _State] = {}
        # Whether there are several tables.
        self._several = False

    @property
    def loaded(self) -> bool:
        """Whether the store was asked what is there."""
        return self._behind.loaded

    def behind_bytes(self, table: Table) -> int:
        """Bytes of a table that are set apart."""
        return self._behind.frame_bytes(table.info.uuid)

    def through_lsn(self, table: Table) -> int:
        """The last LSN of a table that is set apart; 0 for none."""
        return self._behind.parked_through(table.info.uuid)

    def check(self, table: Table) -> None:
        """See ``Parking.check``."""
        self._behind.check(table)

    def held(self) -> dict[UUID, list[HeldObject]]:
        """See ``Parking.held``."""
        return self._behind.held()

    async def load(self) -> None:
        """Look what an earlier process set apart, once there is an epoch; see ``Parking.load``."""
        await self._behind.load()

    async def forget(self, uuid: UUID) -> None:
        """Delete what is set apart of a table that was dropped; see ``Parking.forget``."""
        self._states.pop(uuid, None)
        if self._behind.loaded:
            await self._behind.forget(uuid)

    def count_unwritten(self, unwritten_bytes: Callable[[], int]) -> None:
        """Count what was accepted and is in no table's backlog yet.

        Args:
            unwritten_bytes: returns how much that is, of all tables.
        """
        self._unwritten_bytes = unwritten_bytes

    @asynccontextmanager
    async def copied(self, table: Table, room_bytes: Callable[[], int]) -> AsyncIterator[Backlog]:
        """Copy what is set apart of a table to the local disk, for a read; one read at a time has such a copy (R25).

        Args:
            table: what is read.
            room_bytes: returns how many bytes the disk has for it.

        Raises:
            AdmissionRejected: ``overloaded``: the disk has no room.
            DataCorruption: an object is damaged.
        """
        if not self.behind_bytes(table):
            yield Backlog()
            return
        async with self._copying:
            if self.behind_bytes(table) > room_bytes():
                raise AdmissionRejected(
                    f"{table.info.name} is far behind: {self.behind_bytes(table)} bytes of it are set apart in the "
                    f"object store, and the disk has room for {room_bytes()} to read them: try again"
                )
            async with self._behind.copied(table) as behind:
                yield behind

    def take_over(self, table: Table) -> bool:
        """Forget what the log still has of what is set apart; see ``Parking.take_over``."""
        return self._behind.take_over(table)

    def take_up(self, table: Table) -> None:
        """Let a table's commits begin with what is set apart of it, before what its backlog has."""
        if not self.take_over(table):
            return
        through_lsn = self.through_lsn(table)
        table.last_lsn = max(table.last_lsn, through_lsn)
        table.behind_lsn = through_lsn
        self.judge_room(table)

    @contextmanager
    def committing(self, table: Table) -> Iterator[None]:
        """Commit inside this block; it is left when the table is to be set apart."""
        state = self._state(table)
        try:
            with trio.CancelScope() as scope:
                state.commits = scope
                if state.wanted:
                    scope.cancel()
                yield
        finally:
            state.commits = None

    async def move_if_wanted(self, table: Table) -> None:
        """Move a table's frames out of the log if it is to be set apart; nobody commits it meanwhile.

        Cancellation: what was moved stays so.

        Durability: each frame is in the store before the log lets go of it.
        """
        state = self._state(table)
        if not state.wanted or table.state is not TableState.ACTIVE:
            return
        frames = await self._behind.move(table, min(table.last_lsn, self._objects.lsn))
        table.behind_lsn = self._behind.parked_through(table.info.uuid)
        state.wanted = False
        log.warning(
            "table.set_apart",
            table=str(table.info.name),
            frames=frames,
            bytes=self.behind_bytes(table),
            through_lsn=table.behind_lsn,
        )
        self.judge_room(table)
        table.wake()

    async def feed(self, table: Table) -> None:
        """Bring back what is set apart, as the table commits it, until cancelled.

        Raises:
            DataCorruption: an object is damaged.

        Cancellation: the next start goes on.
        """
        while table.state is TableState.ACTIVE:
            if table.behind_lsn == 0:
                await table.changed.wait()
            elif table.committed.lsn >= table.behind_lsn:
                await self._behind.discard_through(table.info.uuid, table.committed.lsn)
                through_lsn = self._behind.parked_through(table.info.uuid)
                table.behind_lsn = through_lsn if through_lsn > table.committed.lsn else 0
                if not table.behind_lsn:
                    log.info("table.caught_up", table=str(table.info.name), through_lsn=table.committed.lsn)
                table.wake()
            elif table.fetched:
                await _wait_taken(table)
            else:
                table.effort.begin("the object store to give back what is set apart")
                found = await self._behind.fetch_first(table)
                found.discard_through(table.committed.lsn)
                if found:
                    table.fetched = found
                    table.wake()
            self.judge_room(table)

    async def run(self, tables: Callable[[], list[Table]]) -> None:
        """Look once a second which tables are too far behind, until cancelled.

        Args:
            tables: returns those that may be set apart.
        """
        while True:
            await trio.sleep(_POLL_S)
            await self.look(tables())

    async def look(self, tables: list[Table]) -> None:
        """Decide which of the tables are to be set apart, in slices: there may be thousands (T22)."""
        now = trio.current_time()
        self._several = len(tables) > 1
        # Of the tables that commit, the two that need the least of the log: each table is compared with another one.
        ahead: list[tuple[int, Table]] = []
        for some in slices_of(tables):
            for table in some:
                if table.state is not TableState.ACTIVE:
                    # Dropped meanwhile: nothing is kept of it.
                    continue
                state = self._state(table)
                if table.committed.lsn > state.committed_lsn:
                    state.committed_lsn, state.committed_at = table.committed.lsn, now
                self.judge_room(table)
                if self._commits(table, now):
                    ahead = nlargest(2, [*ahead, (self._needs(table), table)], key=lambda each: each[0])
            await trio.lowlevel.checkpoint()
        for some in slices_of(tables):
            for table in some:
                newest = next((lsn for lsn, other in ahead if other is not table), None)
                # Where no other one commits, whatever holds this one up may hold all of them up.
                if newest is not None and table.state is TableState.ACTIVE and self._lags(table, newest):
                    state = self._state(table)
                    state.wanted = True
                    if state.commits is not None:
                        state.commits.cancel()
            await trio.lowlevel.checkpoint()

    def _lags(self, table: Table, newest: int) -> bool:
        """Whether a table holds more of the log than its share, beside one that needs it from ``newest`` on."""
        first = table.backlog.first_lsn
        if first is None or first > self._objects.lsn:
            return False
        held = self._log_bytes(first) - self._log_bytes(newest) if newest > first else 0
        return max(table.backlog.frame_bytes, held) > self._share_bytes

    def _commits(self, table: Table, now: float) -> bool:
        return now - self._state(table).committed_at <= _COMMITS_S

    @staticmethod
    def _needs(table: Table) -> int:
        """The first LSN that a table needs from the log; above all of its own if there is none."""
        first = table.backlog.first_lsn
        return table.last_lsn + 1 if first is None else first

    def judge_room(self, table: Table) -> None:
        """Look whether a table may take more; also when it has taken ``room_left`` bytes since the last look."""
        behind = self.behind_bytes(table)
        waiting = behind + table.backlog.frame_bytes + self._unwritten_bytes()
        most = self._share_bytes if behind else self._most_bytes if self._several else self._limit_bytes
        table.room_left = most - waiting
        if table.state is not TableState.ACTIVE:
            return
        if waiting > most:
            table.room.close(
                f"{table.info.name} is far behind: {waiting} bytes of it wait to be committed, {behind} of them set "
                f"apart; its share is {most} (limits.table_disk_share of limits.disk_bytes)"
            )
        else:
            table.room.open()

    def _state(self, table: Table) -> _State:
        state = self._states.get(table.info.uuid)
        if state is None:
            state = self._states[table.info.uuid] = _State(table.committed.lsn)
        return state


async def _wait_taken(table: Table) -> None:
    """Wait until the table has committed some of what was brought back, or wants it again."""
    async with trio.open_nursery() as nursery:

        async def wait_emptied() -> None:
            while table.fetched:
                await table.changed.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait_emptied)
        await table.committed.wait_risen()
        nursery.cancel_scope.cancel()


__all__ = ["Apart"]
