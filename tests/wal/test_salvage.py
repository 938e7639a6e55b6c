"""Salvage: what is intact is copied, what is not is named, and nothing else comes out (R7, R13)."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from arka._core.framing import KIND_CREATE, KIND_LOST, Frame, Group
from arka.errors import ConfigurationError
from arka.records import LsnRange, Operation
from arka.storage.disk import PosixDisk
from arka.testing.simdisk import SimDisk
from arka.wal.logstate import STATE_NAME, LogState
from arka.wal.salvage import REPORT_NAME, LogReader, copy_log
from arka.wal.seal import SEAL_NAME
from arka.wal.segment import HEADER_BYTES, GroupMark, SegmentHeader, encode_lost, segment_name
from arka.wal.spans import LsnSpan, append_lsn, merge_spans, subtract_spans
from arka.wal.survey import LogSurvey, survey_log

from .logs import (
    DIRECTORY,
    LOG,
    SCHEMA,
    TABLE,
    batch_frame,
    batch_frames,
    make_batch,
    make_disk,
    make_table,
    open_log,
    recover_log,
)

TABLES = (TABLE, make_table(2))
CEILING = 1_000


@dataclass
class Log:
    """A log as it was written: its files, and where each LSN's frame is."""

    disk: SimDisk
    files: dict[str, bytes]
    frames: list[Frame]
    places: dict[int, tuple[str, int, int]]

    @property
    def lsns(self) -> set[int]:
        return {frame.lsn for frame in self.frames}

    def copy(self, files: dict[str, bytes | None]) -> SimDisk:
        """A disk with this log, but for these files; None for one that is gone."""
        disk = make_disk()
        disk.make_directory(DIRECTORY)
        for name, content in (self.files | files).items():
            if content is not None:
                disk.create(DIRECTORY / name, 0)
                disk.damage(DIRECTORY / name, content)
        return disk


async def write_log(*, closed: bool, segment_bytes: int = 9 * 1024, seed: int = 0, count: int = 40) -> Log:
    """Write LSNs 1 to ``count`` of two tables, in groups of several, over some segments."""
    rng = random.Random(seed)
    disk = make_disk()
    await LogState.create(DIRECTORY, disk, log_uuid=LOG, epoch=1, lsn_ceiling=CEILING, store_ceiling=1 << 40)
    writer = await open_log(disk, segment_bytes=segment_bytes)
    frames = [batch_frame(lsn, rows=rng.randint(1, 20), table=rng.choice(TABLES)) for lsn in range(1, count + 1)]
    places = {}
    at = 0
    while at < len(frames):
        size = rng.randint(1, 6)
        for part in await writer.append(frames[at : at + size]):
            for frame in part.frames:
                places[frame.lsn] = part.segment.path.name, frame.offset, frame.offset + frame.frame_bytes
        at += size
    if closed:
        await writer.close()
    disk.kill()
    files = {name: disk.read(DIRECTORY / name) for name in disk.list_names(DIRECTORY)}
    return Log(disk, {name: data for name, data in files.items() if not name.endswith(".new")}, frames, places)


def salvage(disk: SimDisk, frames: list[Frame]) -> tuple[LogSurvey, list[int]]:
    """Survey a log and read its writes; each must be what was written under its LSN."""
    steps = disk.steps
    survey = survey_log(DIRECTORY, disk)
    reader = LogReader(survey, disk)
    rows = {frame.lsn: frame for frame in frames}
    lsns = []
    for write in reader.writes():
        written = rows[write.lsn]
        assert write.batch.equals(make_batch(write.lsn, written.rows))
        assert write.key == b"key-%d" % write.lsn
        assert (write.table.uuid, write.operation) == (written.table.uuid, Operation.UPSERT)
        lsns.append(write.lsn)
    assert reader.unreadable == []
    assert lsns == sorted(set(lsns)), "each once, in order"
    assert disk.steps == steps, "nothing is written"
    return survey, lsns


def is_in(lsn: int, span: LsnSpan) -> bool:
    return span.first <= lsn and (span.last is None or lsn <= span.last)


def check_accounts(log: Log, survey: LogSurvey, lsns: list[int]) -> set[int]:
    """What was copied and what is called missing or torn is everything that was written; returns the missing."""
    copied = set(lsns)
    missing = {lsn for lsn in log.lsns for found in survey.missing if is_in(lsn, found.span)}
    torn = {lsn for lsn in log.lsns - copied for end in survey.torn if lsn > end.after_lsn}
    assert copied | missing | torn == log.lsns
    assert copied.isdisjoint(missing)
    assert copied == {lsn for lsn in log.lsns for span in survey.intact if is_in(lsn, span)}
    for found in survey.missing:
        # Up to an LSN that was never given only where nothing says where the log ended.
        assert found.span.first in log.lsns | {max(log.lsns) + 1}
        assert found.span.last in {*log.lsns, CEILING - 1, None}
    if missing or torn:
        assert survey.damaged or survey.torn
    return missing


