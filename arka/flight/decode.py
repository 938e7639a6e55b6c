"""A stream's IPC messages, turned into batches that a table can hold (T12 to T16, R17).

Owns: the stream's schema and dictionaries, the checks before and after Arrow reads a batch, and the choice
between the wire's own bytes and a rewritten frame. Does not own the message's charge, LSNs, or threads:
``needs_thread`` only says when one is due.

The fast path keeps the frame as the client filled it. Anything else (another column order, wider types,
dictionaries, compression) is decoded and written into a new frame with the same rows, so that whatever
stands in the log is one uncompressed RecordBatch in the table's schema.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, NoReturn, Protocol

import pyarrow as pa

from arka._core import ipc
from arka._core.buffers import FRAME_HEADER_BYTES, FrameBuffer
from arka.errors import ErrorCode, InternalError, InvalidRequest, cut
from arka.flight.conform import Conformance, StreamPlan, plan_conformance
from arka.flight.convert import OverLimit, invalid_batch, over_limit
from arka.flight.dictionaries import REFUSALS, StreamDictionaries
from arka.flight.layout import Layout, describe_finding, plan_layout, wire_schema
from arka.flight.partitions import COUNT_ROWS, PartitionLimit
from arka.flight.plain import is_plain, referred_bytes
from arka.flight.rebinding import Bound, bind_fields, rename_fields
from arka.flight.selection import select_columns
from arka.flight.storable import Storable
from arka.options import Limits
from arka.records import Operation, TableInfo

#: Variable-width bytes above which validation belongs into a thread: 1 MiB takes some 0.2 ms (T16).
THREAD_BYTES: Final = 1024 * 1024
#: The same for batches that are rewritten: casts and copies are several times slower.
THREAD_REWRITE_BYTES: Final = 256 * 1024
#: What a field costs beside its bytes, in the same measure: 1 us where Arrow reads it as it is, 40 us where it is cast.
_FIELD_BYTES: Final = 512
_REWRITTEN_FIELD_BYTES: Final = 4096
#: Fixed-width bytes that are only compared with what is legal cost so much less.
_COMPARED: Final = 16
#: Bytes of a schema message above which reading it and holding it against the table belongs into a thread: a field has
#: some 50 bytes and costs 60 us.
THREAD_SCHEMA_BYTES: Final = 4096
#: What a small batch may decode to: room for it is found at once or not at all.
SMALL_ROOM_BYTES: Final = THREAD_REWRITE_BYTES
#: How often the rows of a batch are in memory while it is written again: as they were, and as they become.
_COPIES: Final = 2
#: The same for what is made to count the bytes that rows name (``plain.referred_bytes``).
_COUNTING_COPIES: Final = 4
#: Longest header of a batch that is remembered, to be recognised: a batch of some hundred columns has so much.
_REMEMBERED_BYTES: Final = 64 * 1024
#: Longest schema message: one of 10,000 columns has about 2 MiB.
MAX_SCHEMA_BYTES: Final = 16 * 1024 * 1024


class NeedsRoom(Exception):
    """A batch decodes to more bytes than it was given room for, and may have more."""


class IpcMessage(Protocol):
    """What the decoder needs of a FlightData message."""

    @property
    def header(self) -> bytes | None:
        """The IPC message's flatbuffer."""
        ...

    @property
    def buffer(self) -> FrameBuffer | None:
        """The frame with the same flatbuffer and the body."""
        ...


@dataclass(slots=True)
class DecodedBatch:
    """A batch that the table can hold.

    Attributes:
        buffer: the frame that goes to the log.
        rows: row count.
        fast: whether ``buffer`` is the frame that the message came in.
        schema: the table's, or its key's for a delete.
    """

    buffer: FrameBuffer
    rows: int
    fast: bool
    schema: pa.Schema

    @property
    def batch(self) -> pa.RecordBatch:
        """The rows: a view of ``buffer``, which it keeps alive."""
        return pa.ipc.read_record_batch(_ipc_message(self.buffer), self.schema)


