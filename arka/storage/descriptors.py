"""The budget of file descriptors: how many the process may have, and how many connections that leaves (R31).

Owns: raising the soft limit, and the reserve that connections may not take. Does not own the connections.
"""

from __future__ import annotations

import resource
from typing import Final, NamedTuple

#: Descriptors that are kept for the log, the object store, the catalog and reads. Threads have none of their own.
RESERVE: Final = 256
#: What a worker process takes on this side: two pipes, its end, and the same while another is started in its place.
WORKER_DESCRIPTORS: Final = 12
#: More than this is never needed, and an unlimited hard limit is no number.
_MOST: Final = 1 << 20


class Budget(NamedTuple):
    """What a process may have.

    Attributes:
        limit: descriptors, all together.
        connections: connections among them.
    """

    limit: int
    connections: int


def raise_limit() -> int:
    """Raise the soft limit of descriptors to the hard one; returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            # A system-wide maximum below the hard limit; what is there has to do.
            pass
    return _MOST if soft == resource.RLIM_INFINITY else soft


def budget(limit: int, connections: int, reserve: int = RESERVE) -> Budget:
    """Divide descriptors.

    Args:
        limit: how many there are.
        connections: how many connections are asked for.
        reserve: how many connections may not take.

    Returns:
        At most as many connections as were asked for, at least one. Half of a small limit is reserved.
    """
    return Budget(limit, max(1, min(connections, limit - min(reserve, limit // 2))))


__all__ = ["RESERVE", "WORKER_DESCRIPTORS", "Budget", "budget", "raise_limit"]