@pytest.mark.parametrize("closed", [False, True])
async def test_whole_log_comes_out(closed: bool) -> None:
    """Of a log that a start would accept every write comes out, and nothing is missing."""
    log = await write_log(closed=closed)
    assert len([name for name in log.files if name.endswith(".wal")]) > 3
    survey, lsns = salvage(log.copy({}), log.frames)
    assert set(lsns) == log.lsns
    assert (survey.missing, survey.damaged, survey.torn) == ([], [], [])
    assert survey.intact == [LsnSpan(1, 40)]
    assert (survey.log_uuid, survey.epochs) == (LOG, [1])


async def test_every_byte_of_a_segment() -> None:
    """A flip anywhere in a sealed segment costs the one write that it hits, and is named.

    The header block, groups' marks, TABLE frames and the footer are no write's bytes: flips in them cost nothing.
    """
    log = await write_log(closed=True, segment_bytes=8 * 1024, count=16)
    name = segment_name(2)
    whole = log.files[name]
    mine = [(start, end, lsn) for lsn, (file, start, end) in log.places.items() if file == name]
    assert len(mine) > 1
    for at in (*range(128), *range(128, HEADER_BYTES, 61), *range(HEADER_BYTES, len(whole))):
        content = bytearray(whole)
        content[at] ^= 0x10
        survey, lsns = salvage(log.copy({name: bytes(content)}), log.frames)
        hit = {lsn for start, end, lsn in mine if start <= at < end}
        assert check_accounts(log, survey, lsns) == hit == log.lsns - set(lsns), at
        assert {Path(error.path).name for error in survey.damaged} == {name}, at


pages = st.tuples(st.just("zero"), st.integers(1, 6), st.integers(0, 9 * 1024), st.sampled_from([64, 512, 4096]))
flips = st.tuples(st.just("flip"), st.integers(1, 6), st.integers(0, 9 * 1024), st.integers(1, 255))
cuts = st.tuples(st.just("cut"), st.integers(1, 6), st.integers(0, 9 * 1024), st.just(0))
losses = st.tuples(st.just("remove"), st.integers(1, 6), st.just(0), st.just(0))
swaps = st.tuples(st.just("swap"), st.integers(1, 6), st.integers(1, 6), st.just(0))
others = st.tuples(st.sampled_from([SEAL_NAME, STATE_NAME]), st.just(0), st.integers(0, 8191), st.integers(1, 255))


@given(
    seed=st.integers(0, 50),
    closed=st.booleans(),
    damage=st.lists(st.one_of(pages, flips, cuts, losses, swaps, others), min_size=1, max_size=4),
)
def test_random_damage(seed: int, closed: bool, damage: list[tuple[str, int, int, int]]) -> None:
    """Whatever happens to a log: copied and missing are all that was written, nothing is made up, nothing is silent."""

    async def main() -> None:
        log = await write_log(closed=closed, seed=seed)
        files: dict[str, bytes | None] = dict(log.files)
        # Under each name, the segment whose bytes lie there.
        origin = {name: name for name in files}
        for kind, number, at, more in damage:
            name = segment_name(number) if number else kind
            content = files.get(name)
            if not content:
                continue
            changed = bytearray(content)
            at_byte = at % len(changed)
            if kind == "zero":
                page = at_byte // more * more
                changed[page : page + more] = bytes(len(changed[page : page + more]))
            elif kind == "cut":
                del changed[at_byte:]
            elif kind == "swap":
                other = segment_name(at)
                if files.get(other):
                    files[name], files[other] = files[other], content
                    origin[name], origin[other] = origin[other], origin[name]
                continue
            elif kind != "remove":
                changed[at_byte] ^= more
            files[name] = bytes(changed) if kind != "remove" else None
        names = [name for name, data in log.files.items() if name.endswith(".wal")]
        disk = log.copy(files)
        survey, lsns = salvage(disk, log.frames)
        # Nothing tells the newest segments' removal, or the oldest's, from a log that ended or began there.
        gone = [origin[name] for name in names if files[name] is None]
        outer = outermost(names, gone)
        lost = {lsn for lsn, (file, _, _) in log.places.items() if file in outer}
        left = Log(disk, {}, [f for f in log.frames if f.lsn not in lost or f.lsn in named(survey)], log.places)
        check_accounts(left, survey, lsns)

    trio.run(main)


