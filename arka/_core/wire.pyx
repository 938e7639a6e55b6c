# cython: language_level=3, auto_pickle=False, autotestdict=False
"""The wire: HTTP/2 frames split off a receive buffer, and gRPC messages put together from DATA payload.

Owns: frame headers, padding, both inbound windows' arithmetic, gRPC prefixes and FlightData's protobuf. Does
not own sockets, stream states, who may send how much (``arka.flight.flow``) nor any other frame's meaning
(h2). Bytes go in through ``Splitter.targets`` and ``received``, or by ``receive`` from a descriptor that never
waits; events come out of ``next``.

One module, long as it is: the splitter feeds the assemblers without leaving C.

Source: RFC 9113 sections 4.1, 6.1, 6.9; gRPC over HTTP/2 "Length-Prefixed-Message"; Protocol Buffers
encoding; Flight.proto's FlightData (fields 1, 2, 3 and 1000).
"""

import os

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove

from arka._core.buffers cimport FrameBuffer

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t readv(int descriptor, const iovec *parts, int count)

# What `Splitter.next` found.
#: No complete event in the bytes so far.
NEED_BYTES = 0
#: A frame other than DATA: ``frame`` is all of it; ``frame_type``, ``flags`` and ``stream_id`` are its header's.
CONTROL = 1
#: The client's connection preface is complete: ``frame`` holds its 24 bytes.
PREFACE = 2
#: ``assembler`` has a prefix of ``message_bytes`` that its window does not cover, or that reserved bytes may.
PREFIX = 3
#: ``message`` is complete; it took ``length`` bytes of stream window, prefix included.
MESSAGE = 4
#: ``assembler`` refused what it got: its ``error`` says why. What follows on the stream is discarded.
REFUSED = 5
#: The peer ended ``stream_id`` (``assembler``) with a DATA frame.
ENDED = 6
#: A DATA frame of ``length`` bytes for ``stream_id``, which is not live; its payload will be discarded.
STRAY = 7
#: A DATA frame of ``length`` bytes overran the window of ``stream_id``; its payload will be discarded.
OVERRUN = 8
#: The DATA on ``stream_id`` contradicts its content-length.
LENGTH = 9
#: A DATA frame carried ``length`` bytes of padding on ``stream_id`` (``assembler``).
PADDING = 10
#: A DATA frame without payload that ends nothing.
EMPTY = 11
#: A well-formed WINDOW_UPDATE: ``length`` bytes more for ``stream_id``, or for the connection (0).
WINDOW = 12
#: A DATA frame has ended, and the window of ``assembler`` is below its ``low``.
LOW = 13

cdef enum:
    E_NEED = 0
    E_CONTROL = 1
    E_PREFACE = 2
    E_PREFIX = 3
    E_MESSAGE = 4
    E_REFUSED = 5
    E_ENDED = 6
    E_STRAY = 7
    E_OVERRUN = 8
    E_LENGTH = 9
    E_PADDING = 10
    E_EMPTY = 11
    E_WINDOW = 12
    E_LOW = 13
    #: inside this module: look again
    E_AGAIN = 99

# What a MessageAssembler is doing with payload.
cdef enum:
    #: collecting the five bytes of a prefix
    S_PREFIX = 0
    #: the prefix is known, nothing of the message was looked at
    S_BEGIN = 1
    #: gathering a FlightData's fields ahead of its body, or all of it
    S_GATHER = 2
    #: filling the body of the frame buffer
    S_BODY = 3
    #: filling a plain message
    S_PLAIN = 4
    #: discarding the rest of this message, which is then delivered without its body
    S_SKIP = 5
    #: discarding whatever comes
    S_DEAD = 6

# What a look at a FlightData's fields found.
cdef enum:
    P_MORE = 0
    P_BODY = 1
    P_DONE = 2
    P_MALFORMED = 3

cdef enum:
    DATA = 0
    HEADERS = 1
    PUSH_PROMISE = 5
    WINDOW_UPDATE = 8
    CONTINUATION = 9
    END_STREAM = 0x1
    END_HEADERS = 0x4
    PADDED = 0x8
    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 3
    FRAME_SIZE_ERROR = 6
    ENHANCE_YOUR_CALM = 11

