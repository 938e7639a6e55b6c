# cython: language_level=3, auto_pickle=False, autotestdict=False
"""HPACK: header blocks to fields, in time that grows with the block and with what it decodes to (T22).

Owns: integers, strings, Huffman coding, the dynamic table of one connection, and which fields are legal by themselves.
Does not own which fields a request needs (``arka.flight.h2state``) nor frames. The static table and the Huffman code
are handed in: they are RFC 7541's.

A field that refers to the table is neither copied nor checked again: it was when it was put there.

Source: RFC 7541; RFC 9113 section 8.2.
"""

from collections import deque

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int16_t, int64_t, uint8_t
from libc.stdlib cimport free, malloc

cdef enum:
    #: what a field counts for beside its bytes, in the table and in a list (RFC 7541, section 4.1)
    ENTRY = 32
    #: octets of an integer behind its prefix: enough for 32 bits
    INTEGER_OCTETS = 5
    NIBBLES = 16
    #: symbols of the code; the last one is EOS
    SYMBOLS = 257
    EOS = 256
    #: changes of the table's size in one block: the smallest size and the last one (RFC 7541, section 4.2)
    CHANGES = 2
    #: bits of padding, all ones, at the end of a string
    PADDING_BITS = 7

#: The first table's size, bytes (RFC 9113, section 6.5.2).
TABLE_BYTES = 4096

# Pseudo-fields, as bits of ``pseudo``.
METHOD = 1
SCHEME = 2
AUTHORITY = 4
PATH = 8
STATUS = 16
PROTOCOL = 32

cdef dict PSEUDO = {
    b":method": 1,
    b":scheme": 2,
    b":authority": 4,
    b":path": 8,
    b":status": 16,
    b":protocol": 32,
}
# Fields of one connection alone, which HTTP/2 has no use for (RFC 9113, section 8.2.2).
cdef frozenset CONNECTION_FIELDS = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)


class HeaderError(Exception):
    """The block is malformed, or one of its fields is not legal: the connection is over."""


class HeadersTooLarge(Exception):
    """The block decodes to more than ``max_header_list_size``: the connection is over."""


cdef class HuffmanCode:
    """A code for octets, as a machine that takes four bits at a time.

    Args:
        codes: of each symbol, the last one EOS, as a number.
        lengths: of each, in bits; at least five, so that four bits end no more than one symbol.
    """

    def __cinit__(self, codes, lengths):
        cdef int node, nibble, bit, at, symbol, count = 1
        if len(codes) != SYMBOLS or len(lengths) != SYMBOLS or min(lengths) <= 4:
            raise ValueError("the code must have 257 symbols of five bits and more")
        children = [[0, 0]]
        leaves = {}
        padding = {0}
        for symbol in range(SYMBOLS):
            node = 0
            for at in range(lengths[symbol] - 1, -1, -1):
                bit = (codes[symbol] >> at) & 1
                if at == 0:
                    leaves[node, bit] = symbol
                elif children[node][bit] == 0:
                    children[node][bit] = count
                    children.append([0, 0])
                    node = count
                    count += 1
                else:
                    node = children[node][bit]
        node = 0
        for _ in range(PADDING_BITS):
            node = children[node][1]
            padding.add(node)
        self.following = <int16_t *> malloc(count * NIBBLES * sizeof(int16_t))
        self.emitted = <int16_t *> malloc(count * NIBBLES * sizeof(int16_t))
        self.may_end = <uint8_t *> malloc(count)
        if self.following == NULL or self.emitted == NULL or self.may_end == NULL:
            raise MemoryError("cannot allocate a Huffman code")
        for node in range(count):
            self.may_end[node] = node in padding
            for nibble in range(NIBBLES):
                at = node
                symbol = -1
                for bit in range(3, -1, -1):
                    if (at, (nibble >> bit) & 1) in leaves:
                        symbol = leaves[at, (nibble >> bit) & 1]
                        at = 0
                    else:
                        at = children[at][(nibble >> bit) & 1]
                self.following[node * NIBBLES + nibble] = -1 if symbol == EOS else at
                self.emitted[node * NIBBLES + nibble] = symbol

    def __dealloc__(self):
        free(self.following)
        free(self.emitted)
        free(self.may_end)

    cdef bytes decode(self, const uint8_t *data, int64_t size):
        """Decode a string; eight bits become a symbol or two at most."""
        cdef int64_t at, written = 0
        cdef int node = 0, half, place
        cdef uint8_t *out = <uint8_t *> malloc(2 * size + 1)
        if out == NULL:
            raise MemoryError("cannot allocate a string")
        try:
            for at in range(size):
                for half in range(2):
                    place = node * NIBBLES + (data[at] >> 4 if half == 0 else data[at] & 0xF)
                    node = self.following[place]
                    if node < 0:
                        raise HeaderError("a string contains EOS")
                    if self.emitted[place] >= 0:
                        out[written] = <uint8_t> self.emitted[place]
                        written += 1
            if not self.may_end[node]:
                raise HeaderError("a string ends in the middle of a symbol")
            return PyBytes_FromStringAndSize(<const char *> out, written)
        finally:
            free(out)


