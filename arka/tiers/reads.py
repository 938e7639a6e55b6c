"""Reading a table: its newest snapshot, and above it every write that was accepted (R25).

Owns: up to which LSN an answer goes, and that the frames it needs stay in the log until they are copied. Does not own
making it (``arka.iceberg.scan``), whose turn it is (``arka.tiers.readturns``) nor sending it (``arka.flight.answers``).
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Final, Protocol

import trio

from arka.errors import ArkaError, DataCorruption, ErrorCode, Unavailable
from arka.records import MAX_LSN
from arka.storage.ports import Answer, CatalogUnavailable, ReadJob, StoreUnavailable, TableFrames, TableMissing
from arka.tiers.backlog import Backlog, Cut
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState
from arka.tiers.watermarks import Watermark

#: How long a read waits for a table that the start has not compared with the catalog yet.
_TAKE_UP_S: Final = 10.0
#: What a read has once it holds nothing of the log, in seconds: its client's pace is judged elsewhere.
_NEVER_S: Final = 1e9
#: How far above the last LSN a read may wait for one: the log reserves so many at a time (R2).
_AHEAD: Final = 2**32


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What a client asks for.

    Attributes:
        columns: names of columns, in the order wanted; None for all.
        limit: most rows; None for all.
        at_lsn: the last LSN that the answer may hold; None for all that was accepted before the request.
        wait_for_lsn: wait until the log has got so far; None for not at all.
        compression: of the answer's buffers, ``lz4`` or ``zstd``; None for none.
    """

    columns: tuple[str, ...] | None = None
    limit: int | None = None
    at_lsn: int | None = None
    wait_for_lsn: int | None = None
    compression: str | None = None


class ReaderAnswer(Answer, Protocol):
    """Takes an answer on its way to a client."""

    async def end(self) -> None:
        """Wait until what is left of the answer needs none of what reads that run have; nothing more comes."""
        ...


class _Pinned:
    """Passes an answer on, and lets go of the log once its frames are copied; see ``ports.Answer``."""

    def __init__(self, answer: ReaderAnswer, held: AsyncExitStack, until: trio.CancelScope) -> None:
        self._answer = answer
        self._held = held
        self._until = until
        self.begin = answer.begin
        self.add = answer.add

    async def tail_copied(self) -> None:
        """Let go of the log: from here on the read may take as long as its client."""
        await self._held.aclose()
        self._until.deadline = trio.current_time() + _NEVER_S
        await self._answer.tail_copied()


async def read_table(
    pipeline: Pipeline, table: Table, request: ReadRequest, answer: ReaderAnswer, *, peer: str = ""
) -> int:
    """Send a table's rows to ``answer`` as Arrow messages.

    Every write that was accepted before the call is in it, each once; what was accepted later may be. Writes that are
    in memory alone are waited for until they are on disk. Of a stopped table the snapshot alone is read: its writes
    are parked, and nobody can say whether they will ever be in it (R18). Until the read has its turn it holds nothing.

    Args:
        pipeline: the engine.
        table: which.
        request: what is wanted.
        answer: takes the messages; the first one is the schema.
        peer: whose read it is: peers take turns (T27).

    Returns:
        The number of rows, once ``answer`` has taken all of them.

    Raises:
        ArkaError: ``out_of_range``: ``at_lsn`` was not given yet, or no retained snapshot ends there; ``wait_for_lsn``
            cannot exist, or no write got it in ``limits.read_wait_s``; ``table_stopped``: the table's mark is not to be
            believed, for example since it is below what is known to be committed, and the answer depends on it;
            ``too_large``: more of the table waits to be committed than a read may copy.
        InvalidRequest: a column that the table does not have.
        AdmissionRejected: ``overloaded``: too many reads wait, or the disk has no room to copy what waits.
        ArkaError: ``table_not_found``: others have dropped or renamed it.
        Unavailable: catalog or warehouse do not answer in time, or lack a file; the start has not compared the table
            with the catalog yet; the log is another process's; or the server drains while the read waits.
        Exception: what a method of ``answer`` raised.

    Cancellation: the worker ends; what was sent stays sent.
    """
    with pipeline.read_turns.pending.admit(peer) as place:
        through_lsn = await _wait_readable(pipeline, table, request)
        async with AsyncExitStack() as held:
            with trio.CancelScope() as until:
                if pipeline.tables.apart.behind_bytes(table):
                    # Its frames lie in the object store, which may be slow: nobody waits for that but such reads.
                    until.deadline = trio.current_time() + pipeline.read_pin_s
                    tail = await _cut(pipeline, table, through_lsn, held)
                    async with pipeline.read_turns.turn(peer, place):
                        return await _scan(pipeline, table, request, tail, _Pinned(answer, held, until), answer)
                async with pipeline.read_turns.turn(peer, place):
                    until.deadline = trio.current_time() + pipeline.read_pin_s
                    tail = await _cut(pipeline, table, through_lsn, held)
                    return await _scan(pipeline, table, request, tail, _Pinned(answer, held, until), answer)
    raise Unavailable(
        f"What {table.info.name} adds to its snapshot was not copied in {pipeline.read_pin_s:g} s (limits.read_pin_s): "
        "try again"
    )


