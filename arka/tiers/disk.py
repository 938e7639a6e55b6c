"""The disk tier: groups of frames go to the WAL, one group commit at a time.

Owns: the disk watermark. Does not own bytes on disk (``arka.wal``). While one group is being written and fsynced,
everything that arrives becomes the next one. There is no timer for writes whose acks at this tier are waited for; those
that want no more than a memory ack wait a few milliseconds for company, since each group costs the streams time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from arka.tiers.memory import MemoryTier
from arka.tiers.watermarks import Watermark
from arka.wal.writer import AppendedRange, WalWriter

#: So many frame bytes are worth a group of their own.
_COMPANY_BYTES: Final = 8 << 20


class DiskTier:
    """Moves frames from the memory tier to the WAL and raises the disk watermark."""

    def __init__(
        self,
        memory: MemoryTier,
        writer: WalWriter,
        watermark: Watermark,
        *,
        group_bytes: int,
        linger_s: float = 0.0,
        on_durable: Callable[[AppendedRange], None],
    ) -> None:
        """Join the tiers.

        Args:
            memory: where the groups come from.
            writer: the WAL.
            watermark: the ``disk`` mark; this tier alone raises it.
            group_bytes: most bytes of one group.
            linger_s: how long frames that nobody waits for wait for company.
            on_durable: told of each range of a segment that is fsynced, in LSN order, before the mark rises.
        """
        self._memory = memory
        self._writer = writer
        self._watermark = watermark
        self._group_bytes = group_bytes
        self._linger_s = linger_s
        self._on_durable = on_durable
        self._writing_bytes = 0

    @property
    def writing_bytes(self) -> int:
        """Frame bytes of the group that is being written."""
        return self._writing_bytes

    async def run(self) -> None:
        """Write groups until the memory tier is closed and empty.

        Raises:
            WalPoisoned: a write or fsync failed; nothing above the watermark can be called safe or lost (R6).

        Cancellation: a group that is being written is finished first; its writes keep their frames.
        """
        while await self._memory.wait_pending():
            await self._memory.wait_company(self._linger_s, min(_COMPANY_BYTES, self._group_bytes))
            group = self._memory.take_group(self._group_bytes)
            self._writing_bytes = group.frame_bytes
            ranges = await self._writer.append(group.frames)
            self._writing_bytes = 0
            last_lsn = group.last_lsn
            for appended in ranges:
                self._on_durable(appended)
            # The heap buffers go before the ledger hears of it: a grant must never outrun the memory.
            charges = group.charges
            del group, ranges
            for charge in charges:
                charge.release()
            self._watermark.advance(last_lsn)


__all__ = ["DiskTier"]
