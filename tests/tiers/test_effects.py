"""Actions run to their end, whatever becomes of the client that asked for them (R41)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from arka.errors import AdmissionRejected, ArkaError, Unavailable
from arka.records import PartitionRequest, TableDefinition, TableName, Tier
from arka.testing.simnode import NAME, SimNode, create_table, write_all
from arka.testing.simwriters import SCHEMA, definition_of
from arka.tiers import creates
from arka.tiers.effects import Effects
from arka.tiers.pipeline import Pipeline

KEYED = replace(
    definition_of(TableName("other", "keyed"), keyed=True),
    partition=(PartitionRequest(0, None, "id_bucket", "bucket[4]"),),
    properties={"comment": "people"},
)
PLAIN = TableDefinition(NAME, SCHEMA)


async def ask_and_leave(effects: Effects, action: str, effect: Any, patience_s: float) -> None:
    """Ask for an action and go away before its answer."""
    with trio.move_on_after(patience_s) as patience:
        await effects.do(action, "t", effect)
    assert patience.cancelled_caught


@pytest.mark.parametrize("definition", [PLAIN, KEYED], ids=["append_only", "primary_key"])
@pytest.mark.parametrize("patience_s", [0.0, 0.0001, 0.5])
async def test_client_that_leaves(definition: TableDefinition, patience_s: float, autojump_clock: MockClock) -> None:
    """CreateTable and DropTable happen although their clients are gone, and the log says so."""
    node = SimNode()
    node.weather.max_delay_s = 1.0
    async with node.run() as pipeline, trio.open_nursery() as nursery:
        effects = Effects(4)
        await nursery.start(effects.run)
        with structlog.testing.capture_logs() as logs:
            await ask_and_leave(effects, "CreateTable", partial(pipeline.tables.create, definition), patience_s)
            await effects.wait_idle()
            assert definition.name in node.catalog._tables
            table = await pipeline.tables.find(definition.name)
            await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
            drop = partial(pipeline.tables.drop, definition.name, purge=True)
            await ask_and_leave(effects, "DropTable", drop, patience_s)
            await effects.wait_idle()
        assert definition.name not in node.catalog._tables
        assert pipeline.tables.listed() == []
        done = [(entry["action"], entry["client_waits"]) for entry in logs if entry["event"] == "action.done"]
        assert done == [("CreateTable", False), ("DropTable", False)]
        nursery.cancel_scope.cancel()


async def test_as_many_as_are_allowed(autojump_clock: MockClock) -> None:
    """One action more than ``limits.actions`` is refused as overloaded; those that run go on, and make room."""
    release = trio.Event()
    async with trio.open_nursery() as nursery:
        effects = Effects(2)
        await nursery.start(effects.run)
        for _ in range(2):
            nursery.start_soon(effects.do, "CreateTable", "t", release.wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(AdmissionRejected, match=r"limits\.actions"):
            await effects.do("DropTable", "t", release.wait)
        release.set()
        await effects.wait_idle()
        await effects.do("DropTable", "t", release.wait)
        nursery.cancel_scope.cancel()


async def test_failures_are_logged_and_told(autojump_clock: MockClock) -> None:
    """What an action raises reaches the client that waits, and the log; a bug in one does not end the others."""

    async def refuse() -> None:
        raise ArkaError("no")

    async def break_down() -> None:
        raise ZeroDivisionError

    async with trio.open_nursery() as nursery:
        effects = Effects(2)
        await nursery.start(effects.run)
        with structlog.testing.capture_logs() as logs:
            with pytest.raises(ArkaError, match="no"):
                await effects.do("A", "t", refuse)
            with pytest.raises(ZeroDivisionError):
                await effects.do("B", "t", break_down)
            effects.adopt("C", "t", break_down)
            await effects.wait_idle()
        assert [(entry["event"], entry["action"]) for entry in logs] == [("action.failed", name) for name in "ABC"]
        effects.start_drain()
        with pytest.raises(Unavailable):
            await effects.do("D", "t", refuse)
        nursery.cancel_scope.cancel()


async def hold_create(nursery: trio.Nursery, pipeline: Pipeline, definition: TableDefinition) -> None:
    """Ask for a table; return when the log has asked the catalog, which never answers."""
    asked = trio.Event()

    async def never(*args: object) -> None:
        asked.set()
        await trio.sleep_forever()

    catalog: Any = pipeline.tables.catalog
    catalog.create_table = never
    nursery.start_soon(pipeline.tables.create, definition)
    await asked.wait()


async def stop_inside_create(node: SimNode, definition: TableDefinition) -> None:
    """Let the process end when the log has asked for a table and the catalog has not answered."""
    async with node.run() as pipeline, trio.open_nursery() as nursery:
        await hold_create(nursery, pipeline, definition)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("definition", [PLAIN, KEYED], ids=["append_only", "primary_key"])
async def test_next_start_finishes_a_create(definition: TableDefinition, autojump_clock: MockClock) -> None:
    """A CreateTable that the end of the process cut off is finished by the next start, exactly as asked for."""
    node = SimNode()
    await stop_inside_create(node, definition)
    assert node.catalog._tables == {}
    async with node.run() as pipeline:
        table, created = await pipeline.tables.create(definition)
        assert not created
        assert table.info.name in node.catalog._tables
        assert table.info.properties.items() >= definition.properties.items()
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
    async with node.run() as pipeline:
        assert [table.info.name for table in pipeline.tables.listed()] == [definition.name]
        await pipeline.tables.drop(definition.name, purge=False)
    async with node.run() as pipeline:
        assert pipeline.tables.listed() == []


async def test_create_waits_for_the_catalog(autojump_clock: MockClock) -> None:
    """A start that finds the catalog unavailable finishes the create when it answers."""
    node = SimNode()
    await stop_inside_create(node, PLAIN)
    node.weather.away = True
    async with node.run() as pipeline:
        assert pipeline.tables.listed() == []
        await trio.sleep(30)
        node.weather.away = False
        await trio.sleep(30)
        assert [table.info.name for table in pipeline.tables.listed()] == [NAME]


async def test_refused_create_stays_refused(autojump_clock: MockClock) -> None:
    """A create whose client was told that it failed is not brought back by a later start."""
    node = SimNode()
    async with node.run() as pipeline:
        node.weather.away = True
        with pytest.raises(Unavailable):
            await create_table(pipeline)
        await trio.sleep(1)
        node.weather.away = False
        node.catalog._tables.clear()
    async with node.run() as pipeline:
        await trio.sleep(30)
        assert pipeline.tables.listed() == []


async def test_catches_an_intent_that_is_forgotten(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    """An engine that writes no definition into its intent is caught: the create is lost with its process."""
    monkeypatch.setattr(creates, "_encode", lambda definition: b"")
    node = SimNode()
    await stop_inside_create(node, PLAIN)
    async with node.run() as pipeline:
        await trio.sleep(30)
        with pytest.raises(ArkaError, match="not found"):
            await pipeline.tables.find(NAME)


async def test_intents_hold_the_log(autojump_clock: MockClock) -> None:
    """The log keeps an intent until its outcome is in the log: the next start needs it (R12)."""
    node = SimNode()
    async with node.run() as pipeline, trio.open_nursery() as nursery:
        await hold_create(nursery, pipeline, PLAIN)
        assert await pipeline.tables.needed_from(10**9) == pipeline.memory.last_lsn
        nursery.cancel_scope.cancel()


async def test_end_of_the_process(autojump_clock: MockClock) -> None:
    """The end of the process cuts effects off in any order; whoever waits is told that the outcome is not known."""
    errors: list[Exception] = []

    async def wait(effects: Effects) -> None:
        try:
            await effects.do("CreateTable", "t", trio.sleep_forever)
        except Unavailable as error:
            errors.append(error)

    for _ in range(8):
        async with trio.open_nursery() as clients, trio.open_nursery() as nursery:
            effects = Effects(9)
            await nursery.start(effects.run)
            for _ in range(3):
                clients.start_soon(wait, effects)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert len(errors) == 24


async def test_actions_on_one_table_keep_their_order(autojump_clock: MockClock) -> None:
    """Actions on one subject follow each other as they were asked for; whoever asks later can wait for them."""
    seen: list[str] = []

    async def act(name: str, seconds: float) -> None:
        seen.append(f"{name} begins")
        await trio.sleep(seconds)
        seen.append(f"{name} ends")

    async with trio.open_nursery() as nursery:
        effects = Effects(9)
        await nursery.start(effects.run)
        for name, seconds in (("drop", 3.0), ("create", 2.0), ("drop again", 0.0)):
            effects.adopt(name, "t", partial(act, name, seconds))
        effects.adopt("create", "other", partial(act, "other", 1.0))
        await effects.wait_for("other")
        assert "drop ends" not in seen
        await effects.wait_for("t")
        assert [line for line in seen if "other" not in line] == [
            f"{name} {what}" for name in ("drop", "create", "drop again") for what in ("begins", "ends")
        ]
        await effects.wait_for("t")
        await effects.wait_idle()
        nursery.cancel_scope.cancel()
