"""Reserved LSNs: none is given that could be given again after a crash (R2).

Owns: raising the ceiling below which LSNs may be given, on the disk and in the object store, ahead of
need and never on an ack's way. Does not own giving them (``arka._core.lsn``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from arka._core.lsn import LsnAllocator
from arka.storage.ports import StoreUnavailable
from arka.wal.logstate import LogStateFile
from arka.wal.shortage import Shortage
from arka.wal.writer import WalPoisoned

log = structlog.get_logger(__name__)

#: LSNs reserved on the disk at a time: minutes of the fastest stream of one-row writes, and the most
#: that a crash skips.
DISK_BLOCK: Final = 1 << 24
#: How often the need is looked at, in seconds; half a block lasts far longer.
_POLL_S: Final = 0.5


class LsnReservation:
    """Keeps the allocator's ceiling ahead of it."""

    def __init__(
        self,
        allocator: LsnAllocator,
        state: LogStateFile,
        *,
        reserve_store_block: Callable[[], Awaitable[int]],
    ) -> None:
        """Join the allocator with where its ceiling is kept.

        Args:
            allocator: its ceiling is the one on disk.
            state: the log's state on disk; holds the store's ceiling too, above which the disk's never goes.
            reserve_store_block: makes a higher ceiling durable in the store and returns it.
        """
        self._allocator = allocator
        self._state = state
        self._reserve_store_block = reserve_store_block

    async def run(self) -> None:
        """Raise the ceilings at half, until cancelled.

        Raises:
            WalPoisoned: the disk does not take the ceiling; the log has failed (R6).
            Fenced: a newer epoch owns the log.
        """
        while True:
            if self._allocator.remaining <= DISK_BLOCK // 2:
                await self._raise()
            await trio.sleep(_POLL_S)

    async def _raise(self) -> None:
        allocator = self._allocator
        wanted = allocator.ceiling + DISK_BLOCK
        store_ceiling = self._state.state.store_ceiling
        if wanted > store_ceiling:
            try:
                store_ceiling = await self._reserve_store_block()
            except StoreUnavailable as error:
                # What is reserved goes on being given; with 2**32 to a block an outage rarely meets this.
                log.warning("lsn.reserve_stalled", remaining=allocator.remaining, reason=str(error))
        ceiling = min(wanted, store_ceiling)
        if ceiling > allocator.ceiling:
            try:
                await self._state.raise_to(lsn_ceiling=ceiling, store_ceiling=store_ceiling)
            except Shortage as error:
                # What is reserved goes on being given; the next look tries again.
                log.warning("lsn.reserve_stalled", remaining=allocator.remaining, reason=str(error))
                return
            except OSError as error:
                raise WalPoisoned(f"The log's state cannot be written: {error}; restart the server") from error
            allocator.raise_ceiling(ceiling)


__all__ = ["DISK_BLOCK", "LsnReservation"]
