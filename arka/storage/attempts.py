"""Attempts at encode jobs that are not over: whose files may still have to be deleted (R32).

Owns: the list of journals by table, from the start of an attempt until a commit names its files or they are gone. Does
not own journals (``arka.iceberg.attempts``) nor deletion (``arka.iceberg.leftovers``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from uuid import UUID, uuid4

import trio

from arka.iceberg import attempts
from arka.iceberg.attempts import Record
from arka.storage.ports import TableFrames


class Attempts:
    """The attempts of one server. Used from trio's thread only; a table's jobs run one after another.

    Args:
        directory: where journals are; those of an earlier process, whose workers are gone, are taken in by ``load``.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._open: dict[UUID, list[str]] = defaultdict(list)
        # Of an earlier process, or of the original of a copied data directory.
        self._inherited: set[str] = set()

    async def load(self) -> None:
        """Take in what an earlier process left.

        Raises:
            OSError: the disk failed.
        """

        def read() -> list[tuple[str, Record]]:
            return [(path, attempts.read(path)) for path in attempts.left_over(self._directory)]

        for path, record in await trio.to_thread.run_sync(read):
            if record.table is None or not record.files:
                await trio.to_thread.run_sync(attempts.forget, path)
            else:
                self._open[record.table].append(path)
                self._inherited.add(path)

    async def begin(self, job: TableFrames) -> TableFrames:
        """Name an attempt at a job and open its journal; returns the job with both.

        Raises:
            OSError: the disk failed.
        """
        attempt = uuid4()
        path = await trio.to_thread.run_sync(attempts.start, self._directory, attempt, job.table.uuid)
        self._open[job.table.uuid].append(path)
        return replace(job, attempt=attempt.hex, journal=path)

    async def give(self, journals: Iterable[str], commit: UUID) -> None:
        """Say that the files of attempts are given to a commit; before it is asked for.

        Raises:
            OSError: the disk failed.
        """
        for path in journals:
            await trio.to_thread.run_sync(partial(attempts.give, path, commit))

    async def end(self, table: UUID, journals: Iterable[str]) -> None:
        """Forget attempts: a commit names their files, or they are gone."""
        for path in journals:
            await trio.to_thread.run_sync(attempts.forget, path)
            if path in self._open[table]:
                self._open[table].remove(path)

    async def over(self, table: UUID, *, given: bool) -> list[tuple[str, Record]]:
        """List a table's attempts whose files may be looked at.

        Args:
            table: the table; none of its jobs may be running.
            given: also those whose files were given to a commit: none of these may land any more.
        """
        found = []
        for path in tuple(self._open.get(table, ())):
            record = await trio.to_thread.run_sync(attempts.read, path)
            # Whether an inherited one's files were given to a commit since is not known here (R29).
            if given or not (record.commits or path in self._inherited):
                found.append((path, record))
        return found

    def waiting(self, table: UUID) -> bool:
        """Whether there is any attempt at the table's jobs that is not over."""
        return bool(self._open.get(table))


__all__ = ["Attempts"]
