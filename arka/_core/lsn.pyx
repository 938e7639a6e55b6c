# cython: language_level=3
"""LSN allocation below a reserved ceiling (R2).

Owns: the next LSN and the ceiling that it may not reach. Does not own how a ceiling becomes durable
(``arka.wal.logstate`` and the object store's epoch): raise it here only after it is.
"""

from libc.stdint cimport uint64_t

from arka.errors import Unavailable

#: The first number that is no LSN any more: LSNs are JSON integers, so below 2**53 (protocol 3.1).
cdef uint64_t END = 1ULL << 53

LSN_END = END


class LsnExhausted(Unavailable):
    """The reserved LSNs are used up; more can be given once a higher ceiling is durable."""


cdef class LsnAllocator:
    """Gives LSNs in rising order, each once, all of them below the ceiling.

    Not thread-safe: used from trio's thread only.

    Args:
        next_lsn: the first LSN to give, 1 .. ``ceiling``.
        ceiling: the first LSN that must not be given, at most 2**53; durable already (R2).
    """

    def __cinit__(self, uint64_t next_lsn, uint64_t ceiling):
        if next_lsn < 1:
            raise ValueError(f"next_lsn must be at least 1, found {next_lsn}")
        if ceiling > END:
            raise ValueError(f"ceiling must be at most 2**53, found {ceiling}")
        if next_lsn > ceiling:
            raise ValueError(f"next_lsn must be at most the ceiling {ceiling}, found {next_lsn}")
        # Invariant: 1 <= _next <= _ceiling <= 2**53, and neither ever falls.
        self._next = next_lsn
        self._ceiling = ceiling

    @property
    def next(self):
        """The LSN that the next call of ``allocate`` gives."""
        return self._next

    @property
    def last(self):
        """The last LSN given, or the one before the first."""
        return self._next - 1

    @property
    def ceiling(self):
        """The first LSN that must not be given yet."""
        return self._ceiling

    @property
    def remaining(self):
        """How many LSNs may be given before the ceiling has to rise."""
        return self._ceiling - self._next

    def allocate(self, uint64_t leave=0):
        """Give the next LSN.

        Args:
            leave: how many have to be left below the ceiling after it.

        Raises:
            LsnExhausted: the ceiling is reached, or fewer would be left.
        """
        if self._next >= self._ceiling or self._ceiling - self._next <= leave:
            raise LsnExhausted(
                f"All LSNs below the reserved ceiling {self._ceiling} are given: wait until it is raised"
            )
        self._next += 1
        return self._next - 1

    def raise_ceiling(self, uint64_t ceiling):
        """Allow LSNs up to, not including, ``ceiling``.

        Args:
            ceiling: durable already (R2); at least the present one, at most 2**53.

        Raises:
            ValueError: it is out of that range.
        """
        if ceiling < self._ceiling:
            raise ValueError(f"the ceiling may only rise: it is {self._ceiling}, asked for {ceiling}")
        if ceiling > END:
            raise ValueError(f"ceiling must be at most 2**53, found {ceiling}")
        self._ceiling = ceiling