def named(survey: LogSurvey) -> set[int]:
    return {lsn for lsn in range(1, 41) for found in survey.missing if is_in(lsn, found.span)}


def outermost(names: list[str], gone: list[str]) -> set[str]:
    """Of the files that are gone, those that no other one stands before, or behind."""
    found: set[str] = set()
    for order in (names, names[::-1]):
        for name in order:
            if name not in gone:
                break
            found.add(name)
    return found


async def test_missing_segment_is_named_exactly() -> None:
    """A segment that is gone from the middle is named by the LSNs that it held, and all others come out."""
    log = await write_log(closed=True)
    held = {lsn for lsn, (file, _, _) in log.places.items() if file == segment_name(3)}
    survey, lsns = salvage(log.copy({segment_name(3): None}), log.frames)
    assert set(lsns) == log.lsns - held
    assert [found.span for found in survey.missing] == [LsnSpan(min(held), max(held))]
    assert segment_name(4) in survey.damaged[0].path


async def test_newest_segments_of_a_closed_log() -> None:
    """What the seal mark says was there and is gone is missing."""
    log = await write_log(closed=True)
    last = max(name for name in log.files if name.endswith(".wal"))
    held = {lsn for lsn, (file, _, _) in log.places.items() if file == last}
    survey, lsns = salvage(log.copy({last: None}), log.frames)
    assert set(lsns) == log.lsns - held
    assert [found.span for found in survey.missing] == [LsnSpan(min(held), max(held))]
    assert {Path(error.path).name for error in survey.damaged} == {last, SEAL_NAME}


async def test_segments_with_damaged_headers_are_read() -> None:
    """A header says nothing that the group behind it does not prove: all writes come out of a log without any."""
    log = await write_log(closed=True)
    files = {
        name: bytes(HEADER_BYTES) + data[HEADER_BYTES:] for name, data in log.files.items() if name.endswith(".wal")
    }
    survey, lsns = salvage(log.copy(dict(files)), log.frames)
    assert set(lsns) == log.lsns
    assert survey.missing == []
    assert len(survey.damaged) == len(files)


async def test_swapped_segments() -> None:
    """Segments under each other's names still say which they are: everything comes out, both are named."""
    log = await write_log(closed=True)
    second, third = segment_name(2), segment_name(3)
    survey, lsns = salvage(log.copy({second: log.files[third], third: log.files[second]}), log.frames)
    assert set(lsns) == log.lsns
    assert survey.missing == []
    assert {Path(error.path).name for error in survey.damaged} == {second, third}


async def test_torn_tail_is_no_damage() -> None:
    """What a start would drop is named as torn, with its bounds; nothing counts as missing for it."""
    log = await write_log(closed=False)
    name, start, _ = log.places[40]
    content = bytearray(log.files[name])
    content[start + 130] ^= 1
    survey, lsns = salvage(log.copy({name: bytes(content)}), log.frames)
    assert set(lsns) == log.lsns - {40}
    assert survey.missing == []
    (torn,) = survey.torn
    assert (torn.file, torn.offset, torn.after_lsn) == (name, start, 39)


async def test_tail_next_to_a_damaged_seal() -> None:
    """Where the seal mark cannot be read, the end of the log may be damage: what is beyond counts as missing."""
    log = await write_log(closed=True)
    name, start, _ = log.places[40]
    content = log.files[name][:start]
    survey, _ = salvage(log.copy({name: content, SEAL_NAME: bytes(56)}), log.frames)
    assert [found.span for found in survey.missing] == [LsnSpan(40, CEILING - 1)]


