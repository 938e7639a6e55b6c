"""The log's tie to the object store: under which epoch, from which disk, behind which object.

Owns: the order in which a process and its store come together, at the start or later, when the store was away:
the epoch before anything else there is looked at (R10), the disk before the start record (R13), the start record
before anything is uploaded (R11). Does not own any of these steps.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog
import trio

from arka.errors import ConfigurationError, DataCorruption, Fenced
from arka.lineage import Start
from arka.storage.ports import ObjectStore, StoreRefused, StoreUnavailable
from arka.tiers.aside import mirror_asides
from arka.tiers.chain import Chain
from arka.tiers.epochs import Claim, EpochLease, LocalLog, take_epoch
from arka.tiers.mirror import CheckpointStore
from arka.tiers.objects import ObjectTier
from arka.wal.logstate import LogState, LogStateFile
from arka.wal.objectfile import ObjectRef
from arka.wal.shortage import Shortage
from arka.wal.writer import WalPoisoned

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: Pause between two attempts to reach a store that is away, in seconds.
_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Taken:
    """What a process that took an epoch found in the store.

    Attributes:
        lease: the epoch.
        released_lsn: what checkpoints cover; the disk has them now too.
        chain: the WAL objects.
        head: the last of them; None for none.
    """

    lease: EpochLease
    released_lsn: int
    chain: Chain
    head: ObjectRef | None


class Uplink:
    """Brings one process and its object store together. Used from trio's thread only."""

    def __init__(self, store: ObjectStore, checkpoints: CheckpointStore, claim: Claim) -> None:
        """Say who asks which store; nothing is asked yet.

        Args:
            store: the object store.
            checkpoints: where checkpoints are, here and there.
            claim: who asks; what its disk knows is said later.
        """
        self._store = store
        self._checkpoints = checkpoints
        self._claim = claim
        self._lease: EpochLease | None = None
        self._connected = trio.Event()
        # What tells this process's commits from those of another copy of its data directory (R15).
        self._token = secrets.randbits(63) | 1
        self._first_lsn = 1

    def begin_at(self, first_lsn: int) -> None:
        """Say from which LSN on this process gives some; before ``connect``."""
        self._first_lsn = first_lsn

    @property
    def connected(self) -> bool:
        """Whether the log goes to the store."""
        return self._connected.is_set()

    @property
    def epoch(self) -> int:
        """The epoch under which the log goes to the store.

        Raises:
            AssertionError: it does not; nothing that needs one may be on its way.
        """
        return self._held.epoch

    async def wait_connected(self) -> int:
        """Wait until the log goes to the store; returns the epoch. Cancellation: nothing changes."""
        await self._connected.wait()
        return self.epoch

    async def verify(self) -> None:
        """See ``EpochLease.verify``; before there is an epoch, the store does not say."""
        if self._lease is None:
            raise StoreUnavailable(f"{self._store.url}: no epoch was taken yet")
        await self._lease.verify()

    async def reserve_block(self) -> int:
        """See ``EpochLease.reserve_block``; before there is an epoch, nothing can be reserved."""
        if not self.connected:
            raise StoreUnavailable(f"{self._store.url}: no epoch was taken yet")
        return await self._held.reserve_block()

    async def take(self, state: LogState | None) -> Taken:
        """Take the epoch, bring the store's checkpoints to the disk, and find the end of the chain; one attempt.

        Args:
            state: the disk's log, as it is now.

        Raises:
            ConfigurationError: see ``take_epoch``.
            DataCorruption: a record in the store, or the chain, is damaged.
            Fenced: another process has taken a higher epoch meanwhile.
            StoreUnavailable: ask again; an epoch that was taken is kept.
        """
        if self._lease is None:
            local = None if state is None else LocalLog(state.log_uuid, state.epoch, state.lsn_ceiling)
            self._lease = await take_epoch(self._store, self._claim.of(local))
        lease, node_id = self._lease, self._claim.node_id
        try:
            released_lsn = await self._checkpoints.mirror()
            await mirror_asides(self._store, self._checkpoints.local, node_id)
            chain = Chain(self._store, node_id, lease.log_uuid, released_lsn=released_lsn)
            return Taken(lease, released_lsn, chain, await chain.find_head())
        except DataCorruption:
            # Of a log that another process goes on with meanwhile, this one sees half.
            await lease.verify()
            raise

    async def connect(self, taken: Taken, state: LogStateFile, objects: ObjectTier, recovered_lsn: int) -> None:
        """Let the log go to the store from here on; one attempt.

        Args:
            taken: what ``take`` returned.
            state: the disk's log.
            objects: the object tier; has been given all that recovery found.
            recovered_lsn: where the log ended on this disk when the process began.

        Raises:
            DataCorruption: the store holds more than the disk: the disk has lost what it had promised (R7).
            Fenced: another process has taken a higher epoch.
            StoreUnavailable: ask again.
            WalPoisoned: the disk does not take the epoch (R6).

        Durability: the epoch is on the disk and its start in the store before anything is uploaded.
        """
        lease, head = taken.lease, taken.head
        if head is not None and head.last_lsn > recovered_lsn:
            # Only what is fsynced is uploaded (R4): either this disk has lost it, or it is from the process that took
            # the log over after this one took its epoch, and before it looked at the chain.
            await lease.verify()
            raise DataCorruption(
                f"{self._store.url}/{head.key(self._claim.node_id)}",
                0,
                f"nothing above LSN {recovered_lsn}, where the log ends on this disk",
                f"an object up to LSN {head.last_lsn}",
            )
        try:
            start = Start(lease.epoch, self._token, self._first_lsn)
            await state.raise_to(epoch=lease.epoch, store_ceiling=lease.lsn_ceiling, start=start)
            recorded = await lease.record_start(head, state.state.lineage)
            await state.raise_to(started_epoch=lease.epoch)
        except Shortage as error:
            # Nothing was written: the next attempt takes another epoch.
            raise StoreUnavailable(f"The log's state cannot be opened: {error}") from error
        except OSError as error:
            raise WalPoisoned(f"The log's state cannot be written: {error}; restart the server") from error
        objects.connect(lease, recorded)
        self._connected.set()

    async def run(self, state: LogStateFile, objects: ObjectTier, recovered_lsn: int) -> None:
        """Connect as soon as the store answers, then show that this process lives, until cancelled.

        Args:
            state: the disk's log.
            objects: the object tier.
            recovered_lsn: where the log ended on this disk when the process began.

        Raises:
            Fenced: another process owns the log, or the log went on from another disk meanwhile.
            DataCorruption: see ``connect``.
            WalPoisoned: see ``connect``.

        Cancellation: as a crash.
        """
        if not self.connected:
            log.warning("objects.offline", store=self._store.url, hint="memory and disk acks go on")

        async def attempt() -> None:
            await self.connect(await self.take(state.state), state, objects, recovered_lsn)

        while not self.connected:
            try:
                await attempt()
            except StoreUnavailable as error:
                objects.effort.fail(str(error))
                log.debug("objects.unavailable", reason=str(error))
                await trio.sleep(_RETRY_S)
            except ConfigurationError as error:
                # At a start a person reads it; here somebody else has gone on with the log.
                raise Fenced(error.detail) from error
            else:
                log.info("objects.online", store=self._store.url, epoch=self.epoch)
        await self._held.beat(self._claim.heartbeat_s)

    async def leave(self) -> None:
        """Tell the next owner that nobody is there any more; a store that is away is left as it is."""
        if self.connected:
            try:
                await self._held.leave()
            except StoreUnavailable as error:
                log.debug("epoch.not_left", reason=str(error))

    @property
    def _held(self) -> EpochLease:
        assert self._lease is not None, "no epoch was taken"
        return self._lease