class _Target:
    """What one operation's frames hold, and how a stream's batches become that.

    Attributes:
        conformance: the way there.
        layout: what the frames look like on the wire.
        columns: the stream's columns that are looked at; None for all.
        wire: with which schema these are read.
        wire_layout: what they look like on the wire.
        rewrites_rows: whether rows may name more than the message holds (``plain``).
        storable: what their values must be like.
        partitions: how many partitions a batch may touch; None where it makes no files.
        plain: whether no bytes of a body can be wrong but those that the layout's check looks at: columns of
            numbers and times alone. What else Arrow would refuse is then in the header.
    """

    def __init__(
        self,
        conformance: Conformance,
        table: TableInfo,
        wire: pa.Schema,
        columns: tuple[int, ...] | None,
        partitions: PartitionLimit | None,
    ) -> None:
        self.conformance = conformance
        self.partitions = partitions
        self.columns = columns
        self.wire = wire if columns is None else pa.schema([wire.field(index) for index in columns])
        self.wire_layout = plan_layout(self.wire)
        self.rewrites_rows = not all(is_plain(field.type) for field in self.wire)
        self.storable = Storable(conformance.schema, table)
        self.layout = plan_layout(conformance.schema, required=True, ranges=self.storable.ranges)
        self.plain = not self.storable.always and all(_is_plain(field.type) for field in conformance.schema)