async def test_tables_are_taken_from_other_segments() -> None:
    """Writes whose TABLE frame is damaged are read by that of another segment; without any they are missing."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=6 * 1024)
    frames = batch_frames(range(1, 7))
    await writer.append(frames)
    await writer.close()
    names = [name for name in disk.list_names(DIRECTORY) if name.endswith(".wal")]
    assert len(names) > 1
    for damaged in (names[:1], names):
        for name in damaged:
            content = bytearray(disk.read(DIRECTORY / name))
            content[HEADER_BYTES + 192 + 200] = 0x5A
            disk.damage(DIRECTORY / name, bytes(content))
        survey, lsns = salvage(disk, frames)
        assert lsns == ([] if damaged == names else [1, 2, 3, 4, 5, 6])
    assert [(found.span, "TABLE" in found.reason) for found in survey.missing] == [(LsnSpan(1, 6), True)]


async def test_segment_that_recovery_had_copied_already() -> None:
    """Where a segment and its copy both lie there each write comes out once; one replaces what the other lost."""
    disk = make_disk()
    writer = await open_log(disk)
    frames = batch_frames([1, 2, 3])
    (part,) = await writer.append(frames)
    disk.kill()
    original = disk.read(part.segment.path)
    await recover_log(disk, epoch=2)
    disk.create(part.segment.path, 0)
    disk.damage(part.segment.path, original)
    survey, lsns = salvage(disk, frames)
    assert (lsns, survey.missing, survey.damaged) == ([1, 2, 3], [], [])
    copy = DIRECTORY / segment_name(2)
    content = bytearray(disk.read(copy))
    content[frames[1].offset + 150] ^= 1
    disk.damage(copy, bytes(content))
    survey, lsns = salvage(disk, frames)
    assert (lsns, survey.missing, len(survey.damaged)) == ([1, 2, 3], [], 1)


async def test_forged_frames_in_a_payload_are_not_copied() -> None:
    """A client that knows the log's UUID cannot have its payload read as frames, whatever is damaged around it."""
    disk = make_disk()
    writer = await open_log(disk)
    await writer.append([batch_frame(1)])
    content = disk.read(DIRECTORY / segment_name(1))
    header = SegmentHeader.from_bytes("", memoryview(content))
    end = (
        header.first_lsn and max(at for at in range(HEADER_BYTES, len(content), 64) if any(content[at : at + 64])) + 64
    )
    mark_bytes = 192
    inner = end + mark_bytes + 128 + 1024
    table = Frame(2, 0, table=TABLE, payload=TABLE.to_bytes(), accepted_us=0)
    forged_mark = GroupMark(bytes(16), inner, inner, 4096, 2)
    forged = Group([forged_mark.to_frame(0), table, batch_frame(7)], inner, header.seed).to_bytes()
    carrier = Frame(KIND_CREATE, 2, payload=bytes(1024) + forged + bytes(1024), accepted_us=0)
    last = batch_frame(3, rows=0)
    mark = GroupMark(header.nonce, end, end, mark_bytes + carrier.frame_bytes + last.frame_bytes, 2)
    group = Group([mark.to_frame(0), carrier, last], end, header.seed).to_bytes()
    # A group behind it, so that what is damaged in this one is not torn.
    behind = end + len(group)
    next_mark = GroupMark(header.nonce, behind, behind, mark_bytes, 0)
    group += Group([next_mark.to_frame(0)], behind, header.seed).to_bytes()
    whole = content[:end] + group + content[end + len(group) :]
    flips = [(at, bytes([whole[at] ^ 1 << bit])) for at in (*range(end, inner - 1024), inner + 300) for bit in range(8)]
    # A length that leads straight to the forged frames, as the frame's only one and beside one that is right.
    place = end + mark_bytes + 8
    to_forged = (inner - end - mark_bytes).to_bytes(8, "little")
    for at, data in [*flips, (place, to_forged), (place, to_forged + whole[place + 8 : place + 24] + bytes(8))]:
        damaged = bytearray(whole)
        damaged[at : at + len(data)] = data
        disk.damage(DIRECTORY / segment_name(1), bytes(damaged))
        survey = survey_log(DIRECTORY, disk)
        assert survey.damaged or survey.torn
        assert 7 not in [write.lsn for write in LogReader(survey, disk).writes()]


