"""What makes no progress is said: after a few seconds, again each minute, with the newest reason (R35)."""

from __future__ import annotations

from typing import Any

import structlog.testing
import trio
from trio.testing import MockClock

from arka.records import Tier
from arka.storage.ports import StoreUnavailable
from arka.testing.simnode import NAME, SimNode, create_table, write
from arka.tiers.uplink import Patience, ask_store
from arka.tiers.watch import PATIENCE_S, Effort, State, Watch, Watched


class _Tier:
    def __init__(self) -> None:
        self.reached = 0
        self.wanted = 0
        self.effort = Effort("an answer")
        self.watched = Watched("disk", self.effort, lambda: State(self.reached, self.wanted), 0.5)


def _stalls(logs: list[Any]) -> list[Any]:
    return [entry for entry in logs if entry["event"] == "stall"]


async def test_a_stall_is_said_again_and_again(autojump_clock: MockClock) -> None:
    """First after the patience, then each minute, with the reason that is newest then; and its end once."""
    tier = _Tier()
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Watch([tier.watched], list).run)
            await trio.sleep(100)
            assert logs == []
            tier.wanted = 3
            tier.effort.begin("the disk")
            await trio.sleep(PATIENCE_S - 1)
            assert tier.watched.stalled is None
            await trio.sleep(2)
            assert "the disk" in (tier.watched.stalled or "")
            tier.effort.fail("no space")
            await trio.sleep(130)
            assert "no space" in (tier.watched.stalled or "")
            tier.reached = 1
            await trio.sleep(1)
            assert tier.watched.stalled is None
            nursery.cancel_scope.cancel()
    assert [entry["reason"].startswith("waiting") for entry in _stalls(logs)] == [True, False, False]
    assert [entry["event"] for entry in logs][-1] == "stall.over"


async def test_slow_progress_is_progress(autojump_clock: MockClock) -> None:
    """A mark that rises now and then stalls only in between, and what is idle never does."""
    tier = _Tier()
    tier.wanted = 1000
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Watch([tier.watched], list).run)
            for _ in range(50):
                await trio.sleep(PATIENCE_S - 1)
                tier.reached += 1
            tier.wanted = tier.reached
            await trio.sleep(1000)
            nursery.cancel_scope.cancel()
    assert logs == []


async def test_a_silent_catalog_is_said_for_its_table(autojump_clock: MockClock) -> None:
    """A catalog that neither answers nor fails: the log and DescribeTable's reason name it."""
    world = SimNode()
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        write(pipeline, table, 1)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert pipeline.stalled(table) is None

        async def silent(*_: Any) -> Any:
            await trio.sleep_forever()

        pipeline.tables.catalog.commit = silent  # type: ignore[method-assign]
        with structlog.testing.capture_logs() as logs:
            write(pipeline, table, 1)
            await trio.sleep(PATIENCE_S * 3)
            assert "the catalog" in (pipeline.stalled(table) or "")
        (said,) = [entry for entry in logs if entry["event"] == "stall"]
        assert (said["tier"], said["table"]) == ("iceberg_committed", str(NAME))


async def test_a_start_with_a_slow_store_has_one_deadline(autojump_clock: MockClock) -> None:
    """What one step waits is gone for the next; a store that fails is asked for the shorter time."""
    patience = Patience(5.0, 30.0)

    async def slow() -> None:
        await trio.sleep(20)

    async def failing() -> None:
        raise StoreUnavailable("no")

    started = trio.current_time()
    await ask_store(slow, patience=patience)
    for request in (slow, slow, failing):
        try:
            await ask_store(request, patience=patience)
        except StoreUnavailable:
            pass
        else:
            raise AssertionError("it had no time left")
    assert trio.current_time() - started <= 31
