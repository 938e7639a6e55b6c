"""File access for everything that Iceberg metadata names: local files are durable, the rest is pyarrow's.

Owns: how bytes of data files, manifests, manifest lists and metadata reach a warehouse. Does not own
their names or contents.

pyiceberg's own file access never fsyncs. Here a local file is on the disk, with its directory entry,
before ``close`` returns, so that the catalog's compare-and-swap can only ever name durable files.
"""

from __future__ import annotations

import contextlib
import io
import os
from types import TracebackType
from typing import Final

import pyarrow as pa
from pyiceberg.io import FileIO, InputFile, InputStream, OutputFile, OutputStream
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.typedef import EMPTY_DICT, Properties

#: The value of pyiceberg's ``py-io-impl`` property that selects this class.
FILE_IO_CLASS: Final = "arka.iceberg.fileio.WarehouseFileIO"

_FILE_MODE: Final = 0o644


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


def make_directory(path: str) -> None:
    """Create a directory and its missing parents, each entry durable on return.

    Raises:
        OSError: a parent is not a directory, or the disk refused.
    """
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_directory(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    # Also when another process made it: its fsync may still be under way.
    sync_directory(parent)


def write_durable(path: str, data: bytes | memoryview | pa.Buffer, *, overwrite: bool = False) -> int:
    """Write a whole file.

    Args:
        path: absolute; missing directories are created.
        data: all of its bytes.
        overwrite: replace an existing file.

    Returns:
        The number of bytes.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: the disk refused; the file is removed again as far as that is possible.

    Durability: contents and directory entry are fsynced on return.
    """
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL)
    try:
        descriptor = os.open(path, flags, _FILE_MODE)
    except FileNotFoundError:
        make_directory(os.path.dirname(path))
        descriptor = os.open(path, flags, _FILE_MODE)
    try:
        with memoryview(data) as view:
            size = view.nbytes
            written = 0
            while written < size:
                written += os.write(descriptor, view[written:])
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    sync_directory(os.path.dirname(path))
    return size


class _DurableStream(io.BytesIO):
    """Collects a file and writes it durably at ``close``; an error inside ``with`` writes nothing."""

    def __init__(self, file: LocalFile, *, overwrite: bool) -> None:
        super().__init__()
        self._file = file
        self._overwrite = overwrite
        self._abandoned = False

    def close(self) -> None:
        """Write the file; a second call does nothing."""
        if not self.closed and not self._abandoned:
            self._abandoned = True
            self._file.size = write_durable(self._file.path, self.getvalue(), overwrite=self._overwrite)
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandoned = True
        self.close()


class LocalFile(InputFile, OutputFile):
    """One file of a ``file://`` warehouse, for reading or for one durable write.

    Attributes:
        path: where it is.
        size: bytes, once this object has written it.
    """

    def __init__(self, location: str, path: str) -> None:
        super().__init__(location=location)
        self.path = path
        self.size: int | None = None

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
        """Open for writing; the file appears, durable, when the stream is closed.

        Raises:
            FileExistsError: it is there and ``overwrite`` is False (raised at close at the latest).
        """
        if not overwrite and self.exists():
            raise FileExistsError(f"Cannot create file, already exists: {self.location}")
        return _DurableStream(self, overwrite=overwrite)

    def to_input_file(self) -> LocalFile:
        """Return the same file for reading."""
        return self


class WarehouseFileIO(FileIO):
    """pyiceberg's file access for Arka: durable local files, pyarrow file systems for other schemes.

    Args:
        properties: catalog and table properties: ``s3.*`` and their like go to pyarrow's file system.
    """

    def __init__(self, properties: Properties = EMPTY_DICT) -> None:
        super().__init__(properties=properties)
        self._remote: PyArrowFileIO | None = None

    def _other(self) -> PyArrowFileIO:
        if self._remote is None:
            self._remote = PyArrowFileIO(self.properties)
        return self._remote

    def new_input(self, location: str) -> InputFile:
        """Return the file at ``location`` for reading."""
        path = local_path(location)
        return self._other().new_input(location) if path is None else LocalFile(location, path)

    def new_output(self, location: str) -> OutputFile:
        """Return the file at ``location`` for writing."""
        path = local_path(location)
        return self._other().new_output(location) if path is None else LocalFile(location, path)

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


def write_file(io_: FileIO, location: str, data: pa.Buffer) -> int:
    """Write a whole new file of a warehouse; durable on return.

    Returns:
        The number of bytes.

    Raises:
        OSError: the warehouse refused; the file may or may not be there.
    """
    path = local_path(location)
    if path is not None:
        return write_durable(path, data)
    with io_.new_output(location).create(overwrite=True) as stream:
        stream.write(data)
    return int(data.size)


__all__ = [
    "FILE_IO_CLASS",
    "LocalFile",
    "WarehouseFileIO",
    "local_path",
    "make_directory",
    "sync_directory",
    "write_durable",
    "write_file",
]