async def _wait_readable(pipeline: Pipeline, table: Table, request: ReadRequest) -> int:
    """Wait until all that a read may find is on disk; returns the last LSN of that."""
    disk, _, _ = pipeline.marks_of(table)
    if request.wait_for_lsn is not None:
        await _wait_for_lsn(pipeline, disk, request.wait_for_lsn)
    if request.at_lsn is not None:
        if not 0 <= request.at_lsn <= pipeline.memory.last_lsn:
            raise ArkaError(
                f"at_lsn {request.at_lsn} was not given to any write yet, {pipeline.last_given_lsn} is the last one",
                code=ErrorCode.OUT_OF_RANGE,
            )
        _check_given(pipeline, "at_lsn", request.at_lsn)
    await _wait_taken_up(table)
    through_lsn = table.last_lsn if request.at_lsn is None else min(request.at_lsn, table.last_lsn)
    await disk.wait_reached(through_lsn)
    return through_lsn


async def _cut(pipeline: Pipeline, table: Table, through_lsn: int, held: AsyncExitStack) -> TableFrames | None:
    """Find the frames of a read, and keep them in the log until ``held`` is closed.

    Raises:
        ArkaError: ``too_large``; ``table_not_found``: it was dropped meanwhile.
        AdmissionRejected: the disk has no room.
        Fenced: another process has taken the log over.
        DataCorruption: something that holds frames of it is damaged or gone.
    """
    committed_lsn = table.committed.lsn
    behind_bytes = pipeline.tables.apart.behind_bytes(table)
    pipeline.tail_room.check(str(table.info.name), behind_bytes, committed_lsn)
    held.enter_context(pipeline.tail_room.beside(behind_bytes))
    try:
        behind = await held.enter_async_context(pipeline.tables.apart.copied(table, pipeline.copy_room))
    except DataCorruption:
        _check_not_dropped(table)
        try:
            # Who takes the log over deletes what it has committed.
            await pipeline.uplink.verify()
        except StoreUnavailable as error:
            raise Unavailable(f"{table.info.name} cannot be read now: {error}") from error
        raise
    # No wait between looking and pinning: what the table still needs is in the log now.
    tail = _frames_of(pipeline, table, through_lsn, behind)
    held.enter_context(pipeline.tables.pin(table))
    if tail is not None:
        pipeline.tail_room.check(str(table.info.name), tail.size, committed_lsn)
    return tail


def _check_given(pipeline: Pipeline, name: str, lsn: int) -> None:
    """Check that an LSN is none of those that restarts skipped or crashes lost.

    Raises:
        ArkaError: ``out_of_range``: it is one.
    """
    if pipeline.is_skipped(lsn):
        raise ArkaError(
            f"{name} {lsn} is the LSN of no write: a restart skipped it or a crash lost it. "
            f"{pipeline.last_given_lsn} is the last one that was given",
            code=ErrorCode.OUT_OF_RANGE,
        )


