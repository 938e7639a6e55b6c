"""Repeating a request until whoever is away answers it.

Owns: the pauses between attempts. Does not own which failures pass, nor what is said about them.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

T = TypeVar("T")

#: Longest pause between two attempts, in seconds.
MAX_RETRY_S: Final = 5.0


async def persist(
    request: Callable[[], Awaitable[T]],
    away: type[Exception],
    on_away: Callable[[Exception], None],
    *,
    retry_s: float,
    rng: random.Random,
) -> T:
    """Repeat a request for as long as it fails with ``away``.

    Args:
        request: what is asked.
        away: the error of an outage; any other ends this.
        on_away: told each of them; what it raises ends this.
        retry_s: the first pause; each is twice the one before, up to ``MAX_RETRY_S``.
        rng: for the jitter: a pause is half of its length at least.

    Cancellation: the last request may have happened.
    """
    pause_s = retry_s
    while True:
        try:
            return await request()
        except away as error:
            on_away(error)
        await trio.sleep(pause_s * rng.uniform(0.5, 1.0))
        pause_s = min(pause_s * 2, MAX_RETRY_S)


__all__ = ["MAX_RETRY_S", "persist"]