class Patience:
    """How long the steps of a start wait for a store, all together (R31): one slow step leaves less to the next.

    Only waiting counts: what the disk takes between two steps does not.
    """

    def __init__(self, failing_s: float, slow_s: float) -> None:
        """Set the times.

        Args:
            failing_s: for how long requests that fail are made again.
            slow_s: for how long answers are waited for.
        """
        self._failing_s = failing_s
        self._slow_s = slow_s

    @contextmanager
    def spend(self) -> Iterator[tuple[float, float]]:
        """Wait for one step; yields until when failed requests are made again, and until when answers are awaited."""
        started = trio.current_time()
        try:
            yield started + self._failing_s, started + self._slow_s
        finally:
            spent = trio.current_time() - started
            self._failing_s = max(0.0, self._failing_s - spent)
            self._slow_s = max(0.0, self._slow_s - spent)


async def ask_store(request: Callable[[], Awaitable[T]], *, patience: Patience | None = None) -> T:
    """Repeat a request of a start until the store answers.

    Args:
        request: raises StoreUnavailable to be asked again.
        patience: for how long it is asked again, and waited for; None without a limit.

    Raises:
        ConfigurationError: the store refuses our requests: a person has to act.
        StoreUnavailable: patience is over.
    """
    if patience is None:
        return await _repeat(request, None)
    with patience.spend() as (retry_until, wait_until):
        with trio.CancelScope(deadline=wait_until):
            return await _repeat(request, retry_until)
        log.warning("objects.slow", hint="the start goes on without the store; the log goes there once it answers")
        raise StoreUnavailable("the object store has not answered for too long")


async def _repeat(request: Callable[[], Awaitable[T]], until: float | None) -> T:
    while True:
        try:
            return await request()
        except StoreRefused as error:
            raise ConfigurationError(f"The object store refuses our requests: {error}") from error
        except StoreUnavailable as error:
            log.warning("objects.unavailable", reason=str(error), retry_s=_RETRY_S)
            if until is not None and trio.current_time() >= until:
                raise
            await trio.sleep(_RETRY_S)


__all__ = ["Patience", "Taken", "Uplink", "ask_store"]
