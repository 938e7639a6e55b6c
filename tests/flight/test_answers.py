"""Answers of DoGet wait in a bounded buffer, and slow clients end where others wait (T27)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from arka.errors import ArkaError, ErrorCode, Unavailable
from arka.flight.answers import RATE_S, AnswerBuffers, BufferedAnswer, check_rate, deliver

PART = bytes(10)


class _Client:
    """A call whose client reads at a rate."""

    def __init__(self, bytes_per_s: float = float("inf")) -> None:
        self.received: list[bytes] = []
        self._bytes_per_s = bytes_per_s

    async def send_bytes(self, part: bytes) -> None:
        if not self._bytes_per_s:
            await trio.sleep_forever()
        await trio.sleep(len(part) / self._bytes_per_s)
        self.received.append(part)


async def _fill(answer: BufferedAnswer, parts: int) -> None:
    for _ in range(parts):
        await answer.add(PART)
    await answer.end()


@contextlib.asynccontextmanager
async def _filling(*answers: tuple[BufferedAnswer, int]) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        for answer, parts in answers:
            nursery.start_soon(_fill, answer, parts)
            await wait_all_tasks_blocked()
        yield nursery
        nursery.cancel_scope.cancel()


async def test_the_buffer_is_bounded() -> None:
    """However much reads find, no more waits than the buffer has; each has its share, whatever others hold."""
    buffers = AnswerBuffers(800, 4)
    greedy, modest = BufferedAnswer(buffers), BufferedAnswer(buffers)
    async with _filling((greedy, 1000), (modest, 1000)):
        assert (greedy.waiting_bytes, modest.waiting_bytes, buffers.common_bytes) == (500, 100, 0)
        # What is taken can be filled again, from the common half first.
        assert await greedy.take() == PART
        await wait_all_tasks_blocked()
        assert greedy.waiting_bytes + modest.waiting_bytes == 600
        assert buffers.common_bytes == 0
    greedy.close()
    modest.close()
    assert buffers.common_bytes == 400
    assert buffers.waiting == 0


async def test_a_slow_client_with_little_left_holds_no_reader() -> None:
    """An answer that is read to its end leaves its reader's share as soon as the rest fits into the common half."""
    buffers = AnswerBuffers(800, 4)
    large, small = BufferedAnswer(buffers), BufferedAnswer(buffers)
    async with _filling((large, 50), (small, 5)):
        assert (large.reading, large.waiting_bytes) == (True, 500)
        assert (small.reading, small.waiting_bytes) == (True, 50)
        for _ in range(5):
            await large.take()
        await wait_all_tasks_blocked()
        # The larger one gave 50 bytes of the common half back: that is enough for the smaller one alone.
        assert (large.reading, small.reading) == (True, False)
        while large.waiting_bytes:
            await large.take()
        await wait_all_tasks_blocked()
        assert not large.reading
        assert await large.take() is None
        assert [await small.take() for _ in range(6)] == [PART] * 5 + [None]
    assert buffers.common_bytes == 400


async def test_a_part_larger_than_all_shares_passes() -> None:
    """A share smaller than what comes at once holds nothing up."""
    buffers = AnswerBuffers(8, 4)
    answer = BufferedAnswer(buffers)
    async with _filling((answer, 3)):
        for _ in range(3):
            assert await answer.take() == PART
            await wait_all_tasks_blocked()
        assert await answer.take() is None
    assert buffers.common_bytes == 4


async def test_an_error_comes_behind_what_was_found() -> None:
    """What is in the buffer is sent before the error that the read ended with."""
    answer, client = BufferedAnswer(AnswerBuffers(800, 4)), _Client()
    await answer.add(PART)
    answer.fail(Unavailable("the store does not answer"))
    with pytest.raises(Unavailable, match="the store does not answer"):
        await deliver(client, answer, 60)  # type: ignore[arg-type]
    assert client.received == [PART]


async def test_schema_and_messages_are_framed() -> None:
    """A schema goes out without the marks of the scan; prefix and head say how long the body is."""
    schema = pa.schema([pa.field("n", pa.int64(), metadata={"PARQUET:field_id": "1"})], metadata={"arka.x": "1"})
    answer, client = BufferedAnswer(AnswerBuffers(1 << 20, 4)), _Client()
    await answer.begin(pa.ipc.read_message(schema.serialize()).metadata.to_pybytes(), 0)
    await answer.begin(b"H" * 16, 20)
    await answer.add(PART)
    await answer.add(PART)
    await answer.end()
    await deliver(client, answer, 60)  # type: ignore[arg-type]
    first, second, *body = client.received
    assert int.from_bytes(first[1:5], "big") == len(first) - 5
    assert b"field_id" not in first
    assert b"arka" not in first
    assert int.from_bytes(second[1:5], "big") == len(second) - 5 + 20
    assert body == [PART, PART]


async def test_a_client_that_stops_reading(autojump_clock: MockClock) -> None:
    """Nothing taken for ``limits.message_stall_s``: the answer ends, others waiting or not."""
    answer, client = BufferedAnswer(AnswerBuffers(800, 4)), _Client(0)
    async with _filling((answer, 1000)):
        with pytest.raises(ArkaError, match="message_stall_s") as caught:
            await deliver(client, answer, 60)  # type: ignore[arg-type]
        assert caught.value.code is ErrorCode.OVERLOADED
        assert answer.too_slow
        assert trio.current_time() == pytest.approx(60, abs=1)


@pytest.mark.parametrize("contended", [False, True])
@pytest.mark.parametrize(("rate", "slow"), [(20, True), (99, True), (150, False)])
async def test_a_slow_client_ends_where_others_wait(
    autojump_clock: MockClock, rate: int, slow: bool, contended: bool
) -> None:
    """Below the least rate over ``RATE_S`` the answer ends with ``overloaded``, but only if somebody waits (T25)."""
    answer, client = BufferedAnswer(AnswerBuffers(800, 4)), _Client(rate)
    ended: list[ArkaError] = []

    async def check() -> None:
        try:
            await check_rate(answer, 100, lambda: contended)  # type: ignore[arg-type]
        except ArkaError as error:
            ended.append(error)

    async with _filling((answer, 600)) as nursery:
        nursery.start_soon(deliver, client, answer, 60)
        await check()
        if slow and contended:
            assert [error.code for error in ended] == [ErrorCode.OVERLOADED]
            assert "min_bytes_per_s" in ended[0].detail
            assert answer.too_slow
            assert RATE_S <= trio.current_time() <= RATE_S + 2
        else:
            # All of it went out.
            assert not ended
            assert len(client.received) >= 599


async def test_a_slow_reader_is_not_its_clients_fault(autojump_clock: MockClock) -> None:
    """A client that takes all there is keeps its answer, however slowly the warehouse gives it."""
    answer, client = BufferedAnswer(AnswerBuffers(800, 4)), _Client()

    async def find_slowly() -> None:
        # Between two looks at the rate: at one, a part would be found that its client had no time to take.
        await trio.sleep(0.5)
        for _ in range(30):
            await trio.sleep(1)
            await answer.add(PART)
        await answer.end()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(find_slowly)
        nursery.start_soon(check_rate, answer, 100, lambda: True)
        await deliver(client, answer, 60)  # type: ignore[arg-type]
    assert len(client.received) == 30