class BatchDecoder:
    """Decodes one stream for one table.

    Not thread-safe: one call at a time, from whatever thread.

    Args:
        table: canonical types with field ids.
        limits: ``batch_bytes``, ``batch_rows`` and ``dictionary_bytes`` are used.
    """

    def __init__(self, table: TableInfo, limits: Limits) -> None:
        self._table = table
        self._limits = limits
        self._header: bytes | None = None
        self._stream: pa.Schema | None = None
        # Which fields of the table the stream's fields meant when it began (R27).
        self._bound: tuple[Bound, ...] = ()
        self._may_upsert = False
        # Why the table as it is now does not take an operation of the stream.
        self._refused: tuple[TableInfo, Operation, str] | None = None
        self._plan: StreamPlan | None = None
        self._targets: dict[Operation, _Target] = {}
        self._wire: pa.Schema | None = None
        self._wire_layout: Layout | None = None
        self._dictionary_ids: tuple[int, ...] = ()
        self._dictionaries: StreamDictionaries | None = None
        # The layout of the message that was looked at last: needs_thread and decode share it, and so do batches with
        # the same header, as those of one row count have without strings.
        self._parsed: tuple[bytes, ipc.BatchLayout] | None = None
        # The layout that Arrow took last for a plain target: it says the same of each batch that has it.
        self._taken: tuple[ipc.BatchLayout, _Target] | None = None

    @property
    def table(self) -> TableInfo:
        """The table as batches are decoded for it."""
        return self._table

    @property
    def dictionary_bytes(self) -> int:
        """Bytes of dictionaries held now; never over ``limits.dictionary_bytes``."""
        return 0 if self._dictionaries is None else self._dictionaries.held_bytes

    def close(self) -> None:
        """Forget the dictionaries. May be called more than once."""
        if self._dictionaries is not None:
            self._dictionaries.clear()
        self._parsed = self._taken = None

    # -- schema -----------------------------------------------------------------------------------

    def set_schema(self, header: bytes) -> None:
        """Take the stream's schema.

        Args:
            header: an IPC Schema message. The same schema may come again.

        Raises:
            InvalidRequest: not a schema, big-endian, or a second, different one; ``schema_mismatch`` with
                every difference where the table takes it for no operation. The decoder stays as it was.
        """
        if header == self._header:
            return
        stream, ids = read_schema(header)
        if self._stream is not None:
            if not stream.equals(self._stream) or ids != self._dictionary_ids:
                raise InvalidRequest("A second, different schema came on this stream: open another stream for it")
            return
        try:
            plan = plan_conformance(stream, self._table)
        except UnicodeDecodeError as error:
            # Arrow keeps names and time zones as bytes; they are decoded when they are asked for.
            raise InvalidRequest(f"Malformed schema message: a name is not UTF-8: {cut(str(error))}") from error
        dictionaries = StreamDictionaries(ids, plan.dictionary_types, self._limits)
        wire = wire_schema(stream)
        self._wire_layout = plan_layout(wire)
        self._stream, self._wire, self._header = stream, wire, header
        self._dictionary_ids, self._dictionaries = ids, dictionaries
        self._plan = plan
        self._bound = bind_fields(list(stream), list(self._table.schema))
        self._may_upsert = plan.upserts is not None
        self._prepare()

    @property
    def wide(self) -> bool:
        """Whether what looks at each field of the stream belongs into a thread."""
        return self._header is not None and len(self._header) > THREAD_SCHEMA_BYTES

    @property
    def fields(self) -> int:
        """How many nodes the stream's batches have; 0 before its schema."""
        return 0 if self._wire_layout is None else self._wire_layout.plan.node_count

    def _prepare(self) -> None:
        """Plan the operations of a wide stream while a thread looks at its fields anyway."""
        if not self.wide:
            return
        for operation in Operation:
            # What the stream does not fit is said when a batch asks for it.
            with suppress(InvalidRequest):
                self._target(operation)

    def rebind(self, table: TableInfo, operation: Operation) -> None:
        """Decode from now on for the table as others have changed it (R27).

        Columns are followed by their field ids: renamed ones go on, new ones are filled with nulls where they may be.

        Args:
            table: the same table.
            operation: what the next batch does.

        Raises:
            InvalidRequest: ``schema_mismatch``: a column of the stream was dropped, or one is there now that it has to
                have. The decoder stays as it was, so that a write that was accepted before can be decoded again.
        """
        if self._stream is not None:
            known = self._refused
            if known is not None and known[0] is table and known[1] is operation:
                raise InvalidRequest(known[2], code=ErrorCode.SCHEMA_MISMATCH)
            renamed = pa.schema(rename_fields(list(self._stream), self._bound, list(table.schema)))
            try:
                plan = plan_conformance(renamed, table)
                if not self._may_upsert and plan.upserts is not None:
                    # What the other columns need was never kept.
                    plan = replace(plan, upserts=None)
                plan.conformance(operation)
            except InvalidRequest as error:
                changed = f"{error.detail}. Others changed the table while the stream was open: open another stream"
                self._refused = table, operation, changed
                raise InvalidRequest(changed, code=error.code) from None
            self._plan = plan
        self._table, self._targets = table, {}
        self._taken = self._refused = None
        self._prepare()

    def check_operation(self, operation: Operation) -> None:
        """Check that the stream's columns suffice for an operation.

        Raises:
            InvalidRequest: no schema has come; see ``StreamPlan.conformance``.
        """
        self._target(operation)

    def _target(self, operation: Operation) -> _Target:
        target = self._targets.get(operation)
        if target is None:
            if self._plan is None:
                raise InvalidRequest("A record batch came before the stream's schema: send the schema first")
            assert self._wire is not None
            conformance, columns, partitions = self._plan.conformance(operation), None, None
            if operation is Operation.UPSERT:
                # A delete makes no files of its own.
                partitions = PartitionLimit(conformance.schema, self._table, self._limits.partitions)
            elif len(self._plan.key_columns) < len(self._wire):
                conformance, columns = self._plan.selected(), self._plan.key_columns
            target = _Target(conformance, self._table, self._wire, columns, partitions)
            self._targets[operation] = target
        return target

    def add_dictionary(self, message: IpcMessage) -> None:
        """Take a dictionary, or what a delta adds to one.

        Args:
            message: a DictionaryBatch. Its values are copied, so its frame may go.

        Raises:
            InvalidRequest: before the schema, malformed, of an id that the schema does not have;
                ``too_large`` when the stream would hold more than ``limits.dictionary_bytes``.
        """
        if self._dictionaries is None:
            raise InvalidRequest("A dictionary came before the stream's schema: send the schema first")
        if message.header is None or message.buffer is None:
            raise InvalidRequest("A dictionary message has no data header")
        self._dictionaries.add(message.header, message.buffer)

    def dictionary_work(self, message: IpcMessage) -> int:
        """Tell whether taking a dictionary belongs into a thread, as ``thread_work`` does for a batch."""
        if self._dictionaries is None or message.header is None or message.buffer is None:
            return 0
        work = self._dictionaries.work(message.header, message.buffer)
        return work if work > THREAD_REWRITE_BYTES else 0

    # -- batches ----------------------------------------------------------------------------------

    def thread_work(self, message: IpcMessage, operation: Operation = Operation.UPSERT) -> int:
        """Tell whether decoding this batch takes long enough to be done in a thread (T16), and how long about.

        Args:
            message: a RecordBatch; one that is malformed needs none.
            operation: what is done with its rows, checked.

        Returns:
            Its work in bytes that are looked at; 0 if it needs no thread.
        """
        frame = message.buffer
        if frame is None or message.header is None or self._plan is None or self._wire_layout is None:
            return 0
        target = self._target(operation)
        try:
            layout = self._layout(message.header)
            work, least = 0, THREAD_BYTES
            if target.conformance.identical and target.columns is None and layout.codec == ipc.CODEC_NONE:
                work = layout.node_count * _FIELD_BYTES
                if frame.body_bytes > THREAD_BYTES:
                    work += layout.variable_bytes(self._wire_layout.plan) + frame.body_bytes // _COMPARED
            else:
                least = THREAD_REWRITE_BYTES
                size = layout.uncompressed_bytes(frame)
                if target.rewrites_rows:
                    # Each row, and each element below, may name all of the message.
                    size *= max((length for length, _ in layout.nodes), default=0)
                if self._plan.dictionary_types:
                    size += layout.rows * 16
                    if self._dictionaries is not None:
                        size += self._dictionaries.unjoined_bytes
                work = size + layout.node_count * _REWRITTEN_FIELD_BYTES
            if layout.rows > COUNT_ROWS and target.partitions is not None and target.partitions.concerns(layout.rows):
                work = max(work, least) + layout.rows * 64
        except ValueError:
            return 0
        return work if work > least else 0

    def needs_thread(self, message: IpcMessage, operation: Operation = Operation.UPSERT) -> bool:
        """Tell whether decoding this batch belongs into a thread; see ``thread_work``."""
        return self.thread_work(message, operation) > 0

    def room(self, message: IpcMessage, operation: Operation = Operation.UPSERT) -> int:
        """Tell how many bytes a batch should be given for what it decodes to.

        Args:
            message: a RecordBatch; one that is malformed needs none.
            operation: what is done with its rows, checked.

        Returns:
            Bytes; 0 if its frame is taken as it is. Dictionaries may make more of it: see ``NeedsRoom``.
        """
        frame = message.buffer
        if frame is None or message.header is None:
            return 0
        target = self._target(operation)
        try:
            layout = self._layout(message.header)
            if target.conformance.identical and layout.codec == ipc.CODEC_NONE:
                return 0
            size = layout.uncompressed_bytes(frame)
        except ValueError:
            return 0
        return min(max(2 * size, SMALL_ROOM_BYTES), self._limits.batch_bytes)

    def taken_bytes(self, message: IpcMessage, room_bytes: int, operation: Operation = Operation.UPSERT) -> int:
        """Tell how many bytes decoding a batch takes at most, while it goes on.

        Args:
            message: a RecordBatch.
            room_bytes: what it may decode to.
            operation: what is done with its rows, checked.
        """
        # The rows as they were read or converted, and the frame that they are written to.
        size = _COPIES * room_bytes
        if not self._target(operation).rewrites_rows or message.header is None or message.buffer is None:
            return size
        try:
            layout = self._layout(message.header)
            uncompressed = layout.uncompressed_bytes(message.buffer)
        except ValueError:
            return size
        # What rows name is counted in integers of 8 bytes.
        longest = max((length for length, _ in layout.nodes), default=0)
        return size + _COUNTING_COPIES * (uncompressed + 8 * min(longest, self._limits.batch_rows))

    def decode(
        self, message: IpcMessage, operation: Operation = Operation.UPSERT, room_bytes: int | None = None
    ) -> DecodedBatch:
        """Decode, check and, where need be, rewrite one batch.

        Args:
            message: a RecordBatch. On the fast path its frame becomes the result's and must not be written
                to any more.
            operation: what is done with its rows: of a delete, the key's columns alone are looked at and kept.
            room_bytes: most bytes that it may decode to for now; ``limits.batch_bytes`` if None.

        Returns:
            The batch and its frame. Nothing in its values can be refused later (see ``storable``).

        Raises:
            InvalidRequest: ``invalid_batch``, naming the column; or see ``check_operation``.
            NeedsRoom: it decodes to more than ``room_bytes``; nothing was made.
        """
        target = self._target(operation)
        header, frame = message.header, message.buffer
        if header is None or frame is None:
            raise InvalidRequest("Invalid batch: it has no data header", code=ErrorCode.INVALID_BATCH)
        try:
            layout = self._layout(header)
        except ValueError as error:
            raise InvalidRequest(f"Invalid batch: {cut(str(error))}", code=ErrorCode.INVALID_BATCH) from error
        if layout.body_bytes != frame.body_bytes:
            raise InvalidRequest(
                f"Invalid batch: a body of {frame.body_bytes} bytes, its header says {layout.body_bytes}",
                code=ErrorCode.INVALID_BATCH,
            )
        if layout.rows > self._limits.batch_rows:
            raise InvalidRequest(
                f"Invalid batch: {layout.rows} rows, the limit is {self._limits.batch_rows} "
                "(limits.batch_rows); send smaller batches",
                code=ErrorCode.INVALID_BATCH,
            )
        if target.columns is not None:
            assert self._wire_layout is not None
            if not layout.fits(self._wire_layout.plan):
                self._refuse(
                    (ipc.FOUND_LENGTH, -1, self._wire_layout.plan.node_count, layout.node_count), target.layout
                )
            header, frame = select_columns(header, layout, frame, self._wire_layout, target.columns)
            layout = ipc.BatchLayout(header)
        as_stored = target.conformance.identical and layout.codec == ipc.CODEC_NONE
        if as_stored and self._accept(target, layout, frame):
            decoded = DecodedBatch(frame, layout.rows, target.columns is None, target.conformance.schema)
        else:
            decoded = self._rewrite_within(target, layout, frame, room_bytes)
        if target.partitions is not None and target.partitions.concerns(layout.rows):
            target.partitions.check(decoded.batch)
        return decoded

    def _layout(self, header: bytes) -> ipc.BatchLayout:
        if self._parsed is not None and self._parsed[0] == header:
            return self._parsed[1]
        layout = ipc.BatchLayout(header)
        self._parsed = (header, layout) if len(header) <= _REMEMBERED_BYTES else None
        return layout

    def _accept(self, target: _Target, layout: ipc.BatchLayout, frame: FrameBuffer) -> bool:
        """Check a frame in the log's own layout; False: a required field's nulls must be hidden first."""
        finding = layout.check(target.layout.plan, frame, self._longest())
        if finding is not None and finding[0] == ipc.FOUND_REQUIRED_NULLS:
            if target.layout.is_column(finding[1]):
                self._refuse(finding, target.layout)
            return False
        if finding is None and self._taken is not None and self._taken[0] is layout and self._taken[1] is target:
            return True
        if finding is not None and finding[0] != ipc.FOUND_OUT_OF_RANGE:
            self._refuse(finding, target.layout)
        batch = _read(frame, target.conformance.schema)
        if finding is not None or target.storable.always:
            target.storable.check(batch)
        if target.plain:
            self._taken = layout, target
        return True

    def _longest(self) -> int:
        """The longest that a nested field may be: an element takes a byte, booleans and nulls less."""
        return max(self._limits.batch_rows, self._limits.batch_bytes)

    def _refuse(self, finding: tuple[int, int, int, int], layout: Layout) -> NoReturn:
        if finding[1] < 0:
            raise InvalidRequest(
                f"Invalid batch: {finding[3]} field nodes, the schema has {finding[2]}; or not the buffers "
                "that go with them",
                code=ErrorCode.INVALID_BATCH,
            )
        raise invalid_batch(layout.paths[finding[1]], describe_finding(finding))

    def _rewrite_within(
        self, target: _Target, layout: ipc.BatchLayout, frame: FrameBuffer, room_bytes: int | None
    ) -> DecodedBatch:
        most = self._limits.batch_bytes
        limit = most if room_bytes is None else min(room_bytes, most)
        try:
            return self._rewrite(target, layout, frame, limit)
        except OverLimit:
            if limit < most:
                raise NeedsRoom from None
            raise

    def _rewrite(self, target: _Target, layout: ipc.BatchLayout, frame: FrameBuffer, limit: int) -> DecodedBatch:
        """Decode a batch as the stream has it and write it again as the log has it.

        Raises:
            OverLimit: it would have more than ``limit`` bytes.
        """
        finding = layout.check(target.wire_layout.plan, frame, self._longest())
        if finding is not None:
            self._refuse(finding, target.wire_layout)
        try:
            size = layout.uncompressed_bytes(frame)
        except ValueError as error:
            raise InvalidRequest(f"Invalid batch: {cut(str(error))}", code=ErrorCode.INVALID_BATCH) from error
        if size > limit:
            raise OverLimit(
                f"Invalid batch: it decompresses to {size} bytes, the limit is {limit} (limits.batch_bytes); "
                "send smaller batches",
                code=ErrorCode.INVALID_BATCH,
            )
        most_rows = self._limits.batch_rows
        dictionaries = self._dictionaries.values if self._dictionaries is not None else None
        # Without names: each is let go of before the next is made, see `taken_bytes`.
        rewritten = write_frame(
            target.conformance.apply(
                _read(frame, target.wire, (limit, most_rows) if target.rewrites_rows else None),
                limit_bytes=limit,
                dictionaries=dictionaries,
                values_bytes=self._limits.batch_bytes,
            )
        )
        if not self._accept(target, ipc.BatchLayout(rewritten.header), rewritten.frame):
            raise InternalError("A rewritten batch still has nulls in a required field")
        return DecodedBatch(rewritten.frame, layout.rows, False, target.conformance.schema)


