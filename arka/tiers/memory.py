"""The memory tier: where a write gets its LSN and waits for the disk.

Owns: the order of the log. One call, without an ``await``, looks the key up, gives the LSN, remembers
the key and queues the frame (R21), so that LSN order, key order and log order are one order. Does not
own the disk (``arka.tiers.disk`` takes groups from here) nor admission by bytes (the transport charged
the message before it invited it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from uuid import UUID

import trio

from arka._core.buffers import FrameBuffer
from arka._core.framing import KIND_BATCH, Frame
from arka._core.lsn import LsnAllocator, LsnExhausted
from arka.records import Operation, Releasable, TableInfo
from arka.tiers.keys import KeyIndex
from arka.tiers.watermarks import now_us

#: LSNs that nothing but outcomes of what is under way may take, for as long as no higher ceiling can be reserved (R31):
#: twice as many as actions run at a time.
LEFT_FOR_OUTCOMES: Final = 128


@dataclass(slots=True)
class Appended:
    """What became of a write: its LSN, or the first write's when the key was known."""

    lsn: int
    duplicate: bool = False
    key_reused: bool = False


@dataclass(slots=True)
class Group:
    """Frames that go to disk together, their bytes there, and what to release once they are there."""

    frames: list[Frame]
    charges: list[Releasable]
    frame_bytes: int

    @property
    def last_lsn(self) -> int:
        """The group's last LSN."""
        return self.frames[-1].lsn


