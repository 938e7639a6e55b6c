"""One table's way from the log into Iceberg: its state and its backlog.

Owns: what streams, the log's tiers and the committer share about a table, and how it ends. Does not own
its commits (``arka.tiers.committer``) nor the log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from uuid import UUID

import trio

from arka._core.framing import Frame
from arka.errors import ArkaError, ErrorCode
from arka.records import TableInfo, Tier
from arka.storage.ports import CatalogTable, TableFrames
from arka.tiers.backlog import Backlog, Cut
from arka.tiers.room import Room
from arka.tiers.watermarks import Watermark


class TableState(Enum):
    """Whether a table takes writes."""

    ACTIVE = "active"
    #: dropped: writes in flight end with ``table_dropped``.
    DROPPED = "dropped"
    #: cannot be committed: refuses writes, keeps what it has (R18).
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a table takes no more writes, as its clients hear it."""

    state: TableState
    code: ErrorCode
    detail: str


class Table:
    """A table of this node: what streams, the log's tiers and the committer share about it.

    Used from trio's thread only.
    """

    def __init__(
        self,
        info: TableInfo,
        committed_lsn: int,
        snapshot_id: int | None,
        *,
        recorded_lsn: int = 0,
        known_from_lsn: int = 0,
    ) -> None:
        """Begin with no frames.

        Args:
            info: the table.
            committed_lsn: the last LSN that the catalog says it holds; 0 as long as nobody has asked.
            snapshot_id: its current snapshot.
            recorded_lsn: the last LSN that an earlier process saw committed: less in the catalog is a rollback (R20).
            known_from_lsn: no LSN up to here was given to one of its writes.
        """
        self.info = info
        self.recorded_lsn = recorded_lsn
        self.known_from_lsn = known_from_lsn
        self.committed = Watermark(Tier.ICEBERG_COMMITTED, committed_lsn, snapshot_id)
        self.backlog = Backlog()
        #: Whether its writes are let in: below the log's room once the table is in the node's list.
        self.room = Room("table", table=str(info.name))
        #: The schemas that waiting frames may use, by id (R24).
        self.schemas = {info.schema_id: info.schema}
        #: The last LSN given to a write of this table; recovery raises it.
        self.last_lsn = committed_lsn
        self.ending: Ending | None = None
        #: An ending that is decided and not yet certain: new writes are refused, those that wait are not told.
        self.coming: Ending | None = None
        #: LSN of the drop record while the catalog has not dropped the table yet.
        self.drop_lsn: int | None = None
        #: Whether its backlog and ``last_lsn`` speak of all its frames, parked ones too.
        self.taken_up = False
        self.hurried_lsn = 0
        self.changed = trio.Event()
        self._end_listeners: dict[Callable[[Ending], None], None] = {}

    @property
    def state(self) -> TableState:
        """Whether the table takes writes."""
        return self.ending.state if self.ending is not None else TableState.ACTIVE

    @property
    def is_committing(self) -> bool:
        """Whether what was accepted for it goes on its way to Iceberg."""
        return self.ending is None and self.coming is None

    def check_active(self) -> None:
        """Refuse a write to a table that takes none.

        Raises:
            ArkaError: ``table_dropped`` or ``table_stopped``.
        """
        ending = self.ending or self.coming
        if ending is not None:
            code = ending.code
            if code is ErrorCode.OUTCOME_UNKNOWN:
                code = ErrorCode.TABLE_STOPPED
            raise ArkaError(ending.detail, code=code)

    @property
    def ending_detail(self) -> str:
        """Why the table takes no writes, for people."""
        return "" if self.ending is None else self.ending.detail

    def adopt(self, found: CatalogTable, log_uuid: UUID) -> None:
        """Learn from the catalog what the log alone could not say: name, schema, how far the table is.

        Stops the table when it stands below what this process knows to be committed (R20).
        """
        self.info = found.info
        self.schemas.setdefault(found.info.schema_id, found.info.schema)
        committed_lsn = found.committed_lsn(log_uuid)
        if committed_lsn < max(self.committed.lsn, self.recorded_lsn):
            self.stop(rollback_detail(self, committed_lsn))
            return
        self.backlog.discard_through(committed_lsn)
        self.last_lsn = max(self.last_lsn, committed_lsn)
        self.committed.advance(committed_lsn, snapshot_id=found.snapshot_id)

    def frames(self, log_uuid: UUID, cut: Cut) -> TableFrames:
        """Say what a worker needs to read the frames of a cut of the backlog."""
        return TableFrames(
            table=self.info,
            schemas={number: schema.serialize().to_pybytes() for number, schema in self.schemas.items()},
            log_uuid=log_uuid,
            after_lsn=self.committed.lsn,
            through_lsn=cut.through_lsn,
            slices=cut.slices,
            size=cut.frame_bytes,
        )

    def note_durable(self, path: str, segment: int, epoch: int, frames: list[Frame], start: int, end: int) -> None:
        """Take ``frames[start:end]``, which are on disk, into the backlog."""
        if self.state is not TableState.DROPPED:
            self.backlog.add_frames(path, segment, epoch, frames, start, end)

    def note_recovered(self, path: str, segment: int, epoch: int, lsn: int, offset: int, frame_bytes: int) -> None:
        """Take a frame that was found on the disk into the backlog."""
        if self.state is not TableState.DROPPED:
            self.backlog.add(path, segment, epoch, lsn, offset, frame_bytes)

    def hurry(self) -> None:
        """Commit what there is without waiting for the interval."""
        self.hurried_lsn = self.last_lsn
        self.wake()

    def wake(self) -> None:
        """Let the committer look again."""
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    def end(self, ending: Ending) -> None:
        """Take no more writes, and tell the streams; the first ending stands."""
        if self.ending is not None:
            return
        self.ending = ending
        for listener in tuple(self._end_listeners):
            listener(ending)
        self.room.detach()
        self.wake()

    def stop(self, detail: str) -> None:
        """Stop a table that cannot be committed for good: waiting writes end with ``outcome_unknown`` (R18)."""
        self.end(Ending(TableState.STOPPED, ErrorCode.OUTCOME_UNKNOWN, detail))

    def listen_end(self, listener: Callable[[Ending], None]) -> None:
        """Call ``listener`` if the table ends; it must not raise or wait."""
        self._end_listeners[listener] = None

    def unlisten_end(self, listener: Callable[[Ending], None]) -> None:
        """Stop calling ``listener``."""
        self._end_listeners.pop(listener, None)


def rollback_detail(table: Table, found_lsn: int) -> str:
    """Say that a table stands below what was committed, with both numbers (R20)."""
    known_lsn = max(table.committed.lsn, table.recorded_lsn)
    return (
        f"Table {table.info.name} stands at LSN {found_lsn}, but {known_lsn} was committed: it was rolled back or "
        "replaced by others. Nothing is replayed (R20); drop it, or move it back and restart"
    )


__all__ = ["Ending", "Table", "TableState", "rollback_detail"]
