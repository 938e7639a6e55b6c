"""What Arka promises, as a model that hears every ack and sees every commit of a simulation.

Owns: which writes there are, what was promised of each, and when a promise is broken. One method per moment at
which a promise can break: an ack, a commit, a start, the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

import trio

from arka.iceberg.frames import FrameRows
from arka.records import AckMessage, Operation, Tier
from arka.storage.ports import CommitJob
from arka.testing.simschemas import MOST_AGE_S, SchemaHistory, misplaced
from arka.testing.simworld import MachineDisk, Trace
from arka.wal.objectfile import parse_object


class PromiseBroken(AssertionError):
    """The engine broke a promise."""


@dataclass(eq=False, slots=True)
class Write:
    """One write as its client knows it.

    Attributes:
        number: in its rows' ``id`` column; no other write has it.
        rows: how many.
        victims: of a delete, the keys that it removes; its first row names itself, a key that is never there.
        table: the UUID of the table that it was sent to.
        key: its idempotency key; empty for none.
        requested: the tier it asks for.
        sends: how often it was sent.
        sent_s: when it was last sent (trio's clock).
        lsn: the LSN that its acks have named, once that binds.
        reached: the highest tier of which an ack binds; -1 for none.
        refused: it was told that it is not in the table and never will be.
        finished: its last ack has come.
        shapes: of each time that it was sent, the ids of the fields that its further columns were meant for.
    """

    number: int
    rows: int
    table: UUID
    key: str
    requested: Tier
    victims: tuple[tuple[int, int], ...] = ()
    sends: int = 0
    sent_s: float = 0.0
    lsn: int = 0
    reached: int = -1
    refused: bool = False
    finished: bool = False
    shapes: set[tuple[int, ...]] = field(default_factory=set)


class Node(Protocol):
    """What a check asks of the process that sent an ack."""

    name: str
    disk: MachineDisk

    @property
    def superseded(self) -> bool:
        """Whether another process went on with a copy of this one's disk: its disk acks bind its own disk only."""
        ...


@dataclass(slots=True)
class StreamAcks:
    """The acks of one stream, to be checked for order.

    Attributes:
        writes: the stream's writes by sequence.
        coalesced: ``acks: watermark``.
        ordered: the stream keeps its order across refusals.
    """

    coalesced: bool
    #: Whether writes behind a retryable refusal must be refused too (R36).
    ordered: bool = False
    #: The first sequence that was refused in such a way; -1 for none.
    refused_from: int = -1
    writes: list[Write] = field(default_factory=list)
    next_tier: list[int] = field(default_factory=list)
    last_sequence: dict[Tier, int] = field(default_factory=dict)
    last_lsn: dict[Tier, int] = field(default_factory=dict)

    def add(self, write: Write) -> None:
        """Note that a write was sent."""
        self.writes.append(write)
        self.next_tier.append(0)


class Promises:
    """The model."""

    def __init__(self, trace: Trace, objects: dict[str, bytes]) -> None:
        self._trace = trace
        self._objects = objects
        self.writes: dict[int, Write] = {}
        self.log_uuid: UUID | None = None
        self._epoch = 0
        self._given_lsn = 0
        self._lsn_of: dict[int, int] = {}
        # By table UUID and write: how many of its rows Iceberg has.
        self.committed: dict[UUID, Counter[int]] = {}
        self._commit_order: dict[UUID, dict[int, None]] = {}
        self._snapshots: dict[UUID, set[str]] = {}
        self._parsed: set[str] = set()
        self._stored: set[int] = set()
        self._disk_lsn = 0
        self._object_lsn = 0
        #: Tables whose drop was asked for, and those whose drop was confirmed.
        self.drop_asked: set[UUID] = set()
        self.drop_confirmed: set[UUID] = set()
        self.acks: Counter[str] = Counter()
        #: ``limits.stall_s`` of this run.
        self.stall_s = 0.0
        # By process and table: when it last had room for writes, and when it last got some after ``stall_s`` without.
        self._room_at: dict[tuple[str, UUID], tuple[float, float]] = {}
        # By table UUID: the schemas that others gave it.
        self._schemas: dict[UUID, SchemaHistory] = {}
        #: Writes whose own data cannot be written to their table (R32).
        self.poison: set[int] = set()
        #: Each so many writes to an append-only table is one; 0 for none.
        self.poison_every = 0
        #: Whether a reader of catalog and warehouse can read a table now (R28).
        self.shows: Callable[[UUID], bool] = lambda table: True
        # By table UUID, of those that nobody can read: what a reader found last.
        self._found_last: dict[UUID, Counter[int]] = {}
        # By table UUID: writes that were in it before its catalog was restored from a backup (R28).
        self._taken_back: dict[UUID, set[int]] = {}
        #: By table UUID: up to where acks ``iceberg_committed`` were due by the owner of the log's present disk.
        self.told_committed: dict[UUID, int] = {}
        # By process: the LSNs that its acks have named, by write.
        self._told: dict[str, dict[int, int]] = {}

    def note(self, what: str) -> None:
        """Add a line to the trace."""
        self._trace.note(what)

    def fail(self, why: str) -> None:
        """Say that a promise is broken.

        Raises:
            PromiseBroken: always.
        """
        self._trace.note(f"BROKEN: {why}")
        raise PromiseBroken(why)

    # -- acks -------------------------------------------------------------------------------------

    def take_ack(self, node: Node, stream: StreamAcks, ack: AckMessage) -> None:
        """Check one ack and note what it promises."""
        tier = Tier.parse(ack.durability_level)
        if not 0 <= ack.sequence < len(stream.writes):
            self.fail(f"{node.name}: an ack for sequence {ack.sequence} of {len(stream.writes)}: {ack}")
        write = stream.writes[ack.sequence]
        self._trace.note(
            f"ack: {node.name} write {write.number} {tier.word} lsn {ack.lsn} {ack.code or ''}"
            f"{' duplicate' if ack.duplicate else ''}"
        )
        if ack.error is not None:
            self.acks[f"error {ack.code}"] += 1
            self._take_error(node, stream, write, ack)
            return
        self.acks[tier.word] += 1
        # Its payload is in its table's columns, which others may have changed since it was sent first.
        if ack.code is not None and write.table not in self._schemas:
            self.fail(f"write {write.number} was sent with the payload it had before, and got {ack.code}")
        self._check_order(stream, ack, tier)
        first = stream.last_sequence.get(tier, -1) + 1 if stream.coalesced and not ack.duplicate else ack.sequence
        stream.last_sequence[tier] = ack.sequence
        for sequence in range(first, ack.sequence + 1):
            if stream.next_tier[sequence] == tier and stream.writes[sequence].requested >= tier:
                lsn = ack.lsn if sequence == ack.sequence else 0
                stream.next_tier[sequence] = tier + 1
                self._bind(node, stream.writes[sequence], tier, lsn, ack)

    def _take_error(self, node: Node, stream: StreamAcks, write: Write, ack: AckMessage) -> None:
        if stream.next_tier[ack.sequence] > write.requested:
            self.fail(f"write {write.number} got an error after its last ack: {ack}")
        stream.next_tier[ack.sequence] = len(Tier)
        # What is behind a refusal of an ordered stream is refused with it, whatever room there is since (R36).
        follows = stream.ordered and 0 <= stream.refused_from < ack.sequence
        if ack.code == "overloaded" and not follows:
            self._check_refusal(node, write)
        if ack.code in ("overloaded", "unavailable") and stream.ordered and stream.refused_from < 0:
            stream.refused_from = ack.sequence
        if ack.code == "outcome_unknown":
            return
        if ack.code == "set_aside":
            if write.number not in self.poison:
                self.fail(f"write {write.number} was set aside, and its data can be written: {ack}")
            write.refused = True
        if ack.code == "table_dropped":
            if write.table not in self.drop_asked:
                self.fail(f"write {write.number} got table_dropped and nobody dropped its table")
        elif write.sends == 1 and not node.superseded:
            write.refused = True
        if ack.code not in ("overloaded", "unavailable"):
            write.finished = True

    def _check_refusal(self, node: Node, write: Write) -> None:
        """A write is refused only where there was no room for ``limits.stall_s`` (R23, R36)."""
        now_s = trio.current_time()
        last_s, shut_until_s = self._room_at.get((node.name, write.table), (-self.stall_s, now_s))
        # Its client may hear of it late: there may be room again.
        if now_s - last_s < self.stall_s and shut_until_s < write.sent_s and not node.superseded:
            self.fail(
                f"{node.name} refused write {write.number} {now_s - last_s:.1f} s after there was room for it; "
                f"limits.stall_s is {self.stall_s:g}"
            )

    def note_room(self, name: str, table: UUID) -> None:
        """Note that a process has room for writes of a table now, whatever it says."""
        now_s = trio.current_time()
        last_s, shut_until_s = self._room_at.get((name, table), (-self.stall_s, now_s))
        self._room_at[name, table] = now_s, now_s if now_s - last_s >= self.stall_s else shut_until_s

    def _check_order(self, stream: StreamAcks, ack: AckMessage, tier: Tier) -> None:
        sequence = ack.sequence
        if sequence <= stream.last_sequence.get(tier, -1):
            self.fail(f"{tier.word} acks of one stream go back to sequence {sequence}: {ack}")
        if stream.next_tier[sequence] != tier:
            self.fail(f"sequence {sequence} got {tier.word}, expected tier {stream.next_tier[sequence]}: {ack}")
        if 0 <= stream.refused_from < sequence and tier is Tier.MEMORY and not ack.duplicate:
            self.fail(f"sequence {sequence} was accepted behind the refused {stream.refused_from} of an ordered stream")
        if tier > stream.writes[sequence].requested:
            self.fail(f"sequence {sequence} asked for {stream.writes[sequence].requested.word}: {ack}")
        if not stream.coalesced:
            behind = [at for at in range(sequence) if stream.next_tier[at] == tier <= stream.writes[at].requested]
            if behind:
                self.fail(f"{tier.word} ack of sequence {sequence} overtook sequence {behind[0]}: {ack}")
        if not ack.duplicate:
            if ack.lsn <= stream.last_lsn.get(tier, 0):
                self.fail(f"LSNs of one stream do not rise at {tier.word}: {ack}")
            stream.last_lsn[tier] = ack.lsn

    def _bind(self, node: Node, write: Write, tier: Tier, lsn: int, ack: AckMessage) -> None:
        """Check that a tier's promise is true of one write, and remember that it was made."""
        if lsn:
            self._told.setdefault(node.name, {})[write.number] = lsn
        # What is in the store is the log's, whoever says so; below that, a superseded node's LSNs are void.
        if lsn and (not node.superseded or tier > Tier.DISK):
            self._check_lsn(node, write, lsn, duplicate=ack.duplicate)
        elif not lsn and write.reached < Tier.DISK:
            # A coalesced ack names its last write's LSN only; what an earlier life gave may be void.
            write.lsn = 0
        # The first write of a duplicate may have been on a disk that is gone: then it is in the store, or was.
        elsewhere = ack.duplicate and self.stored(lsn)
        if tier is Tier.DISK and lsn and not node.disk.on_platter(lsn) and not elsewhere:
            self.fail(f"write {write.number} (LSN {lsn}) was acked {tier.word} and is not fsynced")
        if tier is Tier.OBJECT_STORAGE and lsn and not self.stored(lsn):
            self.fail(f"write {write.number} (LSN {lsn}) was acked {tier.word} and is in no object")
        if tier is Tier.ICEBERG_COMMITTED:
            there = self.committed.get(write.table, Counter())[write.number] == write.rows
            if not there and write.number not in self._taken_back.get(write.table, ()):
                self.fail(f"write {write.number} (LSN {lsn}) was acked {tier.word} and is not in the table")
            # It may be hidden since; there has to have been a moment at which a reader found it.
            found = self._found_last.get(write.table, Counter())
            if there and not self.shows(write.table) and found[write.number] != write.rows:
                self.fail(f"write {write.number} (LSN {lsn}) was acked {tier.word} and no reader ever found it")
            if ack.snapshot_id is not None and ack.snapshot_id not in self._snapshots.get(write.table, ()):
                self.fail(f"snapshot {ack.snapshot_id} was named in an ack and does not exist: {ack}")
        if node.superseded and tier <= Tier.DISK:
            return
        write.reached = max(write.reached, tier)
        if tier >= Tier.DISK:
            self._disk_lsn = max(self._disk_lsn, lsn)
        if tier >= Tier.OBJECT_STORAGE:
            self._object_lsn = max(self._object_lsn, lsn)
        if tier == write.requested:
            write.finished = True

    def _check_lsn(self, node: Node, write: Write, lsn: int, *, duplicate: bool) -> None:
        if write.lsn and lsn != write.lsn:
            if write.reached >= Tier.DISK:
                self.fail(f"write {write.number} had LSN {write.lsn} at {Tier(write.reached).word} and got {lsn}")
            if lsn < write.lsn:
                self.fail(f"write {write.number} was given LSN {write.lsn} and then {lsn}")
        other = self._lsn_of.setdefault(lsn, write.number)
        if other != write.number:
            self.fail(f"{node.name}: LSN {lsn} was given to write {other} and to write {write.number}")
        if duplicate and write.sends < 2:
            self.fail(f"write {write.number} was sent once and called a duplicate")
        write.lsn = lsn

    def stored(self, lsn: int) -> bool:
        """Whether an object was ever seen that holds the frame with this LSN."""
        if lsn not in self._stored:
            for key, data in self._objects.items():
                self.take_object(key, data)
        return lsn in self._stored

    def take_object(self, key: str, data: bytes) -> None:
        """Look into an object, before it is deleted at the latest."""
        if ("/wal/" in key or "/parked/" in key or "/behind/" in key) and key not in self._parsed:
            assert self.log_uuid is not None
            self._parsed.add(key)
            found = parse_object(key, memoryview(data), self.log_uuid)
            self._stored.update(header.lsn for _, header in found.frames() if header.lsn)

    def take_handshake(self, node: Node, table: UUID, writes: list[Write], asked: int, marks: dict[Tier, int]) -> None:
        """Note what a handshake promises of the writes that its client had sent (protocol 3.3)."""
        if node.superseded:
            return
        for tier, mark in marks.items():
            if mark > asked:
                self.fail(f"the handshake names LSN {mark}, the client had {asked}")
            for write in writes:
                if tier >= Tier.DISK and write.table == table and 0 < write.lsn <= mark:
                    write.reached = max(write.reached, tier)

    # -- the engine's life ------------------------------------------------------------------------

    def take_start(self, name: str, *, log_uuid: UUID, next_lsn: int, disk: int) -> None:
        """Check what a start found on its disk."""
        self._trace.note(f"start: {name} next {next_lsn} disk {disk}")
        if self.log_uuid not in (None, log_uuid):
            self.fail(f"the log's UUID changed to {log_uuid}")
        self.log_uuid = log_uuid
        if next_lsn <= self._given_lsn:
            self.fail(f"the next LSN is {next_lsn}, {self._given_lsn} was given before the start")
        if disk < self._disk_lsn:
            self.fail(f"LSN {self._disk_lsn} was acked disk, recovery found {disk}")

    def take_epoch(self, name: str, *, epoch: int, objects: int) -> None:
        """Check what a process found in the store once it had its epoch."""
        self._trace.note(f"epoch: {name} epoch {epoch} objects {objects}")
        if epoch <= self._epoch:
            self.fail(f"epoch {epoch} was taken after {self._epoch}")
        self._epoch = epoch
        if objects < self._object_lsn:
            self.fail(f"LSN {self._object_lsn} was acked object_storage, the chain ends at {objects}")

    def take_node_loss(self) -> None:
        """Note that a disk is gone, and with it all that no more was promised of than ``disk``."""
        self._trace.note("node lost")
        # What it knew of commits is gone with it (R20).
        self.told_committed.clear()
        self._disk_lsn = self._object_lsn
        for write in self.writes.values():
            if write.reached <= Tier.DISK:
                write.reached = -1

    def take_told(self, table: UUID, lsn: int) -> None:
        """Note up to where a process has called a table's writes committed: its next start knows it too (R20)."""
        self.told_committed[table] = max(self.told_committed.get(table, 0), lsn)

    def take_given(self, lsn: int) -> None:
        """Note the last LSN that a process gave."""
        self._given_lsn = max(self._given_lsn, lsn)

    def take_schema(self, table: UUID, schema_id: int) -> None:
        """Record that others gave a table another schema."""
        self._schemas.setdefault(table, SchemaHistory()).note(trio.current_time(), schema_id)

    def take_binding(self, table: UUID, schema_id: int, began: float) -> None:
        """Check that a stream means the columns of a schema that its table had not long before it opened (R27).

        Args:
            table: its UUID.
            schema_id: what the stream was bound to.
            began: when its client named the table; the catalog has answered since, whoever asked.
        """
        history = self._schemas.get(table, SchemaHistory())
        if schema_id not in history.between(began - MOST_AGE_S, trio.current_time()):
            self.fail(f"a stream to table {table} was bound to schema {schema_id}, which the table no longer had")

    def take_hidden(self) -> None:
        """Record what readers find in the tables that they can read, right before some of them are hidden (R28)."""
        for table, counts in self.committed.items():
            if self.shows(table):
                self._found_last[table] = Counter(counts)

    def take_snapshot(self, table: UUID, snapshot_id: int) -> None:
        """Note a snapshot, ours or another writer's."""
        self._snapshots.setdefault(table, set()).add(str(snapshot_id))

    def take_commit(self, job: CommitJob, changes: list[FrameRows], snapshot_id: int) -> None:
        """Check what has just appeared in Iceberg."""
        table = job.table.uuid
        self._trace.note(f"commit: {job.table.name} epoch {job.epoch} through {job.staged.through_lsn}")
        if not self.stored(job.staged.through_lsn):
            self.fail(f"{job.table.name} holds LSN {job.staged.through_lsn}, which is in no object (R4)")
        self.take_snapshot(table, snapshot_id)
        counts = self.committed.setdefault(table, Counter())
        order = self._commit_order.setdefault(table, {})
        for change in changes:
            wrong = None if change.operation is Operation.DELETE else misplaced(change.batch, self.writes)
            if wrong is not None:
                self.fail(f"{job.table.name}: {wrong}")
            for number in _numbers(change):
                counts[number] += 1
                order[number] = None
                write = self.writes.get(number)
                if write is None:
                    self.fail(f"rows of write {number}, which nobody sent, are in {job.table.name}")
                elif counts[number] > write.rows:
                    self.fail(f"write {number} (LSN {write.lsn}) is in {job.table.name} twice")
                elif number in self.poison:
                    self.fail(f"write {number} cannot be written and is in {job.table.name}")
                elif write.refused:
                    self.fail(f"write {number} was refused for good and is in {job.table.name}")

    def take_restore(self, table: UUID, changes: list[FrameRows]) -> None:
        """Record that a table holds what it held at a backup, and nothing that was committed since (R28)."""
        before = self.committed.get(table, Counter())
        self._hold(table, changes)
        self._taken_back.setdefault(table, set()).update(n for n in before if n not in self.committed[table])

    def take_return(self, table: UUID, changes: list[FrameRows]) -> None:
        """Record that a table that was put back holds what it held before that."""
        self._hold(table, changes)
        self._taken_back.pop(table, None)

    def _hold(self, table: UUID, changes: list[FrameRows]) -> None:
        numbers = [number for change in changes for number in _numbers(change)]
        self.committed[table] = Counter(numbers)
        self._commit_order[table] = dict.fromkeys(numbers)

    def refused(self) -> set[int]:
        """The writes that their clients know to be refused, by number: no read that begins now may find one."""
        return {write.number for write in self.writes.values() if write.refused}

    def take_read(
        self, node: Node, table: UUID, through_lsn: int, keys: list[tuple[int, int]], refused: Collection[int]
    ) -> None:
        """Check what a read found (R25).

        Args:
            node: who answered; it was not superseded.
            table: what was read.
            through_lsn: the last LSN that its table's writes had been given when the read began.
            keys: each row's ``id`` and ``part``.
            refused: the writes that were refused when the read began. While it goes on one may be sent again, and
                others may be set aside.
        """
        self._trace.note(f"read: {node.name} {table} through {through_lsn}: {len(keys)} rows")
        found = Counter(number for number, _ in keys)
        if len(set(keys)) < len(keys):
            self.fail(f"a read of table {table} found a row twice")
        doomed = {key for write in self.writes.values() for key in write.victims}
        for number, rows in found.items():
            write = self.writes.get(number)
            if write is None or write.table != table:
                self.fail(f"a read of table {table} found rows of write {number}, which is not its own")
            elif rows > write.rows or (rows < write.rows and not any((number, n) in doomed for n in range(write.rows))):
                self.fail(f"a read of table {table} found {rows} of {write.rows} rows of write {number}")
            elif number in refused and write.refused:
                self.fail(f"a read of table {table} found write {number}, which was refused")
        told = {n: lsn for n, lsn in self._told.get(node.name, {}).items() if lsn <= through_lsn}
        for number, lsn in told.items():
            write = self.writes[number]
            if write.table != table:
                continue
            # A table that others put back is read as it is: nothing is replayed (R20).
            if number in self.poison or table in self._taken_back:
                continue
            if not write.victims and not found[number] and not any((number, n) in doomed for n in range(write.rows)):
                self.fail(f"a read of table {table} through {through_lsn} lacks write {number} (LSN {lsn})")
            for victim in write.victims:
                if told.get(victim[0], lsn) < lsn and victim in set(keys):
                    self.fail(f"a read of table {table} found {victim}, which write {number} (LSN {lsn}) had deleted")

    def check_keyed(self, table: UUID, keys: list[tuple[int, int]]) -> None:
        """Check that a primary-key table holds what its writes come to in the order in which they were committed."""
        expected: set[tuple[int, int]] = set()
        for number in self._commit_order.get(table, {}):
            write = self.writes[number]
            if write.victims:
                expected -= set(write.victims)
            else:
                expected |= {(number, part) for part in range(write.rows)}
        if sorted(keys) != sorted(expected):
            self.fail(f"table {table} has the keys {sorted(keys)}, expected {sorted(expected)}")

    def _check_aside(self, write: Write) -> None:
        """Check that a write that cannot be in its table is where its ack says (R32)."""
        key = f"/aside/{write.table}/{write.lsn:016d}"
        if write.reached >= Tier.DISK and write.lsn and not any(name.endswith(key) for name in self._objects):
            self.fail(f"write {write.number} (LSN {write.lsn}) cannot be written, and was not set aside")
        if write.key and not write.refused and write.sends and write.reached >= Tier.DISK:
            self.note(f"write {write.number} was set aside, and its client was not told in this history")

    def check_end(self, present: set[UUID]) -> None:
        """Check everything that was promised, after a drain; ``present`` are the catalog's tables."""
        for table in self.drop_confirmed & present:
            self.fail(f"table {table} was dropped and is there")
        for write in self.writes.values():
            if write.table not in present:
                if write.table not in self.drop_asked:
                    self.fail(f"table {write.table} is gone and nobody dropped it")
                continue
            found = self.committed.get(write.table, Counter())[write.number]
            if found not in (0, write.rows):
                self.fail(f"{found} of {write.rows} rows of write {write.number} are there")
            if write.number in self.poison:
                self._check_aside(write)
            elif write.reached >= Tier.DISK and found == 0:
                self.fail(f"write {write.number} (LSN {write.lsn}) was acked {Tier(write.reached).word} and is lost")
            if write.refused and found:
                self.fail(f"write {write.number} was refused for good and is there")
        for table, order in self._commit_order.items():
            lsns = [write.lsn for write in map(self.writes.__getitem__, order) if write.reached >= Tier.DISK]
            lsns = [lsn for lsn in lsns if lsn]
            if lsns != sorted(lsns) and table in present:
                self.fail(f"the rows of table {table} are not in LSN order")


def _numbers(change: FrameRows) -> list[int]:
    """The write of each row of a change."""
    numbers: list[int] = change.batch.column("id").to_pylist()
    # The others of a delete are those of its victims.
    return numbers[:1] * len(numbers) if change.operation is Operation.DELETE else numbers


__all__ = ["Node", "PromiseBroken", "Promises", "StreamAcks", "Write"]
