from libc.stdint cimport int64_t, uint32_t, uint64_t

from arka._core.buffers cimport FrameBuffer


cdef class FlightMessage:
    cdef readonly bytes descriptor
    cdef readonly bytes header
    cdef readonly bytes app_metadata
    cdef readonly FrameBuffer buffer
    cdef readonly int64_t body_bytes
    cdef readonly bint oversized
    cdef public object charge


cdef class MessageAssembler:
    cdef public object owner
    cdef readonly bint flight_data
    cdef readonly object error
    cdef public int64_t window
    cdef public int64_t ahead
    cdef public int64_t low
    cdef readonly int64_t progress_bytes
    cdef readonly int64_t message_bytes
    cdef readonly int64_t shortfall
    cdef public int64_t content_bytes
    cdef int64_t content_received
    cdef int64_t message_limit
    cdef int64_t body_limit
    cdef unsigned char prefix[5]
    cdef int prefix_have
    cdef int state
    cdef int64_t need
    cdef int64_t position
    # The fields of the FlightData that is being read.
    cdef bytes _descriptor
    cdef bytes _header
    cdef bytes _app_metadata
    cdef int64_t body_start
    cdef int64_t body_length
    cdef int64_t parsed
    cdef int fields
    # What was gathered of a message that has not come whole.
    cdef unsigned char *gathered
    cdef int64_t gathered_capacity
    cdef FrameBuffer frame
    cdef bytes plain
    cdef int64_t filled

    cdef int feed(self, const unsigned char *data, int64_t size, int64_t after, int64_t *used) except -1
    cdef int _begin(self, int64_t at_hand) except -1
    cdef int _gather(self, const unsigned char *data, int64_t size, int64_t *used) except -1
    cdef int _parse(self, const unsigned char *data, int64_t have) except -1
    cdef int _open_body(self) except -1
    cdef int _malformed(self, str what) except -1
    cdef int _refuse_field(self, uint64_t number, uint64_t size) except -1
    cdef int _fail(self, object error) except -1
    cdef int _copy_body(self, const unsigned char *data) except -1
    cdef object _finish(self)
    cdef void _reset(self) noexcept
    cdef void _drop_gathered(self) noexcept


cdef class Splitter:
    cdef unsigned char *ring
    cdef int64_t ring_bytes
    cdef int64_t start
    cdef int64_t end
    cdef dict streams
    cdef int64_t frame_limit
    cdef int preface_left
    cdef readonly int64_t connection_window
    cdef int64_t consumed_bytes
    # The DATA frame that is being read.
    cdef bint in_data
    cdef bint bulk
    cdef int64_t payload_left
    cdef int64_t padding_left
    cdef int64_t padding_bytes
    cdef int64_t data_length
    cdef bint ends_stream
    cdef bint empty
    cdef MessageAssembler current
    cdef int64_t direct
    cdef MessageAssembler direct_assembler
    # The header block that is open: its stream and its bytes so far.
    cdef uint32_t block_stream
    cdef int64_t block_bytes
    cdef readonly bint drained
    # An event that `receive` has met; `next` says it first.
    cdef int pending
    # What `next` says beside its kind.
    cdef readonly MessageAssembler assembler
    cdef readonly object message
    cdef readonly bytes frame
    cdef readonly int frame_type
    cdef readonly int flags
    cdef readonly uint32_t stream_id
    cdef readonly int64_t length

    cdef int64_t _make_room(self) noexcept
    cdef int _next(self) except -1
    cdef int _frame_header(self) except -1
    cdef int _data_header(self, const unsigned char *head, int64_t length) except -1
    cdef int _control_frame(self, const unsigned char *head, int64_t length) except -1
    cdef int _payload(self) except -1
    cdef int _message(self, MessageAssembler assembler) except -1
    cdef int _frame_end(self) except -1
    cdef int _preface(self) except -1
