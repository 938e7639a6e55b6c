# cython: language_level=3
"""Sorted runs: files that say in which row of which data file each primary key lies.

Owns: the format of a run, finding keys in runs, and making one run of several. Does not own which runs make up an
index (``arka.iceberg.keyindex``) nor what a key's hash is (``arka._core.rowkeys``).

A run is immutable: 4096-byte blocks of 170 entries, sorted by hash, each with a CRC-32C of its own; behind them the
*fences*, which are the upper halves of the hashes that the blocks begin with, and in front of them a header:

    header   magic "ARKARUN1", entries (8), CRC-32C of the header (4) behind them; zeros up to 4096
    block    170 entries of 24 bytes (the last block: as many as are left, then zeros), 12 zeros, CRC-32C (4)
    fences   8 bytes a block, CRC-32C of all of them (4)

    entry    hash (two words of 64 bits, the one that sorts first in front), data file (4), row in it (4)

All numbers are little-endian, as everywhere in Arka. A file number of ``REMOVED`` says that the key has no row; the
others count from the base that the run is opened with. A row with the bit ``UNLESS_THERE`` is in a run that is not in
an index yet: the entry holds if the key has no row.

Hashes are as good as random, so sorting is dealing entries out by their first bits. Keys are looked up in their order,
so the search for a block begins at the fence where the last one was found. A block's CRC is checked when it is first
read.

Longer than the habit: what writes, finds and merges entries shares their layout, which is nobody else's business.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

import os

import pyarrow as pa

from arka._core.crc32c cimport arka_crc_prepare, crc32c_update

cdef extern from "unistd.h" nogil:
    ssize_t write(int fd, const void *data, size_t size)

cdef extern from "sys/mman.h" nogil:
    int PROT_READ
    int MAP_SHARED
    void *MAP_FAILED
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)

cdef enum:
    BLOCK = 4096
    ENTRIES = 170
    CRC_AT = 4092
    #: Blocks gathered for one write: 1 MiB.
    GATHERED = 256

cdef struct Entry:
    uint64_t high
    uint64_t low
    uint32_t file
    uint32_t row

cdef uint32_t NO_FILE = 0xFFFFFFFF
cdef uint32_t CONDITION = 0x80000000

#: The file number of a key that has no row.
REMOVED = 0xFFFFFFFF
#: A bit of a row's number: the entry holds if the key has no row.
UNLESS_THERE = 0x80000000
#: The first bytes of a run.
MAGIC = b"ARKARUN1"

cdef const uint8_t *MAGIC_BYTES = b"ARKARUN1"

arka_crc_prepare()


class RunDamaged(ValueError):
    """A run's bytes are not what was written."""


cdef inline bint comes_before(const Entry *one, const Entry *other) noexcept nogil:
    return one.high < other.high or (one.high == other.high and one.low < other.low)


cdef inline bint same_key(const Entry *one, const Entry *other) noexcept nogil:
    return one.high == other.high and one.low == other.low


# ---------------------------------------------------------------------------------------------------
# Writing.


cdef struct Output:
    int fd
    uint8_t *blocks            # GATHERED of them
    Py_ssize_t filled          # whole blocks in it
    Py_ssize_t entries         # in the block behind them
    uint64_t *fences
    Py_ssize_t fence_count
    uint64_t total
    int error                  # errno of a failed write; 0 for none


cdef int write_all(int fd, const uint8_t *data, size_t size) noexcept nogil:
    """Write at the file's position; return 0 or an errno."""
    cdef ssize_t done
    while size:
        done = write(fd, data, size)
        if done < 0:
            if errno == EINTR:
                continue
            return errno
        data += done
        size -= done
    return 0


cdef void flush(Output *out) noexcept nogil:
    """Write the whole blocks out."""
    if out.filled and out.error == 0:
        out.error = write_all(out.fd, out.blocks, out.filled * BLOCK)
    out.filled = 0


cdef void end_block(Output *out) noexcept nogil:
    """Seal the block that is being filled."""
    cdef uint8_t *block = out.blocks + out.filled * BLOCK
    cdef uint32_t crc
    memset(block + out.entries * sizeof(Entry), 0, CRC_AT - out.entries * sizeof(Entry))
    crc = crc32c_update(0, block, CRC_AT)
    memcpy(block + CRC_AT, &crc, 4)
    out.filled += 1
    out.entries = 0
    if out.filled == GATHERED:
        flush(out)


