# cython: language_level=3
"""The keys of one table: which LSN each has, oldest first, in some 40 bytes a key (R21).

Owns: a FIFO of entries in LSN order and an index into it. Does not own what a key's hash is nor when a key may
go (``arka.tiers.keys``).

The FIFO is a row of chunks, so that growing copies nothing and the oldest entries give their memory back. An entry
is 28 bytes, and the same 28 bytes are what a checkpoint carries: hash (16), LSN (8, little-endian), digest (4,
little-endian).

The index is open-addressed with linear probing. A slot holds 32 bits of the hash, its *tag*, and the entry's number,
so that a miss, a deletion and a rehash read no entry at all. The slot where a search begins is the upper bits of
the tag; a deletion moves what follows back and leaves no marker behind. Tags are made with a secret of the process:
clients choose keys, and with a tag that they can compute they could choose keys that all begin in one slot.

The index changes its size in steps. A new one is made beside the old one, each insertion and deletion moves MOVE slots
to it, and until all are moved a search looks in both. Growing twenty million keys at once takes 100 ms of the server's
only thread. The old index's memory goes back to the system in steps too.
"""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memmove, memset

cdef extern from "sys/mman.h" nogil:
    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_ANONYMOUS
    void *MAP_FAILED
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int MADV_DONTNEED
    int madvise(void *addr, size_t length, int advice)

cdef enum:
    HASH = 16
    ENTRY = 28
    #: Entries in a chunk, a power of two: 112 KiB, whole pages. A table with few keys touches one of them.
    CHUNK_SHIFT = 12
    CHUNK_ENTRIES = 4096
    #: The smallest index, in bits: 512 bytes.
    LEAST_BITS = 6
    #: The largest: a tag has 32 bits.
    MOST_BITS = 31
    #: Slots that each operation moves to a new index. All 2**b are moved before the new index needs another size: a
    #: grown one takes 2**b * 2/3 more entries until then, one that has shrunk by two bits 2**b / 24.
    MOVE = 32
    #: Slots that a look for expired keys moves, though it forgets none: a table at rest finishes too.
    IDLE_MOVE = 1024
    #: Indexes of so many bits are mapped: their memory can be given back piece by piece. The smallest has 1 MiB.
    MAP_BITS = 17
    #: Slots in such a piece: 128 KiB.
    PIECE = 16384

#: Entries are numbered modulo this, so that a number plus one fits 32 bits and is never 0.
cdef uint32_t NUMBERS = 0xFFFFFFFF

#: An emptied slot of the old index: its number is one that no entry has, so that no search ends here.
cdef uint64_t GONE = <uint64_t> 1 << 32

#: Slots that one insertion or deletion moves at most.
MOVED_SLOTS = MOVE
HASH_BYTES = HASH
ENTRY_BYTES = ENTRY


cdef inline unsigned char *entry_at(const Keys *keys, Py_ssize_t position) noexcept nogil:
    """Address the entry at a position; 0 is the oldest."""
    position += keys.front
    return keys.chunks[position >> CHUNK_SHIFT] + (position & (CHUNK_ENTRIES - 1)) * ENTRY


cdef inline uint64_t lsn_at(const Keys *keys, Py_ssize_t position) noexcept nogil:
    cdef uint64_t lsn
    memcpy(&lsn, entry_at(keys, position) + HASH, 8)
    return lsn


cdef inline uint32_t tag_of(const Keys *keys, const unsigned char *hash) noexcept nogil:
    """Mix half of a hash with the secret."""
    cdef uint64_t word
    memcpy(&word, hash, 8)
    return <uint32_t> ((word * keys.secret) >> 32)


cdef inline uint64_t slot_of(const Keys *keys, uint32_t tag, Py_ssize_t position) noexcept nogil:
    """What the index holds for the entry at a position."""
    cdef uint64_t number = (<uint64_t> keys.first_number + <uint64_t> position) % NUMBERS
    return (<uint64_t> tag << 32) | (number + 1)


cdef inline Py_ssize_t position_of(const Keys *keys, uint64_t slot) noexcept nogil:
    """Where the entry is that a slot names."""
    cdef Py_ssize_t position = <Py_ssize_t> <uint32_t> slot - 1 - <Py_ssize_t> keys.first_number
    return position if position >= 0 else position + <Py_ssize_t> NUMBERS


