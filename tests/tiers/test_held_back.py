"""Columns that others make required hold writes back that lack them: none is set aside, and all come in the end."""

from __future__ import annotations

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka.errors import ArkaError
from arka.storage.ports import CommitJob, CommitResult
from arka.testing.simcatalog import SimCatalog
from arka.testing.simnode import NAME, SimNode
from arka.tiers.table import TableState
from tests.tiers.test_adoption import PEOPLE, Change, change, make, stream, with_new

SHORT = {"requested_durability": "object_storage"}


def required(name: str, *, yes: bool = True) -> Change:
    """Make a column required, or optional again."""
    return lambda schema, _: schema.set(schema.get_field_index(name), schema.field(name).with_nullable(not yes))


def ids(node: SimNode) -> list[int]:
    found: list[int] = sorted(node.catalog.rows(NAME)["id"].to_pylist())
    return found


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("what", ["made required", "added"])
async def test_writes_that_lack_a_required_column_wait(
    autojump_clock: MockClock, what: str, keyed: bool, restarted: bool
) -> None:
    """They wait with the reason, also across a restart; mended, all are committed in order (R24, R32)."""
    node = SimNode()
    harm, mend = (
        (required("first"), required("first", yes=False))
        if what == "made required"
        else (with_new("tax", pa.string(), nullable=False), required("tax", yes=False))
    )
    column = "'first'" if what == "made required" else "'tax'"
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=keyed)
        async with stream(pipeline, PEOPLE) as open_stream:
            await open_stream.write((1, "a", "x"))
            await open_stream.settle()
        node.weather.away = True
        async with stream(pipeline, PEOPLE, **SHORT) as open_stream:
            for row in ((2, "b", "x"), (3, None, "y"), (4, "d", "x")):
                await open_stream.write(row)
            assert all(ack.error is None for ack in await open_stream.settle())
        change(node, harm)
        node.weather.away = False
        await trio.sleep(100)
        if not restarted:
            assert table.state is TableState.ACTIVE
            assert table.asides == {}
            assert column in (table.reason or "")
            assert "optional" in (table.reason or "")
            # What has all values, and lies before what has not, is not kept waiting.
            held = sum(frame.batch.num_rows for frame in node.catalog._tables[NAME].changes)
            assert held == (2 if what == "made required" else 1)
            told = ""
            try:
                async with stream(pipeline, PEOPLE, **SHORT) as late:
                    await late.write((9, None, "z"))
                    (ack,) = await late.settle()
                assert ack.lsn == 0
                told = ack.error or ""
            except ArkaError as error:
                told = error.detail
            assert column in told
    if restarted:
        async with node.run() as pipeline:
            await trio.sleep(100)
            table = await pipeline.tables.find(NAME)
            assert (table.state, table.asides) == (TableState.ACTIVE, {})
            assert column in (table.reason or "")
            change(node, mend)
            await trio.sleep(30)
            assert ids(node) == [1, 2, 3, 4]
            assert table.reason is None
    else:
        change(node, mend)
        async with node.run() as pipeline:
            await trio.sleep(30)
            assert ids(node) == [1, 2, 3, 4]


@pytest.mark.parametrize("keyed", [False, True])
async def test_writes_that_have_all_values_go_on(autojump_clock: MockClock, keyed: bool) -> None:
    """A column that is made required holds nothing back that has values in it."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=keyed)
        node.weather.away = True
        async with stream(pipeline, PEOPLE, **SHORT) as open_stream:
            for number in range(5):
                await open_stream.write((number, "a", None))
            await open_stream.settle()
        change(node, required("first"))
        node.weather.away = False
        await trio.sleep(30)
        assert ids(node) == list(range(5))
        assert table.reason is None


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_column_that_becomes_required_between_encode_and_commit(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, keyed: bool
) -> None:
    """Files that were written under the older columns are not committed to a table that requires more."""
    node = SimNode()
    changed: list[str] = []

    async def commit(self: SimCatalog, job: CommitJob) -> CommitResult:
        if job.staged.files and not changed:
            changed.append("once")
            change(node, required("first"))
        return await real(self, job)

    real = SimCatalog.commit
    monkeypatch.setattr(SimCatalog, "commit", commit)
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=keyed)
        async with stream(pipeline, PEOPLE, **SHORT) as open_stream:
            await open_stream.write((1, None, "x"))
            await open_stream.settle()
            await trio.sleep(60)
        assert changed
        assert ids(node) == []
        assert table.asides == {}
        assert "'first'" in (table.reason or "")
        change(node, required("first", yes=False))
        await trio.sleep(30)
        assert ids(node) == [1]
