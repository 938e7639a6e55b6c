"""Reading a table: its newest snapshot, and above it every write that was accepted (R25).

Owns: up to which LSN an answer goes, and that the frames it needs stay in the log until it is made. Does not own making
it (``arka.iceberg.scan``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import trio

from arka.errors import ArkaError, ErrorCode, Unavailable
from arka.records import MAX_LSN
from arka.storage.ports import CatalogUnavailable, ReadJob, TableFrames, TableMissing
from arka.tiers.backlog import Backlog, Cut
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState
from arka.tiers.watermarks import Watermark

#: How long a read waits for a table that the start has not compared with the catalog yet.
_TAKE_UP_S: Final = 10.0
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


async def read_table(pipeline: Pipeline, table: Table, request: ReadRequest, path: str) -> int:
    """Write a table's rows as an Arrow IPC stream to a local file.

    Every write that was accepted before the call is in it, each once; what was accepted later may be. Writes that are
    in memory alone are waited for until they are on disk. Of a stopped table the snapshot alone is read: its writes
    are parked, and nobody can say whether they will ever be in it (R18).

    Args:
        pipeline: the engine.
        table: which.
        request: what is wanted.
        path: the file; replaced.

    Returns:
        The number of rows.

    Raises:
        ArkaError: ``out_of_range``: ``at_lsn`` was not given yet, or no retained snapshot ends there; ``wait_for_lsn``
            cannot exist, or no write got it in ``limits.read_wait_s``; ``table_stopped``: the table's mark is not to be
            believed, for example since it is below what is known to be committed, and the answer depends on it.
        InvalidRequest: a column that the table does not have.
        AdmissionRejected: ``overloaded``: the disk has no room for the answer (R23).
        ArkaError: ``table_not_found``: others have dropped or renamed it.
        Unavailable: catalog or warehouse do not answer in time; the start has not compared the table with the catalog
            yet; the log is another process's; or the server drains while the read waits for an LSN.

    Cancellation: the file may be there.
    """
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
    # No wait between looking and pinning: what the table still needs is in the log now.
    with (
        pipeline.tables.pin(table),
        pipeline.spill_room() as room,
        # Also while it waits for its turn behind others.
        trio.move_on_after(pipeline.read_pin_s),
    ):
        async with pipeline.tables.apart.copied(table, pipeline.copy_room) as behind:
            return await _scan(pipeline, table, request, path, behind, through_lsn, room)
    raise Unavailable(
        f"{table.info.name} was not read in {pipeline.read_pin_s:g} s (limits.read_pin_s): other reads are before it, "
        "or it is too large for that"
    )


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
    path: str,
    behind: Backlog,
    through_lsn: int,
    max_bytes: int,
) -> int:
    """Write a table's rows; what is set apart of it is on the local disk (``behind``)."""
    job = ReadJob(
        table=table.info,
        log_uuid=pipeline.log_uuid,
        columns=request.columns,
        limit=request.limit,
        at_lsn=request.at_lsn,
        tail=_frames_of(pipeline, table, through_lsn, behind),
        max_bytes=max_bytes,
        compression=request.compression,
        lineage=pipeline.tables.lineage(),
        # Before the catalog is asked: it may be committed further meanwhile.
        known_lsn=table.known_lsn,
        recorded=table.recorded,
        waited=request.wait_for_lsn is not None,
    )
    try:
        return await pipeline.tables.catalog.scan(job, path)
    except CatalogUnavailable as error:
        raise Unavailable(f"{table.info.name} cannot be read now: {error}") from error
    except TableMissing as error:
        raise ArkaError(
            f"Table not found: {table.info.name}: others dropped or renamed it", code=ErrorCode.TABLE_NOT_FOUND
        ) from error


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


__all__ = ["ReadRequest", "read_table"]
