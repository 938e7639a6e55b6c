from libc.stdint cimport uint32_t, uint64_t

cdef struct Keys:
    # The FIFO: entry i lies in chunks[(front + i) / CHUNK_ENTRIES]. Invariant: LSNs rise along it.
    unsigned char **chunks
    Py_ssize_t chunk_count
    Py_ssize_t chunk_capacity   # of the array of pointers
    Py_ssize_t front            # entries of the first chunk that are dropped; below CHUNK_ENTRIES
    Py_ssize_t count
    uint32_t first_number       # of the entry at the front
    # The index: tag << 32 | number + 1; 0 is an empty slot. Invariant: at most two thirds are used.
    uint64_t *slots
    int bits                    # there are 2**bits of them
    Py_ssize_t used             # of both indexes
    # While the index changes its size: the one before, which loses a few slots to the new one with each operation. It
    # gets no new entries, and an emptied slot is GONE. Invariant: an entry that is found has a slot in one of the two.
    uint64_t *old               # NULL at other times
    int old_bits
    Py_ssize_t moved            # slots of it before this are moved
    Py_ssize_t gap              # the last slot before ``moved`` that was empty from the start
    Py_ssize_t released         # slots of it before this have no memory any more
    uint64_t moves              # slots moved so far
    uint64_t secret             # odd


cdef class KeyTable:
    cdef Keys _keys
    cdef uint64_t _last_lsn