cdef enum:
    FRAME_HEADER = 9
    PREFIX_SIZE = 5
    #: Bytes of a frame other than DATA, above which it is refused (T9): the size every peer may assume.
    CONTROL_LIMIT = 16384
    #: Bytes of one header block, CONTINUATION frames included (T9).
    BLOCK_LIMIT = 65536
    #: First capacity for the fields ahead of a body, bytes: a batch of some ten columns.
    GATHER_FIRST = 1024
    # Of a FlightData message: longest descriptor and app_metadata, longest data header, and most fields (T24).
    TEXT_MOST = 65536
    HEADER_MOST = 16777216
    FIELDS_MOST = 10000
    #: Rest of a body, bytes, above which it is received in place: below, the copy costs less than the slicing.
    DIRECT_MIN = 8192
    #: Room left in the receive buffer behind a body that is received in place, bytes: what is taken of the
    #: next frame is copied, so not much more than its header and the next message's fields.
    DIRECT_TAIL = 4096
    #: DATA frame, bytes, after which another large one is expected.
    BULK_FRAME = 65536
    #: Room for received bytes from which on the GIL is given up while they are copied.
    GIL_BYTES = 65536
    #: Bytes after which ``receive`` ends: some 100 us of copying, before anything else has its turn.
    TURN_BYTES = 524288

#: The inbound window of a stream, bytes: its INITIAL_WINDOW_SIZE (T4).
INITIAL_WINDOW = 65536
#: The inbound window of a connection, bytes: the largest that RFC 9113 allows (T4).
CONNECTION_WINDOW = 0x7FFFFFFF

cdef const unsigned char *PREFACE_BYTES = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class WireError(Exception):
    """The peer broke HTTP/2's framing: the connection is over.

    Attributes:
        code: the HTTP/2 error code for GOAWAY.
        detail: what was wrong.
    """

    def __init__(self, code, detail):
        super().__init__(detail)
        self.code = code
        self.detail = detail


class Refusal:
    """Why an assembler takes no more messages.

    Attributes:
        kind: ``compressed``, ``flag``, ``too_large`` or ``malformed``.
        detail: one sentence for a person.
    """

    __slots__ = ("detail", "kind")

    def __init__(self, kind, detail):
        self.kind = kind
        self.detail = detail

    def __repr__(self):
        return f"Refusal({self.kind!r}, {self.detail!r})"


cdef class FlightMessage:
    """One FlightData as it came off the wire.

    Attributes:
        descriptor: field 1, a serialised FlightDescriptor; None when absent.
        header: field 2, the IPC message's flatbuffer; None when absent.
        app_metadata: field 3; None when absent.
        buffer: header and body as a frame; None without a header and for an oversized body.
        body_bytes: length of field 1000; 0 when absent.
        oversized: the body is over its limit and was discarded (T17).
        charge: the ledger's charge for the message; the receiver releases it once.
    """

    def __init__(
        self,
        descriptor=None,
        header=None,
        app_metadata=None,
        FrameBuffer buffer=None,
        int64_t body_bytes=0,
        bint oversized=False,
        charge=None,
    ):
        self.descriptor = descriptor
        self.header = header
        self.app_metadata = app_metadata
        self.buffer = buffer
        self.body_bytes = body_bytes
        self.oversized = oversized
        self.charge = charge

    def __repr__(self):
        return (
            f"FlightMessage(descriptor={self.descriptor!r}, header={self.header!r}, "
            f"app_metadata={self.app_metadata!r}, body_bytes={self.body_bytes}, oversized={self.oversized})"
        )


cdef inline int read_varint(const unsigned char *data, int64_t have, int64_t *position, uint64_t *value) noexcept nogil:
    """Read one varint of at most ten bytes; 1 done, 0 truncated, -1 malformed."""
    # SAFETY: reads data[position:have] only, which the caller keeps alive.
    cdef uint64_t result = 0
    cdef int shift = 0
    cdef int64_t at = position[0]
    cdef unsigned char byte
    while at < have:
        byte = data[at]
        at += 1
        if shift == 63 and byte > 1:
            return -1
        result |= (<uint64_t> (byte & 0x7F)) << shift
        if byte < 0x80:
            position[0] = at
            value[0] = result
            return 1
        shift += 7
    return 0


