"""Sorted runs: what is found in them, what several come to, and that damage is noticed."""

from __future__ import annotations

import hashlib
import os
import random
from array import array
from pathlib import Path

import pytest

from arka._core.runs import (
    REMOVED,
    UNLESS_THERE,
    FileMap,
    Run,
    RunDamaged,
    copy_run,
    find_rows,
    find_shadowed,
    merge_runs,
    write_run,
)

Entries = dict[bytes, tuple[int, int]]


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def in_order(found: bytes) -> tuple[int, int]:
    return int.from_bytes(found[:8], "little"), int.from_bytes(found[8:], "little")


class Folder:
    """Makes runs in a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made = 0

    def new_file(self) -> int:
        self._made += 1
        return os.open(self._path / f"{self._made}.run", os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def write(self, entries: Entries) -> Run:
        fd = self.new_file()
        parts = []
        for file in {file for file, _ in entries.values()}:
            mine = {hash_: row for hash_, (number, row) in entries.items() if number == file}
            parts.append((b"".join(mine), file, array("I", mine.values()).tobytes()))
        return self._read(fd, write_run(fd, parts))

    def merge(self, runs: list[Run], *, keep_removed: bool) -> Run:
        fd = self.new_file()
        count, _ = merge_runs(fd, runs, keep_removed=keep_removed)
        run = self._read(fd, os.fstat(fd).st_size)
        assert len(run) == count
        return run

    def merge_all(self, runs: list[Run]) -> tuple[Run, Run]:
        """Merge runs and keep what is shadowed."""
        fds = self.new_file(), self.new_file()
        counts = merge_runs(fds[0], runs, keep_removed=False, shadowed_fd=fds[1])
        made = [self._read(fd, os.fstat(fd).st_size) for fd in fds]
        assert (len(made[0]), len(made[1])) == counts
        return made[0], made[1]

    def _read(self, fd: int, size: int) -> Run:
        data = os.pread(fd, size + 1, 0)
        os.close(fd)
        assert len(data) == size
        return Run(data)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def find(wanted: Run, runs: list[Run]) -> Entries:
    files, rows = (memoryview(part).cast("B").cast("I") for part in find_rows(wanted, runs))
    return {
        hash_: (file, row)
        for (hash_, _, _), file, row in zip(wanted.entries(), files, rows, strict=True)
        if file != REMOVED
    }


def all_shadowed(wanted: Run, shadowed: Run) -> list[tuple[bytes, int, int]]:
    numbers, files, rows = (memoryview(part).cast("B").cast("I") for part in find_shadowed(wanted, shadowed))
    names = [hash_ for hash_, _, _ in wanted.entries()]
    return sorted((names[number], file, row) for number, file, row in zip(numbers, files, rows, strict=True))


@pytest.mark.parametrize(("keys", "most"), [(1, 1), (3, 400), (200, 3), (5_000, 4)])
def test_shadowed_entries_are_all_found(folder: Folder, keys: int, most: int) -> None:
    """Every older entry of a key is found, over any number of blocks, and none of other keys."""
    pick = random.Random(keys)
    older = [
        (key(n), pick.randrange(5), pick.randrange(1000)) for n in range(keys) for _ in range(pick.randint(1, most))
    ]
    fd = folder.new_file()
    parts = []
    for file in range(5):
        mine = [(hash_, row) for hash_, number, row in older if number == file]
        parts.append((b"".join(h for h, _ in mine), file, array("I", [row for _, row in mine]).tobytes()))
    write_run(fd, parts, shadowed=True)
    shadowed = Run(os.pread(fd, os.fstat(fd).st_size, 0), 7)
    os.close(fd)
    asked = {key(n): (0, n) for n in pick.sample(range(2 * keys), keys)}
    found = all_shadowed(folder.write(asked), shadowed)
    assert found == sorted((hash_, file + 7, row) for hash_, file, row in older if hash_ in asked)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 40])
def test_many_runs_become_one(folder: Folder, count: int) -> None:
    """However many there are, some of them empty: the newest entry of each key, in order."""
    pick = random.Random(count)
    layers = [
        {key(n): (layer, n) for n in pick.sample(range(900), pick.choice([0, 1, 170, 500]))} for layer in range(count)
    ]
    newest: Entries = {}
    for layer in layers[::-1]:
        newest.update(layer)
    merged, under = folder.merge_all([folder.write(layer) for layer in layers])
    assert merged.entries() == [(hash_, *newest[hash_]) for hash_ in sorted(newest, key=in_order)]
    assert len(under) == sum(map(len, layers)) - len(newest)


def test_shadowed_runs_become_one(folder: Folder) -> None:
    """All entries of a key stay, whichever run they were in."""
    pick = random.Random(5)
    runs, expected = [], []
    for layer in range(5):
        older = [(key(n), layer, row) for n in range(0, 400, layer + 1) for row in range(pick.randint(1, 3))]
        fd = folder.new_file()
        rows = array("I", [row for _, _, row in older]).tobytes()
        size = write_run(fd, [(b"".join(hash_ for hash_, _, _ in older), 0, rows)], shadowed=True)
        runs.append(Run(os.pread(fd, size, 0), layer))
        os.close(fd)
        expected += older
    fd = folder.new_file()
    assert merge_runs(fd, runs, keep_removed=False, shadowed=True) == (len(expected), 0)
    merged = Run(os.pread(fd, os.fstat(fd).st_size, 0))
    os.close(fd)
    asked = folder.write({key(n): (0, n) for n in range(400)})
    assert all_shadowed(asked, merged) == sorted(expected)


def test_merging_keeps_what_it_shadows(folder: Folder) -> None:
    """Of each key the newest entry stays, the others are in the run beside it; those without a row in neither."""
    layers = [{key(n): (layer, n) for n in range(0, 600, step)} for layer, step in enumerate((1, 2, 3))]
    layers[1][key(6)] = (REMOVED, 0)
    runs = [folder.write(layer) for layer in layers]
    merged, shadowed = folder.merge_all(runs[::-1])
    newest: Entries = {}
    older = []
    for layer in layers:
        older += [(hash_, *newest[hash_]) for hash_ in layer if hash_ in newest and newest[hash_][0] != REMOVED]
        newest |= layer
    assert find(runs[0], [merged]) == newest
    assert all_shadowed(runs[0], shadowed) == sorted(older)


def test_a_mapped_file_outlives_its_descriptor(folder: Folder) -> None:
    """A map is readable after its file was closed, takes no descriptor, and cannot be written to."""
    fd = folder.new_file()
    os.write(fd, b"x" * 5000)
    mapped = FileMap(fd, 5000)
    os.close(fd)
    view = memoryview(mapped)
    del mapped
    assert view.readonly
    assert view.tobytes() == b"x" * 5000
    with pytest.raises(OSError, match="Bad file descriptor"):
        FileMap(fd, 5000)


@pytest.mark.parametrize("count", [0, 1, 2, 169, 170, 171, 340, 341, 20_000, 50_000])
def test_entries_come_back_sorted(folder: Folder, count: int) -> None:
    """A run holds what was written, by hash, whatever the order and the number of blocks."""
    entries = {key(n): (n % 7, n) for n in range(count)}
    run = folder.write(entries)
    assert len(run) == count
    found = run.entries()
    assert {hash_: (file, row) for hash_, file, row in found} == entries
    assert [hash_ for hash_, _, _ in found] == sorted(entries, key=in_order)
    assert find(run, [run]) == entries


def test_hashes_that_are_no_longer_random(folder: Folder) -> None:
    """Hashes that share their upper halves, or all lie at one end, are found all the same."""
    hashes = [bytes(8) + n.to_bytes(8, "little") for n in range(1_000)]
    hashes += [b"\xff" * 8 + n.to_bytes(8, "little") for n in range(1_000)]
    hashes += [n.to_bytes(8, "little") + bytes(8) for n in range(1, 1_000)]
    entries = {hash_: (1, n) for n, hash_ in enumerate(hashes)}
    run = folder.write(entries)
    assert find(run, [run]) == entries
    for some in (hashes[::17], hashes[::5] + [key(n) for n in range(100)]):
        assert find(folder.write(dict.fromkeys(some, (0, 0))), [run]) == {h: entries[h] for h in some if h in entries}


@pytest.mark.parametrize("seed", range(5))
def test_newer_runs_hide_older_ones(folder: Folder, seed: int) -> None:
    """The newest run that has a key decides, in a lookup and in a merge of any neighbours."""
    pick = random.Random(seed)
    truth: Entries = {}
    runs: list[Run] = []
    for number in range(6):
        size = pick.choice((0, 1, 50, 3_000))
        made = {
            key(pick.randrange(4_000)): (REMOVED if pick.random() < 0.2 else number, pick.randrange(1 << 32))
            for _ in range(size)
        }
        truth.update(made)
        runs.insert(0, folder.write(made))
    present = {hash_: place for hash_, place in truth.items() if place[0] != REMOVED}
    everything = folder.write({key(n): (0, 0) for n in range(4_100)})
    assert find(everything, runs) == present
    some = folder.merge(runs[1:4], keep_removed=True)
    assert find(everything, [runs[0], some, *runs[4:]]) == present
    all_of_them = folder.merge(runs, keep_removed=False)
    assert {hash_: (file, row) for hash_, file, row in all_of_them.entries()} == present
    assert find(everything, [all_of_them]) == present
    assert find(everything, []) == {}


def test_doubled_hash_is_refused(folder: Folder) -> None:
    """A key has one place in a run."""
    with pytest.raises(ValueError, match="same hash"):
        write_run(folder.new_file(), [(key(1), 0, None), (key(1), 1, None)])
    with pytest.raises(ValueError, match="15 bytes of hashes, None of rows"):
        write_run(folder.new_file(), [(bytes(15), 0, None)])
    with pytest.raises(ValueError, match="16 bytes of hashes, 8 of rows"):
        write_run(folder.new_file(), [(bytes(16), 0, bytes(8))])


def test_disk_that_takes_nothing() -> None:
    """An error of the file is told with its number."""
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"):
        write_run(fd, [(key(1), 0, None)])
    os.close(fd)


def test_bases_conditions_and_copies(folder: Folder) -> None:
    """File numbers count from a run's base, but for removed keys; a copy leaves entries out, and conditions."""
    run = folder.write({key(n): (REMOVED if n % 3 == 0 else n % 5, n | UNLESS_THERE) for n in range(500)})
    data = (folder._path / "1.run").read_bytes()
    shifted = Run(data, 1_000)
    assert [file for _, file, _ in shifted.entries()] == [
        file if file == REMOVED else file + 1_000 for _, file, _ in run.entries()
    ]
    assert find(run, [shifted]) == {h: (file, row) for h, file, row in shifted.entries() if file != REMOVED}
    assert folder.merge([shifted], keep_removed=True).entries() == shifted.entries()
    files, rows = (memoryview(part).cast("B").cast("I") for part in shifted.places())
    assert [*zip(files, rows, strict=True)] == [entry[1:] for entry in shifted.entries()]
    keep = bytes(n % 2 for n in range(500))
    fd = folder.new_file()
    copied = folder._read(fd, copy_run(fd, run, keep))
    expected = [
        (h, file, row & ~UNLESS_THERE) for (h, file, row), kept in zip(run.entries(), keep, strict=True) if kept
    ]
    assert copied.entries() == expected
    with pytest.raises(ValueError, match="1 bytes for 500 entries"):
        copy_run(folder.new_file(), run, b"1")


