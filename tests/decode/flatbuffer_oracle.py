"""A slow, obvious reader of IPC flatbuffers: what ``arka._core.ipc`` is held against.

Trusts its input; only for messages that pyarrow wrote.
"""

from __future__ import annotations

import struct


class Table:
    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at
        self.vtable = at - struct.unpack_from("<i", data, at)[0]

    def place(self, slot: int) -> int:
        size = struct.unpack_from("<H", self.data, self.vtable)[0]
        entry = 4 + 2 * slot
        offset = struct.unpack_from("<H", self.data, self.vtable + entry)[0] if entry < size else 0
        return self.at + offset if offset else 0

    def scalar(self, slot: int, form: str, default: int = 0) -> int:
        place = self.place(slot)
        return int(struct.unpack_from(form, self.data, place)[0]) if place else default

    def table(self, slot: int) -> Table | None:
        place = self.place(slot)
        return Table(self.data, place + struct.unpack_from("<I", self.data, place)[0]) if place else None

    def pairs(self, slot: int) -> list[tuple[int, int]]:
        place = self.place(slot)
        if not place:
            return []
        start = place + struct.unpack_from("<I", self.data, place)[0]
        count = struct.unpack_from("<I", self.data, start)[0]
        return [struct.unpack_from("<qq", self.data, start + 4 + 16 * i) for i in range(count)]


def read_message(header: bytes) -> Table:
    return Table(header, struct.unpack_from("<I", header, 0)[0])
