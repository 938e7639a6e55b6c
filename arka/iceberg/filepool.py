"""The files of one job, written at the same time (R32).

Owns: how many are written at a time and that all have ended when the job does. Does not own what a file is
(``parquet``).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Final

from arka.storage.ports import StagedFile

#: Files that are written at a time: a small one takes mostly a store's round trip, or a file system's.
_THREADS: Final = 8


class FilePool:
    """Writes files in threads, as many at a time as ``limit_bytes`` of rows allow, one at least.

    Args:
        limit_bytes: most Arrow bytes of the files that are written at a time.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._threads = ThreadPoolExecutor(_THREADS)
        self._running: dict[Future[StagedFile], float] = {}
        self._files: list[Future[StagedFile]] = []

    def __enter__(self) -> FilePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # However the job ends, no thread of it goes on: what it had made is known.
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, size: float, write: Callable[[], StagedFile]) -> None:
        """Write a file of ``size`` Arrow bytes; waits while too many are written.

        Raises:
            Exception: an earlier file failed.
        """
        while self._running and (len(self._running) >= _THREADS or sum(self._running.values()) + size > self._limit):
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                del self._running[future]
                future.result()
        future = self._threads.submit(write)
        self._running[future] = size
        self._files.append(future)

    @property
    def count(self) -> int:
        """How many files there are so far."""
        return len(self._files)

    def finish(self) -> list[StagedFile]:
        """Wait for all files; returns them in the order of ``submit``.

        Raises:
            Exception: one failed.
        """
        return [future.result() for future in self._files]


__all__ = ["FilePool"]
