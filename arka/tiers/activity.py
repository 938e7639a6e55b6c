"""Which tables are written to, durably, so that a crash counts against nobody whom it cannot have hurt (R37).

Owns: whether a table is *quiet*, and the record of each change in the log. Invariant, asserted on both sides: while a
table is quiet none of its writes is acknowledged; *writing* is on disk before the first ack after quiet, and *quiet*
is recorded only behind all of the table's writes. Does not own what follows from it (``Pipeline.resume_marks``), nor
what a start reads of it (``arka.tiers.replay``).

A stream holds its table open from its first write to its end: that costs one fsync after a pause, and nothing for each
write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio

from arka.errors import Unavailable
from arka.slices import slices_of
from arka.tiers.memory import MemoryTier
from arka.tiers.table import Table, TableState
from arka.tiers.watermarks import Watermark
from arka.wal.segment import KIND_ACTIVITY, Activity

#: A table without an open stream is looked at for so long before it counts as quiet, in seconds: less than the second
#: that the contract names, since the record has to reach the disk too.
_QUIET_S: Final = 0.5
#: The pause between two looks at the tables, in seconds.
_LOOK_S: Final = 0.2


class TableActivity:
    """Records when tables become quiet and when they are written to again. Used from trio's thread only."""

    def __init__(
        self, memory: MemoryTier, disk: Watermark, birth: Callable[[], int], tables: Callable[[], Iterable[Table]]
    ) -> None:
        """Join it to the log.

        Args:
            memory: takes the records into the log's order.
            disk: the ``disk`` mark.
            birth: returns that of the log on this disk.
            tables: returns all tables.
        """
        self._memory = memory
        self._disk = disk
        self._birth = birth
        self._tables = tables
        self._closed = False

    async def hold(self, table: Table) -> None:
        """Hold a table open for a stream's writes; to be undone by ``let_go``.

        Cancellation: it is not held.

        Durability: on return the disk knows that the table is written to.
        """
        table.streams += 1
        try:
            if table.quiet:
                self.note_writing(table)
            # Also for a stream that comes while another one's record is on its way.
            await self._disk.wait_reached(table.writing_lsn)
        except BaseException:
            self.let_go(table)
            raise

    def let_go(self, table: Table) -> None:
        """End what ``hold`` began."""
        table.streams -= 1
        table.idle_since = trio.current_time()

    def note_writing(self, table: Table) -> None:
        """Record that a quiet table is written to; no ack may leave before the record is on disk.

        Raises:
            Unavailable: no LSN can be given now; nothing has changed.
        """
        # First the record: where no LSN can be given, the table stays quiet.
        table.writing_lsn = self._record([table], quiet=False)
        table.quiet = False
        table.idle_since = trio.current_time()

    def close(self) -> None:
        """Record nothing more: the log is about to be closed, which says more."""
        self._closed = True

    async def run(self) -> None:
        """Record tables that have become quiet, until cancelled. Cancellation: they stay as they were."""
        while not self._closed:
            await trio.sleep(_LOOK_S)
            for tables in slices_of(self._tables()):
                self._look(tables)
                await trio.lowlevel.checkpoint()

    def _look(self, tables: Sequence[Table]) -> None:
        """Record which of some tables have become quiet, by one record; a look and its record lie in one step."""
        now = trio.current_time()
        quiet = [table for table in tables if self._is_quiet(table, now)]
        if not quiet or self._closed:
            return
        try:
            self._record(quiet, quiet=True)
        except Unavailable:
            # No LSN can be given now (R31): they become quiet later.
            return
        for table in quiet:
            table.quiet = True

    def _is_quiet(self, table: Table, now: float) -> bool:
        if table.quiet or table.streams or table.state is TableState.DROPPED:
            return False
        if table.idle_since is None:
            table.idle_since = now
        # All of its writes are on disk, so the record comes behind them there too.
        return now - table.idle_since >= _QUIET_S and table.last_lsn <= self._disk.lsn

    def _record(self, tables: Sequence[Table], *, quiet: bool) -> int:
        record = Activity(self._birth(), quiet, tuple(table.info.uuid for table in tables))
        return self._memory.append_control(KIND_ACTIVITY, record.to_bytes())


__all__ = ["TableActivity"]
