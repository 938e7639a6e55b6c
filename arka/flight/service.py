"""The Flight RPCs: each takes one call from the transport and turns it into calls on the pipeline.

Owns: the mapping of RPCs, actions and tickets. Does not own streams' writes (``arka.flight.exchange``),
bytes on the wire (``arka.flight.http2``) nor tables (``arka.tiers``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final
from uuid import UUID

import msgspec
import pyarrow as pa
import structlog
import trio

from arka.errors import ArkaError, ErrorCode, InvalidRequest, Unavailable, cut, listed, quote
from arka.flight import messages
from arka.flight.acks import AckForm, chokes_on_metadata
from arka.flight.answers import AnswerBuffers, BufferedAnswer, check_rate, deliver
from arka.flight.exchange import Exchange
from arka.flight.grpc import UNARY_BYTES, Call, Route
from arka.flight.publicschema import COLUMN_WORK, PublicSchemas, public_schema
from arka.flight.refusals import check_not_sql, unknown_action
from arka.flight.requests import (
    ACTION_BYTES,
    THREAD_BYTES,
    Action,
    Requests,
    name_of,
    read_action,
    read_descriptor,
)
from arka.flight.schemas import describe_partition, describe_schema
from arka.flight.unread import Unread, UnreadShare
from arka.lineage import CommitMark
from arka.options import Limits
from arka.records import TableName, Tier
from arka.storage.threads import run_compute
from arka.tiers.ddl import load_table
from arka.tiers.decoderoom import DecodeRoom
from arka.tiers.effects import Effects
from arka.tiers.pipeline import Pipeline
from arka.tiers.reads import ReadRequest, read_table
from arka.tiers.table import SCHEMA_IDS, Table

log = structlog.get_logger(__name__)

#: What a table's name costs in a list, in bytes of data.
_NAME_WORK: Final = 512

_ACTIONS: Final = {
    "CreateTable": "Create a table. Body: name, schema_json, table_type, primary_key, partition_spec, properties.",
    "ListTables": "List the full names of all tables, sorted. Body: empty.",
    "DropTable": "Drop a table. Body: name, purge, table_uuid.",
    "DescribeTable": "Describe a table and how far each tier is. Body: name.",
    "Flush": "Wait until all that was accepted has reached a tier. Body: name, durability.",
}


#: How long a list of tables waits for the actions that were asked for before it, in seconds.
_LIST_PATIENCE_S: Final = 2.0

#: The words of a ticket's ``compression``, and what Arrow calls them.
_COMPRESSIONS: Final = {"none": None, "lz4": "lz4", "zstd": "zstd"}

#: So many more columns, and characters of their names, than its table has now may a ticket name: a past schema's.
_MORE_COLUMNS: Final = 1000
_MORE_CHARACTERS: Final = 64 * 1024

#: More than any table has.
_MOST_ROWS: Final = 2**62
#: Messages of a write stream that one step of its RPC takes, beside those that are taken at once.
_MESSAGES_PER_STEP: Final = 8


class _NameBody(msgspec.Struct, frozen=True):
    """The body of the actions that name one table."""

    name: str
    purge: bool = False
    #: DropTable: the table that is meant, where the name may be another one's.
    table_uuid: UUID | None = None
    durability: str = Tier.ICEBERG_COMMITTED.word
    #: DescribeTable: name what the table's own marks of all logs say.
    logs: bool = False
    #: DescribeTable: add the schema with Iceberg's field ids.
    field_ids: bool = False


class _Ticket(msgspec.Struct, frozen=True):
    """A DoGet ticket in its JSON form (protocol 4)."""

    table_name: str
    at_lsn: int | None = None
    wait_for_lsn: int | None = None
    columns: list[str] | None = None
    limit: int | None = None
    compression: str = "none"


class FlightService:
    """Arrow Flight's RPCs over a pipeline."""

    def __init__(self, pipeline: Pipeline, effects: Effects, limits: Limits, decode_room: DecodeRoom) -> None:
        """Join the service to the engine.

        Args:
            pipeline: where tables are and writes go.
            effects: runs the actions that change something.
            limits: what one stream may use.
            decode_room: for what batches decode to, which the ledger leaves free.
        """
        self._effects = effects
        self._pipeline = pipeline
        self._limits = limits
        self._answer_buffers = AnswerBuffers(limits.read_buffer_bytes, limits.reads)
        self._unread = UnreadShare(limits.unread_bytes)
        self._decode_room = decode_room
        self._requests = Requests()
        self._schemas = PublicSchemas()
        self._draining = False
        self._drain_reason = "The server is draining: reconnect to the same node and resume"
        self._drain_deadline = 0.0
        # The scopes in which write streams read, cancelled when the server drains.
        self._readers: dict[trio.CancelScope, None] = {}
        pipeline.listen_failure(self._on_failure)

    def start_drain(self, deadline: float) -> None:
        """Read no write stream any more; deliver acks until ``deadline`` (trio's clock), then end them (T19)."""
        self._draining = True
        self._drain_deadline = deadline
        for reading in tuple(self._readers):
            reading.cancel()

    def _on_failure(self, code: ErrorCode, detail: str) -> None:
        if code is ErrorCode.UNAVAILABLE:
            # Fenced: what is on its way has its outcome with the log's new owner.
            self._drain_reason = detail
            self.start_drain(trio.current_time())

    def routes(self) -> Mapping[str, Route]:
        """Return the handlers by gRPC path."""
        handlers: dict[str, tuple[Callable[[Call], Awaitable[None]], bool]] = {
            "DoExchange": (self.do_exchange, True),
            "DoPut": (self.do_put, True),
            "DoGet": (self.do_get, False),
            "DoAction": (self.do_action, False),
            "ListActions": (self.list_actions, False),
            "ListFlights": (self.list_flights, False),
            "GetFlightInfo": (self.get_flight_info, False),
            "GetSchema": (self.get_schema, False),
            "Handshake": (self.handshake, False),
            "PollFlightInfo": (self.poll_flight_info, False),
        }
        adopt = {"DoAction": self._adopt_action}
        return {
            messages.SERVICE + name: Route(
                handler,
                flight_data=flight_data,
                adopt=adopt.get(name),
                request_bytes=ACTION_BYTES if name == "DoAction" else UNARY_BYTES,
            )
            for name, (handler, flight_data) in handlers.items()
        }

    # -- writing ----------------------------------------------------------------------------------

    async def do_exchange(self, call: Call) -> None:
        """Take writes and give acks until the client half-closes and all acks are out."""
        await self._write_stream(call, AckForm.METADATA)

    async def do_put(self, call: Call) -> None:
        """Take writes like DoExchange; acks travel as PutResult."""
        await self._write_stream(call, AckForm.PUT_RESULT)

    async def _write_stream(self, call: Call, form: AckForm) -> None:
        if form is AckForm.METADATA and chokes_on_metadata(call.user_agent):
            form = AckForm.BATCH
        exchange = Exchange(
            self._pipeline,
            self._limits,
            call,
            find=partial(self._find, peer=call.peer_host),
            form=form,
            follow=call.follow,
            peer=call.peer_host,
            unread=Unread(self._unread, call.account),
            keep=call.keep,
            hold=call.hold,
            room=self._decode_room,
        )
        call.attach_outbox(exchange)
        try:
            if await self._read_writes(call, exchange):
                await exchange.wait_settled()
                return
            # Draining: the acks that come in time go out, the client resumes for the rest (protocol 3.4).
            with trio.move_on_at(self._drain_deadline):
                await exchange.wait_settled()
            raise Unavailable(self._drain_reason)
        finally:
            exchange.close()

    async def _read_writes(self, call: Call, exchange: Exchange) -> bool:
        """Handle messages until the client half-closes (True) or the server drains (False)."""
        with trio.CancelScope() as reading:
            if self._draining:
                return False
            self._readers[reading] = None
            call.set_taker(exchange.handle_at_once)
            handled = 0
            try:
                while True:
                    await exchange.wait_readable()
                    message = await call.receive()
                    if message is None:
                        return True
                    assert not isinstance(message, bytes)
                    await exchange.handle(message)
                    handled += 1
                    if handled % _MESSAGES_PER_STEP == 0:
                        # The inbox may hold dozens, and what is not taken at once costs up to a millisecond (T22).
                        await trio.lowlevel.checkpoint()
            finally:
                del self._readers[reading]
        return False

    # -- reading ----------------------------------------------------------------------------------

    async def do_get(self, call: Call) -> None:
        """Send a table's rows as record batches: its Iceberg snapshot, and what was accepted since."""
        peer = call.peer_host
        ticket = await self._requests.read(peer, await _request(call), _parse_ticket)
        table = await self._find(TableName.parse(ticket.table_name), max_age_s=0, peer=peer)
        if ticket.limit is not None and ticket.limit < 0:
            raise InvalidRequest(f"limit must not be negative: {ticket.limit}")
        columns = None if ticket.columns is None else tuple(ticket.columns)
        _check_held(table, columns or ())
        limit = None if ticket.limit is None else min(ticket.limit, _MOST_ROWS)
        compression = cut(ticket.compression).lower()
        if compression not in _COMPRESSIONS:
            raise InvalidRequest(
                f"Unknown compression {quote(ticket.compression)}: expected {', '.join(_COMPRESSIONS)}"
            )
        request = ReadRequest(columns, limit, ticket.at_lsn, ticket.wait_for_lsn, _COMPRESSIONS[compression])
        answer = BufferedAnswer(self._answer_buffers, peer)
        turns = self._pipeline.read_turns

        def contended() -> bool:
            return (answer.reading and turns.is_contended(peer)) or self._answer_buffers.waiting > 0

        async def read() -> None:
            try:
                await read_table(self._pipeline, table, request, answer, peer=peer)
            except ArkaError as error:
                answer.fail(error)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                nursery.start_soon(check_rate, answer, self._limits.min_bytes_per_s, contended)
                await deliver(call, answer, self._limits.message_stall_s)
                nursery.cancel_scope.cancel()
        finally:
            answer.close()
            if answer.too_slow:
                # Not earlier: the task that sends would go on with what it has, and fill the buffer again.
                call.discard_unsent()

    async def get_schema(self, call: Call) -> None:
        """Send a table's schema as an encapsulated IPC message."""
        table, _ = await self._named_table(call)
        schema = await self._schemas.message(table.info, call.peer_host)
        await call.send(messages.build("SchemaResult", schema=schema))

    async def get_flight_info(self, call: Call) -> None:
        """Send where a table is read from: one endpoint, this server."""
        table, descriptor = await self._named_table(call)
        schema = await self._schemas.message(table.info, call.peer_host)
        await call.send(_flight_info(table, descriptor, schema).SerializeToString())

    async def poll_flight_info(self, call: Call) -> None:
        """Refuse: there are no queries that take long to plan."""
        await self._named_table(call)
        raise ArkaError(
            "PollFlightInfo: nothing here takes long to plan; use GetFlightInfo, or DoGet at once",
            code=ErrorCode.UNIMPLEMENTED,
        )

    async def list_flights(self, call: Call) -> None:
        """Send the FlightInfo of each table; criteria, if any, are a prefix of its full name."""
        peer = call.peer_host
        prefix = bytes(messages.parse("Criteria", await _request(call)).expression).decode("utf-8", "replace")
        await self._pipeline.tables.refresh_list()
        # All that waited for the list go on at once.
        await call.next_turn()
        for table in self._pipeline.tables.listed():
            if str(table.info.name).startswith(prefix):
                path = [table.info.name.namespace, table.info.name.name]
                descriptor = messages.make("FlightDescriptor", type=messages.DESCRIPTOR_PATH, path=path)
                schema = await self._schemas.message(table.info, peer)
                await call.send(_flight_info(table, descriptor, schema).SerializeToString())
                # A schema that is kept, and room to send it, make none of this wait.
                await call.next_turn()

    async def _named_table(self, call: Call) -> tuple[Table, Any]:
        """Find the table that a request's descriptor names; returns the descriptor too."""
        descriptor = read_descriptor(await _request(call))
        check_not_sql(bytes(descriptor.cmd))
        # As new as what DoGet will read: one answer everywhere (R27).
        return await self._find(name_of(descriptor), max_age_s=0, peer=call.peer_host), descriptor

    async def _find(self, name: TableName, *, max_age_s: float | None = None, peer: str = "") -> Table:
        """Find a table, behind the actions on it that were asked for earlier: their client need not wait for them.

        Args:
            name: the table's.
            max_age_s: see ``Tables.find_fresh``.
            peer: the client's address; its earlier requests are read first.
        """
        # Such an action may have come in the same bytes: its task has its turn first.
        await trio.lowlevel.checkpoint()
        await self._requests.wait_for(peer)
        await self._effects.wait_for(str(name))
        return await self._pipeline.tables.find_fresh(name, max_age_s=max_age_s)

    async def handshake(self, call: Call) -> None:
        """Answer each handshake request; no credentials are asked for."""
        while (data := await call.receive()) is not None:
            assert isinstance(data, bytes)
            request = messages.parse("HandshakeRequest", data)
            await call.send(messages.build("HandshakeResponse", protocol_version=request.protocol_version))

    # -- actions ----------------------------------------------------------------------------------

    async def list_actions(self, call: Call) -> None:
        """Send the actions that ``do_action`` knows."""
        await _request(call)
        for name, description in _ACTIONS.items():
            await call.send(messages.build("ActionType", type=name, description=description))

    async def do_action(self, call: Call) -> None:
        """Run one action; body and result are JSON."""
        peer = call.peer_host
        action = await self._requests.read(peer, await _request(call), read_action)
        if (effect := self._effect_of(action)) is not None:
            result = await self._effects.do(action.type, *effect)
            await call.send(messages.build("Result", body=json.dumps(result).encode()))
            return
        body = action.body
        match action.type:
            case "ListTables":
                with trio.move_on_after(_LIST_PATIENCE_S):
                    await trio.lowlevel.checkpoint()
                    await self._effects.wait_idle()
                await self._pipeline.tables.refresh_list()
                await call.next_turn()
                names = [table.info.name for table in self._pipeline.tables.listed()]
                answer = await run_compute(_spell_names, names, peer=peer, size=len(names) * _NAME_WORK)
            case "DescribeTable":
                answer = await self._describe_table(body, peer)
            case "Flush":
                with self._pipeline.flushes.admit(peer):
                    answer = json.dumps(await self._flush(body, peer)).encode()
            case unknown:
                raise unknown_action(unknown, _ACTIONS)
        await call.send(messages.build("Result", body=answer))

    def _effect_of(self, action: Action) -> tuple[str, Callable[[], Awaitable[Any]]] | None:
        """What an action is to change, with the name of what it is about; None for one that changes nothing.

        Raises:
            ArkaError: the body is malformed.
        """
        tables = self._pipeline.tables
        if (definition := action.definition) is not None:

            async def create() -> Any:
                table, created = await tables.create(definition)
                return {"name": str(table.info.name), "table_uuid": str(table.info.uuid), "created": created}

            return str(definition.name), create
        if action.type == "DropTable":
            request = _parse_body(action.body)
            name = TableName.parse(request.name)

            async def drop() -> Any:
                dropped = await tables.drop(name, purge=request.purge, uuid=request.table_uuid)
                return {"name": str(dropped), "dropped": True}

            return str(name), drop
        return None

    def _adopt_action(self, request: bytes) -> None:
        """Carry out an action whose client left as soon as its request was complete (R41)."""
        if len(request) > THREAD_BYTES:
            self._effects.adopt("DoAction", "", partial(self._adopt_large, request))
            return
        try:
            action = read_action(request)
            effect = self._effect_of(action)
        except ArkaError as error:
            log.info("action.malformed", reason=error.detail)
            return
        if effect is not None:
            self._effects.adopt(action.type, *effect)

    async def _adopt_large(self, request: bytes) -> None:
        """Carry out what is too large to be read on trio's thread."""
        effect = self._effect_of(await run_compute(read_action, request, size=len(request) * 16))
        if effect is not None:
            await effect[1]()

    async def _describe_table(self, body: bytes, peer: str) -> bytes:
        asked = _parse_body(body)
        table = await self._find(TableName.parse(asked.name), max_age_s=0, peer=peer)
        info = table.info
        marks = self._pipeline.table_marks(table)
        logs: dict[str, Any] = {}
        if asked.logs:
            found = await load_table(self._pipeline.tables.catalog, info.name)
            committed = () if found is None or found.info.uuid != info.uuid else found.marks
            logs = {"logs": {str(mark.log_uuid): _describe_mark(mark) for mark in committed}}
        answer = {
            **logs,
            "name": str(info.name),
            "table_uuid": str(info.uuid),
            "table_type": info.table_type.value,
            "primary_key": list(info.key_columns),
            # Spelled in a thread.
            "schema": None,
            "schema_id": info.schema_id % SCHEMA_IDS,
            "partition_spec": describe_partition(info),
            "location": info.location,
            "properties": dict(table.properties),
            "state": table.told_state.value,
            "reason": "; ".join(
                filter(None, (self._pipeline.tables.watch.trouble, self._pipeline.stalled(table), table.reason))
            )
            or None,
            "holding_back": table.room.reason,
            "watermarks": {tier.word: lsn for tier, lsn in marks.items()},
            "set_aside": sorted(table.asides),
            "lag": {
                "writes_from_lsn": table.backlog.first_lsn,
                "frame_bytes": table.backlog.frame_bytes,
                "parked_bytes": self._pipeline.tables.parked_bytes(table),
                "set_apart_bytes": self._pipeline.tables.apart.behind_bytes(table),
            },
            "snapshot_id": None
            if table.committed.latest.snapshot_id is None
            else str(table.committed.latest.snapshot_id),
            "survives": self._pipeline.survival,
        }
        work = len(info.schema) * COLUMN_WORK
        return await run_compute(_spell_table, answer, info.schema, asked.field_ids, peer=peer, size=work)

    async def _flush(self, body: bytes, peer: str) -> Any:
        request = _parse_body(body)
        tier = Tier.parse(request.durability)
        table = await self._find(TableName.parse(request.name), max_age_s=0, peer=peer)
        lsn = await self._pipeline.flush(table, tier)
        return {"name": str(table.info.name), "durability": tier.word, "lsn": lsn}


