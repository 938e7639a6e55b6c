"""Simulated clients: they write real batches, read acks, lose their connection and send again by key.

Owns: what a client does and remembers over the crashes of the servers. Does not own what it may expect
(``simpromises``). A stream is the server's own ``Exchange``; only sockets are missing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec
import pyarrow as pa
import trio

from arka._core.buffers import FrameBuffer
from arka._core.wire import FlightMessage, read_fields
from arka.errors import ArkaError, ErrorCode
from arka.flight.acks import AckForm
from arka.flight.exchange import Exchange
from arka.options import Limits
from arka.records import AckMessage, TableInfo, TableName, TableType, Tier
from arka.testing.simpromises import Node, Promises, StreamAcks, Write
from arka.testing.simschemas import SCHEMA, WIDE, definition_of, fields_of, stream_schema, values_for
from arka.testing.simworld import Process
from arka.tiers.admission import Ledger
from arka.tiers.decoderoom import DecodeRoom
from arka.tiers.pipeline import Pipeline

#: What a message is charged beside its buffer: its frame's key and padding, and its header fields.
_OVERHEAD_BYTES: Final = 1024


class Server(Node, Protocol):
    """What a client needs of a server."""

    process: Process
    ledger: Ledger
    decode_room: DecodeRoom
    limits: Limits
    draining: bool

    @property
    def pipeline(self) -> Pipeline:
        """The running pipeline."""
        ...

    def troubles(self) -> int | None:
        """How much befell the catalog so far; None while it may not answer this server in time."""
        ...

    async def make_table(self, name: TableName) -> None:
        """Create a table; does nothing if there is one of that name."""
        ...


def flight_messages(schema: pa.Schema) -> bytes:
    """The data_header of a schema message."""
    header: bytes = pa.ipc.read_message(schema.serialize()).metadata.to_pybytes()
    return header


def frame_buffer(batch: pa.RecordBatch) -> tuple[bytes, FrameBuffer]:
    """A batch's data_header, and the buffer that the transport would have received it into."""
    message = batch.serialize().to_pybytes()
    end = 8 + int.from_bytes(message[4:8], "little")
    buffer = FrameBuffer(message[8:end], len(message) - end)
    buffer.body[:] = message[end:]
    return message[8:end], buffer


def parse_acks(data: bytes) -> list[AckMessage]:
    """Read whole gRPC messages of acks."""
    acks = []
    while data:
        size = int.from_bytes(data[1:5], "big")
        metadata = read_fields(data[5 : 5 + size])[3]
        assert isinstance(metadata, bytes)
        acks.append(msgspec.json.decode(metadata, type=AckMessage))
        data = data[5 + size :]
    return acks


def _is_not_found(error: BaseException) -> bool:
    return isinstance(error, ArkaError) and error.code is ErrorCode.TABLE_NOT_FOUND


class Writer:
    """One client of one table."""

    def __init__(self, number: int, table: TableName, promises: Promises, rng: random.Random) -> None:
        self.number = number
        self.table = table
        self._promises = promises
        self._rng = rng
        self.keyed = rng.random() < 0.6
        #: The longest pause between two streams, in seconds.
        self.rest_s = 0.5
        #: What its streams say of order; None for nothing.
        self.ordered = random.Random(f"ordered {number}").choice((None, None, True, False))
        self._coalesced = rng.random() < 0.3
        self._resumes = rng.random() < 0.5
        self._requested = rng.choice(list(Tier))
        self._pause_s = rng.choice((0.0, 0.01, 0.2))
        self._mine: list[Write] = []
        self._highest_lsn = 0

    @property
    def unfinished(self) -> list[Write]:
        """Keyed writes that have to be sent again."""
        return [write for write in self._mine if write.key and not write.finished and not write.refused]

    async def run(self, server: Server) -> None:
        """Write through one stream after another, in a drain only what is left. Ends with the process."""
        while True:
            try:
                await _Session(self, server).run()
                # Not the end: what this writer sends to a superseded process meanwhile has to go to this one, too.
                while server.draining and not self.unfinished:  # noqa: ASYNC110
                    await trio.sleep(0.5)
            except* ArkaError as group:
                # A stream ends with one error: what else is in the group is the same one.
                self._promises.note(f"stream: writer {self.number} ended with {group.exceptions[0]}")
                if server.draining and group.subgroup(_is_not_found):
                    # Renamed while the catalog was away, and heard of only after the server had made its tables.
                    await server.make_table(self.table)
            await trio.sleep(self._rng.uniform(0.05, 0.5 if server.draining else self.rest_s))

    def make_write(self, table: TableInfo) -> Write:
        """A write that was never sent; to a primary-key table, some delete rows of others."""
        number = len(self._promises.writes)
        requested = self._requested if self._coalesced else self._rng.choice((self._requested, Tier.ICEBERG_COMMITTED))
        victims: tuple[tuple[int, int], ...] = ()
        rows = self._rng.randint(1, 4)
        if table.table_type is TableType.PRIMARY_KEY and self._rng.random() < 0.4:
            victims = tuple((self._rng.randrange(number + 1), self._rng.randrange(4)) for _ in range(rows))
            rows += 1
        key = f"w{number}" if self.keyed else ""
        write = Write(number, rows, table.uuid, key, requested, victims)
        self._promises.writes[number] = write
        every = self._promises.poison_every
        if every and number % every == 1 and table.table_type is TableType.APPEND_ONLY:
            # Without a draw: histories without such writes stay as they were.
            self._promises.poison.add(number)
        self._mine.append(write)
        return write

    def to_send_again(self, table: Any) -> list[Write]:
        """What a new stream begins with: all that is not settled, and some that is."""
        for write in self._mine:
            if write.table != table:
                # Its table was dropped: its key means nothing in the new one.
                write.finished = True
        again = self.unfinished
        settled = [write for write in self._mine if write.key and write.table == table and write not in again]
        again += self._rng.sample(settled, min(len(settled), 3))
        return sorted(again, key=lambda write: write.number)