class MemoryTier:
    """The write buffer: accepted frames in LSN order until the disk tier takes them.

    Used from trio's thread only.
    """

    def __init__(self, allocator: LsnAllocator, keys: KeyIndex) -> None:
        self._allocator = allocator
        self._keys = keys
        # Invariant: as many charges as frames, each at its frame's place.
        self._frames: list[Frame] = []
        self._charges: list[Releasable | None] = []
        self._queued_bytes = 0
        self._arrived = trio.Event()
        # Whether somebody waits until a queued frame is on disk.
        self._urgent = False
        self._enough_bytes = 0
        self._hurry = trio.Event()
        self._closed = False
        # Control records that had no LSN when they came, by table: kind and payload.
        self._owed: dict[UUID, tuple[int, bytes]] = {}

    @property
    def last_lsn(self) -> int:
        """The last LSN given; the memory watermark."""
        return self._allocator.last

    @property
    def queued_bytes(self) -> int:
        """Frame bytes that wait for the disk."""
        return self._queued_bytes

    def append(
        self,
        table: TableInfo,
        payload: FrameBuffer,
        *,
        rows: int,
        operation: Operation,
        key: bytes,
        digest: int,
        charge: Releasable | None,
        urgent: bool = True,
    ) -> Appended:
        """Accept one write: atomic, ordered, in the buffer on return.

        Args:
            table: its table; the frame carries the UUID and the schema id (R5, R24).
            payload: the batch in canonical form; must not be changed any more.
            rows: its row count.
            operation: upsert or delete.
            key: the idempotency key, empty for none.
            digest: a checksum of the payload, compared when the key is known.
            charge: released when the frame's heap bytes are gone. For a duplicate at once.
            urgent: whether its writer waits until it is on disk.

        Returns:
            The LSN; for a known key the first write's, and nothing was added.

        Raises:
            LsnExhausted: the reserved LSNs are used up before the ceiling was raised.
        """
        if key:
            first = self._keys.find(table.uuid, key)
            if first is not None:
                if charge is not None:
                    charge.release()
                return Appended(first.lsn, duplicate=True, key_reused=first.digest != digest)
        lsn = self._next_lsn(LEFT_FOR_OUTCOMES)
        if key:
            self._keys.insert(table.uuid, key, lsn, digest)
        frame = Frame(
            KIND_BATCH,
            lsn,
            table=table,
            schema_id=table.schema_id,
            operation=int(operation),
            rows=rows,
            key=key,
            payload=payload,
            accepted_us=now_us(),
        )
        self._push(frame, charge, urgent=urgent)
        return Appended(lsn)

    def append_control(
        self, kind: int, payload: bytes, table: TableInfo | None = None, *, outcome: bool = False
    ) -> int:
        """Put a control record (create, drop, lost range) into the log's order.

        Args:
            kind: of the record.
            payload: what it says.
            table: whose it is; None for none of them.
            outcome: whether it says what came of something that is under way: LSNs are left for such records.

        Returns:
            Its LSN.

        Raises:
            LsnExhausted: see ``append``.
        """
        lsn = self._next_lsn(0 if outcome else LEFT_FOR_OUTCOMES)
        self._push(Frame(kind, lsn, table=table, payload=payload, accepted_us=now_us()), None, urgent=True)
        return lsn

    def owe(self, table: UUID, kind: int, payload: bytes) -> None:
        """Put a control record into the log once LSNs are given again, in front of all else.

        Args:
            table: what it is about; of two records for one table the later one stands.
            kind: its kind.
            payload: its payload.
        """
        self._owed[table] = kind, payload

    def owe_nothing(self, table: UUID) -> None:
        """Forget what is owed for a table that is dropped."""
        self._owed.pop(table, None)

    def take_group(self, group_bytes: int) -> Group:
        """Take what waits, in order: at least one frame if any waits, about ``group_bytes`` at most."""
        if self._queued_bytes <= group_bytes:
            frames, charges, taken = self._frames, self._charges, self._queued_bytes
            self._frames, self._charges = [], []
        else:
            count = taken = 0
            while taken < group_bytes:
                taken += self._frames[count].frame_bytes
                count += 1
            frames, charges = self._frames[:count], self._charges[:count]
            del self._frames[:count], self._charges[:count]
        self._queued_bytes -= taken
        self._urgent = self._urgent and bool(self._frames)
        return Group(frames, [charge for charge in charges if charge is not None], taken)

    async def wait_pending(self) -> bool:
        """Wait until frames wait, or until the tier is closed and empty.

        Returns:
            Whether frames wait; False means that there will be no more.

        Cancellation: nothing changes.
        """
        while not self._frames:
            if self._closed:
                return False
            self._arrived = trio.Event()
            await self._arrived.wait()
        return True

    async def wait_company(self, linger_s: float, enough_bytes: int) -> None:
        """Let more frames come, as long as nobody waits for those that are there.

        Args:
            linger_s: the longest that this takes.
            enough_bytes: so many frame bytes need no company.

        Cancellation: nothing changes.
        """
        if self._urgent or self._closed or self._queued_bytes >= enough_bytes:
            return
        self._enough_bytes = enough_bytes
        self._hurry = trio.Event()
        with trio.move_on_after(linger_s):
            await self._hurry.wait()

    def close(self) -> None:
        """Say that nothing more comes: the disk tier ends once the buffer is empty."""
        self._closed = True
        self._arrived.set()
        self._hurry.set()

    def _next_lsn(self, leave: int) -> int:
        """Give the next LSN behind those of the records that are owed, if so many are left after it."""
        while self._owed:
            try:
                lsn = self._allocator.allocate(LEFT_FOR_OUTCOMES)
            except LsnExhausted:
                if leave:
                    raise
                # An outcome does not wait for what is owed of other tables.
                break
            kind, payload = self._owed.pop(next(iter(self._owed)))
            self._push(Frame(kind, lsn, payload=payload, accepted_us=now_us()), None, urgent=True)
        return self._allocator.allocate(leave)

    def _push(self, frame: Frame, charge: Releasable | None, *, urgent: bool) -> None:
        self._frames.append(frame)
        self._charges.append(charge)
        self._queued_bytes += frame.frame_bytes
        self._arrived.set()
        self._urgent |= urgent
        if self._urgent or self._queued_bytes >= self._enough_bytes:
            self._hurry.set()


__all__ = ["LEFT_FOR_OUTCOMES", "Appended", "Group", "MemoryTier"]
