"""Whether files that wait for their commit are still there, at the last moment before it (R28).

Owns: that look. While a commit waits for the catalog others may clear away what no snapshot names. Does not own what
follows: files of rows are made again by the server, files of metadata by the next attempt (``commit``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.io import FileIO
from pyiceberg.manifest import DataFile

from arka.iceberg.fileio import local_path
from arka.iceberg.sqlcatalog import ServerSqlCatalog
from arka.storage.ports import CommitJob, StagedFilesMissing

#: Files in an object store are looked for once they have waited for so many seconds: each one costs a request.
LOOK_AFTER_S: Final = 60.0


class WaitingFiles:
    """The files that a commit is about to name for the first time."""

    def __init__(self, io: FileIO, job: CommitJob, files: Sequence[DataFile], written: Sequence[str]) -> None:
        """Remember what to look for.

        Args:
            io: the warehouse.
            job: the commit's.
            files: data and delete files, the job's own and those that this attempt wrote.
            written: every file that this attempt wrote: manifests, their list, delete files.
        """
        self._io = io
        self._job = job
        self._sizes: dict[str, int | None] = dict.fromkeys(written)
        self._sizes |= {file.file_path: file.file_size_in_bytes for file in files}
        self._rows = {file.path for file in job.staged.files}

    def check(self, further: Iterable[str] = ()) -> None:
        """Look for the files: always for local ones, for others if they have waited long or the attempt is repeated.

        Args:
            further: locations of more files that this attempt wrote.

        Raises:
            StagedFilesMissing: a file with the job's rows is gone or has another size.
            CommitFailedException: a file that this attempt wrote is; the next attempt writes its own.
            OSError: the warehouse did not answer.
        """
        waited = time.monotonic() - self._job.staged.made_s > LOOK_AFTER_S
        for location, size in (self._sizes | dict.fromkeys(further)).items():
            path = local_path(location)
            if path is None and not (waited or self._job.repeated):
                continue
            found = _local_size(path) if path is not None else _remote_size(self._io, location)
            if found is not None and (found == size if size is not None else found > 0):
                continue
            if location in self._rows:
                raise StagedFilesMissing(location)
            raise CommitFailedException(f"the file {location}, which this commit wrote, is gone or has another size")


@contextmanager
def last_look(opened: Catalog, waiting: WaitingFiles) -> Iterator[None]:
    """Look for the files that a commit names as late as the catalog allows.

    A SQL catalog looks once it has the locks; a REST catalog is asked after the look.

    Args:
        opened: the catalog.
        waiting: the files of the commit that is made inside.
    """
    if isinstance(opened, ServerSqlCatalog):
        with opened.last_look(waiting.check):
            yield
    else:
        waiting.check()
        yield


def _local_size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remote_size(io: FileIO, location: str) -> int | None:
    try:
        return len(io.new_input(location))
    except FileNotFoundError:
        return None


__all__ = ["LOOK_AFTER_S", "WaitingFiles", "last_look"]
