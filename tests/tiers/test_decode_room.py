"""Memory for what batches decode to: bounded, fair, and given back (T14, T26)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from arka.errors import InternalError
from arka.options import KIB, MIB
from arka.tiers.decoderoom import SMALL_BYTES, DecodeRoom, Held

MEMORY = 64 * MIB


async def test_large_batches_wait_and_addresses_take_turns() -> None:
    """Ten of one address came first; another one's is the second to be served."""
    room, served = DecodeRoom(MEMORY), []

    async def decode(peer: str) -> None:
        held = await room.take(peer, 8 * MIB)
        served.append(peer)
        assert room.used_bytes <= room.limit_bytes
        await trio.sleep(0)
        held.release()

    first = room.try_take(8 * MIB)
    assert first is not None
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(decode, "hog")
            await wait_all_tasks_blocked()
        nursery.start_soon(decode, "polite")
        await wait_all_tasks_blocked()
        assert room.waiting == 11
        assert room.try_take(8 * MIB) is None
        first.release()
    assert served.index("polite") <= 1
    assert room.used_bytes == 0


async def test_small_ones_never_wait_for_large_ones() -> None:
    """A large batch has all of its part, and more: small ones have their own."""
    room = DecodeRoom(MEMORY)
    large = await room.take("hog", MEMORY)
    small = [room.try_take(256 * KIB) for _ in range(16)]
    assert None not in small
    assert room.try_take(SMALL_BYTES) is None
    large.release()
    for held in small:
        assert held is not None
        held.release()
    assert room.used_bytes == 0


async def test_more_than_there_is_goes_alone() -> None:
    """A batch larger than all the room is served once nothing else is held."""
    room = DecodeRoom(MEMORY)
    held = await room.take("a", 2 * MIB)
    got: list[Held] = []

    async def take_all() -> None:
        got.append(await room.take("b", 2 * MEMORY))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_all)
        await wait_all_tasks_blocked()
        assert not got
        held.shrink(MIB)
        await wait_all_tasks_blocked()
        assert not got
        held.release()
    got[0].release()
    got[0].release()
    assert room.used_bytes == 0


async def test_a_waiter_that_is_cancelled_holds_up_nobody() -> None:
    """Also when its turn comes in the same pass as its cancellation."""
    room = DecodeRoom(MEMORY)
    held = await room.take("a", 8 * MIB)
    scopes = [trio.CancelScope(), trio.CancelScope()]
    got: list[Held] = []

    async def take(size: int, scope: trio.CancelScope) -> None:
        with scope:
            got.append(await room.take("b", size))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, 9 * MIB, scopes[0])
        await wait_all_tasks_blocked()
        nursery.start_soon(take, 3 * MIB, scopes[1])
        await wait_all_tasks_blocked()
        scopes[0].cancel()
        await wait_all_tasks_blocked()
        # The second fits beside what is held.
        assert len(got) == 1
        got.pop().release()
        scopes[0] = trio.CancelScope()
        nursery.start_soon(take, 9 * MIB, scopes[0])
        await wait_all_tasks_blocked()
        scopes[0].cancel()
        held.release()
    assert not got
    assert (room.used_bytes, room.waiting) == (0, 0)


def test_what_was_not_taken_cannot_be_given_back() -> None:
    """The sum is owned by one object, which looks at it each time."""
    room = DecodeRoom(MEMORY)
    held = room.try_take(4 * MIB)
    assert held is not None
    held.size = 5 * MIB
    with pytest.raises(InternalError, match="more of decoded batches"):
        held.release()
