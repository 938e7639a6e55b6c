"""The way of an answer out of a worker process: Arrow messages through a named pipe (T27).

Owns: the records in the pipe, on both sides, and where a message's header ends. Does not own what the messages hold
(``arka.iceberg.scan``), who reads them (``arka.storage.readpipe``) nor how large they are (``arka.iceberg.pieces``).

A record is ``RECORD`` (header bytes, body bytes), then the header, then the body. A record of two zeros says that the
log's frames are copied. Nothing is buffered here: a pipe that is full holds the worker back.
"""

from __future__ import annotations

import io
import os
import select
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import pyarrow as pa

#: Bytes of a message's header, then of its body; both 0: the log's frames are copied.
RECORD: Final = struct.Struct("<IQ")
#: The pipe's name in the folder of a read.
PIPE_NAME: Final = "answer"

#: In front of each message in an IPC stream: the continuation mark, and the bytes of the header.
_PREFIX: Final = struct.Struct("<II")
#: Pieces that one call of the kernel takes (IOV_MAX is 1024).
_MOST_PIECES: Final = 512


class _Pieces(io.RawIOBase):
    """Takes what Arrow writes and keeps it until a message is complete; nothing is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[memoryview] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self.pieces.append(view.cast("B"))
        return view.nbytes


class Outlet:
    """The writing end of a read's pipe. Blocking.

    Every method raises BrokenPipeError once nobody reads any more: the answer is not wanted.
    """

    def __init__(self, path: str) -> None:
        """Open the pipe.

        Args:
            path: the named pipe; the server has its reading end open.

        Raises:
            OSError: nobody reads it any more, or it is gone.
        """
        # Without a reader a blocking open would wait without end.
        self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(self._fd, True)
        self._sink = _Pieces()
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        self._poll = select.poll()
        self._poll.register(self._fd, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def check_wanted(self) -> None:
        """Look whether the answer is still wanted; cheap enough for each file and step."""
        if self._poll.poll(0):
            raise BrokenPipeError("the answer is not wanted any more")

    def say_copied(self) -> None:
        """Say that the log's frames are copied: the server need not keep them any longer."""
        self._write([memoryview(RECORD.pack(0, 0))])

    def begin(self, schema: pa.Schema, compression: str | None) -> None:
        """Send the schema."""
        options = pa.ipc.IpcWriteOptions(compression=compression)
        self._stream = pa.ipc.new_stream(self._sink, schema, options=options)
        # A stream writes its schema with its first batch. That one is for nobody, and the schema is sent alone.
        self._stream.write_batch(pa.RecordBatch.from_pylist([], schema=schema))
        self._sink.pieces = [memoryview(schema.serialize())]
        self._flush()

    def put(self, batch: pa.RecordBatch) -> None:
        """Send a batch as one message."""
        assert self._stream is not None
        self._stream.write_batch(batch)
        self._flush()

    def _flush(self) -> None:
        pieces, self._sink.pieces = self._sink.pieces, []
        # Arrow writes the prefix, or the prefix with the header, first.
        size = sum(piece.nbytes for piece in pieces)
        front = bytearray()
        while len(front) < _PREFIX.size:
            front += pieces.pop(0)
        _, header = _PREFIX.unpack_from(front)
        pieces.insert(0, memoryview(front)[_PREFIX.size :])
        body = size - _PREFIX.size - header
        self._write([memoryview(RECORD.pack(header, body)), *pieces])

    def _write(self, pieces: Sequence[memoryview]) -> None:
        for start in range(0, len(pieces), _MOST_PIECES):
            some = list(pieces[start : start + _MOST_PIECES])
            while some:
                taken = os.writev(self._fd, some)
                while some and taken >= some[0].nbytes:
                    taken -= some.pop(0).nbytes
                if some and taken:
                    some[0] = some[0][taken:]


__all__ = ["PIPE_NAME", "RECORD", "Outlet"]