async def _request(call: Call) -> bytes:
    """Receive the one message of a unary request."""
    data = await call.receive()
    if data is None:
        raise InvalidRequest(f"{call.method}: the request message is missing")
    assert isinstance(data, bytes)
    return data


def _parse_body(body: bytes) -> _NameBody:
    try:
        return msgspec.json.decode(body, type=_NameBody)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"Malformed action body: {cut(str(error))}; expected JSON with 'name'") from error


def _parse_ticket(message: bytes) -> _Ticket:
    """Read a Ticket message: JSON or a bare table name; may be called in any thread."""
    data = bytes(messages.parse("Ticket", message).ticket)
    check_not_sql(data)
    if data.lstrip()[:1] == b"{":
        try:
            return msgspec.json.decode(data, type=_Ticket)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"Malformed ticket: {cut(str(error))}") from error
    try:
        return _Ticket(data.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The ticket is neither JSON nor a table name: {error}") from error


def _spell_names(names: list[TableName]) -> bytes:
    return json.dumps([str(name) for name in names]).encode()


def _spell_table(answer: dict[str, Any], schema: pa.Schema, field_ids: bool) -> bytes:
    """Spell DescribeTable's answer; called in a thread."""
    if field_ids:
        # For `arka wal salvage --resubmit`: an Arrow schema as an IPC message, with Iceberg's field ids (R24).
        answer = {"field_ids": base64.b64encode(schema.serialize()).decode(), **answer}
    answer["schema"] = describe_schema(public_schema(schema))
    return json.dumps(answer).encode()


def _check_held(table: Table, columns: Sequence[str]) -> None:
    """Check that a read may hold its list of columns while it waits (T27); which there are is looked at later.

    Raises:
        InvalidRequest: no schema that the table has had is likely to have so many, or such long ones.
    """
    names = table.info.schema.names
    if len(columns) > 2 * len(names) + _MORE_COLUMNS:
        raise InvalidRequest(f"The ticket names {len(columns)} columns, {table.info.name} has {len(names)}")
    size = sum(map(len, columns))
    if size > 2 * sum(map(len, names)) + _MORE_CHARACTERS:
        raise InvalidRequest(
            f"The ticket's columns have {size} characters, which is more than {table.info.name} can have: found "
            f"{listed(map(quote, columns))}"
        )


def _flight_info(table: Table, descriptor: Any, schema: bytes) -> Any:
    ticket = messages.make("Ticket", ticket=str(table.info.name).encode())
    return messages.make(
        "FlightInfo",
        schema=schema,
        flight_descriptor=descriptor,
        endpoint=[messages.make("FlightEndpoint", ticket=ticket)],
        total_records=-1,
        total_bytes=-1,
    )


def _describe_mark(mark: CommitMark) -> dict[str, Any]:
    """What a table remembers of a log; the token as text, since JSON's numbers are not that exact everywhere."""
    return {"committed_lsn": mark.committed_lsn, "epoch": mark.epoch, "token": f"{mark.token:016x}"}


__all__ = ["FlightService"]
