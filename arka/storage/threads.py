"""Work for a thread: what would hold trio's thread for milliseconds although it waits for nothing.

Owns: how many such jobs run at a time. Blocking I/O has its own limiters beside its adapters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import trio

P = ParamSpec("P")
T = TypeVar("T")

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("arka compute limiter")


async def run_compute(function: Callable[..., T], *args: object) -> T:
    """Run ``function(*args)`` in a thread; at most one per core at a time.

    Returns:
        What it returns; raises what it raises.

    Cancellation: the job is finished first, so that nothing it touches is used by two at once.
    """
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(os.cpu_count() or 1)
        _limiter.set(limiter)
    return await trio.to_thread.run_sync(function, *args, limiter=limiter)


__all__ = ["run_compute"]
