"""Answers of reads without a server: one that collects them, and messages as a catalog sends them.

Owns: ``CollectedAnswer`` and ``send_table``. Does not own what a read finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa

from arka.storage.ports import Answer

_CONTINUATION: Final = b"\xff\xff\xff\xff"


class CollectedAnswer:
    """Keeps all of an answer; see ``ports.Answer``.

    Attributes:
        copied: whether the log's frames are no longer needed.
        messages: how many messages there were.
    """

    def __init__(self, on_copied: Callable[[], None] = lambda: None) -> None:
        self.copied = False
        self.messages = 0
        self._on_copied = on_copied
        self._stream = bytearray()
        self._left = 0

    async def tail_copied(self) -> None:
        """See ``ports.Answer.tail_copied``."""
        assert not self.copied
        assert not self.messages
        self.copied = True
        self._on_copied()

    async def begin(self, header: bytes, body_bytes: int) -> None:
        """See ``ports.Answer.begin``."""
        assert self.copied
        assert self._left == 0
        self.messages += 1
        self._left = body_bytes
        self._stream += _CONTINUATION + len(header).to_bytes(4, "little") + header

    async def add(self, part: bytes) -> None:
        """See ``ports.Answer.add``."""
        assert 0 < len(part) <= self._left
        self._left -= len(part)
        self._stream += part

    async def end(self) -> None:
        """Take note that nothing more comes; see ``arka.tiers.reads.ReaderAnswer``."""
        assert self._left == 0

    def table(self) -> pa.Table:
        """Return the rows, with the schema as it was sent."""
        return pa.ipc.open_stream(pa.py_buffer(bytes(self._stream))).read_all()

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries."""
        found: list[dict[str, Any]] = self.table().to_pylist()
        return found


async def send_table(table: pa.Table, answer: Answer) -> None:
    """Send a table as a catalog does: its schema, then its batches."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    for message in pa.ipc.MessageReader.open_stream(sink.getvalue()):
        body = b"" if message.body is None else message.body.to_pybytes()
        await answer.begin(message.metadata.to_pybytes(), len(body))
        if body:
            await answer.add(body)


__all__ = ["CollectedAnswer", "send_table"]