def read_schema(header: bytes) -> tuple[pa.Schema, tuple[int, ...]]:
    """Read a schema message; an unknown header type would skip Arrow's verifier (T13).

    Returns:
        The schema, and the ids of its dictionary-encoded fields, depth first.

    Raises:
        InvalidRequest: it is not a schema, or big-endian.
    """
    if len(header) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"The stream's schema has {len(header)} bytes, at most {MAX_SCHEMA_BYTES} are legal")
    try:
        if ipc.message_type(header) != ipc.SCHEMA:
            raise InvalidRequest(f"IPC message of type {ipc.message_type(header)}, expected a schema")
        if ipc.schema_endianness(header) != 0:
            raise InvalidRequest("The stream is big-endian: send little-endian Arrow data")
        # First: it bounds what Arrow makes of the bytes (T23).
        ids = tuple(ipc.schema_dictionary_ids(header))
        return pa.ipc.read_schema(pa.py_buffer(FrameBuffer(header, 0)).slice(FRAME_HEADER_BYTES)), ids
    except REFUSALS as error:
        raise InvalidRequest(f"Malformed schema message: {cut(str(error))}") from error


def _ipc_message(frame: FrameBuffer) -> pa.Buffer:
    """The IPC message in a frame, without a copy."""
    return pa.py_buffer(frame).slice(FRAME_HEADER_BYTES)


