"""Sending salvaged writes to a running server, and waiting until each is as safe as asked.

Owns: that conversation, through stock ``pyarrow.flight``. Does not own where the writes come from
(``arka.wal.salvage``). Blocking, without threads: acks are read whenever enough writes wait for theirs.

Columns are told by their Iceberg field ids, as the server's own commits do it (R24): others may have renamed, moved,
widened, added or dropped some since. A value whose column was dropped is left out and the column is named.

A write with an idempotency key that the server knows is a duplicate there, not a double (protocol 3.2). One
without a key is new whatever the server holds already, so such writes are sent only if that is asked for.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final
from uuid import UUID

import pyarrow as pa
import pyarrow.flight as flight

from arka.errors import Unavailable
from arka.iceberg.align import align_batch
from arka.lineage import NO_STARTS, CommitMark, Lineage
from arka.records import Operation, TableInfo, Tier
from arka.tiers.foreign import dropped_columns
from arka.wal.salvage import SalvagedWrite

#: Writes of a stream that may wait for their last ack before acks are read.
_WINDOW_WRITES: Final = 256
#: The same in bytes of their batches.
_WINDOW_BYTES: Final = 32 * 1024 * 1024
#: Open streams: the one that was idle longest ends when another table needs one.
_MAX_STREAMS: Final = 16
#: What a call to a server that is away, refuses or goes away raises.
_CALL_ERRORS: Final = (flight.FlightError, pa.ArrowException, KeyError, OSError)

#: Why a stream failed that the server ended with OK.
_ENDED: Final = "the server ended the stream before its last ack"


@dataclass(slots=True)
class Resubmitted:
    """What became of the writes.

    Attributes:
        acked: new to the server, and acked at the tier that was asked for.
        duplicates: their key was known: they were there already, and are acked at that tier.
        different: those duplicates whose bytes are not those of the first write with the key. Another client
            library encodes the same rows otherwise.
        refused: by reason: not in the table, or the server cannot say.
        below: left out for their LSN.
        keyless: left out because they have no idempotency key.
        committed: left out because the table says that it holds them.
        held_through: up to this LSN every table of the server says that it holds the log's writes.
        dropped: columns that writes have and their table has no more, as ``table: column``.
    """

    acked: int = 0
    duplicates: int = 0
    different: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    below: int = 0
    keyless: int = 0
    committed: int = 0
    held_through: int = 0
    dropped: set[str] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        """Whether everything that was to be sent was acked."""
        return not self.refused


@dataclass(frozen=True, slots=True)
class SentLog:
    """Which log writes come from.

    Attributes:
        uuid: the log.
        epoch: the last one in which this disk's process wrote it.
        aside: table and LSN of its writes that were set aside: their table's mark passed them (R32).
        lineage: the starts that its disk knows of (R15).
    """

    uuid: UUID
    epoch: int
    aside: frozenset[tuple[UUID, int]] = frozenset()
    lineage: Lineage = NO_STARTS


def resubmit(
    writes: Iterable[SalvagedWrite],
    location: str,
    *,
    durability: Tier,
    above_lsn: int = 0,
    keyless: bool = False,
    log: SentLog | None = None,
) -> Resubmitted:
    """Send writes to a server, each table's in the order in which they come.

    Args:
        writes: in LSN order.
        location: the server, as ``grpc://host:port``.
        durability: the tier whose ack is waited for.
        above_lsn: writes up to this LSN are left out.
        keyless: whether to send writes without an idempotency key.
        log: where the writes come from; None if nothing says. What a table's own mark of that log says is committed
            is left out (R38), but for writes that were set aside.

    Returns:
        What became of them. A table that refuses a stream gets no more writes.

    Raises:
        Unavailable: the server cannot be asked for its tables; nothing was sent.

    Durability: what is counted as acked or as a duplicate has reached ``durability``.
    """
    report = Resubmitted()
    try:
        with flight.FlightClient(location) as client, _Sender(client, durability, report, log) as sender:
            for write in writes:
                if write.lsn <= above_lsn:
                    report.below += 1
                elif sender.holds(write):
                    report.committed += 1
                elif not write.key and not keyless:
                    report.keyless += 1
                else:
                    sender.send(write)
    except _ServerAway as error:
        raise Unavailable(f"Cannot ask {location} for its tables: {error}") from error
    return report


class _ServerAway(Exception):
    """The server did not answer the question for its tables."""


class _Sender:
    """The streams of a conversation: one for each table and schema, a limited number at a time."""

    def __init__(self, client: Any, durability: Tier, report: Resubmitted, log: SentLog | None) -> None:
        self._client = client
        self._durability = durability
        self._report = report
        described = _tables(client)
        self._names = {uuid: table["name"] for uuid, table in described.items()}
        self._schemas = {uuid: _schema_of(table) for uuid, table in described.items()}
        # By table: up to which LSN it holds the writes' log, but for those that were set aside.
        self._held = {uuid: _held_of(table, log) for uuid, table in described.items()}
        report.held_through = min(self._held.values(), default=0)
        self._aside = frozenset() if log is None else log.aside
        self._streams: OrderedDict[tuple[UUID, int], _Stream] = OrderedDict()
        # Tables that get no more writes, and why: what follows must not come before what was refused.
        self._closed: dict[UUID, str] = {}

    def holds(self, write: SalvagedWrite) -> bool:
        """Whether the table says that it holds a write."""
        return write.lsn <= self._held.get(write.table.uuid, 0) and (write.table.uuid, write.lsn) not in self._aside

    def send(self, write: SalvagedWrite) -> None:
        """Send one write, or count why not."""
        reason = self._closed.get(write.table.uuid)
        if reason is None and write.table.uuid not in self._names:
            reason = self._closed[write.table.uuid] = self._absent(write.table)
        if reason is not None:
            self._report.refused[reason] += 1
            return
        try:
            batch = align_batch(write.batch, self._schemas[write.table.uuid])
        except (ValueError, pa.ArrowException) as error:
            # What was sent of the table is acked first; what follows must not come before this write.
            for key in [key for key in self._streams if key[0] == write.table.uuid]:
                self._finish(key)
            reason = f"LSN {write.lsn} does not fit {write.table.name} as it is now: {error}"
            self._closed.setdefault(write.table.uuid, reason)
            self._report.refused[reason] += 1
            return
        failure = self._stream(write.table).send(write, batch)
        if failure is not None:
            self._end(write.table.uuid, failure)

    def _absent(self, table: TableInfo) -> str:
        if str(table.name) in self._names.values():
            return f"{table.name} is another table on the server: its UUID is not {table.uuid}"
        return f"{table.name} ({table.uuid}) is not on the server"

    def _stream(self, table: TableInfo) -> _Stream:
        key = (table.uuid, table.schema_id)
        stream = self._streams.get(key)
        if stream is None:
            # Writes of one table stay in order: those at its earlier schema are acked first.
            for other in [other for other in self._streams if other[0] == table.uuid]:
                self._finish(other)
            while len(self._streams) >= _MAX_STREAMS:
                self._finish(next(iter(self._streams)))
            name, schema = self._names[table.uuid], self._schemas[table.uuid]
            self._report.dropped.update(f"{name}: {column}" for column in dropped_columns(table.schema, schema))
            self._streams[key] = stream = _Stream(self._client, name, schema, self._durability, self._report)
        self._streams.move_to_end(key)
        return stream

    def _finish(self, key: tuple[UUID, int]) -> None:
        failure = self._streams.pop(key).finish()
        if failure is not None:
            self._closed.setdefault(key[0], failure)

    def _end(self, uuid: UUID, failure: str) -> None:
        self._closed.setdefault(uuid, failure)
        for key in [key for key in self._streams if key[0] == uuid]:
            del self._streams[key]

    def __enter__(self) -> _Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while kind is None and self._streams:
            self._finish(next(iter(self._streams)))


class _Stream:
    """One DoExchange write stream. Its methods return why the server ended it, or None."""

    def __init__(self, client: Any, table: str, schema: pa.Schema, durability: Tier, report: Resubmitted) -> None:
        self._report = report
        self._wanted = durability.word
        # By sequence: the bytes of the writes whose last ack has not come.
        self._waiting: dict[int, int] = {}
        self._waiting_bytes = 0
        self._sent = 0
        self._failure: str | None = None
        self._schema = schema
        self._writer, self._reader = client.do_exchange(flight.FlightDescriptor.for_path(*table.split(".")))
        self._try(self._begin)

    def _begin(self) -> None:
        self._writer.write_metadata(json.dumps({"requested_durability": self._wanted}).encode())
        self._writer.begin(self._schema)

    def send(self, write: SalvagedWrite, batch: pa.RecordBatch) -> str | None:
        """Send a write, whose batch has the stream's schema; acks are read once too many are due."""
        request: dict[str, str] = {}
        if write.operation is not Operation.UPSERT:
            request["operation"] = write.operation.name.lower()
        if write.key:
            request["idempotency_key"] = write.key.decode()
        self._waiting[self._sent] = batch.nbytes
        self._waiting_bytes += batch.nbytes
        self._sent += 1
        if self._failure is None:
            self._try(self._writer.write_with_metadata, batch, json.dumps(request).encode())
        while self._failure is None and (len(self._waiting) >= _WINDOW_WRITES or self._waiting_bytes >= _WINDOW_BYTES):
            self._try(self._read_ack)
        return self._give_up() if self._failure is not None else None

    def finish(self) -> str | None:
        """Half-close and read the acks that are due."""
        if self._failure is None:
            self._try(self._writer.done_writing)
        while self._failure is None and self._waiting:
            self._try(self._read_ack)
        if self._failure is not None:
            return self._give_up()
        self._attempt(self._writer.close)
        return None

    def _try(self, call: Any, *arguments: Any) -> None:
        self._failure = self._attempt(call, *arguments)

    @staticmethod
    def _attempt(call: Any, *arguments: Any) -> str | None:
        """Make a call on the stream; returns why it failed, None if it did not."""
        try:
            call(*arguments)
        except StopIteration:
            return _ENDED
        except _CALL_ERRORS as error:
            return _reason(error)
        return None

    def _read_ack(self) -> None:
        data = self._reader.read_chunk().app_metadata
        if data is not None:
            self._take(json.loads(data.to_pybytes()))

    def _take(self, ack: dict[str, Any]) -> None:
        report = self._report
        failed = ack["error"] is not None
        if not failed and ack["durability_level"] != self._wanted:
            return
        size = self._waiting.pop(ack["sequence"], None)
        if size is None:
            return
        self._waiting_bytes -= size
        if failed:
            report.refused[f"[{ack.get('code')}] {ack['error']}"] += 1
        elif ack.get("duplicate"):
            report.duplicates += 1
            report.different += ack.get("code") == "key_reused"
        else:
            report.acked += 1

    def _give_up(self) -> str:
        """Take the acks that came, find out why the stream ended, and count what it leaves."""
        reason = self._failure or _ENDED
        # So that a server that waits for more ends the stream too. A write that fails does not say why: the
        # status comes behind the last ack.
        self._attempt(self._writer.done_writing)
        while (ended := self._attempt(self._read_ack)) is None:
            continue
        if ended != _ENDED:
            reason = ended
        self._attempt(self._writer.close)
        if self._waiting:
            self._report.refused[reason] += len(self._waiting)
            self._waiting.clear()
        return reason


