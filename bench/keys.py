"""The index of idempotency keys: memory per key, time per lookup and insert, pauses.

The floor is what one would write without a table of one's own: a Python dict from the key to a tuple. Each side runs
in a process of its own, so that the growth of its resident memory is its own; keys are made anew for each question,
in blocks, and their making is not timed. Times are the thread's own: on a busy machine the wall clock shows the
others.

Environment: ``BENCH_KEYS`` makes the index smaller than ten million keys, for a quick look.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from arka.tiers.keys import KeyIndex
from bench.harness import Result, measurement

TABLE = UUID(int=1)
#: Keys that are made at a time: what they take themselves must not show in what the index takes.
BLOCK = 100_000
KEYS = max(int(os.environ.get("BENCH_KEYS", 10_000_000)) // BLOCK, 1) * BLOCK
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Arka:
    """The index of ``arka.tiers.keys``."""

    def __init__(self) -> None:
        self._index = KeyIndex(0.0, limit=1 << 40)

    def find(self, key: bytes) -> object:
        return self._index.find(TABLE, key)

    def insert(self, key: bytes, lsn: int) -> None:
        self._index.insert(TABLE, key, lsn, lsn & 0xFFFFFFFF)

    def expire(self, lsn: int) -> None:
        self._index.note_committed(TABLE, lsn, 0)
        while self._index.expire(0):
            pass


class Floor:
    """A dict in LSN order."""

    def __init__(self) -> None:
        self._writes: dict[bytes, tuple[int, int]] = {}

    def find(self, key: bytes) -> object:
        return self._writes.get(key)

    def insert(self, key: bytes, lsn: int) -> None:
        self._writes[key] = (lsn, lsn & 0xFFFFFFFF)

    def expire(self, lsn: int) -> None:
        # One walk: a new iterator for each would step over all that went before.
        dead = []
        for key, write in self._writes.items():
            if write[0] > lsn:
                break
            dead.append(key)
        for key in dead:
            del self._writes[key]


SIDES: dict[str, Callable[[], Any]] = {"arka": Arka, "dict": Floor}


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def keys_from(start: int, prefix: str = "nightly-load") -> list[bytes]:
    return [f"{prefix}#{number}".encode() for number in range(start, start + BLOCK)]


def fill(side: Any, count: int) -> list[float]:
    """Insert all keys; return the seconds that each block took."""
    seconds = []
    for start in range(0, count, BLOCK):
        keys = keys_from(start)
        begun = time.thread_time()
        for lsn, key in enumerate(keys, start + 1):
            side.find(key)
            side.insert(key, lsn)
        seconds.append(time.thread_time() - begun)
    return seconds


def look_up(side: Any, keys: list[bytes], *, there: bool) -> float:
    """Look keys up; return the seconds for each."""
    find = side.find
    begun = time.thread_time()
    for key in keys:
        find(key)
    seconds = (time.thread_time() - begun) / len(keys)
    if any((side.find(key) is not None) != there for key in keys[::1000]):
        raise SystemExit("the index is wrong")
    return seconds


def measure(name: str, count: int) -> dict[str, float]:
    """Measure one side in this process."""
    gc.collect()
    before = rss_bytes()
    side = SIDES[name]()
    seconds = fill(side, count)
    full = rss_bytes() - before
    middle = count // 2 // BLOCK * BLOCK
    hit = look_up(side, keys_from(middle), there=True)
    miss = look_up(side, keys_from(0, "another-load"), there=False)
    begun = time.thread_time()
    side.expire(count - count // 100)
    expired = time.thread_time() - begun
    gc.collect()
    return {
        "insert_ns": round(sum(seconds) / count * 1e9),
        "hit_ns": round(hit * 1e9),
        "miss_ns": round(miss * 1e9),
        "pause_ms": round((max(seconds) - statistics.median(seconds)) * 1e3, 1),
        "expire_ns": round(expired / (count - count // 100) * 1e9),
        "rss_mib": round(full / 2**20, 1),
        "bytes_per_key": round(full / count, 1),
        "rss_after_mib": round((rss_bytes() - before) / 2**20, 1),
    }


#: What is measured: its name in ``measure``, unit, and what it is.
FIGURES = {
    "bytes_per_key": ("bytes", "growth of resident memory for each key"),
    "insert_ns": ("ns", "what a new keyed write costs: looked up in vain, then put in, mean"),
    "hit_ns": ("ns", "a key that is there, mean"),
    "miss_ns": ("ns", "a key that is not, mean"),
    "expire_ns": ("ns", "one key less, oldest first, mean"),
    "pause_ms": ("ms", f"what the slowest {BLOCK:,} inserts took longer than the median ones: an index grew"),
}


@measurement("keys")
def keys() -> Iterator[Result]:
    """An index of ten million idempotency keys."""
    found: dict[str, dict[str, float]] = {}
    for name in SIDES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(measure, (name, KEYS))
    for figure, (unit, what) in FIGURES.items():
        name = "keys-rss" if unit == "bytes" else f"keys-{figure.removesuffix(f'_{unit}')}"
        result = Result(name, f"idempotency keys, {KEYS:,} of them: {what}", unit, "a dict from key to tuple")
        result.values, result.floors = [found["arka"][figure]], [found["dict"][figure]]
        if figure == "bytes_per_key":
            result.notes = {
                f"MiB, {side}, {when}": found[side][key]
                for side in SIDES
                for key, when in (("rss_mib", "all keys"), ("rss_after_mib", "all but a hundredth gone"))
            }
        yield result
