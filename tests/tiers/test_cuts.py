"""Cuts that fail get smaller, and grow again (R32)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from arka.storage.ports import CatalogUnavailable, CommitJob, CommitResult, DeadlineMissed, StagedFiles, TableFrames
from arka.tiers.backlog import Backlog
from arka.tiers.cutsize import CutSize
from arka.tiers.table import TableState

from .test_table import Bench, ScriptedCatalog


class SlowCatalog(ScriptedCatalog):
    """Misses the deadline of each encode, or commit, of more than so many frames."""

    def __init__(self, most: int, *, commits: bool = False) -> None:
        super().__init__()
        self.most = most
        self.commits_late = commits
        self.late = 0

    async def encode(self, job: TableFrames, *, fresh: bool = False) -> StagedFiles:
        made = await super().encode(job, fresh=fresh)
        if not self.commits_late:
            self._check(job.after_lsn, job.through_lsn)
        return made

    async def commit(self, job: CommitJob) -> CommitResult:
        result = await super().commit(job)
        if self.commits_late:
            self._check(job.staged.after_lsn, job.staged.through_lsn)
        return result

    def _check(self, after: int, through: int) -> None:
        if through - after > self.most:
            self.late += 1
            raise DeadlineMissed("it took longer than 120 s")


@pytest.mark.parametrize("commits", [False, True])
@pytest.mark.parametrize("most", [1, 7])
async def test_a_cut_that_misses_its_deadline_is_halved(
    autojump_clock: MockClock, nursery: trio.Nursery, most: int, commits: bool
) -> None:
    """A table whose cuts take too long commits all of its writes, in order and once, in smaller ones."""
    bench = Bench()
    bench.catalog = slow = SlowCatalog(most, commits=commits)
    bench.committer._catalog = slow
    bench.write(40)
    bench.objects.advance(40)
    nursery.start_soon(bench.committer.run)
    with trio.fail_after(600):
        await bench.table.committed.wait_reached(40)
    assert slow.late
    assert bench.table.state is TableState.ACTIVE
    if not commits:
        spans = [(job.staged.after_lsn, job.staged.through_lsn) for job in slow.commits]
        assert [after for after, _ in spans] == [0, *(through for _, through in spans[:-1])]


async def test_a_single_write_that_is_late_is_tried_on(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A cut of one write cannot be halved: it is asked for again, since the deadline says nothing of its data."""
    bench = Bench()
    bench.catalog.encode_errors = [DeadlineMissed("late")] * 20
    bench.write()
    bench.objects.advance(1)
    nursery.start_soon(bench.committer.run)
    with trio.fail_after(600):
        await bench.table.committed.wait_reached(1)
    assert bench.catalog.encoded == [(0, 1)] * 21
    assert bench.table.state is TableState.ACTIVE


async def test_an_outage_shrinks_nothing(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A catalog that does not answer says nothing of the cut: the same one is asked for again."""
    bench = Bench()
    bench.catalog.encode_errors = [CatalogUnavailable("away")] * 6
    bench.write(16)
    bench.objects.advance(16)
    nursery.start_soon(bench.committer.run)
    await bench.table.committed.wait_reached(16)
    assert bench.catalog.encoded == [(0, 16)] * 7


class WideCatalog(ScriptedCatalog):
    """Writes so many frames of a cut at most, and takes so long for each frame."""

    def __init__(self, most: int, seconds: float) -> None:
        super().__init__()
        self.most = most
        self.seconds = seconds

    async def encode(self, job: TableFrames, *, fresh: bool = False) -> StagedFiles:
        made = await super().encode(job, fresh=fresh)
        frames = min(job.through_lsn - job.after_lsn, self.most)
        through_lsn = job.after_lsn + frames
        return replace(made, through_lsn=through_lsn, frames=frames, took_s=frames * self.seconds)


@pytest.mark.parametrize("most", [1, 7, 39])
async def test_a_cut_that_is_written_in_part_is_committed_in_part(
    autojump_clock: MockClock, nursery: trio.Nursery, most: int
) -> None:
    """What an encode job has not written is neither committed nor acknowledged with the rest, and comes next."""
    bench = Bench()
    bench.catalog = wide = WideCatalog(most, 0)
    bench.committer._catalog = wide
    bench.write(40)
    bench.objects.advance(40)
    seen: list[int] = []
    nursery.start_soon(bench.committer.run)
    with trio.fail_after(600):
        for _ in range(-(-40 // most)):
            await bench.table.committed.wait_reached((seen[-1] if seen else 0) + 1)
            seen.append(bench.table.committed.lsn)
            assert bench.table.backlog.first_lsn == (None if seen[-1] == 40 else seen[-1] + 1)
    assert seen == [*range(most, 40, most), 40]
    assert [job.staged.through_lsn for job in wide.commits] == seen


async def test_a_cut_whose_files_take_the_deadline_is_halved(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A job that made progress for longer than the deadline is committed, and the next ones are of half its size."""
    bench = Bench()
    bench.catalog = wide = WideCatalog(1_000, seconds=10)
    bench.committer._catalog = wide
    bench.write(40)
    bench.objects.advance(40)
    nursery.start_soon(bench.committer.run)
    await bench.table.committed.wait_reached(40)
    bench.write(60)
    bench.objects.advance(100)
    with trio.fail_after(600):
        await bench.table.committed.wait_reached(100)
    sizes = [job.staged.through_lsn - job.staged.after_lsn for job in wide.commits]
    # 400 s, 200 s, and then less than the deadline of 120 s but more than a quarter of it: so it stays.
    assert sizes == [40, 20, 10, 10, 10, 10]


def test_cuts_grow_again() -> None:
    """After a failure each cut that lands lets the next be twice as large, until all there is fits."""
    size = CutSize()
    assert size.shrink(100)
    assert size.frames == 50
    assert size.shrink(50)
    size.grow(25, 1_000)
    assert size.frames == 50
    size.grow(50, 90)
    assert size.frames is None
    assert not size.shrink(1)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_a_cut_has_at_most_so_many_frames(most: int) -> None:
    """The limit of frames goes through segments, together with the limit of bytes."""
    backlog = Backlog()
    for lsn in range(1, 9):
        backlog.add(f"segment-{lsn // 3}", lsn // 3, 1, lsn, lsn * 64, 100)
    cut = backlog.cut(100, most_frames=most)
    assert cut is not None
    assert (cut.frames, cut.through_lsn) == (min(most, 8), min(most, 8))
    narrower = backlog.cut(100, limit_bytes=300, most_frames=most)
    assert narrower is not None
    assert narrower.frames == min(most, 3)
    assert backlog.frames == 8
