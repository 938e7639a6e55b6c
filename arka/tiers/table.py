"""One table's way from the log into Iceberg: its state and its backlog.

Owns: what streams, the log's tiers and the committer share about a table, and how it ends. Does not own
its commits (``arka.tiers.committer``) nor the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final
from uuid import UUID

import pyarrow as pa
import trio

from arka._core.framing import Frame
from arka.errors import ArkaError, DataCorruption, ErrorCode
from arka.lineage import CommitMark, Lineage
from arka.records import PartitionField, TableInfo, Tier, same_partitions
from arka.storage.ports import AcceptedSpec, CatalogTable, TableFrames
from arka.tiers.backlog import Backlog, Cut
from arka.tiers.room import Room
from arka.tiers.watch import Effort, Watched
from arka.tiers.watermarks import Watermark

#: Schema ids of tables are below this; what the log adds to one that others gave to other columns is a multiple of it.
SCHEMA_IDS: Final = 1 << 24
#: How often an id may be given to other columns while writes wait.
_OWN_IDS: Final = 1 << 7
#: Before every moment of trio's clock.
NEVER: Final = -1e18


class TableState(Enum):
    """Whether a table takes writes."""

    ACTIVE = "active"
    #: dropped: writes in flight end with ``table_dropped``.
    DROPPED = "dropped"
    #: cannot be committed: refuses writes, keeps what it has (R18).
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Binding:
    """The table as it was when writes from some LSN on were accepted (R24, R27).

    Attributes:
        from_lsn: of the first write that may be bound to it.
        info: the table then.
    """

    from_lsn: int
    info: TableInfo


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
        #: The highest mark of it that this directory has seen in the catalog, as of the start; None if none.
        self.recorded: CommitMark | None = None
        self.committed = Watermark(Tier.ICEBERG_COMMITTED, committed_lsn, snapshot_id)
        self.backlog = Backlog()
        #: What is set apart in the object store goes up to here; 0 if nothing is (R33). Invariant: it lies below the
        #: backlog, and ``fetched`` is the part of it that was brought back to be committed.
        self.behind_lsn = 0
        self.fetched = Backlog()
        #: How many bytes may be accepted until somebody looks whether that is still so.
        self.room_left = 0
        #: What is tried to bring its writes into Iceberg, for the watch (R35).
        self.effort = Effort("the catalog, which has not named the table since the start")
        self.watched: Watched | None = None
        #: Whether its writes are let in: below the log's room once the table is in the node's list.
        self.room = Room("table", table=str(info.name))
        #: The schemas that waiting frames may use, by id (R24).
        self.schemas = {info.schema_id: info.schema}
        # What waiting frames were accepted under. Invariant: from_lsn rises; the last one is ``info``.
        self._bindings = [Binding(0, info)]
        #: When the catalog was asked for what ``info`` says (trio's clock), and how often something was adopted.
        self.adopted_at = NEVER
        self.adoptions = 0
        #: Its properties as the catalog had them last; in ``info`` are those that have an effect.
        self.properties: Mapping[str, str] = info.properties
        #: What others made of the table that Arka cannot write, as of the last look: new writes are refused (R27).
        self.refusal = ""
        #: The name that others gave it if Arka cannot spell that name, as ``refusal`` says too; else empty.
        self.misnamed = ""
        #: Why it takes no writes while a file that its current metadata needs is gone; "" while none is known to be
        #: (R33). Its owner is the task that commits the table: an answer of the catalog alone does not end it.
        self.gone = ""
        #: Why its next waiting write is held back: others changed columns so that it does not fit (R24).
        self.held_back = ""
        #: The partition specs that it has, as of the last look; None before that.
        self.specs: Mapping[int, tuple[PartitionField, ...]] | None = None
        #: What others set that has no effect here.
        self.remarks: tuple[str, ...] = ()
        #: The last LSN given to a write of this table; recovery raises it.
        self.last_lsn = committed_lsn
        self.ending: Ending | None = None
        #: An ending that is decided and not yet certain: new writes are refused, those that wait are not told.
        self.coming: Ending | None = None
        #: LSN of the drop record while the catalog has not dropped the table yet.
        self.drop_lsn: int | None = None
        #: Whether its backlog and ``last_lsn`` speak of all its frames, parked ones too.
        self.taken_up = False
        #: This log made the table, and none of its writes has an LSN up to here; 0 where that is not known.
        self.created_lsn = 0
        #: Whether the log says that nobody writes to it (R37); ``arka.tiers.activity`` alone changes the next four.
        self.quiet = False
        #: LSN of the last record that it is written to.
        self.writing_lsn = 0
        #: Streams that hold it open.
        self.streams = 0
        #: Since when it has been without one, on trio's clock; None before anybody looked.
        self.idle_since: float | None = None
        self.hurried_lsn = 0
        self.changed = trio.Event()
        self._end_listeners: dict[Callable[[Ending], None], None] = {}
        #: By LSN, the writes that are not in the table and never will be, and what their writers are told (R32).
        self.asides: dict[int, str] = {}
        self._aside_listeners: dict[Callable[[int, str], None], None] = {}

    @property
    def state(self) -> TableState:
        """Whether the table takes writes."""
        return self.ending.state if self.ending is not None else TableState.ACTIVE

    @property
    def told_state(self) -> TableState:
        """The state as clients hear it: a table that refuses every new write is stopped for them, whatever waits."""
        return TableState.STOPPED if self.refusal and self.ending is None else self.state

    @property
    def is_committing(self) -> bool:
        """Whether what was accepted for it goes on its way to Iceberg."""
        return self.ending is None and self.coming is None

    def check_active(self) -> None:
        """Refuse a write to a table that takes none.

        Raises:
            ArkaError: ``table_dropped`` or ``table_stopped``.
        """
        if self.refusal and self.ending is None and self.coming is None:
            raise ArkaError(self.refusal, code=ErrorCode.TABLE_STOPPED)
        ending = self.ending or self.coming
        if ending is not None:
            code = ending.code
            if code is ErrorCode.OUTCOME_UNKNOWN:
                code = ErrorCode.TABLE_STOPPED
            raise ArkaError(ending.detail, code=code)

    @property
    def reason(self) -> str | None:
        """Why the table takes no writes, or why something that others set has no effect; None if all is well."""
        return (
            self.ending.detail
            if self.ending is not None
            else "; ".join(filter(None, (self.refusal, self.held_back, *self.remarks))) or None
        )

    @property
    def ending_detail(self) -> str:
        """Why the table takes no writes, for people."""
        return "" if self.ending is None else self.ending.detail

    def bind(self, info: TableInfo, from_lsn: int) -> None:
        """Take writes as the table is now; those below ``from_lsn`` were accepted as it was before (R24, R27).

        Args:
            info: the table now.
            from_lsn: above every LSN that was given to one of its writes.
        """
        if _shape(info) == _shape(self.info):
            self._bindings[-1] = replace(self._bindings[-1], info=info)
        else:
            ends = [binding.from_lsn - 1 for binding in self._bindings[1:]] + [from_lsn - 1]
            # Nothing was accepted under one that begins where the new one does.
            waiting = [
                binding
                for binding, end in zip(self._bindings, ends, strict=True)
                if end > self.committed.lsn and binding.from_lsn <= end
            ]
            self._bindings = [*waiting, Binding(from_lsn, info)]
        self.info = info
        self.learn_schema(info.schema_id, info.schema)

    def learn_schema(self, number: int, schema: pa.Schema) -> None:
        """Learn which columns the frames of a schema id have (R24).

        Raises:
            DataCorruption: frames of the same id have other columns: none of them can be read for certain.
        """
        # Invariant: one id means the same columns in all frames that wait; ``numbered`` keeps it for new ones.
        known = self.schemas.setdefault(number, schema)
        if not known.equals(schema, check_metadata=True):
            raise DataCorruption(
                str(self.info.name), 0, f"schema {number} with columns {known.names}", str(schema.names)
            )

    def numbered(self, info: TableInfo) -> TableInfo:
        """Return a table with a schema id that means its columns, here and in the log (R24).

        Others may give the id of a schema that they removed to another one: rolled back or registered again, a table
        counts on from an older state. Such a schema gets an id of this log's own, which ends in the same bits.
        """
        for turn in range(_OWN_IDS):
            number = info.schema_id + turn * SCHEMA_IDS
            known = self.schemas.get(number)
            if known is None or known.equals(info.schema, check_metadata=True):
                return info if turn == 0 else replace(info, schema_id=number)
        return info

    def recall(self, bindings: Sequence[Binding]) -> None:
        """Take in what recovery found of how waiting writes were accepted; once, before anything is adopted.

        Args:
            bindings: at least one, oldest first.
        """
        self._bindings = list(bindings)
        if _shape(bindings[-1].info) != _shape(self.info):
            self._bindings.append(Binding(self.last_lsn + 1, self.info))

    def bindings(self, after_lsn: int, through_lsn: int) -> list[tuple[TableInfo, int]]:
        """Return how the writes in ``(after_lsn, through_lsn]`` were accepted: infos, each with its last LSN."""
        ends = [binding.from_lsn - 1 for binding in self._bindings[1:]] + [through_lsn]
        return [
            (binding.info, min(end, through_lsn))
            for binding, end in zip(self._bindings, ends, strict=True)
            if end > after_lsn and binding.from_lsn <= through_lsn
        ]

    def _accepted_specs(self, through_lsn: int) -> tuple[AcceptedSpec, ...]:
        """The partition specs that the writes up to ``through_lsn`` were accepted under; empty if it is today's.

        Of one that others removed, or gave the id of to another one, today's takes the place (R27).
        """
        found = []
        from_lsn = self.committed.lsn + 1
        for info, last_lsn in self.bindings(self.committed.lsn, through_lsn):
            kept = info if self._has_spec(info) else self.info
            found.append(AcceptedSpec(from_lsn, kept.spec_id, kept.partition))
            from_lsn = last_lsn + 1
        return () if all(spec.spec_id == self.info.spec_id for spec in found) else tuple(found)

    def _has_spec(self, info: TableInfo) -> bool:
        """Whether the table still has the partition spec that some of its writes were accepted under."""
        return self.specs is None or same_partitions(self.specs.get(info.spec_id), info.partition)

    def adopt_mark(self, found: CatalogTable, log_uuid: UUID, lineage: Lineage) -> None:
        """Learn from the catalog how far the table is.

        Stops the table when its mark is not of this log as this process knows it (R29), or stands below what this
        process knows to be committed (R20).
        """
        mark = found.mark_of(log_uuid)
        objection = self.objection(mark, lineage)
        if objection:
            self.stop(objection)
            return
        committed_lsn = mark.committed_lsn
        self.discard_through(committed_lsn)
        self.last_lsn = max(self.last_lsn, committed_lsn)
        self.committed.advance(committed_lsn, snapshot_id=found.snapshot_id)

    def objection(self, mark: CommitMark, lineage: Lineage) -> str:
        """Say why the table cannot go on from a mark that the catalog has of it (R20, R29); empty if it can."""
        return lineage.objection(self.info.name, self.info.uuid, mark, self.known_lsn, self.recorded)

    @property
    def known_lsn(self) -> int:
        """The last LSN that this process knows to be committed, by itself or by an earlier one (R20)."""
        return max(self.committed.lsn, self.recorded_lsn)

    @property
    def commitable(self) -> Backlog:
        """The frames that a commit takes from: what is set apart goes first, as far as it was brought back (R33)."""
        return self.fetched if self.behind_lsn > self.committed.lsn else self.backlog

    def discard_through(self, lsn: int) -> None:
        """Let go of the frames up to ``lsn``: the table holds them."""
        self.fetched.discard_through(lsn)
        self.backlog.discard_through(lsn)

    def fetch_again(self) -> None:
        """Let what is set apart be brought back once more: its local copy is damaged (R33)."""
        self.fetched = Backlog()
        self.wake()

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
            accepted=self._accepted_specs(cut.through_lsn),
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

    def set_aside(self, lsn: int, detail: str) -> None:
        """Take note of a write that is set aside, and tell the streams; it is durable elsewhere (R32)."""
        self.asides[lsn] = detail
        for listener in tuple(self._aside_listeners):
            listener(lsn, detail)

    def next_aside(self) -> int | None:
        """The first set-aside LSN that no commit has passed; None if there is none."""
        first = self.commitable.first_lsn
        return None if first is None else min((lsn for lsn in self.asides if lsn >= first), default=None)

    def listen_aside(self, listener: Callable[[int, str], None]) -> None:
        """Call ``listener`` with each write that is set aside; it must not raise or wait."""
        self._aside_listeners[listener] = None

    def unlisten_aside(self, listener: Callable[[int, str], None]) -> None:
        """Stop calling ``listener``."""
        self._aside_listeners.pop(listener, None)

    def listen_end(self, listener: Callable[[Ending], None]) -> None:
        """Call ``listener`` if the table ends; it must not raise or wait."""
        self._end_listeners[listener] = None

    def unlisten_end(self, listener: Callable[[Ending], None]) -> None:
        """Stop calling ``listener``."""
        self._end_listeners.pop(listener, None)


def _shape(info: TableInfo) -> tuple[int, int]:
    """What writes are bound to."""
    return info.schema_id, info.spec_id


__all__ = ["NEVER", "SCHEMA_IDS", "Binding", "Ending", "Table", "TableState"]
