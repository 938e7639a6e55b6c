"""Damage to stored bytes: every case stops the start, is shown without a change, and costs only what it hit (R7)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from arka import cli
from arka._core.framing import KIND_BATCH, KIND_FOOTER, KIND_GROUP
from arka.storage.disk import PosixDisk
from arka.testing.serverprocess import ServerProcess
from arka.wal.salvage import LogReader
from arka.wal.segment import FRAME_HEADER_BYTES, SegmentHeader
from arka.wal.survey import LogSurvey, survey_log
from arka.wal.walk import FoundFrame, list_segments, walk_frames

from .clients import Stream, connect, create, numbers

pytestmark = [pytest.mark.process, pytest.mark.slow]

#: So large that a segment, which has a megabyte at least, takes few of them.
BATCH_ROWS = 20_000
#: So small that all of them lie in one segment, and larger than a few pages.
TAIL_ROWS = 2_000
PAGE = 4096


@dataclass
class Stored:
    """A data directory that a killed server left, and a copy to begin each test with."""

    server: ServerProcess
    pristine: Path
    lsns: set[int]

    @property
    def wal(self) -> Path:
        return self.server.data / "wal"

    def restore(self) -> None:
        shutil.rmtree(self.server.data)
        shutil.copytree(self.pristine, self.server.data)

    def segments(self) -> list[Path]:
        return [path for _, path in list_segments(self.wal, PosixDisk())]

    def frames(self, segment: Path, kind: int) -> list[FoundFrame]:
        data = memoryview(segment.read_bytes())
        walk = walk_frames(data, SegmentHeader.from_bytes(str(segment), data))
        return [found for found in walk if isinstance(found, FoundFrame) and found.header.kind == kind]

    def files(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.server.data.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """A log of some sealed segments and a tail of several groups, whose server was killed."""
    folder = tmp_path_factory.mktemp("damage")
    settings = {"wal.segment_bytes": "1MiB", "wal.release_grace_s": 3600, "object_store.linger_s": 0.01}
    server = ServerProcess(folder / "data", settings)
    lsns: set[int] = set()
    try:
        for rows, count in ((BATCH_ROWS, 9), (BATCH_ROWS, 9), (TAIL_ROWS, 6)):
            server.start()
            with connect(server.location) as client:
                create(client, "t")
                stream = Stream(client, "t", requested_durability="object_storage")
                for number in range(count):
                    stream.write(numbers(range(rows)), idempotency_key=f"{len(lsns)}-{number}")
                    # One by one, so that each is a group of its own.
                    lsns.add(stream.acks(3)[0]["lsn"])
                stream.finish()
            if rows == BATCH_ROWS:
                server.stop()
            else:
                server.kill()
        shutil.copytree(server.data, folder / "pristine")
        yield Stored(server, folder / "pristine", lsns)
    finally:
        server.kill()


@pytest.fixture
def stored(made: Stored) -> Stored:
    made.restore()
    return made


def flip(path: Path, at: int, bit: int = 0x10) -> tuple[Path, int]:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)
    return path, at


def zero(path: Path, at: int) -> tuple[Path, int]:
    data = bytearray(path.read_bytes())
    page = at // PAGE * PAGE
    data[page : page + PAGE] = bytes(PAGE)
    path.write_bytes(data)
    return path, page


def in_frame(kind: int, where: str) -> Callable[[Stored], Path]:
    def damage(stored: Stored) -> Path:
        segment = stored.segments()[1]
        offset, header = stored.frames(segment, kind)[0]
        payload = offset + FRAME_HEADER_BYTES
        at = {
            "header": offset + 20,
            "length": offset + 9,
            "body": payload + header.payload_bytes // 2,
            "key": payload + header.payload_bytes,
            "mark": payload + 20,
        }[where]
        return flip(segment, at)[0]

    return damage


def zeroed_page(stored: Stored) -> Path:
    segment = stored.segments()[1]
    return zero(segment, stored.frames(segment, KIND_BATCH)[1].offset + 2 * PAGE)[0]


def zeroed_page_in_the_tail(stored: Stored) -> Path:
    segment = stored.segments()[-1]
    return zero(segment, stored.frames(segment, KIND_BATCH)[0].offset + 2 * PAGE)[0]


def flip_in_the_tail(stored: Stored) -> Path:
    segment = stored.segments()[-1]
    return flip(segment, stored.frames(segment, KIND_BATCH)[0].offset + 300)[0]


def segment_header(stored: Stored) -> Path:
    return flip(stored.segments()[1], 33)[0]


def missing_segment(stored: Stored) -> Path:
    segments = stored.segments()
    segments[1].unlink()
    return segments[2]


def truncated_segment(stored: Stored) -> Path:
    segment = stored.segments()[1]
    content = segment.read_bytes()
    segment.write_bytes(content[: stored.frames(segment, KIND_BATCH)[2].offset + 1000])
    return segment


def swapped_segments(stored: Stored) -> Path:
    first, second = stored.segments()[1:3]
    between = first.with_name("between")
    first.rename(between)
    second.rename(first)
    between.rename(second)
    return first


def behind_the_footer(stored: Stored) -> Path:
    segment = stored.segments()[1]
    (footer,) = stored.frames(segment, KIND_FOOTER)
    return flip(segment, footer.offset + 192 + 4096)[0]


def seal_mark(stored: Stored) -> Path:
    # It stands twice: one good copy would do.
    flip(stored.wal / "sealed", 40)
    return flip(stored.wal / "sealed", PAGE + 40)[0]


def both_slots(stored: Stored) -> Path:
    flip(stored.wal / "log", 20)
    return flip(stored.wal / "log", PAGE + 20)[0]


CASES: dict[str, tuple[Callable[[Stored], Path], int]] = {
    "frame header": (in_frame(KIND_BATCH, "header"), 1),
    "frame length": (in_frame(KIND_BATCH, "length"), 1),
    "body": (in_frame(KIND_BATCH, "body"), 1),
    "key": (in_frame(KIND_BATCH, "key"), 1),
    "group mark": (in_frame(KIND_GROUP, "mark"), 0),
    "footer": (in_frame(KIND_FOOTER, "mark"), 0),
    "behind the footer": (behind_the_footer, 0),
    "zeroed page": (zeroed_page, 1),
    "zeroed page in the tail": (zeroed_page_in_the_tail, 1),
    "flip in the tail": (flip_in_the_tail, 1),
    "segment header": (segment_header, 0),
    "missing segment": (missing_segment, -1),
    "truncated segment": (truncated_segment, -1),
    "swapped segments": (swapped_segments, 0),
    "seal mark": (seal_mark, 0),
    "both slots of the log state": (both_slots, 0),
}


def salvage(stored: Stored) -> tuple[LogSurvey, set[int]]:
    disk = PosixDisk()
    survey = survey_log(stored.wal, disk)
    reader = LogReader(survey, disk)
    copied = {write.lsn for write in reader.writes()}
    assert reader.unreadable == []
    return survey, copied


def test_the_log_as_it_was_left(stored: Stored) -> None:
    """Before any damage: several sealed segments, a tail of several groups, everything intact."""
    segments = stored.segments()
    assert len(segments) > 4
    assert len(stored.frames(segments[-1], KIND_GROUP)) > 3
    survey, copied = salvage(stored)
    assert copied == stored.lsns
    assert (survey.missing, survey.damaged) == ([], [])


@pytest.mark.parametrize("case", CASES)
def test_damaged_log(stored: Stored, case: str) -> None:
    """The start is refused with file and offset; the commands show it unchanged; all that is intact comes out.

    The LSNs that are called missing are exactly the others.
    """
    damage, lost = CASES[case]
    file = damage(stored)
    before = stored.files()
    shown = {}
    for command in ("verify", "dump", "salvage"):
        shown[command] = CliRunner().invoke(cli.main, ["wal", command, str(stored.server.data)])
    assert shown["verify"].exit_code == shown["dump"].exit_code == 3, shown["dump"].output
    assert f"{file}: damaged at byte " in shown["verify"].stderr
    assert file.name in shown["dump"].stdout
    survey, copied = salvage(stored)
    missing = {lsn for lsn in stored.lsns for gap in survey.missing if gap.span.first <= lsn <= (gap.span.last or lsn)}
    assert missing == stored.lsns - copied
    if lost >= 0:
        assert len(missing) == lost
    else:
        assert missing
    assert stored.files() == before
    server = stored.server
    server.log.unlink()
    server.spawn()
    assert server.wait() == 3, server.log_tail()
    assert f"{file}: damaged at byte " in server.log_tail()
    assert ": expected " in server.log_tail()


def test_one_slot_of_the_log_state(stored: Stored) -> None:
    """One damaged copy of the log's state costs nothing: it is named, and the next start mends it."""
    flip(stored.wal / "log", 20)
    result = CliRunner().invoke(cli.main, ["wal", "verify", str(stored.server.data)])
    assert result.exit_code == 0
    assert "log: damaged at byte 4:" in result.stderr
    stored.server.start()
    stored.server.stop()
    result = CliRunner().invoke(cli.main, ["wal", "verify", str(stored.server.data)])
    assert result.exit_code == 0
    assert result.stderr == ""


