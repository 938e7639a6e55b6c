"""File access for everything that Iceberg metadata names: local files are durable, the rest is pyarrow's.

Owns: how bytes of data files, manifests, manifest lists and metadata reach a warehouse. Does not own
their names or contents.

pyiceberg's own file access never fsyncs. Here a local file is on the disk, with its directory entry,
before ``close`` returns, so that the catalog's compare-and-swap can only ever name durable files.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, S3FileSystem
from pyiceberg.io import (
    S3_ENDPOINT,
    S3_REGION,
    S3_RETRY_STRATEGY_IMPL,
    FileIO,
    InputFile,
    InputStream,
    OutputFile,
    OutputStream,
)
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.typedef import EMPTY_DICT, Properties

# For its effect: no manifest is read before it.
import arka.iceberg.avrodoubles  # noqa: F401
from arka.privacy import FILE_MODE, make_folder, share_file, share_folder

#: The value of pyiceberg's ``py-io-impl`` property that selects this class.
FILE_IO_CLASS: Final = "arka.iceberg.fileio.WarehouseFileIO"

#: Properties of a file system in S3 and the variables that stand for them; the first that is set counts.
_AWS_VARIABLES: Final = {
    S3_ENDPOINT: ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    S3_REGION: ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
#: Files of a batch that are open at a time.
_BATCH_FILES: Final = 128


def local_path(location: str) -> str | None:
    """Return the path of a local location, None for any other scheme.

    Args:
        location: a URL or an absolute path. Percent signs mean themselves, as they do for pyiceberg.
    """
    if location.startswith("file://"):
        return location.removeprefix("file://")
    if location.startswith("file:"):
        return location.removeprefix("file:")
    return location if location.startswith("/") else None


def sync_directory(path: str) -> None:
    """Make the entries of a directory durable.

    Raises:
        OSError: the fsync failed; what it was for may not survive a crash.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: str, above: str = "", *, shared: bool = False) -> None:
    """Create a directory and its missing parents, each entry durable on return.

    Args:
        path: the directory.
        above: a directory that has to exist if ``path`` lies in it; empty for none.
        shared: whether what is made is the warehouse's, and so open to the server's shared group.

    Raises:
        FileNotFoundError: ``above`` does not exist.
        OSError: a parent is not a directory, or the disk refused.
    """
    if os.path.isdir(path):
        return
    if path == above:
        raise FileNotFoundError(errno.ENOENT, "the table's folder is gone", path)
    parent = os.path.dirname(path)
    make_directory(parent, above, shared=shared)
    if make_folder(path) and shared:
        share_folder(path)
    # Also when another process made it: its fsync may still be under way.
    sync_directory(parent)


class _Batch:
    """Files that are written now and made durable together.

    On a journalling file system the first fsync after several writes does most of the work of all.
    """

    def __init__(self, above: str = "", *, shared: bool = False) -> None:
        self._above = above
        self._shared = shared
        # Invariant: each descriptor is open; nothing else closes it. A descriptor from before the write
        # is what an error of the kernel's writeback is reported to.
        self._open: list[tuple[int, str]] = []
        # Files of one job are written by several threads.
        self._lock = threading.Lock()

    def write(self, path: str, data: bytes | memoryview | pa.Buffer, *, overwrite: bool) -> int:
        """Write a file; its durability comes with ``sync``."""
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL)
        try:
            descriptor = os.open(path, flags, FILE_MODE)
        except FileNotFoundError:
            make_directory(os.path.dirname(path), self._above, shared=self._shared)
            descriptor = os.open(path, flags, FILE_MODE)
        try:
            if self._shared:
                share_file(descriptor)
            with memoryview(data) as view:
                written = 0
                while written < view.nbytes:
                    written += os.write(descriptor, view[written:])
        except BaseException:
            self._take_back([(descriptor, path)])
            raise
        with self._lock:
            # Whole files alone are made durable: another thread may call for it at any moment.
            self._open.append((descriptor, path))
            full = len(self._open) >= _BATCH_FILES
        if full:
            self.sync()
        return written

    def sync(self) -> None:
        """Make everything written so far durable, files first, then their directories."""
        with self._lock:
            taken, self._open = self._open, []
        try:
            for descriptor, _ in taken:
                os.fsync(descriptor)
            for directory in {os.path.dirname(path): None for _, path in taken}:
                sync_directory(directory)
        except BaseException:
            self._take_back(taken)
            raise
        for descriptor, _ in taken:
            os.close(descriptor)

    def _take_back(self, files: list[tuple[int, str]]) -> None:
        """Keep files that are not durable for ``abandon``."""
        with self._lock:
            self._open += files

    def abandon(self) -> None:
        """Remove what is not durable yet, as far as that is possible."""
        for _, path in self._open:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._close()

    def _close(self) -> None:
        for descriptor, _ in self._open:
            os.close(descriptor)
        self._open.clear()


