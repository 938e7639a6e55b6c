"""What every ``Disk`` must do: checks that the real and the simulated one both pass.

Owns: the checks. Each takes a disk and a fresh directory, and raises AssertionError. What only a crash
can show is checked on the simulated disk alone (tests/wal).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import trio

from arka._core.framing import KIND_LOST, Frame, Group, crc_seed, verify_frame
from arka.storage.ports import Disk, DiskFile

Check = Callable[[Disk, Path], Awaitable[None]]


def _expect(error: type[BaseException], call: Callable[[], object]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"expected {error.__name__}")


async def _create(disk: Disk, path: Path) -> DiskFile:
    def job() -> DiskFile:
        disk.make_directory(path.parent)
        return disk.create(path, 8192)

    return await disk.run(job)


async def check_run(disk: Disk, directory: Path) -> None:
    """``run`` returns what the job returns and raises what it raises."""
    assert await disk.run(lambda: 7) == 7
    try:
        await disk.run(lambda: disk.open(directory / "absent"))
    except FileNotFoundError:
        pass
    else:
        raise AssertionError("expected FileNotFoundError")


async def check_run_cancelled_before(disk: Disk, directory: Path) -> None:
    """A job whose caller is cancelled before it begins does not run."""
    ran: list[int] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await disk.run(lambda: ran.append(1))
    assert scope.cancelled_caught
    assert not ran


async def check_create(disk: Disk, directory: Path) -> None:
    """A new file is zeros of its size, and its name cannot be created twice."""

    def job() -> None:
        disk.make_directory(directory)
        path = directory / "a"
        disk.create(path, 10_000).close()
        assert bytes(disk.map(path)) == bytes(10_000)
        _expect(FileExistsError, lambda: disk.create(path, 0))
        disk.create(directory / "empty", 0).close()
        assert bytes(disk.map(directory / "empty")) == b""

    await disk.run(job)


async def check_write(disk: Disk, directory: Path) -> None:
    """Parts are written joined, at the offset, also beyond the end; ``release_tail`` keeps the length."""

    def job() -> None:
        disk.make_directory(directory)
        path = directory / "a"
        file = disk.create(path, 100)
        file.write(98, [b"ab", memoryview(b"cd"), b"", bytearray(b"ef")])
        file.write(0, [bytes([i % 251]) for i in range(3000)])
        file.sync()
        expected = bytes(i % 251 for i in range(3000))
        assert bytes(disk.map(path)) == expected
        file.write(20_000, [b"z"])
        file.release_tail(3000)
        file.sync()
        found = bytes(disk.map(path))
        assert len(found) == 20_001
        assert found[:3000] == expected
        file.close()
        file.close()
        again = disk.open(path)
        again.write(0, [b"!"])
        again.close()
        assert bytes(disk.map(path))[:2] == b"!" + expected[1:2]

    await disk.run(job)


async def check_commit(disk: Disk, directory: Path) -> None:
    """A group is sealed and written at its offset."""

    def job() -> None:
        disk.make_directory(directory)
        path = directory / "a"
        file = disk.create(path, 4096)
        seed = crc_seed(UUID(int=1), 2, 3)
        frames = [Frame(KIND_LOST, lsn, payload=b"x" * 100 * lsn, accepted_us=0) for lsn in (1, 2, 3)]
        file.commit(Group(frames, 64, seed))
        file.close()
        data = disk.map(path)
        assert [verify_frame(data, frame.offset, seed).lsn for frame in frames] == [1, 2, 3]

    await disk.run(job)


async def check_commit_apart(disk: Disk, directory: Path) -> None:
    """``Disk.commit`` does the same, one group after another, and says which file fails."""
    seed = crc_seed(UUID(int=1), 2, 3)
    path = directory / "a"
    file = await _create(disk, path)
    offset = 64
    frames = []
    for lsn in range(1, 9):
        frames.append(Frame(KIND_LOST, lsn, payload=b"x" * 100 * lsn, accepted_us=0))
        group = Group(frames[-1:], offset, seed)
        await disk.commit(file, group)
        offset += group.size
    data = await disk.run(partial(disk.map, path))
    assert [verify_frame(data, frame.offset, seed).lsn for frame in frames] == list(range(1, 9))
    file.close()
    try:
        await disk.commit(file, Group([Frame(KIND_LOST, 9, payload=b"", accepted_us=0)], offset, seed))
    except OSError as error:
        if error.filename != str(path):
            raise AssertionError(f"expected {path} to be named") from error
    else:
        raise AssertionError("expected OSError")


async def check_commit_cancelled_before(disk: Disk, directory: Path) -> None:
    """A commit whose caller is cancelled before it begins writes nothing, and another one works."""
    seed = crc_seed(UUID(int=1), 2, 3)
    path = directory / "a"
    file = await _create(disk, path)
    group = Group([Frame(KIND_LOST, 1, payload=b"x", accepted_us=0)], 64, seed)
    with trio.CancelScope() as scope:
        scope.cancel()
        await disk.commit(file, group)
    assert scope.cancelled_caught
    assert bytes(await disk.run(partial(disk.map, path))) == bytes(8192)
    await disk.commit(file, group)
    assert verify_frame(await disk.run(partial(disk.map, path)), 64, seed).lsn == 1
    file.close()


async def check_names(disk: Disk, directory: Path) -> None:
    """Names are listed sorted; renaming replaces; removing twice is no error; what is mapped stays."""

    def job() -> None:
        assert disk.list_names(directory) == []
        disk.make_directory(directory)
        disk.make_directory(directory)
        for name in ("c", "a", "b"):
            file = disk.create(directory / name, 0)
            file.write(0, [name.encode()])
            file.close()
        assert disk.list_names(directory) == ["a", "b", "c"]
        view = disk.map(directory / "b")
        disk.rename(directory / "a", directory / "b")
        disk.remove(directory / "c")
        disk.remove(directory / "c")
        disk.sync_directory(directory)
        assert disk.list_names(directory) == ["b"]
        assert bytes(disk.map(directory / "b")) == b"a"
        assert bytes(view) == b"b", "what was mapped stays"
        _expect(FileNotFoundError, lambda: disk.map(directory / "a"))
        _expect(FileNotFoundError, lambda: disk.open(directory / "a"))
        _expect(FileNotFoundError, lambda: disk.rename(directory / "a", directory / "x"))
        assert disk.free_bytes(directory) > 0

    await disk.run(job)


#: All checks, by name.
CHECKS: dict[str, Check] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_run,
        check_run_cancelled_before,
        check_create,
        check_write,
        check_commit,
        check_commit_apart,
        check_commit_cancelled_before,
        check_names,
    )
}

__all__ = ["CHECKS", "Check"]
