"""The writer: group commits to the active segment, and the segments' lives from spare to retired.

Owns: what is in the active segment and when a new one begins. Does not own LSNs, nor which frames make
a group (``arka.tiers.disk``), nor the format (``segment``, FORMAT.md).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import UUID

import trio

from arka import failpoints
from arka._core.framing import KIND_BATCH, Frame, first_out_of_order, run_end
from arka.errors import Closed, InternalError, OutcomeUnknown
from arka.options import WalOptions
from arka.storage.ports import Disk, DiskFile
from arka.wal.active import MARKS_BYTES, ActiveSegment, now_us, table_frame
from arka.wal.seal import Kept, SealMark, change_seal, check_sealed, kept_of, write_seal
from arka.wal.segment import (
    CONTROL_KINDS,
    HEADER_BYTES,
    UNFINISHED_SUFFIX,
    AppendedRange,
    SegmentHeader,
    SegmentRef,
    segment_name,
)
from arka.wal.shortage import DESCRIPTORS, RETRY_S, Shortage, short_of
from arka.wal.walk import list_segments


class WalPoisoned(OutcomeUnknown):
    """A write or fsync of the log failed: what was not acked may or may not be found at restart (R6)."""


class _Begun:
    """A segment whose header is durable, and which is not in place yet."""

    __slots__ = ("file", "header", "named", "ref")

    def __init__(self, ref: SegmentRef, header: SegmentHeader, file: DiskFile) -> None:
        self.ref = ref
        self.header = header
        self.file = file
        # Whether it has its name; its directory may not be durable yet.
        self.named = False


class WalWriter:
    """Appends groups of frames to a log. Made by ``open``; used from trio's thread."""

    def __init__(
        self, directory: Path, disk: Disk, *, log_uuid: UUID, epoch: int, options: WalOptions, seal: SealMark
    ) -> None:
        """Use ``open`` instead.

        Args:
            directory: where the segments are.
            disk: the file system.
            log_uuid: the log.
            epoch: goes into the headers of all segments that this writer makes.
            options: sizes.
            seal: where the log stands.
        """
        self._directory = directory
        self._disk = disk
        self._log_uuid = log_uuid
        self._epoch = epoch
        self._options = options
        self._next_segment = seal.segment + 1
        self._last_lsn = seal.last_lsn
        # Invariant: the mark on disk. It names every segment that was ever acked from and is not released (R39).
        self._mark = seal
        self._active: ActiveSegment | None = None
        self._begun: _Begun | None = None
        self._held_back: Shortage | None = None
        self._poison: BaseException | None = None
        self._closed = False
        # Invariant: whoever touches _active, _next_segment, _last_lsn and _mark holds the lock, or is the job that its
        # holder waits for.
        self._lock = trio.Lock()
        # Whether the next frame begins a segment.
        self._rolls = False
        self._spare: DiskFile | None = None
        self._spares = 0
        self._spare_wanted = trio.Event()
        self._spare_wanted.set()

    @classmethod
    async def open(
        cls,
        directory: Path,
        disk: Disk,
        *,
        log_uuid: UUID,
        epoch: int,
        first_segment: int,
        options: WalOptions,
    ) -> WalWriter:
        """Open a log for writing. It was recovered (``recover``), closed, or is empty.

        From here on the log does not count as closed: whoever opens it may give LSNs that nothing on the disk
        knows of. The first segment is made by the first ``append``, since its header names its first LSN.

        Args:
            directory: where the segments are; made if it does not exist.
            disk: the file system.
            log_uuid: the log.
            epoch: at least the epoch of everything in the directory.
            first_segment: number of the next segment, from 1: ``RecoveredLog.next_segment``.
            options: sizes.

        Raises:
            ConfigurationError: the log has to be recovered first, or ``first_segment`` is used up.
            DataCorruption: the directory belongs to another log, or its seal mark is damaged.
            Fenced: a higher epoch has written here.
            OSError: the directory cannot be made or read, or the seal mark not be written.

        Durability: on return the log is marked as open.

        Cancellation: before it begins nothing is written; once begun it is finished.
        """

        def prepare() -> SealMark:
            disk.make_directory(directory)
            seal = check_sealed(disk, directory, log_uuid, epoch, first_segment)
            write_seal(disk, directory, seal)
            failpoints.hit("wal.opened")
            return seal

        seal = await disk.run(prepare)
        return cls(directory, disk, log_uuid=log_uuid, epoch=epoch, options=options, seal=seal)

    @property
    def last_lsn(self) -> int:
        """The last LSN that is durable."""
        return self._last_lsn

    @property
    def poisoned(self) -> bool:
        """Whether a write or fsync has failed."""
        return self._poison is not None

    @property
    def held_back(self) -> Shortage | None:
        """What keeps the next segment from being made; None: nothing, or none is wanted."""
        return self._held_back

    async def append(self, frames: list[Frame]) -> list[AppendedRange]:
        """Write frames as one group commit.

        Args:
            frames: of kinds that take an LSN, LSNs rising and above all written before; batch frames have
                a ``table`` at their ``schema_id``. Their payloads must not change until this returns.

        Returns:
            Where the frames are, in order: one range, or more if segments filled up. Each frame's
            ``offset`` is set and its payload dropped: the bytes are in the segment.

        Raises:
            WalPoisoned: a write or fsync failed, now or before. Some of the frames may be found by a
                recovery; nothing can be appended any more (R6). Where no new segment can be made for lack of
                descriptors, memory or room, this waits instead (R31).
            InternalError: the frames break a rule above; nothing was written.
            Closed: the writer was closed.

        Durability: on return all of the frames are fsynced, with all that leads to them.

        Cancellation: before the write begins, nothing is written and the frames may be appended again. Once
        it has begun it is finished, and this returns normally: so a cancelled append wrote nothing. A group that waits
        for a new segment may be cancelled between two segments: those of its frames that are on disk have no payload.
        """
        await self._lock_at_once()
        try:
            self._check_usable()
            if not frames:
                return []
            self._check_frames(frames)
            ranges = await self._commit_at_once(frames)
            if ranges is None:
                ranges = await self._commit_all(frames)
            if self._spare is None:
                self._spare_wanted.set()
            return ranges
        finally:
            self._lock.release()

    async def keep_spare(self) -> None:
        """Preallocate the next segment ahead of its use, again and again, until cancelled.

        A task for the caller's nursery. Without it, segments are allocated by the ``append`` that needs
        them. A failure to allocate is left to that ``append``, to which it matters.

        Cancellation: an unused spare is removed by ``close`` or by recovery.
        """
        while True:
            await self._spare_wanted.wait()
            self._spare_wanted = trio.Event()
            if self._spare is None and not self._closed and self._poison is None:
                self._spares += 1
                name = f"spare-{self._spares}{UNFINISHED_SUFFIX}"
                try:
                    self._spare = await self._disk.run(partial(self._allocate, name))
                except OSError:
                    # Most likely no room. Nothing of the log was touched; the next append that wants a spare
                    # and finds none asks again.
                    continue

    def roll(self) -> None:
        """Let the next frame begin a segment, so that the one before it can be retired."""
        self._rolls = True

    async def retire(self, segments: Sequence[SegmentRef]) -> None:
        """Forget the log's oldest segments, then unlink them. Processes that have them mapped keep what they have (R9).

        The order matters: what the seal mark names and is not there is damage (R39).

        Args:
            segments: sealed segments; with them go all frames in them, so R12 must hold for each.

        Raises:
            InternalError: an older segment would be left, or one is active: recovery would find a hole.
            OSError: some of them are left; the same call may be made again.

        Durability: they are gone for good on return.

        Cancellation: before it begins nothing is removed; once begun it is finished.
        """
        active = self._active
        if active is not None and any(ref.number >= active.ref.number for ref in segments):
            raise InternalError(f"segment {active.ref.number} is active: it cannot be retired")
        numbers = sorted(ref.number for ref in segments)
        async with self._lock:
            await self._disk.run(partial(self._forget, numbers))
        await self._disk.run(partial(self._remove, numbers))

    async def close(self) -> None:
        """Seal the active segment and mark the log as closed. A poisoned log is only let go of.

        Raises:
            WalPoisoned: sealing failed; what was appended is durable all the same.

        Durability: on return a recovery finds a closed log and has nothing to rewrite.

        Cancellation: before the write begins, the writer is still open; once begun it is finished.
        """
        async with self._lock:
            if self._closed:
                return
            while True:
                try:
                    await self._disk.run(self._finish)
                except Shortage:
                    await trio.sleep(RETRY_S)
                else:
                    break
            self._closed = True

    async def _lock_at_once(self) -> None:
        """Lock without a turn of the loop, where nobody else has it: a turn is a tenth of a group commit.

        Cancellation: the lock is not held.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def _commit_at_once(self, frames: list[Frame]) -> list[AppendedRange] | None:
        """Commit what fits into the active segment: one write and one fsync, for which no job is needed.

        Returns:
            As ``append``; None if a job is needed: nothing was done.
        """
        active = self._active
        # Failpoints on the way pause and fail, which is for threads.
        if active is None or self._rolls or failpoints.armed():
            return None
        cut = active.cut(frames, 0)
        if len(cut.taken) < len(frames):
            return None
        try:
            appended = await active.commit_in(self._disk, cut)
        except trio.Cancelled:
            raise
        except BaseException as error:
            raise self._poisoned_by(error) from error
        self._last_lsn = appended.last_lsn
        return [appended]

    async def _commit_all(self, frames: list[Frame]) -> list[AppendedRange]:
        """Commit frames with as many new segments as they need; waits while none can be made (R31)."""
        ranges: list[AppendedRange] = []
        done = 0
        try:
            while True:
                more, done, self._held_back = await self._disk.run(partial(self._commit, frames, done))
                ranges += more
                if self._held_back is None:
                    return ranges
                await trio.sleep(RETRY_S)
        finally:
            self._held_back = None

    def _poisoned_by(self, error: BaseException) -> WalPoisoned:
        self._poison = error
        return WalPoisoned(f"{self._directory}: the log cannot be written: {error}; restart the server")

    # -- jobs: run in the disk's thread -----------------------------------------------------------

    def _commit(self, frames: list[Frame], done: int) -> tuple[list[AppendedRange], int, Shortage | None]:
        """Write ``frames[done:]``; returns where they are, how many are written, and what the rest waits for."""
        ranges: list[AppendedRange] = []
        try:
            rolls, self._rolls = self._rolls, False
            if rolls and self._active is not None:
                self._active.seal()
                self._active = None
            while done < len(frames):
                active = self._active
                if active is None:
                    try:
                        active = self._active = self._start_segment(frames[done])
                    except Shortage as shortage:
                        return ranges, done, shortage
                cut = active.cut(frames, done)
                done += len(cut.taken)
                full = done < len(frames)
                if cut.taken:
                    ranges.append(active.commit(cut, then_seal=full))
                    self._last_lsn = cut.taken[-1].lsn
                else:
                    active.seal()
                if full:
                    self._active = None
        except BaseException as error:
            raise self._poisoned_by(error) from error
        return ranges, done, None

    def _start_segment(self, first: Frame) -> ActiveSegment:
        """Make the next segment, or go on with one that a shortage interrupted.

        Its predecessor's footer is fsynced (R7).

        Raises:
            Shortage: something lacks for now: call again with the same frame.
            OSError: a write or fsync failed.
        """
        begun = self._begun
        if begun is None:
            begun = self._begun = self._begin_segment(first)
        if begun.header.first_lsn != first.lsn:
            found = begun.header.first_lsn
            raise InternalError(f"segment {begun.ref.number} was begun for LSN {found}, not {first.lsn}")
        if not begun.named:
            # A segment gets its name when its header is durable: under a segment's name a bad header is damage.
            with short_of():
                self._disk.rename(begun.file.path, begun.ref.path)
            begun.named = True
            failpoints.hit("wal.segment_renamed")
        # Only its opening can run short of these: a failed fsync is none of them.
        with short_of(DESCRIPTORS):
            self._disk.sync_directory(self._directory)
        failpoints.hit("wal.segment_named")
        # Named before anything in it is acked, and once it is there: never a name without a file.
        self._write_mark(self._kept.with_newest(begun.ref.number, begun.header.base_lsn))
        self._begun = None
        self._next_segment += 1
        return ActiveSegment(begun.ref, begun.header, begun.file)

    def _begin_segment(self, first: Frame) -> _Begun:
        """Make a file with a durable header."""
        need = HEADER_BYTES + MARKS_BYTES + first.frame_bytes
        if first.kind == KIND_BATCH:
            need += table_frame(first).frame_bytes
        failpoints.hit("wal.segment_begin")
        number = self._next_segment
        ref = SegmentRef(self._directory / segment_name(number), number, self._epoch)
        capacity = self._options.segment_bytes
        file = None
        if need <= capacity:
            file, self._spare = self._spare, None
        if file is None:
            capacity = max(capacity, need)
            with short_of():
                file = self._create(ref.path.with_name(ref.path.name + UNFINISHED_SUFFIX), capacity)
        failpoints.hit("wal.segment_allocated")
        header = SegmentHeader(
            log_uuid=self._log_uuid,
            epoch=self._epoch,
            number=number,
            base_lsn=self._last_lsn,
            first_lsn=first.lsn,
            capacity=capacity,
            replaces=0,
            created_us=now_us(),
            nonce=secrets.token_bytes(16),
        )
        file.write(0, [header.to_bytes()])
        failpoints.hit("wal.header_written")
        file.sync()
        failpoints.hit("wal.header_synced")
        return _Begun(ref, header, file)

    def _allocate(self, name: str) -> DiskFile:
        spare = self._create(self._directory / name, self._options.segment_bytes)
        failpoints.hit("wal.spare_allocated")
        return spare

    def _create(self, path: Path, size: int) -> DiskFile:
        try:
            return self._disk.create(path, size)
        except OSError:
            # On a full disk, what was allocated before the error is what the active segment may need.
            with suppress(OSError):
                self._disk.remove(path)
            raise

    @property
    def _kept(self) -> Kept:
        assert self._mark.kept is not None, "an open log names its segments"
        return self._mark.kept

    def _write_mark(self, kept: Kept) -> None:
        mark = replace(self._mark, kept=kept)
        change_seal(self._disk, self._directory, mark)
        self._mark = mark

    def _forget(self, numbers: Sequence[int]) -> None:
        """Name the segments that stay, and no others."""
        found = list_segments(self._directory, self._disk)
        listed = [number for number, _ in found]
        present = [number for number in numbers if number in listed]
        if listed[: len(present)] != present:
            raise InternalError(f"segments {present} are not the oldest ones of {listed}: they cannot be retired")
        left = found[len(present) :]
        self._write_mark(kept_of(self._disk, left, self._last_lsn))
        failpoints.hit("release.segments_forgotten")

    def _remove(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            # One at a time: whatever a crash undoes, no hole is left.
            self._disk.remove(self._directory / segment_name(number))
            failpoints.hit("release.segment_unlinked")
            self._disk.sync_directory(self._directory)
            failpoints.hit("release.segment_removed")

    def _finish(self) -> None:
        active, self._active = self._active, None
        spare, self._spare = self._spare, None
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.file.close()
        if spare is not None:
            spare.close()
        if self._poison is not None:
            if active is not None:
                active.close()
            return
        try:
            failpoints.hit("stop.begin_seal")
            if active is not None:
                active.seal()
            if spare is not None:
                self._disk.remove(spare.path)
            if begun is not None:
                # It holds nothing: no frame was written to it, and the mark does not name it.
                self._disk.remove(begun.ref.path if begun.named else begun.file.path)
                self._disk.sync_directory(self._directory)
            kept = self._kept if self._kept.oldest else Kept(0, 0, self._last_lsn)
            last = self._next_segment - 1
            mark = SealMark(self._log_uuid, self._epoch, last, self._last_lsn, closed=True, kept=kept)
            write_seal(self._disk, self._directory, mark)
            self._mark = mark
            failpoints.hit("stop.marked")
        except Shortage:
            # What is done already is not done again.
            raise
        except BaseException as error:
            self._poison = error
            raise WalPoisoned(f"{self._directory}: the log cannot be sealed: {error}") from error

    # -- checks -----------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._poison is not None:
            raise WalPoisoned(
                f"{self._directory}: an earlier write of the log failed ({self._poison}); restart the server"
            )
        if self._closed:
            raise Closed(f"{self._directory}: the log was closed")

    def _check_frames(self, frames: list[Frame]) -> None:
        wrong = first_out_of_order(frames, self._last_lsn)
        if wrong >= 0:
            before = frames[wrong - 1].lsn if wrong else self._last_lsn
            raise InternalError(f"LSN {frames[wrong].lsn} was to be written after LSN {before}")
        start = 0
        while start < len(frames):
            frame = frames[start]
            if frame.kind in CONTROL_KINDS:
                raise InternalError(f"frames of kind {frame.kind} are the writer's own")
            if frame.kind == KIND_BATCH and (frame.table is None or frame.table.schema_id != frame.schema_id):
                raise InternalError(f"the batch with LSN {frame.lsn} needs its table at schema {frame.schema_id}")
            start = run_end(frames, start)


__all__ = ["AppendedRange", "WalPoisoned", "WalWriter"]
