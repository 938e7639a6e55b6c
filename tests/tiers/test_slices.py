"""T22: with any number of tables, frames and keys, no step of trio's thread looks at all of them. Work is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
import trio
from trio.testing import MockClock

from arka import slices
from arka._core.keys import ENTRY_BYTES, KeyTable
from arka.options import KIB
from arka.records import TableInfo, TableName, Tier
from arka.testing.simnode import SimNode, create_table, with_options, write
from arka.tiers import keys as keys_module
from arka.tiers.activity import TableActivity
from arka.tiers.apart import Apart
from arka.tiers.backlog import Backlog, BacklogTotal
from arka.tiers.keys import KeyIndex
from arka.tiers.table import Table
from arka.tiers.watch import Watched

#: More than two slices.
TABLES = 2 * slices.TABLES + 40
#: What one step may look at: a slice, and the one table that a committer has at hand.
MOST = slices.TABLES + 8


class StepTally(trio.abc.Instrument):
    """Counts what each step does, by a word; keeps the most of one step, and which task it was."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.most: dict[str, tuple[int, str]] = {}

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """A step begins."""
        del task
        self.now.clear()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """A step has ended."""
        for word, count in self.now.items():
            if count > self.most.get(word, (0, ""))[0]:
                self.most[word] = (count, task.name)


@pytest.fixture
def tally(monkeypatch: pytest.MonkeyPatch) -> StepTally:
    """Count looks at tables, and keys that are loaded, in every step."""
    counted = StepTally()

    def count(owner: type, name: str, word: str) -> None:
        before: Callable[..., Any] = getattr(owner, name)

        def run(self: object, *args: Any, **options: Any) -> Any:
            counted.now[word] += 1
            return before(self, *args, **options)

        monkeypatch.setattr(owner, name, run)

    count(TableActivity, "_is_quiet", "tables looked at for quiet")
    count(Watched, "look", "tables watched")
    count(Apart, "judge_room", "tables compared")
    count(TableInfo, "to_bytes", "schemas spelled")

    class CountedKeys(KeyTable):
        @property
        def first_lsn(self) -> int | None:
            counted.now["key tables asked for their first LSN"] += 1
            return super().first_lsn

        def count(self, after_lsn: int, through_lsn: int) -> int:
            counted.now["key tables counted"] += 1
            return super().count(after_lsn, through_lsn)

        def pack(self, *args: int) -> bytes:
            counted.now["key tables packed"] += 1
            return super().pack(*args)

        def load(self, packed: bytes) -> int:
            counted.now["keys loaded"] += len(packed) // ENTRY_BYTES
            return super().load(packed)

    monkeypatch.setattr(keys_module, "KeyTable", CountedKeys)

    class CountedBacklog(Backlog):
        @property
        def first_lsn(self) -> int | None:
            counted.now["backlogs asked for their first LSN"] += 1
            return super().first_lsn

        @property
        def frame_bytes(self) -> int:
            counted.now["backlogs asked for their bytes"] += 1
            return super().frame_bytes

        def add(self, *args: Any) -> None:
            counted.now["frames given to tables"] += 1
            super().add(*args)

    monkeypatch.setattr("arka.tiers.table.Backlog", CountedBacklog)
    return counted


async def test_no_step_looks_at_all_tables(tally: StepTally, autojump_clock: MockClock) -> None:
    """The tasks that look at every table, again and again, look at some in each step: commits, checkpoints, deletes."""
    settings = with_options(
        wal__segment_bytes=32 * KIB, wal__group_bytes=KIB, idempotency__keys=10**6, idempotency__retention_s=3.0
    )
    node = SimNode(settings)
    async with node.run() as pipeline:
        tables = [await create_table(pipeline, TableName("default", f"t{n}")) for n in range(TABLES)]
        await trio.sleep(2)
        trio.lowlevel.add_instrument(tally)
        for turn in range(2):
            for number, table in enumerate(tables):
                write(pipeline, table, number, b"k%d" % turn)
            for table in tables:
                await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
            await trio.sleep(8)
        assert all(table.quiet for table in tables)
        trio.lowlevel.remove_instrument(tally)
    print(tally.most)
    expected = {
        "tables looked at for quiet",
        "tables watched",
        "tables compared",
        "schemas spelled",
        "key tables asked for their first LSN",
        "key tables counted",
        "key tables packed",
        "backlogs asked for their first LSN",
    }
    assert expected - tally.most.keys() == set()
    assert {word: found for word, found in tally.most.items() if found[0] > MOST} == {}