cdef class HeaderDecoder:
    """Decodes the header blocks of one connection, in order.

    Args:
        code: the Huffman code.
        static_table: names and values of the static table, in order.

    Attributes:
        max_header_list_size: most bytes that a block may decode to, 32 for each field included.
        max_allowed_table_size: largest table that the peer may choose, bytes.
        decoded_bytes: what the last block decoded to, 32 for each field included.
        pseudo: the pseudo-fields of the last block, as bits.
    """

    def __cinit__(self, HuffmanCode code not None, static_table, int64_t max_header_list_size=65536):
        self.code = code
        self.static_table = list(static_table)
        self.entries = deque()
        self.table_limit = TABLE_BYTES
        self.max_header_list_size = max_header_list_size
        self.max_allowed_table_size = TABLE_BYTES

    @property
    def table_bytes(self):
        """What the dynamic table holds, in bytes."""
        return self.table_size

    def decode(self, bytes block not None):
        """Decode one block.

        Args:
            block: all of it, CONTINUATION included.

        Returns:
            The fields, names and values.

        Raises:
            HeaderError: it is malformed, a field is illegal, or pseudo-fields are repeated, unknown or not first.
            HeadersTooLarge: it decodes to more than allowed; no more than that was decoded.
        """
        cdef const uint8_t *data = <const uint8_t *> PyBytes_AS_STRING(block)
        cdef int64_t have = PyBytes_GET_SIZE(block), at = 0, index, size
        cdef uint8_t first
        cdef bint regular = False
        cdef int bit, changes = 0
        cdef tuple field
        fields = []
        self.decoded_bytes = 0
        self.pseudo = 0
        while at < have:
            first = data[at]
            if first & 0x80:
                index = read_integer(data, have, &at, 7)
                field = self._entry(index)
                if index <= len(self.static_table) and field[0] in CONNECTION_FIELDS:
                    raise HeaderError(f"field of a connection: {field[0]!r}")
            elif first & 0xE0 == 0x20:
                changes += 1
                if fields or changes > CHANGES:
                    raise HeaderError("a change of the table's size behind a field, or many of them")
                size = read_integer(data, have, &at, 5)
                if size > self.max_allowed_table_size:
                    raise HeaderError(f"a table of {size} bytes, allowed are {self.max_allowed_table_size}")
                self.table_limit = size
                self._shrink(size)
                continue
            else:
                index = read_integer(data, have, &at, 6 if first & 0x40 else 4)
                name = self._entry(index)[0] if index else self._string(data, have, &at)
                value = self._string(data, have, &at)
                field = (name, value)
                # Before it is put anywhere: what is in the table is legal.
                self._count(field)
                check_field(name, value)
                if first & 0x40:
                    self._insert(field)
            if first & 0x80:
                self._count(field)
            if (<bytes> field[0])[0] == c":":
                bit = PSEUDO.get(field[0], 0)
                if bit == 0:
                    raise HeaderError("unknown pseudo-field")
                if regular:
                    raise HeaderError(f"pseudo-field {field[0]!r} behind a field")
                if self.pseudo & bit:
                    raise HeaderError(f"two pseudo-fields {field[0]!r}")
                self.pseudo |= bit
            else:
                regular = True
            fields.append(field)
        if self.table_limit > self.max_allowed_table_size:
            raise HeaderError("the table was not made as small as it has to be")
        return fields

    cdef int _count(self, tuple field) except -1:
        self.decoded_bytes += ENTRY + PyBytes_GET_SIZE(<bytes> field[0]) + PyBytes_GET_SIZE(<bytes> field[1])
        if self.decoded_bytes > self.max_header_list_size:
            raise HeadersTooLarge(f"a header list of more than {self.max_header_list_size} bytes")
        return 0

    cdef tuple _entry(self, int64_t index):
        """Look an index up: 1 is the first entry of the static table."""
        cdef int64_t known = len(self.static_table)
        if 0 < index <= known:
            return self.static_table[index - 1]
        if index > known and index - known <= len(self.entries):
            return self.entries[index - known - 1]
        raise HeaderError(f"no entry {index} in the table")

    cdef bytes _string(self, const uint8_t *data, int64_t have, int64_t *at):
        """Read a string literal (RFC 7541, section 5.2)."""
        cdef int64_t size, start
        cdef bint coded
        if at[0] >= have:
            raise HeaderError("a field is cut off")
        coded = data[at[0]] & 0x80
        size = read_integer(data, have, at, 7)
        if size > have - at[0]:
            raise HeaderError("a string is cut off")
        start = at[0]
        at[0] += size
        if coded:
            return self.code.decode(data + start, size)
        return PyBytes_FromStringAndSize(<const char *> (data + start), size)

    cdef int _insert(self, tuple field) except -1:
        cdef int64_t size = ENTRY + PyBytes_GET_SIZE(<bytes> field[0]) + PyBytes_GET_SIZE(<bytes> field[1])
        # An entry larger than the table empties it (RFC 7541, section 4.4).
        self._shrink(self.table_limit - size)
        if size <= self.table_limit:
            self.entries.appendleft(field)
            self.table_size += size
        return 0

    cdef int _shrink(self, int64_t limit) except -1:
        """Drop the oldest entries until what is left has at most ``limit`` bytes."""
        cdef tuple field
        while self.table_size > limit and self.entries:
            field = self.entries.pop()
            self.table_size -= ENTRY + PyBytes_GET_SIZE(<bytes> field[0]) + PyBytes_GET_SIZE(<bytes> field[1])
        return 0


