"""The server's end of the pipe through which a worker sends an answer (T27).

Owns: the folder of one read, its pipe, and taking records from it as they come. Does not own what is in the records
(``arka.iceberg.outlet``) nor where they go (``ports.Answer``).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, TypeVarTuple
from uuid import uuid4

import trio

from arka.iceberg.outlet import PIPE_NAME, RECORD
from arka.privacy import FILE_MODE, make_folders
from arka.storage.ports import Answer, CatalogUnavailable

#: The folder of reads in the data directory; it may be a mount of its own.
READ_FOLDER: Final = "spill"
#: Bytes that the kernel may hold of an answer.
_PIPE_BYTES: Final = 256 * 1024
#: Bytes that are taken at once: a turn of some tens of microseconds.
_TAKEN_BYTES: Final = 128 * 1024


Ts = TypeVarTuple("Ts")


class ReadPipe:
    """The reading end of a pipe. Used from trio's thread only.

    Attributes:
        folder: has the pipe, for the worker.
        taken: how often something was taken, or had to wait for the answer; only rises.
    """

    def __init__(self, folder: Path, reader: int, writer: int) -> None:
        self.folder = str(folder)
        self.taken = 0
        self._reader: int | None = reader
        # Held open: without it the pipe would be at its end before the worker has opened it.
        self._writer: int | None = writer
        self._held_back = False

    def progress(self) -> int:
        """How far the answer is; an answer that waits for its client counts as one that goes on. From any thread."""
        if self._held_back:
            self.taken += 1
        return self.taken

    def end(self) -> None:
        """Say that the worker sends nothing any more: ``run`` returns once all is taken."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def close(self) -> None:
        """Read nothing any more: what the worker sends from now on fails."""
        self.end()
        if self._reader is not None:
            trio.lowlevel.notify_closing(self._reader)
            os.close(self._reader)
            self._reader = None

    async def run(self, answer: Answer) -> bool:
        """Take all records, until ``end`` was called and nothing is left.

        Returns:
            Whether the last record was whole: of a worker that died it is not.

        Raises:
            Exception: what a method of ``answer`` raised.

        Cancellation: what was not taken is lost.
        """
        while front := await self._take(RECORD.size):
            if len(front) < RECORD.size:
                return False
            header_bytes, body_bytes = RECORD.unpack(front)
            if not header_bytes:
                await answer.tail_copied()
                continue
            header = await self._take(header_bytes)
            if len(header) < header_bytes:
                return False
            await self._give(answer.begin, header, body_bytes)
            left = body_bytes
            while left:
                part = await self._receive(min(left, _TAKEN_BYTES))
                if not part:
                    return False
                left -= len(part)
                await self._give(answer.add, part)
        return True

    async def _give(self, take: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        self._held_back = True
        try:
            await take(*args)
        finally:
            self._held_back = False

    async def _take(self, size: int) -> bytes:
        """Take ``size`` bytes; fewer at the end."""
        found = part = await self._receive(min(size, _TAKEN_BYTES))
        while part and len(found) < size:
            part = await self._receive(min(size - len(found), _TAKEN_BYTES))
            found += part
        return found

    async def _receive(self, most: int) -> bytes:
        """Take some bytes; nothing at the end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            # Invariant: only ``close`` makes it None, and nothing is taken after that.
            assert self._reader is not None
            try:
                part = os.read(self._reader, most)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._reader)
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                self.taken += 1
                return part


@asynccontextmanager
async def open_read_pipe(directory: Path) -> AsyncIterator[ReadPipe]:
    """Make a pipe in a folder of its own, which goes with the block, whatever else is in it.

    Args:
        directory: for such folders.

    Raises:
        CatalogUnavailable: the disk failed, or there are no descriptors.
    """
    folder = directory / str(uuid4())
    try:
        try:
            reader, writer = await trio.to_thread.run_sync(_make, folder)
        except OSError as error:
            raise CatalogUnavailable(f"an answer cannot be sent: {error}") from error
        pipe = ReadPipe(folder, reader, writer)
        try:
            yield pipe
        finally:
            pipe.close()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_remove, folder)


def _make(folder: Path) -> tuple[int, int]:
    make_folders(folder)
    path = folder / PIPE_NAME
    os.mkfifo(path, FILE_MODE)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        os.close(reader)
        raise
    with suppress(OSError):
        # Unless the user has too many large pipes already: then this one is as the kernel makes it.
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return reader, writer


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def prepare_read_folders(directory: Path) -> None:
    """Make the directory of reads, and remove what a crash left in it.

    Raises:
        OSError: the disk failed.
    """
    make_folders(directory)
    for left in directory.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        elif left.suffix == ".arrows":
            # Of a version that kept whole answers there.
            left.unlink()


__all__ = ["READ_FOLDER", "ReadPipe", "open_read_pipe", "prepare_read_folders"]
