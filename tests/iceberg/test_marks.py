"""A table's mark of a log: what a commit sets is read back, and what others made of it is told (R15)."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from arka.client.resubmit import SentLog, _held_of
from arka.iceberg.marks import mark_of, mark_properties, marks_of
from arka.lineage import MAX_STARTS, CommitMark, Lineage, Start
from arka.tableproperties import committed_lsn_property, epoch_property, token_property

LOG = UUID(int=9)
TABLE, OTHER = UUID(int=1), UUID(int=2)
LSN, EPOCH, TOKEN = committed_lsn_property(LOG), epoch_property(LOG), token_property(LOG)
MADE = mark_properties(LOG, 12, 3, 0xABC)


def test_round_trip() -> None:
    """What a commit sets is read back, with a token and without."""
    assert mark_of(MADE, LOG) == CommitMark(LOG, 12, 3, 0xABC)
    assert marks_of({**MADE, "other": "1"}) == (CommitMark(LOG, 12, 3, 0xABC),)
    assert mark_of(mark_properties(LOG, 12, 3, 0), LOG) == CommitMark(LOG, 12, 3)
    assert mark_of({}, LOG) == CommitMark(LOG, 0, 0)


def test_commit_of_an_older_version() -> None:
    """An older version sets LSN and epoch alone: the token that stays is not its own."""
    assert mark_of({**MADE, LSN: "20", EPOCH: "4"}, LOG) == CommitMark(LOG, 20, 4)


@pytest.mark.parametrize(
    "changed",
    [
        {LSN: "11"},
        {LSN: "13"},
        {LSN: ""},
        {LSN: "twelve"},
        {LSN: "-1"},
        {LSN: "12.0"},
        {LSN: "9" * 30},
        {LSN: None},
        {EPOCH: "2"},
        {EPOCH: "x"},
        {EPOCH: None},
        {LSN: None, EPOCH: None},
        {TOKEN: "garbage"},
        {TOKEN: "3-12-"},
    ],
)
def test_what_others_changed(changed: dict[str, str | None]) -> None:
    """A number that is not the one that the commit set is damage, and the property is named."""
    found = mark_of({name: value for name, value in {**MADE, **changed}.items() if value is not None}, LOG)
    assert any(name in found.damage for name in changed)
    assert Lineage((Start(3, 0xABC, 1),)).objection("t", TABLE, found).startswith("Others changed")


STARTS = Lineage((Start(2, 22, 100), Start(3, 33, 200), Start(6, 66, 300)))


@pytest.mark.parametrize(
    ("mark", "is_ours"),
    [
        (CommitMark(LOG, 0, 0), True),
        (CommitMark(LOG, 99, 1), True),
        (CommitMark(LOG, 99, 1, 11), True),
        (CommitMark(LOG, 100, 1, 11), False),
        (CommitMark(LOG, 150, 2, 22), True),
        (CommitMark(LOG, 200, 2, 22), False),
        (CommitMark(LOG, 150, 2, 23), False),
        (CommitMark(LOG, 150, 2), False),
        (CommitMark(LOG, 299, 3, 33), True),
        (CommitMark(LOG, 250, 4, 44), False),
        (CommitMark(LOG, 250, 4), False),
        (CommitMark(LOG, 10_000, 6, 66), True),
        (CommitMark(LOG, 10_000, 6, 67), False),
        # Whose epoch that is the object store says.
        (CommitMark(LOG, 10_000, 7, 77), True),
    ],
)
def test_whose_mark_it_is(mark: CommitMark, is_ours: bool) -> None:
    """A mark is ours if its start is, and held LSNs that this start may have given."""
    assert (STARTS.problem_of(TABLE, _written(mark)) == "") is is_ours


def _written(mark: CommitMark) -> CommitMark:
    """A mark as a start writes it that has the given token."""
    start = Lineage((Start(mark.epoch, mark.token, 1),))
    return replace(mark, token=start.token_for(TABLE, mark.epoch, mark.committed_lsn))


@pytest.mark.parametrize("epoch", [2, 3, 6])
def test_mark_of_another_table(epoch: int) -> None:
    """A mark that others copied from another table of the same log is not this one's, whichever start made it."""
    lsn = {2: 150, 3: 250, 6: 350}[epoch]
    mark = CommitMark(LOG, lsn, epoch, STARTS.token_for(TABLE, epoch, lsn))
    assert not STARTS.problem_of(TABLE, mark)
    assert "no process of this directory" in STARTS.problem_of(OTHER, mark)
    assert "arka.* properties" in STARTS.objection("u", OTHER, mark)


def test_mark_of_another_table_holds_nothing_of_a_salvaged_log() -> None:
    """What is salvaged is not left out for a mark that others copied from another table."""
    token = STARTS.token_for(TABLE, 6, 350)
    log = SentLog(LOG, 6, lineage=STARTS)
    logs = {str(LOG): {"committed_lsn": 350, "epoch": 6, "token": f"{token:016x}"}}
    assert _held_of({"table_uuid": str(TABLE), "logs": logs}, log) == 350
    assert _held_of({"table_uuid": str(OTHER), "logs": logs}, log) == 0


def test_starts_are_forgotten_from_the_oldest() -> None:
    """The number of starts is bounded; one that takes an epoch again gives way."""
    found = Lineage()
    for epoch in range(1, MAX_STARTS + 10):
        found = found.extended(Start(epoch, epoch, epoch))
    assert [start.epoch for start in found.starts] == list(range(10, MAX_STARTS + 10))
    assert found.extended(Start(MAX_STARTS, 5, 5)).starts[-1] == Start(MAX_STARTS, 5, 5)