cdef inline void put(Output *out, const Entry *entry) noexcept nogil:
    """Add the next entry in order."""
    if out.entries == 0:
        out.fences[out.fence_count] = entry.high
        out.fence_count += 1
    memcpy(out.blocks + out.filled * BLOCK + out.entries * sizeof(Entry), entry, sizeof(Entry))
    out.entries += 1
    out.total += 1
    if out.entries == ENTRIES:
        end_block(out)


cdef void finish(Output *out) noexcept nogil:
    """Write the rest, and the fences."""
    cdef uint32_t crc
    if out.entries:
        end_block(out)
    flush(out)
    crc = crc32c_update(0, <const uint8_t *> out.fences, out.fence_count * 8)
    if out.error == 0:
        out.error = write_all(out.fd, <const uint8_t *> out.fences, out.fence_count * 8)
    if out.error == 0:
        out.error = write_all(out.fd, <const uint8_t *> &crc, 4)


cdef int open_output(Output *out, int fd, uint64_t most) except -1:
    """Begin a run of at most so many entries, with room for its header; ``close_output`` frees what it holds."""
    memset(out, 0, sizeof(Output))
    out.fd = fd
    out.blocks = <uint8_t *> malloc(GATHERED * BLOCK)
    out.fences = <uint64_t *> malloc((most // ENTRIES + 1) * 8)
    if out.blocks == NULL or out.fences == NULL:
        close_output(out)
        raise MemoryError(f"no room for the fences of {most} entries")
    memset(out.blocks, 0, BLOCK)
    out.filled = 1
    return 0


cdef object seal_output(Output *out):
    """Write the header of a finished run; returns the run's size, or raises what its writing failed with."""
    cdef uint32_t crc
    if out.error:
        raise OSError(out.error, os.strerror(out.error))
    header = MAGIC + out.total.to_bytes(8, "little")
    crc = crc32c_update(0, header, len(header))
    os.pwrite(out.fd, header + crc.to_bytes(4, "little"), 0)
    return BLOCK + out.fence_count * (BLOCK + 8) + 4


cdef void close_output(Output *out) noexcept:
    free(out.blocks)
    free(out.fences)
    out.blocks = NULL
    out.fences = NULL


cdef void deal(const Entry *entries, Entry *dealt, int64_t count, int bits, int64_t *ends) noexcept nogil:
    """Sort entries: deal them out by the first bits of their hashes, then put each few in order."""
    cdef int64_t i, j, start
    cdef int64_t buckets = <int64_t> 1 << bits
    cdef Entry entry
    for i in range(count):
        ends[(entries[i].high >> (64 - bits)) + 1] += 1
    for i in range(buckets):
        ends[i + 1] += ends[i]
    for i in range(count):
        j = <int64_t> (entries[i].high >> (64 - bits))
        dealt[ends[j]] = entries[i]
        ends[j] += 1
    start = 0
    for j in range(buckets):
        for i in range(start + 1, ends[j]):
            entry = dealt[i]
            while i > start and comes_before(&entry, &dealt[i - 1]):
                dealt[i] = dealt[i - 1]
                i -= 1
            dealt[i] = entry
        start = ends[j]


def write_run(int fd, parts, *, bint shadowed=False):
    """Write a run from entries in any order.

    Args:
        fd: an empty file open for writing.
        parts: for each some hashes, 16 bytes an entry (``rowkeys.hash_keys``); the number of the data file that their
            rows are in, or ``REMOVED``; and a native 32-bit number an entry, its row, or None for 0, 1 and so on. No
            two hashes are equal.
        shadowed: equal hashes are no error; such a run is for ``find_shadowed`` alone.

    Returns:
        The size of the run in bytes.

    Raises:
        ValueError: the lengths of a part do not belong together, or two hashes are equal.
        OSError: the file does not take it; what was written is of no use.
        MemoryError: no room to sort.

    Durability: the file is not fsynced.
    """
    cdef int64_t count = 0
    cdef int64_t first = 0
    cdef int64_t i
    cdef int bits = 1
    cdef bint doubled = False
    cdef Entry *entries
    cdef Entry *dealt
    cdef int64_t *ends
    cdef Output out
    for hashes, _, rows in parts:
        count += entry_count(hashes, rows)
    # About one entry in a bucket, and no more buckets than stay cheap to count.
    while bits < 24 and <int64_t> 1 << bits < count:
        bits += 1
    open_output(&out, fd, count)
    entries = <Entry *> malloc(max(1, count) * sizeof(Entry))
    dealt = <Entry *> malloc(max(1, count) * sizeof(Entry))
    ends = <int64_t *> calloc((<size_t> 1 << bits) + 1, sizeof(int64_t))
    try:
        if entries == NULL or dealt == NULL or ends == NULL:
            raise MemoryError(f"no room to sort {count} entries")
        for hashes, file, rows in parts:
            first += fill(entries + first, hashes, file, rows)
        with nogil:
            deal(entries, dealt, count, bits, ends)
            for i in range(count):
                if i and same_key(&dealt[i - 1], &dealt[i]):
                    doubled = True
                put(&out, &dealt[i])
            finish(&out)
        if doubled and not shadowed:
            raise ValueError("two entries of a run have the same hash")
        return seal_output(&out)
    finally:
        free(entries)
        free(dealt)
        free(ends)
        close_output(&out)


cdef int64_t entry_count(object hashes, object rows) except -1:
    """Count a part's entries."""
    size = memoryview(hashes).nbytes
    if size % 16 or (rows is not None and memoryview(rows).nbytes * 4 != size):
        raise ValueError(f"{size} bytes of hashes, {None if rows is None else memoryview(rows).nbytes} of rows")
    return size // 16


cdef int64_t fill(Entry *entries, object hashes, uint32_t file, object rows) except -1:
    """Write a part's entries; returns how many. SAFETY: there is room for ``entry_count``."""
    cdef const uint8_t[::1] hash_bytes = memoryview(hashes).cast("B")
    cdef const uint8_t[::1] row_bytes
    cdef const uint8_t *row_at = NULL
    cdef int64_t count = hash_bytes.shape[0] // 16
    cdef int64_t i
    if rows is not None and count:
        row_bytes = memoryview(rows).cast("B")
        row_at = &row_bytes[0]
    with nogil:
        for i in range(count):
            memcpy(&entries[i].high, &hash_bytes[16 * i], 16)
            entries[i].file = file
            if row_at == NULL:
                entries[i].row = <uint32_t> i
            else:
                memcpy(&entries[i].row, row_at + 4 * i, 4)
    return count


# ---------------------------------------------------------------------------------------------------
# Reading.


cdef class FileMap:
    """All bytes of a file, mapped to be read; unlike those of ``mmap`` it takes no file descriptor.

    Args:
        fd: the file; it may be closed afterwards.
        size: its length in bytes, at least 1.

    Raises:
        OSError: it cannot be mapped.
    """

    cdef void *_start
    cdef Py_ssize_t _size

    def __cinit__(self, int fd, Py_ssize_t size):
        cdef void *start = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0)
        if start == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        # Invariant: a map of _size bytes, given back once, when nobody holds a view of it any more.
        self._start = start
        self._size = size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self._start, self._size, 1, flags)

    def __dealloc__(self):
        if self._start != NULL:
            munmap(self._start, self._size)