async def test_a_start_gives_frames_and_keys_in_slices(tally: StepTally, autojump_clock: MockClock) -> None:
    """A table's recovered keys and frames come piece by piece, and all of them come."""
    count = 20_000
    node = SimNode(with_options(wal__segment_bytes=64 * 1024 * KIB, idempotency__keys=10**6))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        for number in range(count):
            write(pipeline, table, number, b"k%d" % number, filler=1)
            if number % 500 == 0:
                await pipeline.flush(table, Tier.DISK)
        await pipeline.flush(table, Tier.DISK)
        uuid, last_lsn = table.info.uuid, table.last_lsn
    node.disk.crash()
    trio.lowlevel.add_instrument(tally)
    opened = await node.open()
    trio.lowlevel.remove_instrument(tally)
    found = opened.pipeline.tables.get(uuid)
    assert found is not None
    assert found.last_lsn == last_lsn
    assert len(opened.pipeline._keys) == count
    print(tally.most)
    assert 0 < tally.most["keys loaded"][0] <= 16_384


def _index(tables: int) -> tuple[KeyIndex, list[UUID]]:
    keys, made = KeyIndex(100.0, limit=10**6), [uuid4() for _ in range(tables)]
    for lsn, table in enumerate(made, 1):
        keys.insert(table, b"k", lsn, 0)
    return keys, made


async def test_keys_change_between_two_slices() -> None:
    """While a figure over all tables is taken, keys come and tables go; what is told errs to the safe side."""
    keys, made = _index(TABLES)
    through = TABLES // 2
    found: list[int | None] = []

    async def forget() -> None:
        await keys.forget_uncovered(through)

    async def first() -> None:
        found.append(await keys.first_lsn())

    async def change() -> None:
        for number in range(6):
            # Of a table that was looked at, of one that is still to be, and of a new one.
            for place, table in enumerate((made[0], made[-1], uuid4())):
                keys.insert(table, b"n%d" % number, 10**6 + 10 * number + place, 0)
            keys.drop_table(made[100 + number])
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(forget)
        nursery.start_soon(first)
        nursery.start_soon(change)
    assert found == [1]
    exact = await keys.uncovered_bytes(2**62)
    assert keys.fresh_bytes >= exact
    packed = b"".join(entries for _, entries in keys.uncovered(2**62))
    assert len(packed) == exact
    await keys.forget_uncovered(through)
    assert keys.fresh_bytes == exact


async def test_a_key_that_comes_where_no_more_is_fresh_is_packed() -> None:
    """A table that is forgotten as covered between two slices is fresh again with its next key."""
    keys, made = _index(TABLES)

    async def change() -> None:
        await trio.lowlevel.checkpoint()
        for number, table in enumerate(made):
            keys.insert(table, b"later", 10**6 + number, 0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keys.forget_uncovered, TABLES)
        nursery.start_soon(change)
    packed = b"".join(entries for _, entries in keys.uncovered(2**62))
    assert len(packed) == TABLES * ENTRY_BYTES
    assert keys.fresh_bytes >= len(packed)


async def test_what_is_needed_while_it_is_asked(autojump_clock: MockClock) -> None:
    """A read that pins a table which is committed between two slices keeps its frames: pins are looked at last."""
    node = SimNode()
    async with node.run() as pipeline:
        tables: list[Table] = []
        for number in range(TABLES):
            tables.append(await create_table(pipeline, TableName("default", f"t{number}")))
        await trio.sleep(1)
        last = tables[-1]
        lsn = write(pipeline, last, 1).lsn
        await pipeline.flush(last, Tier.DISK)
        needed: list[int | None] = []
        with pipeline.tables.pin(last):
            assert last.backlog.first_lsn == lsn

            async def ask() -> None:
                needed.append(await pipeline.tables.needed_from(lsn + 5))

            async def commit() -> None:
                await trio.lowlevel.checkpoint()
                last.backlog.discard_through(lsn)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                nursery.start_soon(commit)
            assert needed == [lsn]


def test_a_total_of_backlogs_is_the_sum() -> None:
    """However frames come, move and go, the total that owners keep is what adding up would give."""
    total, one, two, earlier = BacklogTotal(), Backlog(), Backlog(), Backlog()
    one.add("a", 1, 1, 10, 0, 100)
    one.count_in(total)
    two.count_in(total)
    for lsn in range(11, 21):
        one.add("a" if lsn < 15 else "b", 1, 1, lsn, lsn, lsn)
        two.add("a", 1, 1, 100 + lsn, lsn, 2 * lsn)
    assert total.frame_bytes == one.frame_bytes + two.frame_bytes == 100 + 3 * sum(range(11, 21))
    one.discard_through(16)
    assert one.frame_bytes == sum(range(17, 21))
    earlier.add("z", 1, 1, 50, 0, 7)
    two.put_before(earlier)
    assert earlier.frame_bytes == 0
    assert two.frame_bytes == 7 + 2 * sum(range(11, 21))
    assert total.frame_bytes == one.frame_bytes + two.frame_bytes
    one.count_in(None)
    assert total.frame_bytes == two.frame_bytes
    two.discard_through(10**6)
    assert total.frame_bytes == two.frame_bytes == 0
