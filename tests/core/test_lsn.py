"""LSN allocation: rising, never twice, never at or above the ceiling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka._core.lsn import LSN_END, LsnAllocator, LsnExhausted
from arka.errors import Unavailable
from arka.records import MAX_LSN


def test_gives_each_lsn_once_up_to_the_ceiling() -> None:
    """LSNs begin at ``next_lsn`` and end below the ceiling; then the error says that it may pass (R2)."""
    allocator = LsnAllocator(5, 8)
    assert (allocator.next, allocator.last, allocator.ceiling, allocator.remaining) == (5, 4, 8, 3)
    assert [allocator.allocate() for _ in range(3)] == [5, 6, 7]
    assert (allocator.next, allocator.last, allocator.remaining) == (8, 7, 0)
    for _ in range(2):
        with pytest.raises(LsnExhausted, match="8") as caught:
            allocator.allocate()
    assert isinstance(caught.value, Unavailable)
    assert caught.value.retryable
    allocator.raise_ceiling(9)
    assert allocator.allocate() == 8


def test_stays_below_two_to_the_53() -> None:
    """The last LSN of all is 2**53 - 1: larger ones are no JSON integers for all clients (protocol 3.1)."""
    assert LSN_END == MAX_LSN + 1
    allocator = LsnAllocator(MAX_LSN, LSN_END)
    assert allocator.allocate() == MAX_LSN
    with pytest.raises(LsnExhausted):
        allocator.allocate()
    with pytest.raises(ValueError, match=r"2\*\*53"):
        allocator.raise_ceiling(LSN_END + 1)


@pytest.mark.parametrize(
    ("next_lsn", "ceiling", "error"),
    [
        (0, 5, ValueError),
        (6, 5, ValueError),
        (1, LSN_END + 1, ValueError),
        (-1, 5, OverflowError),
        (1, 2**64, OverflowError),
    ],
)
def test_impossible_bounds_are_refused(next_lsn: int, ceiling: int, error: type[Exception]) -> None:
    """LSN 0 is no LSN, and no bound may pass the end."""
    with pytest.raises(error):
        LsnAllocator(next_lsn, ceiling)


def test_an_empty_block_gives_nothing() -> None:
    """A ceiling equal to the next LSN is legal and gives nothing until it is raised."""
    allocator = LsnAllocator(1, 1)
    with pytest.raises(LsnExhausted):
        allocator.allocate()


@given(st.lists(st.one_of(st.none(), st.integers(-3, 5)), max_size=60))
def test_ceiling_only_rises(moves: list[int | None]) -> None:
    """Whatever is asked, LSNs rise by one and stay below a ceiling that never falls."""
    allocator = LsnAllocator(1, 4)
    given_lsns = []
    for move in moves:
        ceiling = allocator.ceiling
        if move is None:
            if allocator.remaining:
                given_lsns.append(allocator.allocate())
            else:
                with pytest.raises(LsnExhausted):
                    allocator.allocate()
        elif move < 0:
            with pytest.raises(ValueError, match="only rise"):
                allocator.raise_ceiling(ceiling + move)
            assert allocator.ceiling == ceiling
        else:
            allocator.raise_ceiling(ceiling + move)
            assert allocator.ceiling == ceiling + move
        assert allocator.last < allocator.ceiling
    assert given_lsns == list(range(1, len(given_lsns) + 1))


def test_leaves_some_for_others() -> None:
    """Who asks for a new thing leaves LSNs for the outcome of others; they can all be given."""
    allocator = LsnAllocator(1, 11)
    assert [allocator.allocate(4) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(LsnExhausted):
        allocator.allocate(4)
    assert [allocator.allocate() for _ in range(4)] == [7, 8, 9, 10]
    with pytest.raises(LsnExhausted):
        allocator.allocate()