cdef int64_t read_integer(const uint8_t *data, int64_t have, int64_t *at, int bits) except -1:
    """Read an integer whose prefix has ``bits`` bits (RFC 7541, section 5.1); at[0] < have."""
    cdef int64_t mask = (1 << bits) - 1
    cdef int64_t value = data[at[0]] & mask
    cdef int octet
    at[0] += 1
    if value < mask:
        return value
    for octet in range(INTEGER_OCTETS):
        if at[0] >= have:
            raise HeaderError("an integer is cut off")
        value += <int64_t> (data[at[0]] & 0x7F) << (7 * octet)
        at[0] += 1
        if data[at[0] - 1] < 0x80:
            return value
    raise HeaderError("an integer is longer than any that is needed")


cdef int check_field(bytes name, bytes value) except -1:
    """Check that a field is legal by itself (RFC 9113, sections 8.2.1 and 8.2.2)."""
    cdef const uint8_t *text = <const uint8_t *> PyBytes_AS_STRING(name)
    cdef int64_t size = PyBytes_GET_SIZE(name), at
    if size == 0:
        raise HeaderError("a field without a name")
    for at in range(size):
        if text[at] <= 0x20 or text[at] >= 0x7F or 0x41 <= text[at] <= 0x5A or (text[at] == c":" and at > 0):
            raise HeaderError(f"illegal character in the name of a field, at {at}")
    text = <const uint8_t *> PyBytes_AS_STRING(value)
    size = PyBytes_GET_SIZE(value)
    for at in range(size):
        if text[at] == 0 or text[at] == 0x0A or text[at] == 0x0D:
            raise HeaderError(f"illegal character in the value of a field, at {at}")
    if size and (text[0] in (0x20, 0x09) or text[size - 1] in (0x20, 0x09)):
        raise HeaderError("white space around the value of a field")
    if name == b"te" and value.lower() != b"trailers":
        raise HeaderError("te is not trailers")
    if name in CONNECTION_FIELDS:
        raise HeaderError(f"field of a connection: {name!r}")
    return 0