def read_fields(const unsigned char[::1] data):
    """Read a small protobuf message without a schema.

    Args:
        data: a serialised message.

    Returns:
        Field number to value: bytes for length-delimited fields, int for varints; fixed-width fields are left
        out; the last occurrence of a field wins.

    Raises:
        ValueError: the bytes are not a protobuf message, or use groups.
    """
    cdef int64_t have = data.shape[0]
    cdef int64_t at = 0
    cdef uint64_t tag = 0, value = 0
    cdef const unsigned char *base
    fields = {}
    if have == 0:
        return fields
    base = &data[0]
    while at < have:
        if read_varint(base, have, &at, &tag) != 1 or tag >> 32 or tag >> 3 == 0:
            raise ValueError(f"malformed field tag before byte {at}")
        if tag & 7 == 0:
            if read_varint(base, have, &at, &value) != 1:
                raise ValueError(f"malformed varint at byte {at}")
            fields[tag >> 3] = value
            continue
        if tag & 7 == 1:
            value = 8
        elif tag & 7 == 5:
            value = 4
        elif tag & 7 != 2:
            raise ValueError(f"illegal wire type {tag & 7} before byte {at}")
        elif read_varint(base, have, &at, &value) != 1:
            raise ValueError(f"malformed length at byte {at}")
        if value > <uint64_t> (have - at):
            raise ValueError(f"field {tag >> 3} at byte {at} is longer than the message")
        if tag & 7 == 2:
            fields[tag >> 3] = PyBytes_FromStringAndSize(<const char *> (base + at), <int64_t> value)
        at += <int64_t> value
    return fields


