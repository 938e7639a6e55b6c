"""One write stream: what DoExchange and DoPut have in common, without a socket.

Owns: the stream's defaults, its sequences and keys, and the order "decode, accept, ack". Does not own
LSNs (``arka.tiers``), the bytes' validity (``arka.flight.decode``) nor when acks may be sent (the
transport pulls them through ``take``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

import trio

from arka._core import ipc
from arka._core.wire import FlightMessage
from arka.errors import ArkaError, ErrorCode, InvalidRequest, Unavailable, cut, quote
from arka.flight import messages
from arka.flight.acks import AckForm, AckQueue
from arka.flight.decode import (
    SMALL_ROOM_BYTES,
    THREAD_SCHEMA_BYTES,
    BatchDecoder,
    DecodedBatch,
    NeedsRoom,
    read_schema,
)
from arka.flight.ordering import StreamOrder
from arka.flight.refusals import check_not_sql
from arka.flight.requests import name_of, read_descriptor
from arka.flight.unread import STEP_BYTES, Unread, UnreadShare
from arka.options import Limits
from arka.records import Operation, Releasable, TableName, TableType, Tier, WriteRequest, parse_write_request
from arka.storage.threads import Job
from arka.tiers.decoderoom import DecodeRoom, Held
from arka.tiers.pipeline import Pipeline
from arka.tiers.room import NoRoom, Room
from arka.tiers.table import Ending, Table
from arka.tiers.watermarks import Advance

T = TypeVar("T")

#: Longest idempotency key in UTF-8 bytes (protocol 3).
_MAX_KEY_BYTES: Final = 256
_ACKS: Final = ("each", "requested", "watermark")
_FORMS: Final = {"metadata": AckForm.METADATA, "batch": AckForm.BATCH}


#: What a byte of a schema costs, in bytes of data: a field of some 50 bytes takes 60 us.
_SCHEMA_WORK: Final = 256
#: About what a field takes of a schema message, in bytes.
_FIELD_BYTES: Final = 50


class _Released:
    """Stands for a charge that somebody else releases."""

    def release(self) -> None:
        """Do nothing."""


_RELEASED: Final = _Released()


class _Paid:
    """A message's charge, and the room for what it decodes to: released together."""

    __slots__ = ("held", "wire")

    def __init__(self, wire: Releasable, held: Held) -> None:
        self.wire = wire
        self.held = held

    def release(self) -> None:
        """Release both."""
        self.wire.release()
        self.held.release()


#: Charges so many bytes that are kept while the stream lasts, and what they are.
Keeper = Callable[[int, str], Releasable]


class Outbound(Protocol):
    """What a stream needs of its RPC: a way to say that acks may be due."""

    def wake(self) -> None:
        """Let the connection ask for acks."""
        ...


@dataclass(frozen=True, slots=True)
class _WriteOptions:
    """What holds for one write, or for those that say nothing themselves."""

    requested: Tier = Tier.DISK
    operation: Operation = Operation.UPSERT
    key: bytes = b""