def write_durable(
    path: str, data: bytes | memoryview | pa.Buffer, *, overwrite: bool = False, above: str = "", shared: bool = False
) -> int:
    """Write a whole file.

    Args:
        path: absolute; missing directories are created.
        data: all of its bytes.
        overwrite: replace an existing file.
        above: see ``make_directory``.
        shared: see ``make_directory``.

    Returns:
        The number of bytes.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: the disk refused; the file is removed again as far as that is possible.

    Durability: contents and directory entry are fsynced on return.
    """
    batch = _Batch(above, shared=shared)
    try:
        size = batch.write(path, data, overwrite=overwrite)
        batch.sync()
    except BaseException:
        batch.abandon()
        raise
    return size


class _DurableStream(io.BytesIO):
    """Collects a file and hands it over at ``close``; an error inside ``with`` writes nothing."""

    def __init__(self, publish: Callable[[memoryview], None]) -> None:
        super().__init__()
        self._publish: Callable[[memoryview], None] | None = publish

    def close(self) -> None:
        """Write the file; a second call does nothing."""
        publish, self._publish = self._publish, None
        if publish is not None:
            with self.getbuffer() as view:
                publish(view)
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._publish = None
        self.close()


class LocalFile(InputFile, OutputFile):
    """One file of a ``file://`` warehouse, for reading or for one durable write.

    Args:
        location: its URL.
        path: where it is.
        batch: makes it durable later, together with others; None: at the end of the write.
        above: see ``make_directory``.

    Attributes:
        path: where it is.
        size: bytes, once this object has written it.
    """

    def __init__(self, location: str, path: str, batch: _Batch | None = None, above: str = "") -> None:
        super().__init__(location=location)
        self.path = path
        self.size: int | None = None
        self._batch = batch
        self._above = above

    def __len__(self) -> int:
        return self.size if self.size is not None else os.stat(self.path).st_size

    def exists(self) -> bool:
        """Say whether the file is there."""
        return os.path.exists(self.path)

    def open(self, seekable: bool = True) -> InputStream:
        """Open for reading.

        Raises:
            FileNotFoundError: it is not there.
        """
        stream: InputStream = pa.OSFile(self.path, "rb")
        return stream

    def create(self, overwrite: bool = False) -> OutputStream:
        """Open for writing; the file appears when the stream is closed.

        Raises:
            FileExistsError: it is there and ``overwrite`` is False (raised at close at the latest).
        """
        if not overwrite and self.exists():
            raise FileExistsError(f"Cannot create file, already exists: {self.location}")

        def publish(data: memoryview) -> None:
            if self._batch is None:
                self.size = write_durable(self.path, data, overwrite=overwrite, above=self._above, shared=True)
            else:
                self.size = self._batch.write(self.path, data, overwrite=overwrite)

        return _DurableStream(publish)

    def to_input_file(self) -> LocalFile:
        """Return the same file for reading."""
        return self


class _RemoteFileIO(PyArrowFileIO):
    """pyarrow's file systems, with one request for a small S3 object instead of a multipart upload's three.

    Endpoint and region come from the AWS variables where no property gives them, as they do for the object store:
    pyarrow takes only credentials from there.
    """

    def __init__(self, properties: Properties = EMPTY_DICT) -> None:
        found = {
            name: value
            for name, variables in _AWS_VARIABLES.items()
            if (value := next(filter(None, map(os.environ.get, variables)), None)) is not None
        }
        super().__init__({**found, **properties})

    def _initialize_s3_fs(self, netloc: str | None) -> FileSystem:
        made = super()._initialize_s3_fs(netloc)
        if S3_RETRY_STRATEGY_IMPL in self.properties:
            # A file system does not tell its retry strategy: this one cannot be made again.
            return made
        (arguments,) = made.__reduce__()[1]
        return S3FileSystem(**{**arguments, "allow_delayed_open": True})


