"""Failpoints: every name stands in the registry and at a place, and a wish that cannot be is refused at start."""

from __future__ import annotations

import ast
import errno
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

import arka
from arka import failpoints
from arka.errors import ConfigurationError
from arka.failpoints import Place

PACKAGE = Path(arka.__file__).parent


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("", server_pid=0)


def test_every_place_is_in_the_registry() -> None:
    """Each name is passed at exactly one place of the source, and trio's places alone are awaited."""
    passed = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("failpoints.hit", "failpoints.reach"):
                (name,) = node.args
                assert isinstance(name, ast.Constant), f"{path}:{node.lineno}"
                passed.append((name.value, ast.unparse(node.func) == "failpoints.reach"))
    assert sorted(passed) == sorted((point.name, point.place is Place.TRIO) for point in failpoints.ALL)
    assert max(Counter(point.name for point in failpoints.ALL).values()) == 1


def test_nothing_set_does_nothing() -> None:
    """Without the variable a place does nothing at all."""
    assert not failpoints.armed()
    failpoints.hit("wal.group_synced")
    failpoints.hit("not even a name")


def test_an_error_comes_at_its_hit_alone() -> None:
    """``eio@2`` fails the second pass, with the failpoint's name in the message, and no other."""
    failpoints.arm("wal.group_written=eio@2, wal.segment_begin=enospc", server_pid=0)
    failpoints.hit("wal.group_written")
    with pytest.raises(OSError, match=r"wal\.group_written") as raised:
        failpoints.hit("wal.group_written")
    assert raised.value.errno == errno.EIO
    failpoints.hit("wal.group_written")
    with pytest.raises(OSError, match=r"wal\.segment_begin") as raised:
        failpoints.hit("wal.segment_begin")
    assert raised.value.errno == errno.ENOSPC


async def test_a_pause_on_trios_thread_is_trios(autojump_clock: MockClock) -> None:
    """A pause in a task of trio's holds that task, not the others."""
    failpoints.arm("objects.put=pause:5", server_pid=0)
    passed: list[float] = []

    async def other() -> None:
        await trio.sleep(1)
        passed.append(trio.current_time())

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await failpoints.reach("objects.put")
        passed.append(trio.current_time())
    assert passed == [began + 1, began + 5]


@pytest.mark.parametrize(
    "text",
    [
        "wal.group=kill",
        "wal.group_synced",
        "wal.group_synced=explode",
        "wal.group_synced=pause",
        "wal.group_synced=kill:1",
        "wal.group_synced=kill@0",
        "wal.group_synced=kill@x",
        "wal.group_synced=pause:x",
        "objects.put=eio",
        "wal.group_synced=kill,,wal.group=kill",
    ],
)
def test_what_cannot_be_is_refused(text: str) -> None:
    """An unknown name, an unknown action or one that the place does not have is an error that says so."""
    with pytest.raises(ConfigurationError, match="ARKA_FAILPOINTS"):
        failpoints.arm(text, server_pid=0)