async def test_files_are_read_back_by_stock_pyarrow(tmp_path: Path) -> None:
    """Each table's stream has its batches in LSN order with LSN, key and operation; the report says the rest."""
    log_directory, out = tmp_path / "wal", tmp_path / "out"
    disk = PosixDisk()
    state = await LogState.create(log_directory, disk, log_uuid=LOG, epoch=1, lsn_ceiling=100, store_ceiling=1 << 40)
    writer = await open_log(disk, directory=log_directory)
    evolved = make_table(1, schema_id=1)
    frames = [
        batch_frame(1),
        Frame(KIND_CREATE, 2, payload=b"\x81\xa1a\x01", accepted_us=5),
        batch_frame(3, rows=2, table=make_table(2), key=b""),
        batch_frame(4, table=evolved),
        Frame(KIND_LOST, 9, payload=encode_lost(LsnRange(4, 8)), accepted_us=5),
    ]
    await writer.append(frames)
    await writer.close()
    before = {path.name: path.read_bytes() for path in log_directory.iterdir()}
    found = copy_log(survey_log(log_directory, disk), disk, out)
    assert {path.name: path.read_bytes() for path in log_directory.iterdir()} == before
    assert found.complete
    report = json.loads((out / REPORT_NAME).read_text())
    assert (report["complete"], report["missing"], report["damaged"]) == (True, [], [])
    assert (report["log_uuid"], report["epochs"]) == (str(LOG), [1])
    assert report["state"] == {"epoch": 1, "lsn_ceiling": state.lsn_ceiling}
    assert report["intact"] == [{"first": 1, "last": 4}, {"first": 9, "last": 9}]
    assert report["records"] == [
        {"lsn": 2, "kind": "create", "payload": {"a": 1}},
        {"lsn": 9, "kind": "lost", "payload": {"after": 4, "through": 8}},
    ]
    assert [(table["file"], table["writes"], table["rows"], table["keyed"]) for table in report["tables"]] == [
        ("default.table_1-00000000.arrows", 1, 1, 1),
        ("default.table_2-00000000.arrows", 1, 2, 0),
        ("default.table_1-00000000-schema1.arrows", 1, 1, 1),
    ]
    assert {path.name for path in out.iterdir()} == {REPORT_NAME, *(table["file"] for table in report["tables"])}
    for table, lsn, key in zip(report["tables"], [1, 3, 4], [b"key-1", None, b"key-4"], strict=True):
        with pa.OSFile(str(out / table["file"])) as source, pa.ipc.open_stream(source) as stream:
            assert stream.schema == SCHEMA
            batch, metadata = stream.read_next_batch_with_custom_metadata()
            assert batch.equals(make_batch(lsn, table["rows"]))
            assert (metadata[b"arka.lsn"], metadata[b"arka.operation"]) == (b"%d" % lsn, b"upsert")
            assert metadata.get(b"arka.key") == key
            with pytest.raises(StopIteration):
                stream.read_next_batch()


async def test_copy_goes_to_a_new_folder_elsewhere(tmp_path: Path) -> None:
    """Neither the log's own directory nor a folder that holds something is written to."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path / "wal")
    await writer.append(batch_frames([1]))
    await writer.close()
    survey = survey_log(tmp_path / "wal", disk)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out in (tmp_path / "wal", tmp_path / "wal" / "out", tmp_path / "full"):
        with pytest.raises(ConfigurationError):
            copy_log(survey, disk, out)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["file"]


async def test_frame_that_is_no_batch_is_named(tmp_path: Path) -> None:
    """An intact frame that is no batch of its table is left out and named, and what follows still comes out."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path / "wal")
    odd = Frame(1, 2, table=TABLE, payload=b"\xff\xff\xff\xff\x08\0\0\0" + bytes(8), accepted_us=0)
    await writer.append([batch_frame(1), odd, batch_frame(3)])
    await writer.close()
    found = copy_log(survey_log(tmp_path / "wal", disk), disk, tmp_path / "out")
    assert not found.complete
    assert [lsn for lsn, _ in found.unreadable] == [2]
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert [(gap["first"], gap["last"]) for gap in report["missing"]] == [(2, 2)]
    assert report["intact"] == [{"first": 1, "last": 1}, {"first": 3, "last": 3}]
    assert report["tables"][0]["writes"] == 2


async def test_segment_of_another_log_is_left_out() -> None:
    """Frames of another log are not copied, although each is intact (R1)."""
    log = await write_log(closed=True)
    foreign = make_disk()
    writer = await open_log(foreign, log_uuid=UUID(int=9), first_segment=2)
    await writer.append(batch_frames(range(1, 4)))
    await writer.close()
    name = segment_name(2)
    held = {lsn for lsn, (file, _, _) in log.places.items() if file == name}
    survey, lsns = salvage(log.copy({name: foreign.read(DIRECTORY / name)}), log.frames)
    assert set(lsns) == log.lsns - held
    assert check_accounts(log, survey, lsns) == held


lsn_sets = st.sets(st.integers(1, 30))


def spans_of(lsns: set[int]) -> list[LsnSpan]:
    spans: list[LsnSpan] = []
    for lsn in sorted(lsns):
        append_lsn(spans, lsn)
    return spans


@given(first=lsn_sets, second=lsn_sets)
def test_spans_are_sets(first: set[int], second: set[int]) -> None:
    """Joining and subtracting spans is what it is for sets of LSNs."""
    assert merge_spans([*spans_of(second), *spans_of(first)]) == spans_of(first | second)
    assert merge_spans(subtract_spans(spans_of(first), spans_of(second)[::-1])) == spans_of(first - second)
    assert subtract_spans([LsnSpan(1, None)], spans_of(second))[-1].last is None
