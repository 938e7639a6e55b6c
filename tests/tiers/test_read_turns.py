"""Few reads run at a time, peers take turns, and what waits holds nothing (T27)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from arka.errors import AdmissionRejected, ArkaError, ErrorCode, Unavailable
from arka.tiers.readturns import ReadTurns
from arka.tiers.space import DiskSpace
from arka.tiers.tailroom import TailRoom


class _Reads:
    """Reads that run until they are told to end; the order in which they began is kept."""

    def __init__(self, turns: ReadTurns, nursery: trio.Nursery) -> None:
        self.turns = turns
        self.began: list[str] = []
        self.ends: dict[str, trio.Event] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self._nursery = nursery

    async def start(self, name: str) -> None:
        self.ends[name] = trio.Event()
        self.scopes[name] = trio.CancelScope()
        self._nursery.start_soon(self._run, name)
        await wait_all_tasks_blocked()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await wait_all_tasks_blocked()

    async def _run(self, name: str) -> None:
        with self.scopes[name], self.turns.pending.admit(name[0]) as place:
            async with self.turns.turn(name[0], place):
                self.began.append(name)
                await self.ends[name].wait()


async def test_peers_take_turns() -> None:
    """Whoever has many reads waiting has one after the other begin only in turn with others."""
    turns = ReadTurns(2, 100)
    async with trio.open_nursery() as nursery:
        reads = _Reads(turns, nursery)
        for number in range(5):
            await reads.start(f"a{number}")
        # One of two turns is nobody's to take who has another.
        assert reads.began == ["a0"]
        await reads.start("b0")
        await reads.start("b1")
        await reads.start("c0")
        assert reads.began == ["a0", "b0"]
        assert turns.is_contended("a")
        for name in ("a0", "c0", "a1", "b0", "b1"):
            await reads.end(name)
        # The one with fewest running first, among equals the one whose last read ended longest ago.
        assert reads.began == ["a0", "b0", "c0", "a1", "a2", "b1"]
        nursery.cancel_scope.cancel()
    assert (turns.running, turns.pending.total, list(turns._waiting.peers)) == (0, 0, [])


async def test_one_turn_is_enough() -> None:
    """With a single turn a peer may have it."""
    turns = ReadTurns(1, 1)
    async with trio.open_nursery() as nursery:
        reads = _Reads(turns, nursery)
        await reads.start("a0")
        assert reads.began == ["a0"]
        nursery.cancel_scope.cancel()


async def test_a_read_that_gives_up_leaves_its_place() -> None:
    """Cancelled at whatever moment, a read leaves neither a place nor a turn behind."""
    turns = ReadTurns(3, 100)
    async with trio.open_nursery() as nursery:
        reads = _Reads(turns, nursery)
        for number in range(4):
            await reads.start(f"a{number}")
        reads.scopes["a2"].cancel()
        await wait_all_tasks_blocked()
        # In one turn of the loop a read ends and the next one gives up, before it knows that it has the turn.
        reads.ends["a0"].set()
        reads.scopes["a3"].cancel()
        await wait_all_tasks_blocked()
        assert (turns.running, turns.pending.total, list(turns._waiting.peers)) == (1, 0, [])
        await reads.start("a5")
        assert reads.began[-1] == "a5"
        nursery.cancel_scope.cancel()
    assert (turns.running, turns.pending.total) == (0, 0)


async def test_queues_are_bounded() -> None:
    """A peer's part of those that wait, then the whole; a peer that has none waiting may have one all the same."""
    turns = ReadTurns(1, 4)
    async with trio.open_nursery() as nursery:
        reads = _Reads(turns, nursery)
        for name in ("x0", "a0", "a1", "b0", "b1"):
            await reads.start(name)
        for peer, why in (("a", "2 reads of this client's address"), ("b", "2 reads of this client's address")):
            with pytest.raises(AdmissionRejected, match=why), turns.pending.admit(peer):
                pass
        await reads.start("c0")
        with pytest.raises(AdmissionRejected, match="5 reads wait already, allowed are 4"), turns.pending.admit("c"):
            pass
        assert turns.pending.total == 5
        nursery.cancel_scope.cancel()
    assert (turns.running, turns.pending.total) == (0, 0)


async def test_a_drain_ends_what_waits() -> None:
    """Reads that run go on; those that wait end with ``unavailable``, and none begins any more."""
    turns = ReadTurns(2, 100)
    refused: list[str] = []

    async def read(name: str) -> None:
        try:
            with turns.pending.admit("a") as place:
                async with turns.turn("a", place):
                    await trio.sleep_forever()
        except Unavailable as error:
            refused.append(f"{name}: {error.detail}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, "runs")
        await wait_all_tasks_blocked()
        nursery.start_soon(read, "waits")
        await wait_all_tasks_blocked()
        turns.close("draining")
        await read("late")
        await wait_all_tasks_blocked()
        assert sorted(refused) == ["late: draining", "waits: draining"]
        assert (turns.running, turns.pending.total) == (1, 0)
        nursery.cancel_scope.cancel()
    assert turns.running == 0


def _room(free: int = 1 << 40) -> tuple[TailRoom, ReadTurns]:
    turns = ReadTurns(4, 100)
    space = DiskSpace(limit_bytes=1 << 40, free_bytes=100, used_bytes=0, read_free=lambda: free)
    return TailRoom(1000, space, turns), turns


async def test_copies_share_a_limit(autojump_clock: MockClock) -> None:
    """A copy waits for others to go, in which case others count as waited for; one too large is told at once."""
    room, turns = _room()
    room.check("t", 1000, 7)
    with pytest.raises(ArkaError, match=r"1001 bytes of t .*limits\.read_disk_bytes.*at_lsn 7") as caught:
        room.check("t", 1001, 7)
    assert caught.value.code is ErrorCode.TOO_LARGE
    had: list[float] = []

    async def copy() -> None:
        async with room.copy(600):
            had.append(trio.current_time())
            await trio.sleep(10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(copy)
        await wait_all_tasks_blocked()
        nursery.start_soon(copy)
        nursery.start_soon(copy)
        await wait_all_tasks_blocked()
        assert (len(had), turns.starved, turns.is_contended("z"), room.used_bytes) == (1, 2, True, 600)
    assert [round(at - had[0]) for at in had] == [0, 10, 20]
    assert (turns.starved, turns.is_contended("z"), room.used_bytes) == (0, False, 0)


async def test_a_copy_does_not_take_room_that_writes_need() -> None:
    """With the disk nearly full a read with waiting rows is refused; one of committed rows is not."""
    room, _ = _room(free=120)
    with pytest.raises(AdmissionRejected, match="room for 22 bytes that writes do not need"):
        async with room.copy(23):
            pass
    async with room.copy(0):
        pass
    assert room.used_bytes == 0