cdef Py_ssize_t probe(const Keys *keys, const unsigned char *hash, uint32_t tag) noexcept nogil:
    """Find a hash's slot, or the empty one where the search for it ends."""
    cdef Py_ssize_t mask = (<Py_ssize_t> 1 << keys.bits) - 1
    cdef Py_ssize_t at = <Py_ssize_t> (tag >> (32 - keys.bits))
    cdef uint64_t slot
    while True:
        slot = keys.slots[at]
        if slot == 0:
            return at
        if (slot >> 32) == tag and memcmp(entry_at(keys, position_of(keys, slot)), hash, HASH) == 0:
            return at
        at = (at + 1) & mask


cdef Py_ssize_t probe_old(const Keys *keys, const unsigned char *hash, uint32_t tag) noexcept nogil:
    """Find a hash's slot in the old index; -1 if it is not there."""
    cdef Py_ssize_t mask
    cdef Py_ssize_t at
    cdef uint64_t slot
    if keys.old == NULL:
        return -1
    mask = (<Py_ssize_t> 1 << keys.old_bits) - 1
    at = <Py_ssize_t> (tag >> (32 - keys.old_bits))
    while True:
        slot = keys.old[at]
        if slot == 0:
            return -1
        if (slot >> 32) == tag and <uint32_t> slot and memcmp(entry_at(keys, position_of(keys, slot)), hash, HASH) == 0:
            return at
        at = (at + 1) & mask


cdef void clear_slot(Keys *keys, Py_ssize_t hole) noexcept nogil:
    """Empty a slot and move those behind it back that would no longer be found."""
    cdef Py_ssize_t mask = (<Py_ssize_t> 1 << keys.bits) - 1
    cdef Py_ssize_t at = hole
    cdef Py_ssize_t home
    cdef uint64_t slot
    while True:
        at = (at + 1) & mask
        slot = keys.slots[at]
        if slot == 0:
            break
        home = <Py_ssize_t> (slot >> (64 - keys.bits))
        # Its search begins at or before the hole, so it passes the hole.
        if ((at - home) & mask) >= ((at - hole) & mask):
            keys.slots[hole] = slot
            hole = at
    keys.slots[hole] = 0
    keys.used -= 1


cdef uint64_t *take_slots(int bits) noexcept nogil:
    """Make an empty index; NULL when there is no memory for it."""
    cdef size_t size = <size_t> 8 << bits
    cdef void *made
    if bits < MAP_BITS:
        return <uint64_t *> calloc(size, 1)
    made = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if made == MAP_FAILED else <uint64_t *> made


cdef void give_slots(uint64_t *slots, int bits) noexcept nogil:
    if slots == NULL:
        return
    if bits < MAP_BITS:
        free(slots)
    else:
        munmap(slots, <size_t> 8 << bits)


cdef bint resize(Keys *keys, int bits) noexcept nogil:
    """Begin a new index with 2**bits slots; false when there is no memory for it, and nothing has changed.

    An earlier change of size is finished first. That happens to none that ``MOVE`` is large enough for.
    """
    cdef uint64_t *slots = take_slots(bits)
    if slots == NULL:
        return False
    if keys.old != NULL:
        move_some(keys, <Py_ssize_t> 1 << keys.old_bits)
    keys.old = keys.slots
    keys.old_bits = keys.bits
    keys.moved = keys.gap = keys.released = 0
    keys.slots = slots
    keys.bits = bits
    return True


cdef void move_some(Keys *keys, Py_ssize_t most) noexcept nogil:
    """Move the next slots of the old index to the new one; after the last one the old one is gone."""
    cdef Py_ssize_t mask = (<Py_ssize_t> 1 << keys.bits) - 1
    cdef Py_ssize_t size
    cdef Py_ssize_t end
    cdef Py_ssize_t old
    cdef Py_ssize_t at
    cdef uint64_t slot
    if keys.old == NULL:
        return
    size = <Py_ssize_t> 1 << keys.old_bits
    end = keys.moved + most if most < size - keys.moved else size
    keys.moves += end - keys.moved
    for old in range(keys.moved, end):
        slot = keys.old[old]
        if slot == 0:
            keys.gap = old
        elif <uint32_t> slot:
            at = <Py_ssize_t> (slot >> (64 - keys.bits))
            while keys.slots[at]:
                at = (at + 1) & mask
            keys.slots[at] = slot
            keys.old[old] = GONE
    keys.moved = end
    if end == size:
        give_slots(keys.old, keys.old_bits)
        keys.old = NULL
    elif keys.old_bits >= MAP_BITS and keys.gap - keys.released >= PIECE:
        # No search for what is still to be moved passes the gap. What is given back reads as empty, which ends others.
        end = keys.gap & ~(<Py_ssize_t> PIECE - 1)
        madvise(keys.old + keys.released, (end - keys.released) * 8, MADV_DONTNEED)
        keys.released = end