class _Session:
    """One stream of a writer."""

    def __init__(self, writer: Writer, server: Server) -> None:
        self._writer = writer
        self._server = server
        self._rng = writer._rng
        self._promises = writer._promises
        self._exchange = Exchange(
            server.pipeline,
            server.limits,
            self,
            find=server.pipeline.tables.find_fresh,
            form=AckForm.METADATA,
            room=server.decode_room,
        )
        self._acks = StreamAcks(writer._coalesced)
        # Mostly what its table's default is.
        self._ordered: bool | None = writer.ordered
        self._awake = trio.Event()
        self._schema = SCHEMA
        # The ids of the fields that its further columns mean.
        self._fields: dict[str, int] = {}

    def wake(self) -> None:
        """See ``Outbound``."""
        self._awake.set()

    async def run(self) -> None:
        """Bind the table, write, read acks until all are there or patience ends."""
        writer, exchange = self._writer, self._exchange
        try:
            request: dict[str, Any] = {
                "table_name": str(writer.table),
                "acks": "watermark" if writer._coalesced else "each",
            }
            if self._ordered is not None:
                request |= {"ordered": self._ordered}
            began, troubles = trio.current_time(), self._server.troubles()
            await self._handle(FlightMessage(app_metadata=msgspec.json.encode(request)), 0)
            table = exchange._bound_table()
            keyed = table.info.table_type is TableType.PRIMARY_KEY
            self._acks.ordered = keyed if self._ordered is None else self._ordered
            if writer._resumes and writer._mine:
                asked = writer._highest_lsn
                marks = self._server.pipeline.resume_marks(table, asked)
                self._promises.take_handshake(self._server, table.info.uuid, writer._mine, asked, marks)
            # As a client does that has just asked for the table's schema.
            self._schema = stream_schema(table.info.schema)
            await self._handle(FlightMessage(header=flight_messages(self._schema)), 0)
            bound = exchange._require_decoder().table
            meant = fields_of(bound.schema)
            # A column that was dropped since is meant for no field.
            self._fields = {name: meant.get(name, 0) for name in self._schema.names if name in WIDE}
            # One that takes no writes binds nobody.
            calm = troubles is not None and self._server.troubles() == troubles
            if calm and table.is_committing and not table.refusal:
                self._promises.take_binding(bound.uuid, bound.schema_id, began)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_acks)
                await self._write(table.info)
                if self._server.draining or self._rng.random() < 0.7:
                    await exchange.wait_settled()
                nursery.cancel_scope.cancel()
        finally:
            exchange.close()

    async def _write(self, table: TableInfo) -> None:
        for write in self._writer.to_send_again(table.uuid):
            await self._send(write)
        for _ in range(0 if self._server.draining else self._rng.randint(1, 12)):
            if self._server.draining:
                return
            await self._send(self._writer.make_write(table))
            await trio.sleep(self._rng.uniform(0, self._writer._pause_s))

    async def _send(self, write: Write) -> None:
        # The same payload each time: what differs would be key_reused.
        filler = "x" * (write.number * 97 % 700)
        keys = [(write.number, part) for part in range(write.rows)]
        if write.victims:
            keys = [(write.number, -1), *write.victims]
        columns: list[list[object]] = [
            [number for number, _ in keys],
            [part for _, part in keys],
            [filler] * write.rows,
        ]
        columns += values_for(write.number, write.rows, self._fields)
        schema = self._schema
        header, buffer = frame_buffer(
            pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
        )
        request = {"requested_durability": write.requested.word}
        if write.key:
            request["idempotency_key"] = write.key
        if write.victims:
            request["operation"] = "delete"
        message = FlightMessage(
            header=header, app_metadata=msgspec.json.encode(request), buffer=buffer, body_bytes=buffer.body_bytes
        )
        await self._handle(message, buffer.size + _OVERHEAD_BYTES, lambda: self._sent(write))

    def _sent(self, write: Write) -> None:
        write.sends += 1
        write.sent_s = trio.current_time()
        write.shapes.add(tuple(self._fields.values()))
        # A refusal speaks of one attempt.
        write.refused = False
        self._acks.add(write)
        self._promises.note(f"send: {self._server.name} writer {self._writer.number} write {write.number}")

    async def _handle(self, message: FlightMessage, size: int, before: Callable[[], None] | None = None) -> None:
        granted = trio.Event()
        charge = self._server.ledger.request(size, granted.set)
        message.charge = charge
        try:
            await granted.wait()
            await self._server.process.gate()
        except trio.Cancelled:
            charge.release()
            raise
        if before is not None:
            before()
        await self._exchange.handle(message)

    async def _read_acks(self) -> None:
        while True:
            await self._awake.wait()
            self._awake = trio.Event()
            await trio.sleep(self._rng.choice((0.0, 0.0, 0.02, 1.0)) * self._rng.random())
            await self._server.process.gate()
            while data := self._exchange.take(self._rng.choice((1, 300, 1 << 20))):
                for ack in parse_acks(data):
                    self._promises.take_ack(self._server, self._acks, ack)
                    if not self._server.superseded:
                        self._writer._highest_lsn = max(self._writer._highest_lsn, ack.lsn)


__all__ = ["SCHEMA", "Server", "Writer", "definition_of"]