class WarehouseFileIO(FileIO):
    """pyiceberg's file access for Arka: durable local files, pyarrow file systems for other schemes.

    Args:
        properties: catalog and table properties: ``s3.*`` and their like go to pyarrow's file system.
    """

    def __init__(self, properties: Properties = EMPTY_DICT) -> None:
        super().__init__(properties=properties)
        self._remote: PyArrowFileIO | None = None
        self._batch: _Batch | None = None
        self._above = ""

    def confine(self, location: str) -> None:
        """Make no folder of a table, and none above it: only CreateTable does that (R28).

        Args:
            location: the table's.
        """
        self._above = local_path(location) or ""

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Make local files written inside durable together, at the end instead of each at its own.

        An error inside removes those that are not durable yet.

        Raises:
            OSError: the disk refused.
        """
        self._batch = _Batch(self._above, shared=True)
        try:
            yield
            self._batch.sync()
        except BaseException:
            self._batch.abandon()
            raise
        finally:
            self._batch = None

    def _other(self) -> PyArrowFileIO:
        if self._remote is None:
            self._remote = _RemoteFileIO(self.properties)
        return self._remote

    def new_input(self, location: str) -> InputFile:
        """Return the file at ``location`` for reading."""
        path = local_path(location)
        return self._other().new_input(location) if path is None else LocalFile(location, path)

    def new_output(self, location: str) -> OutputFile:
        """Return the file at ``location`` for writing."""
        path = local_path(location)
        return (
            self._other().new_output(location) if path is None else LocalFile(location, path, self._batch, self._above)
        )

    def list_remote(self, location: str) -> dict[str, float]:
        """See ``list_folder``; one LIST (or its pages) of a folder that is not local.

        Raises:
            OSError: the warehouse did not answer.
        """
        other = self._other()
        scheme, netloc, path = other.parse_location(location, other.properties)
        found = other.fs_by_scheme(scheme, netloc).get_file_info(FileSelector(path, allow_not_found=True))
        return {info.base_name: (info.mtime_ns or 0) / 1e9 for info in found if info.type is FileType.File}

    def delete(self, location: str | InputFile | OutputFile) -> None:
        """Delete a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        name = location.location if isinstance(location, InputFile | OutputFile) else location
        path = local_path(name)
        if path is None:
            self._other().delete(name)
        else:
            os.unlink(path)


def batch_of(io_: FileIO) -> contextlib.AbstractContextManager[None]:
    """Return a batch of a warehouse whose files can be made durable together (``WarehouseFileIO.batch``)."""
    return io_.batch() if isinstance(io_, WarehouseFileIO) else contextlib.nullcontext()


def list_folder(io_: FileIO, location: str) -> dict[str, float]:
    """List the files of one folder of a warehouse: their names, and when each was written (seconds since 1970).

    Folders in it are left out. A folder that is not there is empty.

    Raises:
        OSError: the warehouse did not answer.
    """
    path = local_path(location)
    if path is not None:
        try:
            with os.scandir(path) as entries:
                return {entry.name: entry.stat().st_mtime for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}
    return io_.list_remote(location) if isinstance(io_, WarehouseFileIO) else {}


def write_file(io_: FileIO, location: str, data: pa.Buffer) -> int:
    """Write a whole new file of a warehouse; durable on return, or with the batch that is open.

    Returns:
        The number of bytes.

    Raises:
        OSError: the warehouse refused; the file may or may not be there.
    """
    with io_.new_output(location).create(overwrite=True) as stream:
        stream.write(data)
    return int(data.size)


__all__ = [
    "FILE_IO_CLASS",
    "LocalFile",
    "WarehouseFileIO",
    "batch_of",
    "list_folder",
    "local_path",
    "make_directory",
    "sync_directory",
    "write_durable",
    "write_file",
]