def _held_of(table: dict[str, Any], log: SentLog | None) -> int:
    """Up to which LSN of a log a table holds all writes that were not set aside, by its own mark."""
    mark = None if log is None else table.get("logs", {}).get(str(log.uuid))
    if log is None or mark is None or mark["epoch"] > log.epoch:
        # The log went on from another disk than the one that was salvaged: the mark speaks of that one's LSNs.
        return 0
    found = CommitMark(log.uuid, int(mark["committed_lsn"]), int(mark["epoch"]), int(mark.get("token", "0"), 16))
    # So it does where another copy of the salvaged directory committed, or it is another table's mark.
    return 0 if log.lineage.problem_of(UUID(table["table_uuid"]), found) else found.committed_lsn


def _schema_of(table: dict[str, Any]) -> pa.Schema:
    """The table's columns with their field ids, all nullable: what a write does not hold goes as nulls.

    The server takes no more of a delete than its keys, and refuses an upsert without a required value.
    """
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(table["field_ids"])))
    return pa.schema([field.with_nullable(True) for field in schema])


def _tables(client: Any) -> dict[UUID, dict[str, Any]]:
    """The server's tables by UUID: a name may stand for another table by now (R5)."""
    try:
        (listed,) = client.do_action(flight.Action("ListTables", b""))
        tables: dict[UUID, dict[str, Any]] = {}
        for name in json.loads(listed.body.to_pybytes()):
            body = json.dumps({"name": name, "logs": True, "field_ids": True}).encode()
            (described,) = client.do_action(flight.Action("DescribeTable", body))
            table = json.loads(described.body.to_pybytes())
            tables[UUID(table["table_uuid"])] = table
    except _CALL_ERRORS as error:
        raise _ServerAway(_reason(error)) from error
    return tables


def _reason(error: BaseException) -> str:
    """An error without what gRPC adds to it for its developers."""
    text = str(error).partition(". gRPC client debug context")[0]
    return text.removeprefix("Flight returned ").strip("'\"") or type(error).__name__


__all__ = ["Resubmitted", "SentLog", "resubmit"]
