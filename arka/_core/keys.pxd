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
    Py_ssize_t used
    uint64_t secret             # odd


cdef class KeyTable:
    cdef Keys _keys
    cdef uint64_t _last_lsn