@pytest.mark.parametrize("prefix", ["wal", "epoch"])
def test_damaged_object(stored: Stored, prefix: str) -> None:
    """The newest WAL object and the newest epoch's record are looked at by each start, which names the object."""
    newest = max(path for path in (stored.server.data / "objects" / "arka-0" / prefix).rglob("*") if path.is_file())
    flip(newest, newest.stat().st_size // 2)
    server = stored.server
    server.log.unlink()
    server.spawn()
    assert server.wait() == 3, server.log_tail()
    assert newest.name in server.log_tail()
    assert "damaged at byte" in server.log_tail()


def test_half_made_files_are_no_damage(stored: Stored) -> None:
    """A spare, a segment and a seal mark that never got their names do not stop a start, and go."""
    (stored.wal / "spare-1.new").write_bytes(bytes(1 << 20))
    (stored.wal / "segment-0000000000000099.wal.new").write_bytes(b"half a header")
    (stored.wal / "sealed.new").write_bytes(b"")
    assert CliRunner().invoke(cli.main, ["wal", "verify", str(stored.server.data)]).exit_code == 0
    with stored.server:
        # Spares of its own come at once.
        assert not (stored.wal / "segment-0000000000000099.wal.new").exists()
        assert not (stored.wal / "sealed.new").exists()