def _is_plain(type_: pa.DataType) -> bool:
    """Whether any bits are a value of the type: Arrow's own validation looks at lengths and null counts alone."""
    types = pa.types
    return bool(
        types.is_integer(type_)
        or types.is_floating(type_)
        or types.is_boolean(type_)
        or types.is_date32(type_)
        or types.is_timestamp(type_)
    )


def _read(frame: FrameBuffer, schema: pa.Schema, most: tuple[int, int] | None = None) -> pa.RecordBatch:
    """Read a frame's message without a copy, and validate it.

    Args:
        frame: of a RecordBatch.
        schema: as it is on the wire.
        most: bytes and rows that its rows may refer to, where that may be more than the message holds.

    Raises:
        InvalidRequest: ``invalid_batch``, naming the column.
        OverLimit: the same, where its rows refer to more bytes.
    """
    try:
        batch = pa.ipc.read_record_batch(_ipc_message(frame), schema)
    except REFUSALS as error:
        raise InvalidRequest(f"Invalid batch: {cut(str(error))}", code=ErrorCode.INVALID_BATCH) from error
    if most is not None:
        _check_referred(batch, *most)
    try:
        batch.validate(full=True)
    except REFUSALS as error:
        for field, column in zip(schema, batch.columns, strict=True):
            try:
                column.validate(full=True)
            except REFUSALS as cause:
                raise invalid_batch(field.name, str(cause)) from cause
        raise InvalidRequest(f"Invalid batch: {cut(str(error))}", code=ErrorCode.INVALID_BATCH) from error
    return batch