def test_rows_that_are_counted(folder: Folder) -> None:
    """Without numbers, a part's rows are 0, 1 and so on."""
    fd = folder.new_file()
    size = write_run(fd, [(b"".join(key(n) for n in range(300)), 4, None), (b"", 5, None)])
    run = folder._read(fd, size)
    assert find(run, [run]) == {key(n): (4, n) for n in range(300)}


def test_each_flipped_bit_is_found(folder: Folder) -> None:
    """A flipped bit anywhere, or a cut end, is an error and never another answer."""
    run = folder.write({key(n): (n, n) for n in range(200)})
    entries = run.entries()
    path = folder._path / "1.run"
    data = bytearray(path.read_bytes())
    unread = 0
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        try:
            assert Run(bytes(data)).entries() == entries
            unread += 1
            assert 20 <= at < 4096, at
        except RunDamaged:
            pass
        data[at] ^= 1 << at % 8
    # The padding of the header says nothing.
    assert unread == 4096 - 20
    for size in (0, 7, 4096, 4099, len(data) - 1):
        with pytest.raises(RunDamaged):
            Run(bytes(data[:size]))
    with pytest.raises(RunDamaged):
        Run(bytes(data) + b"\0")


def test_damage_in_lookups_and_merges(folder: Folder) -> None:
    """A damaged block is an error for whoever needs it, and for nobody else."""
    whole = folder.write({key(n): (n, n) for n in range(2_000)})
    data = bytearray((folder._path / "1.run").read_bytes())
    data[4096 * 5] ^= 1
    *_, last = whole.entries()
    for at, (hash_, _, _) in enumerate(whole.entries()):
        wanted = folder.write({hash_: (0, 0)})
        if at // 170 == 4:
            with pytest.raises(RunDamaged, match="block 4 of a run, at offset 20480"):
                find_rows(wanted, [Run(bytes(data))])
            if at > 4 * 170 + 3:
                break
        elif at < 3:
            assert find(wanted, [Run(bytes(data))])
    assert find(folder.write({last[0]: (0, 0)}), [Run(bytes(data))]) == {last[0]: last[1:]}
    with pytest.raises(RunDamaged):
        merge_runs(folder.new_file(), [whole, Run(bytes(data))], keep_removed=False)