async def _wait_for_lsn(pipeline: Pipeline, disk: Watermark, lsn: int) -> None:
    """Wait until the log has an LSN on disk: for ``limits.read_wait_s``, and no longer than it takes writes.

    Raises:
        ArkaError: ``out_of_range``: no write can have the LSN, or none got it in that time.
        Unavailable: it was given and is not on disk yet; or the server drains.
    """
    last_lsn = pipeline.memory.last_lsn
    if not 0 <= lsn <= min(MAX_LSN, last_lsn + _AHEAD):
        raise ArkaError(
            f"wait_for_lsn {lsn} cannot be an LSN of this log: {pipeline.last_given_lsn} is the last one given",
            code=ErrorCode.OUT_OF_RANGE,
        )
    _check_given(pipeline, "wait_for_lsn", lsn)
    with trio.move_on_after(pipeline.read_wait_s):
        async with trio.open_nursery() as nursery:

            async def end_with_the_log() -> None:
                await pipeline.stopping.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_with_the_log)
            await disk.wait_reached(lsn)
            nursery.cancel_scope.cancel()
    if disk.lsn >= lsn:
        return
    if pipeline.stopping.is_set():
        raise Unavailable(f"The server is draining: LSN {lsn} was not reached, read again after its restart")
    waited = f"in {pipeline.read_wait_s:g} s (limits.read_wait_s)"
    if lsn > pipeline.memory.last_lsn:
        raise ArkaError(
            f"wait_for_lsn {lsn} was given to no write {waited}, {pipeline.memory.last_lsn} is the last one",
            code=ErrorCode.OUT_OF_RANGE,
        )
    raise Unavailable(f"LSN {lsn} was not on disk {waited}: try again")


async def _scan(
    pipeline: Pipeline,
    table: Table,
    request: ReadRequest,
    tail: TableFrames | None,
    pinned: Answer,
    answer: ReaderAnswer,
) -> int:
    """Send a table's rows: those of its snapshot, and what ``tail`` adds."""
    job = ReadJob(
        table=table.info,
        log_uuid=pipeline.log_uuid,
        columns=request.columns,
        limit=request.limit,
        at_lsn=request.at_lsn,
        tail=tail,
        compression=request.compression,
        lineage=pipeline.tables.lineage(),
        # Before the catalog is asked: it may be committed further meanwhile.
        known_lsn=table.known_lsn,
        recorded=table.recorded,
        waited=request.wait_for_lsn is not None,
    )
    async with pipeline.tail_room.copy(0 if tail is None else tail.size):
        try:
            rows = await pipeline.tables.catalog.scan(job, pinned)
        except CatalogUnavailable as error:
            _check_not_dropped(table)
            raise Unavailable(f"{table.info.name} cannot be read now: {error}") from error
        except TableMissing as error:
            _check_not_dropped(table)
            raise ArkaError(
                f"Table not found: {table.info.name}: others dropped or renamed it", code=ErrorCode.TABLE_NOT_FOUND
            ) from error
        await answer.end()
        return rows


def _check_not_dropped(table: Table) -> None:
    """Say of a read that failed that its table was dropped meanwhile, which takes its files away.

    A drop is in the log before the files go, and is carried out whatever happens.

    Raises:
        ArkaError: ``table_not_found``.
    """
    if table.state is TableState.DROPPED or table.drop_lsn is not None:
        what = f"Table not found: {table.info.name}: it was dropped while it was read"
        raise ArkaError(what, code=ErrorCode.TABLE_NOT_FOUND)


async def _wait_taken_up(table: Table) -> None:
    with trio.move_on_after(_TAKE_UP_S):
        while table.state is TableState.ACTIVE and not table.taken_up:
            await table.changed.wait()
    if table.state is TableState.ACTIVE and not table.taken_up:
        raise Unavailable(f"{table.info.name} was not compared with the catalog yet, which does not answer: try again")


def _frames_of(pipeline: Pipeline, table: Table, through_lsn: int, behind: Backlog) -> TableFrames | None:
    """The frames up to ``through_lsn`` that this process does not know to be committed."""
    cut = table.backlog.cut(through_lsn) if table.state is TableState.ACTIVE else None
    earlier = behind.cut(through_lsn) if table.state is TableState.ACTIVE else None
    if cut is None or earlier is None:
        cut = cut or earlier
    else:
        slices, frames = (*earlier.slices, *cut.slices), earlier.frames + cut.frames
        cut = Cut(cut.through_lsn, slices, frames, earlier.frame_bytes + cut.frame_bytes)
    if cut is None:
        return None
    if cut.through_lsn <= table.committed.lsn:
        # Committed by whoever owns the log now: what this process took in since is no part of it.
        raise Unavailable(
            f"{table.info.name} holds LSN {table.committed.lsn} in Iceberg, this server gave {cut.through_lsn} last: "
            "another server has taken its log over"
        )
    # What is set aside is in no table, although no commit has passed it yet (R32).
    asides = tuple(lsn for lsn in table.asides if lsn > table.committed.lsn)
    return replace(table.frames(pipeline.log_uuid, cut), without=asides)


__all__ = ["ReadRequest", "ReaderAnswer", "read_table"]
