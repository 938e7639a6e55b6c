"""The backlog: cuts are prefixes, nothing is lost or given twice."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka.errors import InternalError
from arka.tiers.backlog import Backlog


def _offsets(backlog: Backlog, through: int, limit: int) -> list[int]:
    cut = backlog.cut(through, limit)
    if cut is None:
        return []
    out: list[int] = []
    for part in cut.slices:
        values = array("Q")
        values.frombytes(part.offsets)
        out += values
    assert len(out) == cut.frames
    return out


def test_cut_respects_lsn_and_bytes() -> None:
    """A cut holds nothing above its LSN, and stops at its size, but never holds nothing when it may hold one."""
    backlog = Backlog()
    for lsn in range(1, 7):
        backlog.add(f"s{lsn // 4}", lsn // 4, 1, lsn, lsn * 100, 10)
    assert _offsets(backlog, 0, 1000) == []
    assert _offsets(backlog, 5, 1000) == [100, 200, 300, 400, 500]
    assert _offsets(backlog, 99, 1) == [100]
    assert _offsets(backlog, 99, 40) == [100, 200, 300, 400]
    backlog.discard_through(2)
    assert _offsets(backlog, 99, 25) == [300, 400]
    assert backlog.first_lsn == 3
    assert backlog.frame_bytes == 40


def test_lsns_must_rise() -> None:
    """A frame out of order is a broken promise, not data."""
    backlog = Backlog()
    backlog.add("s", 1, 1, 5, 0, 10)
    with pytest.raises(InternalError):
        backlog.add("s", 1, 1, 5, 64, 10)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 50), st.booleans()), max_size=40),
    st.integers(1, 120),
    st.data(),
)
def test_cutting_until_empty_gives_each_frame_once(
    frames: list[tuple[int, int, bool]], limit: int, data: st.DataObject
) -> None:
    """Whatever the segments and sizes, repeated cuts give every frame exactly once, in order."""
    backlog = Backlog()
    lsn = segment = 0
    expected = []
    for step, size, roll in frames:
        lsn += step
        segment += roll
        backlog.add(f"s{segment}", segment, 1, lsn, lsn * 64, size)
        expected.append(lsn * 64)
    given_out: list[int] = []
    while backlog:
        through = data.draw(st.integers(backlog.first_lsn or 0, lsn))
        cut = backlog.cut(through, limit)
        assert cut is not None
        given_out += _offsets(backlog, through, limit)
        assert cut.through_lsn <= through
        backlog.discard_through(cut.through_lsn)
    assert given_out == expected
    assert backlog.frame_bytes == 0
