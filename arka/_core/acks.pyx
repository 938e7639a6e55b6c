# cython: language_level=3
"""Acks as bytes: runs of them, from what a stream knows of its writes (protocol 3).

Owns: the wire form of the acks of accepted writes. Does not own which are due (``arka.flight.acks``), nor the acks of
rejected and repeated writes, which are rare and made there.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

#: A bit of a write's tier: its ack is not of the common form, and no run goes beyond it.
SPECIAL = 0x80

cdef enum:
    C_SPECIAL = 0x80
    # Digits of the greatest 64-bit number and a sign.
    NUMBER = 20
    # Bytes of a gRPC prefix, a tag and a varint of 32 bits.
    PREFIX = 11

cdef bytes LSN = b'{"lsn":'
cdef bytes ROWS = b',"rows":'


cdef inline unsigned char *put_bytes(unsigned char *at, bytes text) noexcept:
    memcpy(at, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    return at + PyBytes_GET_SIZE(text)


cdef inline unsigned char *put_number(unsigned char *at, uint64_t number) noexcept nogil:
    """Write a number in decimal."""
    cdef unsigned char digits[NUMBER]
    cdef int count = 0
    while True:
        digits[count] = <unsigned char> (48 + number % 10)
        count += 1
        number //= 10
        if number == 0:
            break
    while count:
        count -= 1
        at[0] = digits[count]
        at += 1
    return at


cdef inline unsigned char *put_varint(unsigned char *at, size_t number) noexcept nogil:
    while number > 127:
        at[0] = <unsigned char> (number & 127 | 128)
        number >>= 7
        at += 1
    at[0] = <unsigned char> number
    return at + 1


def encode_run(
    const int64_t[::1] lsns,
    const int64_t[::1] rows,
    const unsigned char[::1] tiers,
    Py_ssize_t start,
    Py_ssize_t stop,
    *,
    int tier,
    int64_t through_lsn,
    int64_t first_sequence,
    bytes head,
    bytes middle,
    bytes tail,
    bint last_only,
    bint exact,
    Py_ssize_t budget,
):
    """Encode the acks of writes ``start`` to ``stop`` at one tier, until one that is not due or not of the common form.

    Args:
        lsns: of all writes.
        rows: row counts of all writes.
        tiers: the tier that each write asked for, perhaps with ``SPECIAL``; those that asked for less are skipped.
        start: index of the first write.
        stop: index behind the last one.
        tier: the tier.
        through_lsn: what has reached it.
        first_sequence: the sequence of index 0.
        head: what a message begins with, the ack's field tag included.
        middle: the JSON text between LSN and sequence.
        tail: the JSON text behind the number of rows.
        last_only: encode the last one alone, which stands for all of them.
        exact: skip those that asked for more, too.
        budget: no other ack is encoded once there are so many bytes.

    Returns:
        Whole gRPC messages, and the index behind the last write that was looked at: the first that is not due, is
        special, or has no room; or ``stop``.

    Raises:
        ValueError: an index is out of range.
    """
    cdef Py_ssize_t index = start
    cdef Py_ssize_t last = -1
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t least = PyBytes_GET_SIZE(head) + PyBytes_GET_SIZE(middle) + PyBytes_GET_SIZE(tail)
    cdef Py_ssize_t most = least + PyBytes_GET_SIZE(LSN) + PyBytes_GET_SIZE(ROWS) + 3 * NUMBER + PREFIX
    cdef Py_ssize_t room
    cdef bytes made
    cdef unsigned char *at
    cdef unsigned char *begin
    cdef int asked
    if not 0 <= start <= stop <= lsns.shape[0] or stop > rows.shape[0] or stop > tiers.shape[0]:
        raise ValueError(f"writes {start} to {stop} of {lsns.shape[0]}")
    room = 1 if last_only else min(stop - start, max(budget, 0) // (least + PREFIX) + 1)
    made = PyBytes_FromStringAndSize(NULL, room * most)
    begin = at = <unsigned char *> PyBytes_AS_STRING(made)
    while index < stop:
        asked = tiers[index] & (C_SPECIAL - 1)
        if asked < tier or (exact and asked > tier):
            index += 1
            continue
        if tiers[index] & C_SPECIAL or lsns[index] > through_lsn:
            break
        if last_only:
            last = index
        elif at - begin >= budget or count == room:
            break
        else:
            at = put_ack(at, lsns[index], rows[index], first_sequence + index, head, middle, tail)
            count += 1
        index += 1
    if last >= 0:
        at = put_ack(at, lsns[last], rows[last], first_sequence + last, head, middle, tail)
    return made[: at - begin], index


cdef unsigned char *put_ack(
    unsigned char *at, int64_t lsn, int64_t row_count, int64_t sequence, bytes head, bytes middle, bytes tail
) noexcept:
    """Write one gRPC message; returns where it ends."""
    cdef unsigned char text[3 * NUMBER]
    cdef unsigned char *number = put_number(text, lsn)
    cdef Py_ssize_t lsn_size = number - text
    cdef Py_ssize_t sequence_size, rows_size, size, whole
    cdef unsigned char *message = at
    number = put_number(text + NUMBER, sequence)
    sequence_size = number - text - NUMBER
    number = put_number(text + 2 * NUMBER, row_count)
    rows_size = number - text - 2 * NUMBER
    size = PyBytes_GET_SIZE(LSN) + lsn_size + PyBytes_GET_SIZE(middle) + sequence_size
    size += PyBytes_GET_SIZE(ROWS) + rows_size + PyBytes_GET_SIZE(tail)
    at = put_bytes(at + 5, head)
    at = put_varint(at, size)
    at = put_bytes(at, LSN)
    memcpy(at, text, lsn_size)
    at = put_bytes(at + lsn_size, middle)
    memcpy(at, text + NUMBER, sequence_size)
    at = put_bytes(at + sequence_size, ROWS)
    memcpy(at, text + 2 * NUMBER, rows_size)
    at = put_bytes(at + rows_size, tail)
    whole = at - message - 5
    message[0] = 0
    message[1] = <unsigned char> (whole >> 24)
    message[2] = <unsigned char> (whole >> 16 & 255)
    message[3] = <unsigned char> (whole >> 8 & 255)
    message[4] = <unsigned char> (whole & 255)
    return at