class Exchange:
    """The state machine of one write stream. Used from trio's thread only, by one task.

    ``take`` is called by whoever writes for the connection (its writer, its reader, a tier that has risen), between the
    steps of that task.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        limits: Limits,
        outbound: Outbound,
        *,
        find: Callable[[TableName], Awaitable[Table]],
        form: AckForm,
        follow: Callable[[Room], None] | None = None,
        peer: str = "",
        unread: Unread | None = None,
        keep: Keeper | None = None,
        hold: Callable[[Callable[[Exception], None] | None], None] | None = None,
        room: DecodeRoom | None = None,
    ) -> None:
        """Begin without a table.

        Args:
            pipeline: where tables are and writes go.
            limits: what the stream may use.
            outbound: told that acks may be due.
            find: finds a table.
            form: how acks travel unless the client says otherwise.
            follow: told whose room holds the stream back.
            peer: whose turn it is among the threads (T23).
            unread: counts what the client has not read (T26).
            keep: charges what is kept while the stream lasts (T26).
            hold: told that the client does not read, with what ends the stream for it; and with None that it does.
            room: for what batches decode to; one of the stream's own if None.
        """
        self._decode_room = room or DecodeRoom(limits.memory_bytes)
        # What the stream's last batches have decoded to.
        self._decoded_bytes = 0
        self._unread = unread or Unread(UnreadShare(limits.unread_bytes), None)
        self._keep = keep
        self._hold = hold
        # The schema and dictionaries, and why the stream ended while its client did not read.
        self._kept: Releasable | None = None
        self._ended: Exception | None = None
        self._pipeline = pipeline
        self._peer = peer
        self._limits = limits
        self._find = find
        self._outbound = outbound
        # Told whose room holds the stream back.
        self._follow = follow
        self._table: Table | None = None
        # Whether table_name chose the table: the descriptor may repeat until the schema (T12) and yields to it.
        self._named_by_request = False
        self._decoder: BatchDecoder | None = None
        self._schema_header: bytes | None = None
        self._schema_metadata: bytes | None = None
        # Whether a WriteRequest has come that is not a batch's own: from then on a schema is checked when it comes.
        self._asked = False
        self._defaults = _WriteOptions()
        # Lost ranges up to here do not count in handshakes (R37).
        self._settled_lsn = 0
        # Whether the stream holds its table open (R37): from its first write on.
        self._holds = False
        self._key_prefix: str | None = None
        self._key_next = 0
        self.acks = AckQueue()
        self.acks.form = form
        self._order = StreamOrder()
        # What ack_as: auto stands for; of DoPut all there is.
        self._auto_form = form
        self._moved = trio.Event()
        self._attending = False
        pipeline.listen_failure(self._on_failure)
        # Bytes of acks that the transport has taken so far.
        self._taken = 0
        # Whether the transport was told that acks may be due, and has not asked for them since.
        self._told = False

    # -- the transport's side ---------------------------------------------------------------------

    def take(self, budget: int) -> bytes:
        """Give acks that are due, about ``budget`` bytes of them (see ``AckQueue.take``)."""
        self._told = False
        out = self.acks.take(budget)
        self._taken += len(out)
        if self._unread.charged:
            self._unread.charge(self.acks.unread_bytes)
        if out or self.acks.settled or self.acks.requested_only:
            # Of writes that wait for a later tier nothing is told, and they count as read.
            self._moved.set()
        return out

    async def wait_settled(self) -> None:
        """Wait until every write has had its last ack. Cancellation: nothing changes."""
        while not self.acks.settled:
            self._moved = trio.Event()
            self._tell()
            await self._moved.wait()

    def _tell(self) -> None:
        """Let the transport ask for acks."""
        if not self._told:
            self._told = True
            self._outbound.wake()

    async def wait_readable(self) -> None:
        """Wait until the client has few enough unread acks to send more (T6).

        Raises:
            ArkaError: ``too_large``: it did not read them in ``limits.unread_acks_timeout_s``.

        Cancellation: nothing changes.
        """
        timeout_s = self._limits.unread_acks_timeout_s
        deadline: float | None = None
        taken = self._taken
        held = False
        try:
            while self._is_behind():
                self._moved = trio.Event()
                # Only a client that does not read is timed; one that waits for a slow tier is merely held back.
                if not self.acks.due or self._taken != taken:
                    deadline, taken = None, self._taken
                if not self.acks.due:
                    await self._moved.wait()
                    continue
                if deadline is None:
                    deadline = trio.current_time() + timeout_s
                if not held and self._hold is not None:
                    held = True
                    self._hold(self._end)
                with trio.move_on_at(deadline) as scope:
                    await self._moved.wait()
                if self._ended is not None:
                    raise self._ended
                if scope.cancelled_caught:
                    raise ArkaError(
                        f"{self.acks.unsent} writes have unread acks, {self._unread.charged} bytes of acks and errors "
                        f"are unread, and none was read for {timeout_s:g} s: read acks while writing",
                        code=ErrorCode.TOO_LARGE,
                    )
        finally:
            if held and self._hold is not None:
                self._hold(None)

    def _is_behind(self) -> bool:
        """Whether the client has too many unread acks to send more; brings their charge up to date now and then."""
        acks, unread = self.acks, self._unread
        if acks.within(unread.checked, self._limits.unread_acks):
            return False
        most = acks.most_bytes
        unread.charge(acks.unread_bytes)
        if not acks.fewer_than(self._limits.unread_acks) or (acks.due and unread.too_many):
            unread.checked = 0
            return True
        unread.checked = most + STEP_BYTES
        return False

    def _end(self, error: Exception) -> None:
        """End the stream, whose client does not read."""
        self._ended = error
        self._moved.set()

    def _keep_schema(self) -> None:
        """Charge the schema and the dictionaries that the stream has now.

        Raises:
            AdmissionRejected: the ledger has no room to keep them.
        """
        if self._keep is None:
            return
        held = len(self._schema_header or b"") + (0 if self._decoder is None else self._decoder.dictionary_bytes)
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.release()
        if held:
            self._kept = self._keep(held, "a schema and its dictionaries")

    def close(self) -> None:
        """Stop listening to the tiers. To be called once, however the stream ends."""
        self._stop_attending()
        self._unread.close()
        if self._kept is not None:
            self._kept.release()
        self._pipeline.unlisten_failure(self._on_failure)
        if self._table is not None:
            self._table.unlisten_end(self._on_end)
            self._table.unlisten_aside(self._on_aside)
            if self._holds:
                self._holds = False
                self._pipeline.activity.let_go(self._table)
        if self._decoder is not None:
            self._decoder.close()

    # -- messages ---------------------------------------------------------------------------------

    async def handle(self, message: FlightMessage) -> None:
        """Take one message of the stream.

        Raises:
            ArkaError: the stream ends with it: a protocol error, an unknown table, a schema that does not
                match. What befalls a single write is an error ack instead (protocol 3.4).

        Cancellation: the message is either a write with an LSN or was never there.
        """
        kept = False
        try:
            if message.descriptor is not None and self._schema_header is None:
                await self._take_descriptor(message.descriptor)
            kind = ipc.message_type(message.header) if message.header else ipc.NONE
            if kind == ipc.RECORD_BATCH:
                kept = await self._take_batch(message)
                return
            if kind == ipc.NONE:
                await self._settle_schema_metadata(None)
                if message.app_metadata:
                    await self._take_defaults(message.app_metadata)
            elif kind == ipc.SCHEMA:
                await self._take_schema(message)
                self._keep_schema()
            elif kind == ipc.DICTIONARY_BATCH:
                await self._take_dictionary(message)
                self._keep_schema()
            else:
                raise InvalidRequest(
                    f"IPC message of type {kind} in a write stream: expected schema, dictionary or batch"
                )
        except ValueError as error:
            raise InvalidRequest(f"Malformed IPC message: {cut(str(error))}") from error
        finally:
            if not kept:
                message.charge.release()

    async def _take_descriptor(self, data: bytes) -> None:
        descriptor = read_descriptor(data)
        if descriptor.type == messages.DESCRIPTOR_PATH or descriptor.path:
            name = name_of(descriptor)
            if not self._named_by_request:
                await self._bind(name)
        elif descriptor.type == messages.DESCRIPTOR_CMD and descriptor.cmd:
            check_not_sql(bytes(descriptor.cmd))
            raise InvalidRequest("The descriptor must be a path that names the table, found a command")

    async def _take_schema(self, message: FlightMessage) -> None:
        """Bind the stream's schema; its metadata sets defaults unless the next batch repeats it (T18)."""
        assert message.header is not None
        metadata = message.app_metadata
        if metadata:
            request = parse_write_request(metadata)
            await self._bind_requested(request)
            self._schema_metadata = metadata
            self._asked = True
        if message.header != self._schema_header:
            await self._with_schema(message.header, read_schema, message.header)
        if self._schema_header is not None:
            # The first one is the stream's; a second may only repeat it.
            await self._check_schema()
        self._schema_header = message.header
        if self._asked or self._decoder is not None:
            await self._check_schema()

    async def _check_schema(self) -> None:
        """Hold the schema against the table, where both are known: a WriteRequest has come (protocol 3)."""
        if self._schema_header is not None and self._table is not None:
            if self._decoder is None:
                # The names in it mean the columns that have them now.
                await self._pipeline.tables.adoption.refresh(self._table)
                decoder = BatchDecoder(self._table.info, self._limits)
                await self._with_schema(self._schema_header, decoder.set_schema, self._schema_header)
                self._decoder = decoder
            self._require_decoder()

    async def _with_schema(self, header: bytes, function: Callable[..., T], *args: object) -> T:
        """Call what looks at each field of a schema: in a thread if there may be many."""
        if len(header) <= THREAD_SCHEMA_BYTES:
            return function(*args)
        return await Job(self._peer, len(header) * _SCHEMA_WORK).run(function, *args, abandon=True)

    async def _take_dictionary(self, message: FlightMessage) -> None:
        if self._decoder is None:
            await self._check_schema()
        decoder = self._require_decoder()
        work = decoder.dictionary_work(message)
        if not work:
            decoder.add_dictionary(message)
            return
        # As it came and as it is held; what stays is charged by `_keep_schema`.
        size = 2 * min(work, self._limits.dictionary_bytes)
        message.charge = _Paid(message.charge, await self._decode_room.take(self._peer, size))
        await self._in_thread(message, work, decoder.add_dictionary, message)

    async def _in_thread(self, message: FlightMessage, work: int, function: Callable[..., T], *args: object) -> T:
        """Call what looks at a message in a thread, when it is this client's turn.

        Cancellation: the thread is left alone, so that no drain waits for it; the message is paid for until it ends.
        """
        job = Job(self._peer, work)
        try:
            return await job.run(function, *args, abandon=True)
        except trio.Cancelled:
            if job.running:
                job.keep(message.charge)
                message.charge = _RELEASED
            raise

    async def _settle_schema_metadata(self, next_metadata: bytes | None) -> None:
        """Apply what stood on the schema message, unless the first batch says the same (arrow-go repeats it)."""
        pending, self._schema_metadata = self._schema_metadata, None
        if pending is not None and pending != next_metadata:
            await self._take_defaults(pending)

    async def _take_defaults(self, metadata: bytes) -> None:
        """Read a WriteRequest that holds for the batches to come."""
        request = parse_write_request(metadata)
        await self._bind_requested(request)
        defaults = self._defaults
        if request.requested_durability is not None:
            defaults = replace(defaults, requested=Tier.parse(request.requested_durability))
        if request.operation is not None:
            defaults = replace(defaults, operation=self._parse_operation(request.operation))
        self._defaults = defaults
        self._asked = True
        await self._check_schema()
        self._take_stream_options(request)
        if request.idempotency_key is not None:
            _check_key(request.idempotency_key)
            self._key_prefix = request.idempotency_key
            self._key_next = 0
        self._settled_lsn = max(self._settled_lsn, request.settled_lsn or 0)
        if request.resume_after_lsn is not None:
            self._resume(request)
        elif request.idempotency_key is not None:
            self._key_next = request.key_start or 0

    def _resume(self, request: WriteRequest) -> None:
        """Answer a handshake, and take writes again behind a refusal (R36); the numbers of keys go on where it says."""
        assert request.resume_after_lsn is not None
        if self._key_prefix is not None:
            if request.key_start is None:
                raise InvalidRequest(
                    "resume_after_lsn with an idempotency_key needs key_start: the next batch's number"
                )
            self._key_next = request.key_start
        marks = self._pipeline.resume_marks(self._bound_table(), request.resume_after_lsn, self._settled_lsn)
        self.acks.handshake(marks)
        self._order.resume()
        self._tell()

    def _resume_with_batch(self, metadata: bytes | None) -> None:
        """Take a resume_after_lsn that came with a batch: it holds for this batch and those behind it."""
        request = parse_write_request(metadata or b"{}")
        self._settled_lsn = max(self._settled_lsn, request.settled_lsn or 0)
        if request.resume_after_lsn is not None:
            self._resume(request)

    def _take_stream_options(self, request: WriteRequest) -> None:
        """Take what belongs to the whole stream, so that it cannot change after the first write."""
        if request.ordered is not None and request.ordered != self._order.requested:
            if self.acks.writes and request.ordered != self._order.is_ordered(self._bound_table().info.table_type):
                raise InvalidRequest("ordered belongs to the whole stream: send it before the first batch")
            self._order.requested = request.ordered
        form, coalesce, requested_only = self.acks.form, self.acks.coalesce, self.acks.requested_only
        if request.ack_as is not None:
            word = cut(request.ack_as).lower()
            if word not in ("auto", *_FORMS):
                raise InvalidRequest(f"Unknown ack_as {quote(request.ack_as)}: expected auto, metadata or batch")
            if self._auto_form is not AckForm.PUT_RESULT:
                form = _FORMS.get(word, self._auto_form)
        if request.acks is not None:
            acks = cut(request.acks).lower()
            if acks not in _ACKS:
                raise InvalidRequest(f"Unknown acks {quote(request.acks)}: expected {', '.join(_ACKS)}")
            coalesce = acks == "watermark"
            requested_only = acks == "requested"
        wanted = (form, coalesce, requested_only)
        if wanted != (self.acks.form, self.acks.coalesce, self.acks.requested_only):
            if self.acks.writes:
                raise InvalidRequest("ack_as and acks belong to the whole stream: send them before the first batch")
            self.acks.form, self.acks.coalesce, self.acks.requested_only = wanted
            # The empty schema may be due.
            self._tell()

    # -- the table --------------------------------------------------------------------------------

    async def _bind(self, name: TableName) -> None:
        """Choose the stream's table; it may change until the first batch."""
        if self._table is not None and self._table.info.name == name:
            return
        if self.acks.writes:
            assert self._table is not None
            raise InvalidRequest(f"The stream writes to {self._table.info.name}: {name} needs a stream of its own")
        table = await self._find(name)
        assert not self._holds, "a stream's table is fixed with its first write"
        if self._table is not None:
            self._table.unlisten_end(self._on_end)
            self._table.unlisten_aside(self._on_aside)
            if self._decoder is not None:
                self._decoder.close()
        self._table, self._decoder = table, None
        table.listen_end(self._on_end)
        table.listen_aside(self._on_aside)
        if self._follow is not None:
            self._follow(table.room)

    async def _bind_requested(self, request: WriteRequest) -> None:
        """Choose the table that a stream's WriteRequest names, whatever the descriptor says (protocol 3)."""
        if request.table_name is not None:
            await self._bind(TableName.parse(request.table_name))
            self._named_by_request = True

    def _bound_table(self) -> Table:
        if self._table is None:
            raise InvalidRequest(
                "No table is named: put it into the descriptor's path or into table_name before the first batch"
            )
        return self._table

    def _require_decoder(self) -> BatchDecoder:
        if self._schema_header is None:
            raise InvalidRequest("A batch or dictionary came before the schema")
        self._bound_table()
        assert self._decoder is not None, "whoever needs the decoder checks the schema first"
        self._decoder.set_schema(self._schema_header)
        return self._decoder

    # -- writes -----------------------------------------------------------------------------------

    async def _take_batch(self, message: FlightMessage) -> bool:
        """Accept one write or reject it; returns whether the message's charge was handed on."""
        await self._settle_schema_metadata(message.app_metadata)
        if self._decoder is None:
            await self._check_schema()
        decoder = self._decoder if self._decoder is not None else self._require_decoder()
        if _resumes(message.app_metadata):
            self._resume_with_batch(message.app_metadata)
        if not self._holds:
            await self._pipeline.hold(self._bound_table())
            self._holds = True
        number, self._key_next = self._key_next, self._key_next + 1
        while True:
            try:
                await self._take_write(decoder, message, number)
            except NoRoom as error:
                # Its stream gets no window meanwhile, and what comes behind it waits behind it.
                await error.room.wait()
                decoder = self._require_decoder()
            except (Unavailable, trio.Cancelled):
                raise
            except ArkaError as error:
                self._reject(error)
                return False
            else:
                self._tell()
                return True

    async def _take_write(self, decoder: BatchDecoder, message: FlightMessage, number: int) -> None:
        """Accept one write.

        Raises:
            NoRoom: nothing was done; it may be tried again.
            ArkaError: why it is refused.
        """
        if decoder.wide and decoder.table is not self._bound_table().info:
            await self._rebind_wide(decoder, message, number)
        options = self._check_write(decoder, message, number)
        while True:
            decoded = await self._decode(decoder, message, options.operation)
            if not self._rebind(decoder, options):
                break
            # Others changed the table meanwhile: these are columns that it had.
            self._give_room_back(message)
        try:
            self._accept(decoded, options, message)
        except NoRoom:
            # It is decoded again when there is room on the disk.
            self._give_room_back(message)
            raise

    async def _decode(self, decoder: BatchDecoder, message: FlightMessage, operation: Operation) -> DecodedBatch:
        """Decode a batch, once there is memory for what it decodes to; ``message.charge`` holds that too then (T26).

        Cancellation: nothing changes.
        """
        work = decoder.thread_work(message, operation)
        room_bytes = decoder.room(message, operation)
        if room_bytes:
            room_bytes = min(max(room_bytes, self._decoded_bytes), self._limits.batch_bytes)
        while True:
            if room_bytes:
                size = decoder.taken_bytes(message, room_bytes, operation)
                message.charge = _Paid(message.charge, await self._decode_room.take(self._peer, size))
            try:
                if work:
                    decoded = await self._in_thread(message, work, decoder.decode, message, operation, room_bytes)
                else:
                    decoded = decoder.decode(message, operation, room_bytes)
            except NeedsRoom:
                self._give_room_back(message)
                room_bytes = self._limits.batch_bytes
                work = max(work, room_bytes)
                continue
            self._settle_room(decoded, message)
            return decoded

    def _settle_room(self, decoded: DecodedBatch, message: FlightMessage) -> None:
        """Keep the room that a batch's frame takes, and no more."""
        paid = message.charge
        if not isinstance(paid, _Paid):
            return
        if decoded.fast:
            self._give_room_back(message)
        else:
            size = decoded.buffer.size
            self._decoded_bytes = max(self._decoded_bytes // 2, size)
            paid.held.shrink(size)

    def _give_room_back(self, message: FlightMessage) -> None:
        """Keep a message's own charge alone."""
        paid = message.charge
        if isinstance(paid, _Paid):
            message.charge = paid.wire
            paid.held.release()

    def handle_at_once(self, message: FlightMessage) -> bool:
        """Take one message of the stream without waiting, if it is a batch like those before it.

        Called instead of ``handle``, and only while no call of ``handle`` is under way.

        Returns:
            Whether it was taken. If not nothing was done, and it is for ``handle``, which also raises what ends
            the stream.
        """
        decoder, header = self._decoder, message.header
        if decoder is None or not header or not self.acks.writes or self._schema_metadata is not None:
            return False
        if self._is_behind() or _resumes(message.app_metadata):
            return False
        try:
            if ipc.message_type(header) != ipc.RECORD_BATCH:
                return False
            if decoder.table is not self._bound_table().info and decoder.wide:
                return False
            options = self._check_write(decoder, message, self._key_next)
            if decoder.needs_thread(message, options.operation):
                return False
            decoded = decoder.decode(message, options.operation, SMALL_ROOM_BYTES)
        except (ValueError, NeedsRoom):
            return False
        except ArkaError as error:
            return self._reject_at_once(message, error)
        if not decoded.fast:
            held = self._decode_room.try_take(decoded.buffer.size)
            if held is None:
                return False
            message.charge = _Paid(message.charge, held)
        try:
            self._accept(decoded, options, message)
        except (Unavailable, NoRoom):
            # Nothing has an LSN yet.
            self._give_room_back(message)
            return False
        except ArkaError as error:
            return self._reject_at_once(message, error)
        self._key_next += 1
        self._tell()
        return True

    def _reject_at_once(self, message: FlightMessage, error: ArkaError) -> bool:
        """Note a write that ``handle_at_once`` refused; returns whether it was taken."""
        if isinstance(error, Unavailable):
            return False
        self._key_next += 1
        self._reject(error)
        message.charge.release()
        return True

    def _rebind(self, decoder: BatchDecoder, options: _WriteOptions) -> bool:
        """Bind the stream to its table as it is now, by field id (R27); returns whether others have changed it.

        Raises:
            ArkaError: ``schema_mismatch``: a column that the stream has was dropped, or one that it lacks was added.
        """
        info = self._bound_table().info
        if decoder.table is info:
            return False
        try:
            decoder.rebind(info, options.operation)
        except ArkaError:
            if self._pipeline.knows(self._bound_table(), options.key):
                # Sent again: it is answered as the first time and adds nothing.
                return False
            raise
        return True

    async def _rebind_wide(self, decoder: BatchDecoder, message: FlightMessage, number: int) -> None:
        """Bind a stream of many fields in a thread; a refusal is kept for ``_rebind``, which knows resent writes."""
        assert message.header is not None
        operation = self._write_options(message.app_metadata, number).operation
        work = decoder.fields * _SCHEMA_WORK * _FIELD_BYTES
        with suppress(InvalidRequest):
            await self._in_thread(message, work, decoder.rebind, self._bound_table().info, operation)

    def _check_write(self, decoder: BatchDecoder, message: FlightMessage, number: int) -> _WriteOptions:
        """Check what can be said of a write before its batch is read; returns what holds for it."""
        options = self._write_options(message.app_metadata, number)
        if self._order.refusal is not None and not self._pipeline.knows(self._bound_table(), options.key):
            raise self._order.refusal.with_traceback(None)
        if message.oversized:
            raise ArkaError(
                f"The batch's body has {message.body_bytes} bytes, the limit is {self._limits.batch_bytes} "
                "(limits.batch_bytes): send smaller batches",
                code=ErrorCode.TOO_LARGE,
            )
        self._rebind(decoder, options)
        decoder.check_operation(options.operation)
        return options

    def _reject(self, error: ArkaError) -> None:
        """Note a write that was refused."""
        error = self._order.note_refused(error, self._bound_table().info.table_type)
        self.acks.reject(error.code, error.detail)
        self._tell()

    def _accept(self, decoded: DecodedBatch, options: _WriteOptions, message: FlightMessage) -> None:
        # Invariant: its bytes are of the schema that its frame will name. No await lies between the check and this.
        assert self._decoder is not None
        table = self._bound_table()
        assert self._decoder.table is table.info or self._pipeline.knows(table, options.key)
        paid = message.charge if isinstance(message.charge, _Paid) else None
        charge = message.charge if paid is None else paid.held
        appended = self._pipeline.append(
            self._bound_table(),
            decoded.buffer,
            rows=decoded.rows,
            operation=options.operation,
            key=options.key,
            charge=charge,
            requested=options.requested,
        )
        if paid is not None:
            # The frame is in memory now, and what came is not.
            paid.wire.release()
        if appended.duplicate:
            code = ErrorCode.KEY_REUSED if appended.key_reused else None
            self.acks.duplicate(appended.lsn, decoded.rows, options.requested, code)
        else:
            self.acks.accept(appended.lsn, decoded.rows, options.requested)
        self._attend()

    def _write_options(self, metadata: bytes | None, number: int) -> _WriteOptions:
        """Resolve what holds for one write from its own WriteRequest and the stream's defaults."""
        if not metadata and self._key_prefix is None:
            return self._defaults
        requested, operation = self._defaults.requested, self._defaults.operation
        key = "" if self._key_prefix is None else f"{self._key_prefix}#{number}"
        if metadata:
            request = parse_write_request(metadata)
            table = self._bound_table()
            if request.table_name is not None and TableName.parse(request.table_name) != table.info.name:
                raise InvalidRequest(
                    f"The stream writes to {table.info.name}: a batch cannot go to {cut(request.table_name)}"
                )
            if request.requested_durability is not None:
                requested = Tier.parse(request.requested_durability)
            if request.operation is not None:
                operation = self._parse_operation(request.operation)
            if request.idempotency_key is not None:
                _check_key(request.idempotency_key)
                key = request.idempotency_key
            self._take_stream_options(request)
        return _WriteOptions(requested, operation, key.encode())

    def _parse_operation(self, word: str) -> Operation:
        try:
            operation = Operation[cut(word).upper()]
        except KeyError:
            raise InvalidRequest(f"Unknown operation {quote(word)}: expected upsert or delete") from None
        table = self._bound_table()
        if operation is Operation.DELETE and table.info.table_type is not TableType.PRIMARY_KEY:
            raise InvalidRequest(f"operation delete needs a primary-key table; {table.info.name} is append-only")
        return operation

    def _attend(self) -> None:
        """Listen to the tiers while writes wait for them: of thousands of streams, a group commit tells those alone."""
        if self._attending:
            return
        self._attending = True
        for mark in self._pipeline.marks_of(self._bound_table()):
            self.acks.advance(mark.latest)
            mark.listen(self._on_advance)

    def _stop_attending(self) -> None:
        self._attending = False
        if self._table is not None:
            for mark in self._pipeline.marks_of(self._table):
                mark.unlisten(self._on_advance)

    # -- what comes back up -----------------------------------------------------------------------

    def _on_advance(self, advance: Advance) -> None:
        self.acks.advance(advance)
        if advance.lsn >= self.acks.highest_lsn:
            # Nothing waits for this tier until the next write.
            self._attending = False
            self._pipeline.marks_of(self._bound_table())[advance.tier - Tier.DISK].unlisten(self._on_advance)
        if self.acks.unsent:
            self._moved.set()
            self._tell()

    def _on_aside(self, lsn: int, detail: str) -> None:
        self.acks.set_aside(lsn, detail)

    def _on_end(self, ending: Ending) -> None:
        self.acks.fail(ending.code, ending.detail)
        self._tell()

    def _on_failure(self, code: ErrorCode, detail: str) -> None:
        if code is ErrorCode.OUTCOME_UNKNOWN:
            # Else the log is another process's now, and the stream ends with a status (protocol 3.4).
            self.acks.fail(code, detail)
            self._tell()


def _resumes(metadata: bytes | None) -> bool:
    """Whether a batch's WriteRequest may hold a handshake: rare enough to be looked at by itself."""
    return bool(metadata) and b"resume_after_lsn" in metadata  # type: ignore[operator]


def _check_key(key: str) -> None:
    length = len(key.encode())
    if not 1 <= length <= _MAX_KEY_BYTES:
        raise InvalidRequest(f"idempotency_key has {length} bytes: expected 1 to {_MAX_KEY_BYTES}")


FailureListener = Callable[[ErrorCode, str], None]

__all__ = ["Exchange", "FailureListener", "Outbound"]
