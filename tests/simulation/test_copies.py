"""Random histories of a data directory that is copied and put back (R15, R29): what is acknowledged is there once.

Catalog and warehouse lie outside, the object store inside: nothing but the tables' marks tells the copies apart.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from unittest import mock

import trio
from trio.testing import MockClock

from arka.errors import ArkaError, ErrorCode
from arka.lineage import Lineage
from arka.records import TableDefinition, TableName, TableType
from arka.testing.simnode import NAME, SimNode, create_table, with_options, write
from arka.testing.simworld import Trace, deterministic
from arka.testing.simwriters import SCHEMA
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState

KEYED = TableName("default", "k")
NAMES = (NAME, KEYED)
SEEDS = 12


class Broken(Exception):
    """A promise was broken."""


@dataclass
class Branch:
    """A data directory, and what was acknowledged ``disk`` from it or from what it is a copy of: LSN to row."""

    node: SimNode
    writes: dict[TableName, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))

    def fork(self) -> Branch:
        return Branch(self.node.fork(), copy.deepcopy(self.writes))


class History:
    """One seed's history."""

    def __init__(self, seed: int, *, copies: bool) -> None:
        self.rng = random.Random(seed)
        self.copies = copies
        self.ids = count(1)
        self.branches = [Branch(SimNode(with_options(server__take_over=True)))]
        self.older: list[Branch] = []
        self.stopped = self.committed = 0

    @property
    def catalog_node(self) -> SimNode:
        return self.branches[0].node

    async def run(self) -> None:
        async with self.branches[0].node.run() as pipeline:
            await create_table(pipeline)
            schema = SCHEMA.set(0, SCHEMA.field(0).with_nullable(False))
            definition = TableDefinition(KEYED, schema, table_type=TableType.PRIMARY_KEY, key_columns=("id",))
            await pipeline.tables.create(definition)
            await self._serve(self.branches[0], pipeline)
        for _ in range(10):
            rng = self.rng
            branch = rng.choice(self.branches)
            event = rng.random()
            if self.copies and event < 0.2:
                self.branches.append(branch.fork())
            elif self.copies and event < 0.3:
                self.older.append(branch.fork())
            elif self.copies and event < 0.4 and self.older:
                self.branches[self.branches.index(branch)] = rng.choice(self.older).fork()
            elif event < 0.5:
                # What has only a disk ack goes with it.
                branch.node.lose_disk()
                branch.writes.clear()
            await self._lives(rng.sample(self.branches, rng.randint(1, min(2, len(self.branches)))))
        for name in NAMES:
            found = self.catalog_node.ids(name)
            if len(found) != len(set(found)):
                raise Broken(f"rows of {name} are there twice")
        if not self.copies and self.stopped:
            raise Broken("a table stopped although there is no copy")

    async def _lives(self, branches: list[Branch]) -> None:
        """Let servers of these directories live at once."""
        async with trio.open_nursery() as nursery:
            for branch in branches:
                nursery.start_soon(self._live, branch)

    async def _live(self, branch: Branch) -> None:
        node = branch.node
        node.store.away = self.rng.random() < 0.2
        async with trio.open_nursery() as nursery:
            # An empty disk needs the store, and waits for it.
            nursery.start_soon(self._bring_store_back, node)
            if self.copies and self.rng.random() < 0.1:
                nursery.start_soon(self._copy_later, branch)
            async with node.run(closes=self.rng.random() < 0.5) as pipeline:
                await self._serve(branch, pipeline)
            nursery.cancel_scope.cancel()

    async def _bring_store_back(self, node: SimNode) -> None:
        await trio.sleep(self.rng.uniform(0, 20))
        node.store.away = False

    async def _copy_later(self, branch: Branch) -> None:
        """Copy a directory that is written to."""
        await trio.sleep(self.rng.uniform(0, 2))
        self.branches.append(branch.fork())

    async def _serve(self, branch: Branch, pipeline: Pipeline) -> None:
        tables = [await pipeline.tables.find(name) for name in NAMES]
        self._check(branch, tables)
        for _ in range(self.rng.randint(1, 12)):
            table = self.rng.choice(tables)
            row = next(self.ids)
            try:
                lsn = write(pipeline, table, row).lsn
            except ArkaError as error:
                if error.code is not ErrorCode.TABLE_STOPPED:
                    raise
                self.stopped += 1
                continue
            await pipeline.marks_of(table)[0].wait_reached(lsn)
            branch.writes[table.info.name][lsn] = row
            await trio.sleep(self.rng.choice((0.0, 0.05, 0.4)))
            self._check(branch, tables)
        branch.node.store.away = False
        if self.rng.random() < 0.6:
            for table in tables:
                with trio.move_on_after(30):
                    while table.state is TableState.ACTIVE and table.committed.lsn < table.last_lsn:
                        await trio.sleep(0.5)
                if table.state is TableState.ACTIVE and table.committed.lsn < table.last_lsn:
                    raise Broken(f"{table.info.name} is not committed and not stopped")
        self._check(branch, tables)

    def _check(self, branch: Branch, tables: list[Table]) -> None:
        """Check that whatever counts as committed is in its table."""
        for table in tables:
            there = set(self.catalog_node.ids(table.info.name))
            for lsn, row in branch.writes[table.info.name].items():
                if lsn <= table.committed.lsn:
                    self.committed += 1
                    if row not in there:
                        raise Broken(f"LSN {lsn} of {table.info.name} counts as committed, and no reader finds it")


def run(seed: int, *, copies: bool = True) -> History:
    """Run one history.

    Raises:
        Broken: a promise was broken; perhaps in a group.
    """
    history = History(seed, copies=copies)
    with deterministic(seed, Trace()):
        trio.run(history.run, clock=MockClock(autojump_threshold=0))
    return history


def test_copies() -> None:
    """No promise is broken, whatever is copied, put back or lost, and however many servers run at once."""
    histories = [run(seed) for seed in range(SEEDS)]
    # Else they show nothing.
    assert sum(history.stopped > 0 for history in histories) > SEEDS // 4
    assert sum(history.committed for history in histories) > SEEDS * 10


def test_no_table_stops_without_a_copy() -> None:
    """Kills, stops, lost disks and outages alone never make a mark look like another copy's."""
    for seed in range(SEEDS):
        run(seed, copies=False)


def test_catches_ignored_tokens() -> None:
    """An engine that takes each mark of the log's UUID for its own breaks a promise."""
    with mock.patch.object(Lineage, "problem_of", return_value=""):
        assert any(_breaks(seed) for seed in range(SEEDS))


def _breaks(seed: int) -> bool:
    broken = False
    try:
        run(seed)
    except* Broken:
        broken = True
    return broken