def _check_referred(batch: pa.RecordBatch, limit_bytes: int, most_rows: int) -> None:
    """Check what rows refer to in all, before Arrow validates it value by value (T23)."""
    left = limit_bytes
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            # Lengths of buffers alone: constant time for each array.
            column.validate()
            left -= referred_bytes(column, most_rows)
        except REFUSALS as error:
            raise invalid_batch(field.name, str(error)) from error
        if left < 0:
            raise over_limit(field.name, limit_bytes, ", where a value counts as often as rows name it")


@dataclass(frozen=True, slots=True)
class WrittenFrame:
    """A frame and the flatbuffer in it."""

    header: bytes
    frame: FrameBuffer


def write_frame(batch: pa.RecordBatch) -> WrittenFrame:
    """Write a batch into a new frame: one uncompressed RecordBatch message."""
    message = pa.ipc.read_message(batch.serialize())
    del batch
    header = message.metadata.to_pybytes()
    body = memoryview(message.body).cast("B") if message.body is not None else memoryview(b"")
    frame = FrameBuffer(header, len(body))
    frame.body[:] = body
    return WrittenFrame(header, frame)


__all__ = [
    "SMALL_ROOM_BYTES",
    "BatchDecoder",
    "DecodedBatch",
    "IpcMessage",
    "NeedsRoom",
    "WrittenFrame",
    "read_schema",
    "write_frame",
]