cdef class MessageAssembler:
    """Puts the gRPC messages of one stream together from the payload of its DATA frames.

    Args:
        flight_data: messages are FlightData and become FlightMessage; otherwise they are bytes.
        message_limit: largest message, bytes; a larger one is refused at its prefix.
        body_limit: largest FlightData body, bytes; a larger one is discarded and the message marked.
        owner: whatever the caller wants to find again on events.

    Attributes:
        window: bytes that the peer may still send on the stream; the caller adds what it grants.
        ahead: bytes of ``window`` that were granted before any message asked for them; while there are any,
            each prefix is an event.
        low: bytes of ``window`` below which the end of a DATA frame is an event; 0 for none.
        progress_bytes: payload consumed so far.
        message_bytes: wire length of the message in progress, prefix included; 0 between messages.
        shortfall: at a PREFIX event, how many bytes of the message the window does not cover; <= 0 if it does.
        content_bytes: the request's content-length, or -1.
        error: the Refusal that ended assembling, or None.
    """

    def __cinit__(self, bint flight_data, int64_t message_limit, int64_t body_limit, owner=None):
        self.owner = owner
        self.flight_data = flight_data
        self.message_limit = message_limit
        self.body_limit = body_limit
        self.window = INITIAL_WINDOW
        self.content_bytes = -1

    def __dealloc__(self):
        free(self.gathered)

    @property
    def between_messages(self):
        """Whether the stream may end here without cutting off a message that anybody waits for."""
        return self.state == S_DEAD or (self.state == S_PREFIX and self.prefix_have == 0)

    def abort(self):
        """Drop the message in progress and discard what follows. The reader's own view of a buffer stays valid."""
        self._reset()
        self.state = S_DEAD

    cdef int feed(self, const unsigned char *data, int64_t size, int64_t after, int64_t *used) except -1:
        """Consume payload up to the next event.

        Args:
            data, size: payload at hand.
            after: payload bytes of the same frame that are still to come; the window has them already.
            used: set to the bytes consumed; all of them unless there is an event.
        """
        cdef int64_t at = 0, n
        cdef int event
        while True:
            if self.state == S_PREFIX:
                n = min(size - at, PREFIX_SIZE - self.prefix_have)
                memcpy(&self.prefix[self.prefix_have], data + at, n)
                self.prefix_have += <int> n
                self.progress_bytes += n
                at += n
                used[0] = at
                if self.prefix_have < PREFIX_SIZE:
                    return E_NEED
                event = self._begin(size - at + after)
                if event:
                    return event
            if self.state == S_BEGIN:
                if size - at >= self.need:
                    if self.flight_data:
                        n = self._parse(data + at, self.need)
                        if n == P_MALFORMED:
                            used[0] = at
                            return E_REFUSED
                        self._copy_body(data + at)
                    else:
                        self.plain = PyBytes_FromStringAndSize(<const char *> (data + at), self.need)
                    self.progress_bytes += self.need
                    used[0] = at + self.need
                    return E_MESSAGE
                if self.flight_data:
                    self.state = S_GATHER
                else:
                    self.plain = PyBytes_FromStringAndSize(NULL, self.need)
                    self.state = S_PLAIN
            if at == size:
                used[0] = at
                return E_NEED
            if self.state == S_GATHER:
                event = self._gather(data + at, size - at, &n)
                at += n
                self.progress_bytes += n
                if event or self.state == S_GATHER:
                    used[0] = at
                    return event
                if at == size:
                    used[0] = at
                    return E_NEED
            n = min(size - at, self.need - self.position)
            if self.state == S_BODY:
                memcpy(self.frame.data + self.frame.body_offset + self.filled, data + at, n)
                self.filled += n
            elif self.state == S_PLAIN:
                memcpy(PyBytes_AS_STRING(self.plain) + self.position, data + at, n)
            elif self.state == S_DEAD:
                n = size - at
            self.position += n
            self.progress_bytes += n
            at += n
            used[0] = at
            if self.state == S_DEAD or self.position < self.need:
                return E_NEED
            return E_MESSAGE

    cdef int _begin(self, int64_t at_hand) except -1:
        """Look at a complete prefix; the frame has ``at_hand`` bytes more, which the window has already."""
        self.prefix_have = 0
        self.need = (
            <int64_t> self.prefix[1] << 24
            | <int64_t> self.prefix[2] << 16
            | <int64_t> self.prefix[3] << 8
            | <int64_t> self.prefix[4]
        )
        if self.prefix[0] == 1:
            return self._fail(Refusal("compressed", "compressed messages are not supported: send them as identity"))
        if self.prefix[0] > 1:
            return self._fail(Refusal("flag", f"a message's first byte is {self.prefix[0]}, expected 0"))
        if self.need > self.message_limit:
            return self._fail(
                Refusal("too_large", f"message of {self.need} bytes is over the limit of {self.message_limit}")
            )
        self.position = 0
        self.parsed = 0
        self.fields = 0
        self.filled = 0
        self.message_bytes = self.need + PREFIX_SIZE
        self.state = S_BEGIN
        self.shortfall = self.need - at_hand - self.window
        # An empty message needs no window, and no payload may follow that would wake it up after the event.
        if self.need and (self.shortfall > 0 or self.ahead > 0):
            return E_PREFIX
        return E_NEED

    cdef int _gather(self, const unsigned char *data, int64_t size, int64_t *used) except -1:
        """Gather fields until the body begins or the message is whole."""
        cdef int64_t n, capacity
        cdef int found
        cdef void *grown
        used[0] = 0
        while True:
            # In doubling steps, so that little of the body passes through here.
            n = min(min(size - used[0], self.need - self.position), max(self.position, GATHER_FIRST // 2))
            if self.position + n > self.gathered_capacity:
                capacity = min(max(2 * (self.position + n), GATHER_FIRST), self.need)
                grown = realloc(self.gathered, capacity)
                if grown == NULL:
                    raise MemoryError(f"cannot gather a message of {self.need} bytes")
                self.gathered = <unsigned char *> grown
                self.gathered_capacity = capacity
            memcpy(self.gathered + self.position, data + used[0], n)
            self.position += n
            used[0] += n
            found = self._parse(self.gathered, self.position)
            if found == P_MALFORMED:
                return E_REFUSED
            if found == P_BODY:
                self._open_body()
                self.filled = self.position - self.body_start
                if self.state == S_BODY:
                    memcpy(
                        self.frame.data + self.frame.body_offset, self.gathered + self.body_start, self.filled
                    )
                self._drop_gathered()
                return E_MESSAGE if self.position == self.need else E_NEED
            if found == P_DONE:
                self._copy_body(self.gathered)
                self._drop_gathered()
                return E_MESSAGE
            if used[0] == size:
                return E_NEED

    cdef int _parse(self, const unsigned char *data, int64_t have) except -1:
        """Read as many whole fields as there are, from ``parsed`` on.

        Returns:
            P_MORE: a field is not complete; P_BODY: the next field is a body that ends the message;
            P_DONE: the message is whole; P_MALFORMED: refused.
        """
        cdef int64_t at, start
        cdef uint64_t tag = 0, value = 0
        cdef int got, kind
        cdef uint64_t number
        while self.parsed < self.need:
            at = self.parsed
            got = read_varint(data, have, &at, &tag)
            if got == 0:
                break
            if got < 0 or tag >> 32 or tag >> 3 == 0:
                return self._malformed("field tag")
            kind = tag & 7
            number = tag >> 3
            if kind == 0 or kind == 2:
                got = read_varint(data, have, &at, &value)
                if got == 0:
                    break
                if got < 0:
                    return self._malformed("varint")
                if kind == 0:
                    value = 0
            elif kind == 1:
                value = 8
            elif kind == 5:
                value = 4
            else:
                return self._malformed(f"wire type {kind}")
            start = at
            if value > <uint64_t> (self.need - start):
                return self._malformed(f"length of field {number}")
            if kind == 2 and number <= 3 and value > <uint64_t> (HEADER_MOST if number == 2 else TEXT_MOST):
                return self._refuse_field(number, value)
            if self.fields == FIELDS_MOST:
                return self._malformed(f"number of fields: more than {FIELDS_MOST}")
            if kind == 2 and number == 1000:
                self.body_start = start
                self.body_length = <int64_t> value
                if start + <int64_t> value == self.need:
                    return P_BODY
            if start + <int64_t> value > have:
                break
            if kind == 2 and number <= 3:
                field = PyBytes_FromStringAndSize(<const char *> (data + start), <int64_t> value)
                if number == 1:
                    self._descriptor = field
                elif number == 2:
                    self._header = field
                else:
                    self._app_metadata = field
            self.parsed = start + <int64_t> value
            self.fields += 1
        if self.parsed == self.need:
            return P_DONE
        return self._malformed("end: the last field is cut off") if have == self.need else P_MORE

    cdef int _open_body(self) except -1:
        """Lay out what the body that has been announced is received into."""
        if self._header is None or self.body_length > self.body_limit:
            self.state = S_SKIP
        else:
            self.frame = FrameBuffer(self._header, self.body_length)
            self.state = S_BODY

    cdef int _copy_body(self, const unsigned char *data) except -1:
        """Lay out the message whose bytes are all at ``data``."""
        if self._header is None or self.body_length > self.body_limit:
            return 0
        self.frame = FrameBuffer(self._header, self.body_length)
        if self.body_length:
            memcpy(self.frame.data + self.frame.body_offset, data + self.body_start, self.body_length)
        return 0

    cdef int _refuse_field(self, uint64_t number, uint64_t size) except -1:
        what = {1: "a descriptor", 2: "a data header", 3: "app_metadata"}[number]
        most = HEADER_MOST if number == 2 else TEXT_MOST
        self._fail(Refusal("too_large", f"{what} of {size} bytes is over the limit of {most}"))
        return P_MALFORMED

    cdef int _malformed(self, str what) except -1:
        self._fail(Refusal("malformed", f"malformed FlightData: illegal {what}"))
        return P_MALFORMED

    cdef int _fail(self, object error) except -1:
        self._reset()
        self.state = S_DEAD
        self.error = error
        return E_REFUSED

    cdef object _finish(self):
        """Take the complete message and make ready for the next prefix."""
        cdef FlightMessage message
        if not self.flight_data:
            plain = self.plain
            self._reset()
            return plain
        message = FlightMessage.__new__(FlightMessage)
        message.descriptor = self._descriptor
        message.header = self._header
        message.app_metadata = self._app_metadata
        message.buffer = self.frame
        message.body_bytes = self.body_length
        message.oversized = self.body_length > self.body_limit
        self._reset()
        return message

    cdef void _reset(self) noexcept:
        self.state = S_PREFIX
        self.prefix_have = 0
        self.message_bytes = 0
        self.body_length = 0
        self._descriptor = None
        self._header = None
        self._app_metadata = None
        self.frame = None
        self.plain = None
        self._drop_gathered()

    cdef void _drop_gathered(self) noexcept:
        free(self.gathered)
        self.gathered = NULL
        self.gathered_capacity = 0


cdef class Splitter:
    """Splits what one client sends into frames, and DATA payload into messages.

    Args:
        frame_limit: MAX_FRAME_SIZE as advertised, bytes; a larger frame is FRAME_SIZE_ERROR.
        ring_bytes: size of the receive buffer; at least 32 KiB, so that any frame but DATA fits.

    Use: receive into ``targets()``, tell ``received(n)``, then call ``next()`` until it is NEED_BYTES.

    Attributes:
        drained: whether the last ``receive`` took all that there was.
        in_body: whether a body is being received in place.
    """

    def __cinit__(self, int64_t frame_limit, int64_t ring_bytes=131072):
        if ring_bytes < 2 * CONTROL_LIMIT:
            raise ValueError(f"ring_bytes must be at least {2 * CONTROL_LIMIT}: {ring_bytes}")
        self.ring = <unsigned char *> malloc(ring_bytes)
        if self.ring == NULL:
            raise MemoryError(f"cannot allocate a receive buffer of {ring_bytes} bytes")
        self.ring_bytes = ring_bytes
        self.frame_limit = frame_limit
        self.streams = {}
        self.preface_left = 24
        self.connection_window = CONNECTION_WINDOW

    def __dealloc__(self):
        free(self.ring)

    def __getbuffer__(self, Py_buffer *view, int flags):
        # The receive buffer itself, for `targets` alone.
        PyBuffer_FillInfo(view, self, self.ring, self.ring_bytes, 0, flags)

    @property
    def in_body(self):
        return self.in_data and self.current is not None and self.current.state == S_BODY and self.start == self.end

    @property
    def frame_left(self):
        """Payload bytes of the DATA frame in progress that have not been taken in; the windows have them already."""
        return self.payload_left if self.in_data else 0

    def lacking(self):
        """The assembler of the DATA frame in progress, if it will have less window than its ``low``; else None."""
        if self.in_data and self.current is not None and self.current.window + self.payload_left < self.current.low:
            return self.current
        return None

    def open(self, uint32_t stream_id, MessageAssembler assembler not None):
        """Make a stream live: its DATA goes to ``assembler``."""
        self.streams[stream_id] = assembler

    def close(self, uint32_t stream_id):
        """End a stream's liveness: its DATA is STRAY, the rest of a frame in progress is discarded."""
        cdef MessageAssembler assembler = self.streams.pop(stream_id, None)
        if assembler is not None:
            if assembler is self.current:
                self.current = None
            assembler.abort()

    def take_credit(self, int64_t least=1):
        """Give the peer back what has left the socket since the last call.

        Args:
            least: bytes below which nothing is given back yet.

        Returns:
            The increment for the connection's WINDOW_UPDATE; 0 when there is nothing to give.
        """
        cdef int64_t credit = self.consumed_bytes
        if credit < least:
            return 0
        self.consumed_bytes = 0
        self.connection_window += credit
        return credit

    def targets(self):
        """Where the next bytes go, in order: a body in place, if one is being received, then the receive buffer.

        Returns:
            One or two writable memoryviews, valid until ``received``; never empty.
        """
        cdef int64_t place, stop = self._make_room()
        ring = memoryview(self)[self.end:stop]
        if not self.direct:
            return [ring]
        place = self.direct_assembler.frame.body_offset + self.direct_assembler.filled
        return [memoryview(self.direct_assembler.frame)[place:place + self.direct], ring]

    cdef int64_t _make_room(self) noexcept:
        """Choose where the next bytes go: ``direct`` of them into the body in progress, the others into the ring.

        Returns:
            Where the ring's free part is to end; it begins at ``end``.
        """
        cdef int64_t room = 0
        if self.start:
            if self.end > self.start:
                memmove(self.ring, self.ring + self.start, self.end - self.start)
            self.end -= self.start
            self.start = 0
        self.direct_assembler = None
        self.direct = 0
        if self.in_data and self.current is not None and self.end == 0:
            if self.current.state == S_BODY:
                room = min(self.payload_left, self.current.need - self.current.position)
            if room >= DIRECT_MIN:
                self.direct = room
                self.direct_assembler = self.current
                return DIRECT_TAIL
        # With another body to come that shall be received in place, take little more than what comes before it.
        return min(self.ring_bytes, self.end + DIRECT_TAIL) if self.bulk else self.ring_bytes

    def receive(self, int descriptor):
        """Receive until there is an event, nothing more to read for now, or the turn has been long enough.

        Args:
            descriptor: of a socket that does not block.

        Returns:
            How many bytes were received; 0 when the peer sends no more.

        Raises:
            OSError: nothing was received; BlockingIOError if there is nothing yet.
            WireError: as ``next``.
        """
        cdef int64_t stop, total = 0
        cdef ssize_t size
        cdef iovec parts[2]
        cdef int count, error = 0
        cdef size_t room
        cdef FrameBuffer frame
        while total < TURN_BYTES:
            stop = self._make_room()
            count = 0
            if self.direct:
                frame = self.direct_assembler.frame
                parts[0].iov_base = frame.data + frame.body_offset + self.direct_assembler.filled
                parts[0].iov_len = self.direct
                count = 1
            parts[count].iov_base = self.ring + self.end
            parts[count].iov_len = stop - self.end
            room = self.direct + stop - self.end
            size = -1
            while size < 0:
                # SAFETY: this call holds the ring's owner and the frame; nothing else writes to them, since a
                # Splitter is used by one task, and nothing frees them before the call returns.
                if room < GIL_BYTES:
                    size = readv(descriptor, parts, count + 1)
                    error = errno
                else:
                    with nogil:
                        size = readv(descriptor, parts, count + 1)
                        error = errno
                if size < 0 and error != EINTR:
                    break
            if size <= 0:
                # What has come first is dealt with first: the next call meets the end, or the error, again.
                self.drained = size < 0
                if total or size == 0:
                    return total
                raise OSError(error, os.strerror(error))
            self.received(size)
            total += size
            self.drained = <size_t> size < room
            if self.drained:
                break
            self.pending = self._next()
            if self.pending:
                break
        return total

    def received(self, int64_t size):
        """Account for ``size`` bytes that were received into ``targets()``."""
        cdef int64_t direct = min(size, self.direct)
        if direct:
            # An RPC that ended meanwhile has no assembler any more: its bytes are discarded.
            if self.current is not None and self.current is self.direct_assembler and self.current.state == S_BODY:
                self.current.position += direct
                self.current.filled += direct
                self.current.progress_bytes += direct
            self.payload_left -= direct
            self.direct = 0
            self.direct_assembler = None
        self.end += size - direct

    def next(self):
        """Find the next event in what was received.

        Returns:
            One of the module's event kinds; the attributes that it names hold until the next call.

        Raises:
            WireError: the connection is over.
        """
        cdef int event = self.pending
        if event:
            self.pending = E_NEED
            return event
        return self._next()

    cdef int _next(self) except -1:
        cdef int event
        while True:
            if self.preface_left:
                event = self._preface()
            elif self.in_data:
                event = self._payload()
            else:
                event = self._frame_header()
            if event != E_AGAIN:
                return event

    cdef int _preface(self) except -1:
        cdef int64_t have = min(self.end - self.start, 24)
        if memcmp(self.ring + self.start, PREFACE_BYTES, have) != 0:
            raise WireError(PROTOCOL_ERROR, "the connection does not begin with HTTP/2's preface")
        if have < 24:
            return E_NEED
        self.preface_left = 0
        self.start += 24
        self.frame = PyBytes_FromStringAndSize(<const char *> PREFACE_BYTES, 24)
        return E_PREFACE

    cdef int _frame_header(self) except -1:
        cdef const unsigned char *head = self.ring + self.start
        cdef int64_t length
        if self.end - self.start < FRAME_HEADER:
            return E_NEED
        length = <int64_t> head[0] << 16 | <int64_t> head[1] << 8 | <int64_t> head[2]
        self.frame_type = head[3]
        self.flags = head[4]
        self.stream_id = (
            <uint32_t> (head[5] & 0x7F) << 24 | <uint32_t> head[6] << 16 | <uint32_t> head[7] << 8 | <uint32_t> head[8]
        )
        if length > self.frame_limit:
            raise WireError(
                FRAME_SIZE_ERROR, f"frame of {length} bytes is over MAX_FRAME_SIZE, which is {self.frame_limit}"
            )
        if self.block_stream and (self.frame_type != CONTINUATION or self.stream_id != self.block_stream):
            raise WireError(
                PROTOCOL_ERROR, f"frame of type {self.frame_type} inside the header block of stream {self.block_stream}"
            )
        if self.frame_type == DATA:
            return self._data_header(head, length)
        return self._control_frame(head, length)

    cdef int _data_header(self, const unsigned char *head, int64_t length) except -1:
        cdef int64_t padding = 0
        cdef MessageAssembler assembler
        if self.flags & PADDED:
            if length < 1:
                raise WireError(FRAME_SIZE_ERROR, "a padded DATA frame has no padding length")
            if self.end - self.start < FRAME_HEADER + 1:
                return E_NEED
            if head[FRAME_HEADER] >= length:
                raise WireError(PROTOCOL_ERROR, "a DATA frame's padding is as long as the frame or longer")
            padding = head[FRAME_HEADER] + 1
        if length > self.connection_window:
            raise WireError(FLOW_CONTROL_ERROR, "DATA overran the connection's window")
        self.connection_window -= length
        self.start += FRAME_HEADER + (padding > 0)
        self.in_data = True
        self.bulk = length >= BULK_FRAME
        self.length = length
        self.data_length = length
        self.padding_bytes = padding
        self.padding_left = padding - (padding > 0)
        self.payload_left = length - padding
        self.empty = self.payload_left == 0
        self.ends_stream = self.flags & END_STREAM
        assembler = self.streams.get(self.stream_id)
        self.assembler = assembler
        # Until the frame is accepted, it is one to be discarded.
        self.current = None
        if assembler is None:
            return E_STRAY
        if length > assembler.window:
            return E_OVERRUN
        assembler.window -= length
        assembler.content_received += self.payload_left
        if assembler.content_bytes >= 0 and (
            assembler.content_received > assembler.content_bytes
            or (self.ends_stream and assembler.content_received != assembler.content_bytes)
        ):
            return E_LENGTH
        self.current = assembler
        return E_AGAIN

    cdef int _control_frame(self, const unsigned char *head, int64_t length) except -1:
        cdef int64_t increment
        if length > CONTROL_LIMIT:
            raise WireError(
                ENHANCE_YOUR_CALM, f"frame of type {self.frame_type} with {length} bytes, accepted are {CONTROL_LIMIT}"
            )
        if self.frame_type in (HEADERS, PUSH_PROMISE):
            self.block_bytes = 0
        if self.block_bytes + length > BLOCK_LIMIT and self.frame_type == CONTINUATION:
            raise WireError(ENHANCE_YOUR_CALM, f"header block over {BLOCK_LIMIT} bytes")
        if self.end - self.start < FRAME_HEADER + length:
            return E_NEED
        if self.frame_type == WINDOW_UPDATE and length == 4:
            increment = (
                <int64_t> (head[9] & 0x7F) << 24
                | <int64_t> head[10] << 16
                | <int64_t> head[11] << 8
                | <int64_t> head[12]
            )
            if increment:
                self.length = increment
                self.start += FRAME_HEADER + length
                return E_WINDOW
        if self.frame_type in (HEADERS, PUSH_PROMISE, CONTINUATION):
            self.block_bytes += length
            self.block_stream = 0 if self.flags & END_HEADERS else self.stream_id
        self.frame = PyBytes_FromStringAndSize(<const char *> head, FRAME_HEADER + length)
        self.length = length
        self.start += FRAME_HEADER + length
        return E_CONTROL

    cdef int _payload(self) except -1:
        """Go on with the DATA frame in progress."""
        cdef int64_t n, used = 0
        cdef int event
        cdef MessageAssembler assembler = self.current
        if assembler is not None and assembler.state == S_BODY and assembler.position == assembler.need:
            # The last bytes of the body were received in place.
            return self._message(assembler)
        if self.payload_left:
            n = min(self.end - self.start, self.payload_left)
            if n == 0:
                return E_NEED
            if assembler is None:
                self.start += n
                self.payload_left -= n
                return E_AGAIN
            event = assembler.feed(self.ring + self.start, n, self.payload_left - n, &used)
            self.start += used
            self.payload_left -= used
            if event == E_NEED:
                return E_AGAIN
            if event == E_MESSAGE:
                return self._message(assembler)
            self.assembler = assembler
            self.length = assembler.message_bytes
            return event
        if self.padding_left:
            n = min(self.end - self.start, self.padding_left)
            if n == 0:
                return E_NEED
            self.start += n
            self.padding_left -= n
            return E_AGAIN
        return self._frame_end()

    cdef int _message(self, MessageAssembler assembler) except -1:
        self.assembler = assembler
        self.length = assembler.message_bytes
        self.message = assembler._finish()
        return E_MESSAGE

    cdef int _frame_end(self) except -1:
        """Account for the complete DATA frame: each of its events in a call of its own."""
        self.assembler = self.current
        if self.data_length:
            self.consumed_bytes += self.data_length
            self.data_length = 0
            if self.current is not None:
                if self.padding_bytes:
                    self.length = self.padding_bytes
                    return E_PADDING
                if self.current.window < self.current.low:
                    return E_LOW
        self.in_data = False
        self.current = None
        if self.assembler is None:
            return E_AGAIN
        if self.ends_stream:
            return E_ENDED
        return E_EMPTY if self.empty else E_AGAIN