cdef class Run:
    """A run that is read; it holds on to the buffer.

    Args:
        data: all of the file, a map as a rule. A file that shrinks under its map kills the process: runs are
            unlinked, never shortened.
        base: added to the file numbers in it.

    Raises:
        RunDamaged: header or fences are not what was written, or the length is not what the header says.
    """

    cdef Py_buffer _view
    cdef const uint8_t *_blocks
    cdef const uint8_t *_fences
    cdef uint64_t _count
    cdef int64_t _block_count
    # A bit a block: its CRC was checked.
    cdef uint8_t *_checked
    cdef uint32_t _base

    def __cinit__(self, data, uint32_t base=0):
        cdef uint32_t crc
        cdef const uint8_t *start
        # Invariant: a view that was taken has an object; it and `_checked` are given back in __dealloc__.
        PyObject_GetBuffer(data, &self._view, PyBUF_SIMPLE)
        start = <const uint8_t *> self._view.buf
        self._base = base
        if self._view.len < BLOCK + 4 or memcmp(start, MAGIC_BYTES, 8) != 0:
            begin = start[:min(8, self._view.len)]
            raise RunDamaged(f"no run: {self._view.len} bytes that begin with {begin!r}")
        memcpy(&crc, start + 16, 4)
        if crc != crc32c_update(0, start, 16):
            raise RunDamaged("a run's header has a wrong checksum")
        memcpy(&self._count, start + 8, 8)
        self._block_count = (self._count + ENTRIES - 1) // ENTRIES
        if self._view.len != BLOCK + self._block_count * (BLOCK + 8) + 4:
            raise RunDamaged(f"a run of {self._count} entries has {self._view.len} bytes")
        self._blocks = start + BLOCK
        self._fences = self._blocks + self._block_count * BLOCK
        memcpy(&crc, self._fences + 8 * self._block_count, 4)
        if crc != crc32c_update(0, self._fences, 8 * self._block_count):
            raise RunDamaged("a run's fences have a wrong checksum")
        self._checked = <uint8_t *> calloc((self._block_count >> 3) + 1, 1)
        if self._checked == NULL:
            raise MemoryError(f"no room to read a run of {self._count} entries")

    def __dealloc__(self):
        free(self._checked)
        if self._view.obj is not None:
            PyBuffer_Release(&self._view)

    def __len__(self):
        return self._count

    @property
    def base(self):
        """What is added to the file numbers in it."""
        return self._base

    def entries(self):
        """List the entries in their order: hash, file, row. For tests and people.

        Raises:
            RunDamaged: a block is not what was written.
        """
        cdef uint64_t i
        cdef const Entry *entry
        found = []
        for i in range(self._count):
            entry = entry_at(self, i)
            if entry == NULL:
                raise damaged(self, i // ENTRIES)
            found.append(((<const uint8_t *> entry)[:16], file_of(self, entry), entry.row))
        return found

    def places(self):
        """Return the entries' file numbers and rows: two Arrow buffers of native 32-bit numbers.

        Raises:
            RunDamaged: a block is not what was written.
            MemoryError: no room for them.
        """
        cdef uint64_t i
        cdef uint64_t bad = self._count
        cdef const Entry *entry
        cdef uint32_t *files_at
        cdef uint32_t *rows_at
        files = pa.allocate_buffer(4 * self._count)
        rows = pa.allocate_buffer(4 * self._count)
        files_at = <uint32_t *> <uintptr_t> files.address
        rows_at = <uint32_t *> <uintptr_t> rows.address
        with nogil:
            for i in range(self._count):
                entry = entry_at(self, i)
                if entry == NULL:
                    bad = i
                    break
                files_at[i] = file_of(self, entry)
                rows_at[i] = entry.row
        if bad < self._count:
            raise damaged(self, bad // ENTRIES)
        return files, rows


cdef object damaged(Run run, int64_t block):
    return RunDamaged(f"block {block} of a run, at offset {BLOCK + block * BLOCK}, has a wrong checksum")


cdef inline uint32_t file_of(Run run, const Entry *entry) noexcept nogil:
    """The file number of an entry, counted from 0."""
    return entry.file if entry.file == NO_FILE else entry.file + run._base


cdef inline const uint8_t *block_at(Run run, int64_t block) noexcept nogil:
    """Address a block; NULL if it is damaged."""
    cdef const uint8_t *at = run._blocks + block * BLOCK
    cdef uint32_t crc
    if not run._checked[block >> 3] >> (block & 7) & 1:
        memcpy(&crc, at + CRC_AT, 4)
        if crc != crc32c_update(0, at, CRC_AT):
            return NULL
        run._checked[block >> 3] |= <uint8_t> (1 << (block & 7))
    return at


cdef inline const Entry *entry_at(Run run, uint64_t number) noexcept nogil:
    """Address an entry; NULL if its block is damaged."""
    cdef const uint8_t *block = block_at(run, number // ENTRIES)
    if block == NULL:
        return NULL
    return <const Entry *> (block + number % ENTRIES * sizeof(Entry))


cdef inline uint64_t fence_at(Run run, int64_t block) noexcept nogil:
    cdef uint64_t fence
    memcpy(&fence, run._fences + 8 * block, 8)
    return fence


cdef int64_t last_block_before(Run run, uint64_t high, int64_t low) noexcept nogil:
    """Find the last block, from ``low`` on, whose fence is below ``high``; ``low`` if there is none.

    An entry with these upper bits lies in it or, where fences are equal to them, in one of those behind it.
    """
    cdef int64_t step = 1
    cdef int64_t top = low + 1
    cdef int64_t middle
    # Looked for from where the last one was found: those that ask come in order.
    while top < run._block_count and fence_at(run, top) < high:
        low = top
        top += step
        step *= 2
    if top > run._block_count:
        top = run._block_count
    while top - low > 1:
        middle = (low + top) // 2
        if fence_at(run, middle) < high:
            low = middle
        else:
            top = middle
    return low


cdef int find_entry(Run run, const Entry *wanted, int64_t *block, const Entry **found) noexcept nogil:
    """Look for a key from a block on, and note the block it is in; return 0, or -1 if one is damaged."""
    cdef int64_t at = last_block_before(run, wanted.high, block[0])
    cdef int64_t low, top, middle, entries
    cdef const Entry *start
    block[0] = at
    found[0] = NULL
    while at < run._block_count and fence_at(run, at) <= wanted.high:
        start = <const Entry *> block_at(run, at)
        if start == NULL:
            block[0] = at
            return -1
        entries = min(<int64_t> ENTRIES, <int64_t> run._count - at * ENTRIES)
        low = 0
        top = entries
        while low < top:
            middle = (low + top) // 2
            if comes_before(&start[middle], wanted):
                low = middle + 1
            else:
                top = middle
        if low < entries:
            if same_key(&start[low], wanted):
                found[0] = &start[low]
            return 0
        at += 1
    return 0


def find_rows(Run wanted, runs):
    """Look the keys of one run up in others.

    Args:
        wanted: the run whose keys are looked up.
        runs: the newest first; the first that has a key decides.

    Returns:
        Two Arrow buffers of native 32-bit numbers, in the order of ``wanted``: the data file of each key's row, or
        ``REMOVED`` where it has none, and the row in it.

    Raises:
        RunDamaged: a block is not what was written.
        MemoryError: no room for the answer.
    """
    cdef Py_ssize_t count = len(runs)
    cdef Py_ssize_t i
    cdef int64_t at
    cdef int64_t rows = wanted._count
    cdef Run run
    cdef uint32_t *files_at
    cdef uint32_t *rows_at
    cdef int64_t bad
    files = pa.allocate_buffer(4 * rows)
    places = pa.allocate_buffer(4 * rows)
    files_at = <uint32_t *> <uintptr_t> files.address
    rows_at = <uint32_t *> <uintptr_t> places.address
    # The oldest first: what a newer run says is written over it.
    with nogil:
        for at in range(rows):
            files_at[at] = NO_FILE
            rows_at[at] = 0
    for i in range(count - 1, -1, -1):
        run = runs[i]
        with nogil:
            bad = look_up(wanted, run, files_at, rows_at)
        if bad >= 0:
            raise damaged(run, bad)
        if bad == -2:
            raise RunDamaged("the run whose keys are looked up has a block with a wrong checksum")
    return files, places


cdef int64_t look_up(Run wanted, Run run, uint32_t *files, uint32_t *rows) noexcept nogil:
    """Write what one run knows of the keys over what is there; return -1, a damaged block, or -2: of ``wanted``."""
    cdef uint64_t i
    cdef int64_t block = 0
    cdef const Entry *entry
    cdef const Entry *found
    if run._count == 0:
        return -1
    for i in range(wanted._count):
        entry = entry_at(wanted, i)
        if entry == NULL:
            return -2
        if find_entry(run, entry, &block, &found) != 0:
            return block
        if found != NULL:
            files[i] = file_of(run, found)
            rows[i] = found.row
    return -1


def find_shadowed(Run wanted, Run shadowed):
    """Look the keys of one run up in one that may have several entries of a key.

    Args:
        wanted: the run whose keys are looked up.
        shadowed: see ``write_run`` and ``merge_runs``.

    Returns:
        Three Arrow buffers of native 32-bit numbers, an item for each entry that was found: the number of the wanted
        entry, the data file of the row, and the row in it.

    Raises:
        RunDamaged: a block is not what was written.
        MemoryError: no room for the answer.
    """
    cdef int64_t found = 0
    cdef int64_t bad
    with nogil:
        bad = gather_shadowed(wanted, shadowed, &found, NULL, NULL, NULL)
    if bad >= 0:
        raise damaged(shadowed, bad)
    if bad == -2:
        raise RunDamaged("the run whose keys are looked up has a block with a wrong checksum")
    numbers, files, rows = (pa.allocate_buffer(4 * found) for _ in range(3))
    cdef uint32_t *numbers_at = <uint32_t *> <uintptr_t> numbers.address
    cdef uint32_t *files_at = <uint32_t *> <uintptr_t> files.address
    cdef uint32_t *rows_at = <uint32_t *> <uintptr_t> rows.address
    found = 0
    with nogil:
        gather_shadowed(wanted, shadowed, &found, numbers_at, files_at, rows_at)
    return numbers, files, rows


cdef int64_t gather_shadowed(
    Run wanted, Run run, int64_t *found_count, uint32_t *numbers, uint32_t *files, uint32_t *rows
) noexcept nogil:
    """Count the entries of wanted keys, and write them down if asked to; return as ``look_up`` does."""
    cdef uint64_t i, at
    cdef int64_t block = 0
    cdef const Entry *entry
    cdef const Entry *found
    if run._count == 0:
        return -1
    for i in range(wanted._count):
        entry = entry_at(wanted, i)
        if entry == NULL:
            return -2
        if find_entry(run, entry, &block, &found) != 0:
            return block
        if found == NULL:
            continue
        # The first of those with this key: the others are behind it.
        at = (<const uint8_t *> found - run._blocks) // BLOCK
        at = at * ENTRIES + (<const uint8_t *> found - run._blocks - at * BLOCK) // sizeof(Entry)
        while same_key(found, entry):
            if numbers != NULL:
                numbers[found_count[0]] = <uint32_t> i
                files[found_count[0]] = file_of(run, found)
                rows[found_count[0]] = found.row
            found_count[0] += 1
            at += 1
            if at == run._count:
                break
            found = entry_at(run, at)
            if found == NULL:
                return <int64_t> (at // ENTRIES)
    return -1


def copy_run(int fd, Run run, keep):
    """Write a run of some of another one's entries; they hold whatever the condition on them was.

    Args:
        fd: an empty file open for writing.
        run: file numbers are copied as they are in it, without its base.
        keep: a byte an entry, not 0 for those that are kept; more bytes mean nothing.

    Returns:
        The size of the new run in bytes.

    Raises:
        ValueError: there are fewer bytes than entries.
        RunDamaged: a block is not what was written.
        OSError: the file does not take it; what was written is of no use.
        MemoryError: no room for the fences.

    Durability: the file is not fsynced.
    """
    cdef uint64_t i
    cdef uint64_t bad = run._count
    cdef const Entry *entry
    cdef Entry entry_out
    cdef Output out
    cdef const uint8_t[::1] kept = memoryview(keep).cast("B")
    if <uint64_t> kept.shape[0] < run._count:
        raise ValueError(f"{kept.shape[0]} bytes for {run._count} entries")
    open_output(&out, fd, run._count)
    try:
        with nogil:
            for i in range(run._count):
                if not kept[i]:
                    continue
                entry = entry_at(run, i)
                if entry == NULL:
                    bad = i
                    break
                entry_out = entry[0]
                entry_out.row &= ~CONDITION
                put(&out, &entry_out)
            finish(&out)
        if bad < run._count:
            raise damaged(run, bad // ENTRIES)
        return seal_output(&out)
    finally:
        close_output(&out)


def merge_runs(int fd, runs, *, bint keep_removed, int shadowed_fd=-1, bint shadowed=False):
    """Make one run of several.

    Args:
        fd: an empty file open for writing.
        runs: the newest first; of a key that several have, the newest entry stays.
        keep_removed: keep entries of keys without a row; without, there must be no older run.
        shadowed_fd: an empty file for a run of the entries that do not stay, for ``find_shadowed``; -1 for none.
        shadowed: all entries of a key stay: the run is for ``find_shadowed``, as these are.

    Returns:
        The entries of the run, and of that of those that do not stay.

    Raises:
        RunDamaged: a block is not what was written.
        OSError: the file does not take it; what was written is of no use.
        MemoryError: no room for the fences.

    Durability: the file is not fsynced.
    """
    cdef Py_ssize_t count = len(runs)
    cdef Py_ssize_t i
    cdef uint64_t most = 0
    cdef Py_ssize_t status
    cdef Run run
    cdef Head *heads
    cdef Output out
    cdef Output under
    cdef Output *under_out = NULL
    memset(&under, 0, sizeof(Output))
    for run in runs:
        most += run._count
    heads = <Head *> calloc(max(1, count), sizeof(Head))
    if heads == NULL:
        raise MemoryError(f"no room to merge {count} runs")
    try:
        open_output(&out, fd, most)
        try:
            if shadowed_fd >= 0:
                open_output(&under, shadowed_fd, most)
                under_out = &under
            held = tuple(runs)
            for i in range(count):
                heads[i].run = <void *> held[i]
                heads[i].age = i
            # SAFETY: `held` owns the runs.
            with nogil:
                status = merge(heads, count, keep_removed, shadowed, &out, under_out)
                if status < 0:
                    finish(&out)
                    if under_out != NULL:
                        finish(under_out)
            if status >= 0:
                run = held[heads[status].age]
                raise damaged(run, heads[status].place // ENTRIES)
            seal_output(&out)
            if under_out != NULL:
                seal_output(under_out)
            return out.total, under.total
        finally:
            close_output(&out)
            close_output(&under)
    finally:
        free(heads)


cdef struct Head:
    void *run
    Py_ssize_t age             # 0 for the newest
    uint64_t place             # of the entry in the run
    const Entry *entry


cdef inline bint is_ahead(const Head *one, const Head *other) noexcept nogil:
    """Whether one head's entry is to come out before the other's: by key, and of a key the newest."""
    if same_key(one.entry, other.entry):
        return one.age < other.age
    return comes_before(one.entry, other.entry)


cdef void sift_down(Head *heap, Py_ssize_t count, Py_ssize_t at) noexcept nogil:
    """Put a head that may be too far up in its place."""
    cdef Head moved = heap[at]
    cdef Py_ssize_t child = 2 * at + 1
    while child < count:
        if child + 1 < count and is_ahead(&heap[child + 1], &heap[child]):
            child += 1
        if not is_ahead(&heap[child], &moved):
            break
        heap[at] = heap[child]
        at = child
        child = 2 * at + 1
    heap[at] = moved


cdef Py_ssize_t merge(
    Head *heap, Py_ssize_t count, bint keep_removed, bint keep_all, Output *out, Output *under
) noexcept nogil:
    """Put the newest entry of each key in order; return -1, or which head is at a damaged block."""
    cdef Py_ssize_t i
    cdef Head *top = heap
    cdef Entry entry
    cdef Entry last
    cdef bint first = True
    # Runs without entries go to the end, and out of the count.
    i = 0
    while i < count:
        if (<Run> heap[i].run)._count == 0:
            count -= 1
            heap[i], heap[count] = heap[count], heap[i]
            continue
        heap[i].entry = entry_at(<Run> heap[i].run, 0)
        if heap[i].entry == NULL:
            return i
        i += 1
    for i in range(count // 2 - 1, -1, -1):
        sift_down(heap, count, i)
    memset(&last, 0, sizeof(Entry))
    while count and out.error == 0 and (under == NULL or under.error == 0):
        entry = top.entry[0]
        entry.file = file_of(<Run> top.run, top.entry)
        if keep_all or first or not same_key(&entry, &last):
            if keep_removed or entry.file != NO_FILE:
                put(out, &entry)
        elif under != NULL and entry.file != NO_FILE:
            put(under, &entry)
        first = False
        last = entry
        top.place += 1
        if top.place < (<Run> top.run)._count:
            top.entry = entry_at(<Run> top.run, top.place)
            if top.entry == NULL:
                return 0
        else:
            count -= 1
            heap[0], heap[count] = heap[count], heap[0]
        if count > 1:
            sift_down(heap, count, 0)
    return -1