cdef unsigned char *take_chunk() noexcept nogil:
    """Map a chunk. From malloc, freed ones would stay in the heap: with the process, not with the system."""
    cdef void *chunk = mmap(NULL, CHUNK_ENTRIES * ENTRY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if chunk == MAP_FAILED else <unsigned char *> chunk


cdef void give_chunk(unsigned char *chunk) noexcept nogil:
    munmap(chunk, CHUNK_ENTRIES * ENTRY)


cdef bint reserve(Keys *keys) noexcept nogil:
    """Make room for one entry more; false when there is no memory for it."""
    cdef unsigned char **chunks
    cdef Py_ssize_t capacity
    if (keys.used + 1) * 3 > <Py_ssize_t> 2 << keys.bits:
        if keys.bits == MOST_BITS or not resize(keys, keys.bits + 1):
            return False
    if (keys.front + keys.count) >> CHUNK_SHIFT < keys.chunk_count:
        return True
    if keys.chunk_count == keys.chunk_capacity:
        capacity = 2 * keys.chunk_capacity if keys.chunk_capacity else 1
        chunks = <unsigned char **> realloc(keys.chunks, capacity * sizeof(unsigned char *))
        if chunks == NULL:
            return False
        keys.chunks = chunks
        keys.chunk_capacity = capacity
    keys.chunks[keys.chunk_count] = take_chunk()
    if keys.chunks[keys.chunk_count] == NULL:
        return False
    keys.chunk_count += 1
    return True


cdef bint append(Keys *keys, const unsigned char *hash, uint64_t lsn, uint32_t digest) noexcept nogil:
    """Add an entry at the end; an older one of the same hash is no longer found. False: no memory."""
    cdef unsigned char *entry
    cdef uint32_t tag
    cdef Py_ssize_t at
    cdef Py_ssize_t old
    if not reserve(keys):
        return False
    move_some(keys, MOVE)
    tag = tag_of(keys, hash)
    at = probe(keys, hash, tag)
    entry = entry_at(keys, keys.count)
    memcpy(entry, hash, HASH)
    memcpy(entry + HASH, &lsn, 8)
    memcpy(entry + HASH + 8, &digest, 4)
    if keys.slots[at] == 0:
        old = probe_old(keys, hash, tag)
        if old < 0:
            keys.used += 1
        else:
            keys.old[old] = GONE
    keys.slots[at] = slot_of(keys, tag, keys.count)
    keys.count += 1
    return True


cdef void drop_front(Keys *keys) noexcept nogil:
    """Forget the oldest entry."""
    cdef Py_ssize_t mask = (<Py_ssize_t> 1 << keys.bits) - 1
    cdef uint32_t tag = tag_of(keys, entry_at(keys, 0))
    cdef uint64_t wanted = slot_of(keys, tag, 0)
    cdef Py_ssize_t at = <Py_ssize_t> (tag >> (32 - keys.bits))
    # It has no slot if a later entry of the same hash has taken it.
    while keys.slots[at] != 0:
        if keys.slots[at] == wanted:
            clear_slot(keys, at)
            wanted = 0
            break
        at = (at + 1) & mask
    if wanted and keys.old != NULL:
        mask = (<Py_ssize_t> 1 << keys.old_bits) - 1
        at = <Py_ssize_t> (tag >> (32 - keys.old_bits))
        while keys.old[at] != 0:
            if keys.old[at] == wanted:
                keys.old[at] = GONE
                keys.used -= 1
                break
            at = (at + 1) & mask
    keys.first_number = keys.first_number + 1 if keys.first_number + 1 < NUMBERS else 0
    keys.count -= 1
    keys.front += 1
    if keys.front == CHUNK_ENTRIES:
        give_chunk(keys.chunks[0])
        keys.chunk_count -= 1
        memmove(keys.chunks, keys.chunks + 1, keys.chunk_count * sizeof(unsigned char *))
        keys.front = 0


cdef Py_ssize_t drop_through(Keys *keys, uint64_t lsn, Py_ssize_t most) noexcept nogil:
    """Forget the oldest entries up to an LSN; returns how many."""
    cdef Py_ssize_t dropped = 0
    while dropped < most and keys.count and lsn_at(keys, 0) <= lsn:
        drop_front(keys)
        dropped += 1
        move_some(keys, MOVE)
        if keys.old == NULL and keys.bits > LEAST_BITS + 1 and keys.used < <Py_ssize_t> 1 << (keys.bits - 3):
            # Not to its tightest: the next key must not make it grow again. Without memory it stays large.
            resize(keys, keys.bits - 2)
    move_some(keys, IDLE_MOVE)
    return dropped


cdef Py_ssize_t first_above(const Keys *keys, uint64_t lsn) noexcept nogil:
    """Find the position of the first entry above an LSN."""
    cdef Py_ssize_t low = 0
    cdef Py_ssize_t high = keys.count
    cdef Py_ssize_t middle
    while low < high:
        middle = (low + high) >> 1
        if lsn_at(keys, middle) > lsn:
            high = middle
        else:
            low = middle + 1
    return low


cdef void copy_out(const Keys *keys, Py_ssize_t start, Py_ssize_t end, char *out) noexcept nogil:
    """Copy the entries of a range of positions."""
    cdef Py_ssize_t run
    while start < end:
        run = CHUNK_ENTRIES - ((keys.front + start) & (CHUNK_ENTRIES - 1))
        if run > end - start:
            run = end - start
        memcpy(out, entry_at(keys, start), run * ENTRY)
        out += run * ENTRY
        start += run


cdef class KeyTable:
    """Hashes of keys with their writes' LSNs, in LSN order. Used from one thread.

    Args:
        first_number: the number of the first entry. Numbers go round; where they begin makes no difference, and
            tests begin just before the end.
    """

    def __cinit__(self, uint32_t first_number=0):
        memset(&self._keys, 0, sizeof(Keys))
        self._keys.first_number = first_number % NUMBERS
        self._keys.secret = int.from_bytes(os.urandom(8), "little") | 1
        self._keys.slots = take_slots(LEAST_BITS)
        self._keys.bits = LEAST_BITS
        if self._keys.slots == NULL:
            raise MemoryError("cannot allocate an index of keys")

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self._keys.chunk_count):
            give_chunk(self._keys.chunks[i])
        free(self._keys.chunks)
        give_slots(self._keys.slots, self._keys.bits)
        give_slots(self._keys.old, self._keys.old_bits)

    def __len__(self):
        return self._keys.used

    @property
    def first_lsn(self):
        """The least LSN held; None when there is none."""
        return lsn_at(&self._keys, 0) if self._keys.count else None

    @property
    def last_lsn(self):
        """The highest LSN that was ever put in; the next one has to be above it."""
        return self._last_lsn

    @property
    def memory_bytes(self):
        """Bytes allocated."""
        return (
            self._keys.chunk_count * CHUNK_ENTRIES * ENTRY
            + self._keys.chunk_capacity * sizeof(unsigned char *)
            + (<Py_ssize_t> 8 << self._keys.bits)
            + ((<Py_ssize_t> 8 << self._keys.old_bits) - 8 * self._keys.released if self._keys.old != NULL else 0)
        )

    @property
    def moves(self):
        """Slots of the index that were moved to another one so far: the work of its changes of size."""
        return self._keys.moves

    def find(self, bytes key_hash not None):
        """Return ``(lsn, digest)`` of a hash's latest entry, or None.

        Args:
            key_hash: 16 bytes, equally distributed.
        """
        cdef const unsigned char *wanted = checked_hash(key_hash)
        cdef unsigned char *entry
        cdef uint64_t slot
        cdef uint64_t lsn
        cdef uint32_t digest
        cdef uint32_t tag = tag_of(&self._keys, wanted)
        cdef Py_ssize_t old
        slot = self._keys.slots[probe(&self._keys, wanted, tag)]
        if slot == 0:
            old = probe_old(&self._keys, wanted, tag)
            if old < 0:
                return None
            slot = self._keys.old[old]
        entry = entry_at(&self._keys, position_of(&self._keys, slot))
        memcpy(&lsn, entry + HASH, 8)
        memcpy(&digest, entry + HASH + 8, 4)
        return lsn, digest

    def insert(self, bytes key_hash not None, uint64_t lsn, uint32_t digest):
        """Add an entry; one of the same hash that is still held is no longer found.

        Args:
            key_hash: 16 bytes, equally distributed.
            lsn: above all before it, 1 .. 2**64 - 1.
            digest: kept beside it.

        Raises:
            MemoryError: nothing has changed.
            ValueError: the LSN does not rise.
        """
        cdef const unsigned char *wanted = checked_hash(key_hash)
        if lsn <= self._last_lsn:
            raise ValueError(f"LSNs must rise: {lsn} came after {self._last_lsn}")
        if not append(&self._keys, wanted, lsn, digest):
            raise MemoryError(f"cannot hold more than {self._keys.used} keys")
        self._last_lsn = lsn

    def expire_through(self, uint64_t lsn, Py_ssize_t most=0x7FFFFFFFFFFFFFFF):
        """Forget the entries up to ``lsn``, oldest first.

        Args:
            lsn: the last one to forget.
            most: stop after so many.

        Returns:
            How many were forgotten.
        """
        return drop_through(&self._keys, lsn, most)

    def count(self, uint64_t after_lsn, uint64_t through_lsn):
        """Return how many entries lie in ``(after_lsn, through_lsn]``."""
        return max(first_above(&self._keys, through_lsn) - first_above(&self._keys, after_lsn), 0)

    def pack(self, uint64_t after_lsn, uint64_t through_lsn, Py_ssize_t most=0x7FFFFFFFFFFFFFFF):
        """Return the entries in ``(after_lsn, through_lsn]`` joined, oldest first, 28 bytes each; at most ``most``."""
        cdef Py_ssize_t start = first_above(&self._keys, after_lsn)
        cdef Py_ssize_t end = first_above(&self._keys, through_lsn)
        if end - start > most:
            end = start + most
        cdef bytes packed
        if end <= start:
            return b""
        packed = PyBytes_FromStringAndSize(NULL, (end - start) * ENTRY)
        copy_out(&self._keys, start, end, PyBytes_AS_STRING(packed))
        return packed

    def load(self, packed):
        """Add what ``pack`` returned; entries at or below ``last_lsn`` are known already and left out.

        Args:
            packed: whole entries whose LSNs rise.

        Returns:
            How many were added.

        Raises:
            MemoryError: only the first of them were added.
            ValueError: they are not whole entries with rising LSNs; none was added.
        """
        cdef Py_buffer view
        cdef const unsigned char *entry
        cdef Py_ssize_t i, _i
        cdef Py_ssize_t added = 0
        cdef uint64_t before = 0
        cdef uint64_t lsn
        cdef uint32_t digest
        PyObject_GetBuffer(packed, &view, PyBUF_SIMPLE)
        try:
            entry = <const unsigned char *> view.buf
            if view.len % ENTRY:
                raise ValueError(f"{view.len} bytes are not whole entries of {ENTRY} bytes")
            for i in range(view.len // ENTRY):
                memcpy(&lsn, entry + i * ENTRY + HASH, 8)
                if lsn <= before:
                    raise ValueError(f"LSNs must rise: {lsn} came after {before}")
                before = lsn
            for _i in range(view.len // ENTRY):
                memcpy(&lsn, entry + HASH, 8)
                memcpy(&digest, entry + HASH + 8, 4)
                if lsn > self._last_lsn:
                    if not append(&self._keys, entry, lsn, digest):
                        raise MemoryError(f"cannot hold more than {self._keys.used} keys")
                    self._last_lsn = lsn
                    added += 1
                entry += ENTRY
        finally:
            PyBuffer_Release(&view)
        return added


cdef const unsigned char *checked_hash(bytes key_hash) except NULL:
    """Take a hash's bytes."""
    if PyBytes_GET_SIZE(key_hash) != HASH:
        raise ValueError(f"a hash has {HASH} bytes, found {PyBytes_GET_SIZE(key_hash)}")
    return <const unsigned char *> PyBytes_AS_STRING(key_hash)
