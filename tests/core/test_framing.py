"""Frames: their bytes against an oracle, their checksum against another, and what must not be accepted."""

from __future__ import annotations

import errno
import os
import random
import struct
from array import array
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka._core import framing
from arka._core.buffers import FRAME_HEADER_BYTES, FrameBuffer
from arka._core.framing import (
    KIND_BATCH,
    KIND_CREATE,
    KIND_FOOTER,
    KIND_GROUP,
    KIND_LOST,
    MARK_BYTES,
    Frame,
    FrameError,
    Group,
    crc32c,
    crc32c_portable,
    crc_seed,
    drop_payloads,
    find_mark,
    first_nonzero,
    first_out_of_order,
    fit,
    last_nonzero,
    parse_header,
    places,
    reseal_header,
    run_end,
    verify_frame,
)

LOG = UUID("00112233-4455-6677-8899-aabbccddeeff")
SEED = crc_seed(LOG, 3, 7)
TABLE = SimpleNamespace(uuid=UUID(int=2**100 + 5))


# -- the oracle: slow and obvious ---------------------------------------------------------------------


def crc_oracle(data: bytes, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frame_oracle(
    *,
    kind: int,
    lsn: int,
    payload: bytes,
    key: bytes,
    rows: int,
    operation: int,
    schema_id: int,
    accepted_us: int,
    table: bytes,
    seed: int,
) -> bytes:
    frame_bytes = -(-(128 + len(payload) + len(key)) // 64) * 64
    rest = struct.pack(
        "<QQQQQBBHI16s",
        frame_bytes,
        lsn,
        accepted_us,
        len(payload),
        rows,
        kind,
        operation,
        len(key),
        schema_id,
        table,
    )
    covered = (rest.ljust(120, b"\0") + payload + key).ljust(frame_bytes - 8, b"\0")
    return b"ARKF" + struct.pack("<I", crc_oracle(covered, seed)) + covered


# -- checksum -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [crc32c, crc32c_portable, crc_oracle])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0x00000000),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc_known_vectors(function, data: bytes, expected: int) -> None:
    """Every way to compute the CRC-32C agrees with RFC 3720 appendix B.4."""
    assert function(data) == expected


def test_crc_of_every_length() -> None:
    """The processor's way, the portable way and the oracle agree at each length around the lanes' sizes."""
    rng = random.Random(1)
    data = rng.randbytes(3 * 4096 * 2 + 3 * 256 + 40)
    lengths = [*range(300), *range(3 * 256 - 9, 3 * 256 + 20), *range(3 * 4096 - 9, 3 * 4096 + 9), len(data)]
    for length in lengths:
        for skew in (0, 1, 7):
            part = memoryview(data)[skew : skew + length]
            crc = rng.getrandbits(32)
            assert crc32c(part, crc) == crc32c_portable(part, crc)
            if length < 400:
                assert crc32c(part, crc) == crc_oracle(bytes(part), crc)


@given(st.binary(max_size=2000), st.integers(0, 2000), st.integers(0, 2**32 - 1))
def test_crc_can_be_continued(data: bytes, at: int, crc: int) -> None:
    """The checksum of two parts, one continued from the other, is that of the whole."""
    assert crc32c(data[at:], crc32c(data[:at], crc)) == crc32c(data, crc) == crc32c_portable(data, crc)


def test_seed_names_log_epoch_and_segment() -> None:
    """The seed is the CRC of the three; any other log, epoch or segment has another (R8)."""
    assert crc_seed(LOG, 3, 7) == crc_oracle(LOG.bytes + struct.pack("<QQ", 3, 7))
    others = [(UUID(int=LOG.int ^ 1), 3, 7), (LOG, 4, 7), (LOG, 3, 8), (LOG, 7, 3)]
    assert len({SEED, *(crc_seed(*other) for other in others)}) == 5


# -- one frame ----------------------------------------------------------------------------------------


def make_buffer(metadata: bytes, body: bytes) -> FrameBuffer:
    buffer = FrameBuffer(metadata, len(body))
    buffer.body[:] = body
    return buffer


@given(
    kind=st.integers(1, 5),
    lsn=st.integers(0, 2**53),
    payload=st.binary(max_size=300),
    key=st.binary(max_size=256),
    rows=st.integers(0, 2**40),
    operation=st.integers(0, 255),
    schema_id=st.integers(0, 2**32 - 1),
    accepted_us=st.integers(0, 2**63),
    in_buffer=st.booleans(),
    has_table=st.booleans(),
)
def test_frame_bytes(kind, lsn, payload, key, rows, operation, schema_id, accepted_us, in_buffer, has_table) -> None:
    """A frame's bytes are those that FORMAT.md says, and read back as what went in."""
    fields = {
        "key": key,
        "rows": rows,
        "operation": operation,
        "schema_id": schema_id,
        "accepted_us": accepted_us,
    }
    content = make_buffer(payload, payload) if in_buffer else payload
    expected_payload = bytes(content.ipc) if in_buffer else payload
    frame = Frame(kind, lsn, table=TABLE if has_table else None, payload=content, **fields)
    data = Group([frame], 640, SEED).to_bytes()
    table = TABLE.uuid.bytes if has_table else bytes(16)
    assert data == frame_oracle(kind=kind, lsn=lsn, payload=expected_payload, table=table, seed=SEED, **fields)
    assert len(data) == frame.frame_bytes
    assert frame.offset == 640
    header = verify_frame(data, 0, SEED)
    assert (header.kind, header.lsn, header.rows, header.operation) == (kind, lsn, rows, operation)
    assert (header.schema_id, header.accepted_us, header.table_uuid) == (schema_id, accepted_us, table)
    assert (header.payload_bytes, header.key_bytes) == (len(expected_payload), len(key))


def test_large_frame_is_written_from_its_buffer() -> None:
    """A frame above the size that is copied has the same bytes, its header in its own buffer."""
    body = random.Random(2).randbytes(100_000)
    buffer = make_buffer(b"meta", body)
    frame = Frame(KIND_BATCH, 9, payload=buffer, key=b"k" * 70, rows=3, accepted_us=5)
    data = Group([frame], 0, SEED).to_bytes()
    assert data == frame_oracle(
        kind=KIND_BATCH,
        lsn=9,
        payload=bytes(buffer.ipc),
        key=b"k" * 70,
        rows=3,
        operation=0,
        schema_id=0,
        accepted_us=5,
        table=bytes(16),
        seed=SEED,
    )
    assert data[: buffer.size] == bytes(buffer)


def test_every_changed_bit_is_found() -> None:
    """One changed bit anywhere in a frame is refused; so is another seed, and each shorter file (R8)."""
    data = Group([Frame(KIND_CREATE, 4, payload=b"x" * 50, key=b"key", accepted_us=1)], 0, SEED).to_bytes()
    verify_frame(data, 0, SEED)
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(FrameError) as caught:
                verify_frame(damaged, 0, SEED)
            assert caught.value.offset == 0
            assert caught.value.expected
            assert caught.value.found
        with pytest.raises(FrameError):
            verify_frame(data[:at], 0, SEED)
    with pytest.raises(FrameError, match="CRC"):
        verify_frame(data, 0, crc_seed(LOG, 3, 8))


@given(st.binary(max_size=400), st.integers(-70, 500))
def test_garbage_is_refused(data: bytes, offset: int) -> None:
    """Whatever stands in a file, and wherever one looks, it is no frame; nothing else happens."""
    for content in (data, b"ARKF" + data):
        with pytest.raises(FrameError):
            verify_frame(content, offset, SEED)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 65535))
def test_hostile_lengths_are_refused(frame_bytes: int, payload_bytes: int, key_bytes: int) -> None:
    """Lengths that overflow, overrun the file or contradict each other are refused before they are used."""
    data = bytearray(Group([Frame(KIND_CREATE, 4, payload=b"x" * 50, accepted_us=1)], 0, SEED).to_bytes())
    original = bytes(data)
    struct.pack_into("<Q", data, 8, frame_bytes)
    struct.pack_into("<Q", data, 32, payload_bytes)
    struct.pack_into("<H", data, 50, key_bytes)
    fits = -(-(128 + payload_bytes + key_bytes) // 64) * 64 == frame_bytes <= len(data)
    if fits:
        assert parse_header(data, 0).frame_bytes == frame_bytes
    else:
        with pytest.raises(FrameError):
            parse_header(data, 0)
    if bytes(data) != original:
        with pytest.raises(FrameError):
            verify_frame(data, 0, SEED)


def test_resealed_frame_is_at_home_in_another_segment() -> None:
    """A frame that is copied to another segment differs in its CRC alone."""
    other = crc_seed(LOG, 4, 8)
    data = bytes(64) + Group([Frame(KIND_LOST, 4, payload=b"x" * 500, accepted_us=1)], 64, SEED).to_bytes()
    copy = reseal_header(data, 64, other) + data[64 + FRAME_HEADER_BYTES :]
    assert verify_frame(copy, 0, other).lsn == 4
    assert copy[:4] + copy[8:] == data[64:68] + data[72:]


def test_frames_refuse_what_they_cannot_hold() -> None:
    """Keys above 65535 bytes, payloads of other types and payloads that were dropped are refused."""
    with pytest.raises(ValueError, match="65535"):
        Frame(KIND_BATCH, 1, payload=b"", key=bytes(65536), accepted_us=0)
    for payload in (bytearray(b"x"), "x", None):
        with pytest.raises(TypeError):
            Frame(KIND_BATCH, 1, payload=payload, accepted_us=0)
    frame = Frame(KIND_BATCH, 1, payload=b"x", accepted_us=0)
    drop_payloads([frame])
    assert frame.payload is None
    with pytest.raises(ValueError, match="LSN 1"):
        Group([frame], 0, SEED)
    with pytest.raises(TypeError):
        Group(["x"], 0, SEED)


# -- groups -------------------------------------------------------------------------------------------


def mixed_frames(rng: random.Random, count: int) -> list[Frame]:
    frames = []
    for lsn in range(1, count + 1):
        size = rng.choice((0, 10, 900, 15_000, 16_384, 40_000))
        payload = make_buffer(b"m" * rng.randrange(200), rng.randbytes(size)) if lsn % 3 else rng.randbytes(size)
        frames.append(Frame(KIND_BATCH, lsn, payload=payload, key=b"k" * rng.randrange(130), accepted_us=0))
    return frames


def test_group_is_written_as_it_is_sealed(tmp_path: Path) -> None:
    """What reaches the file is the frames one behind the other, whatever is copied and whatever is not."""
    frames = mixed_frames(random.Random(5), 60)
    group = Group(frames, 4096, SEED)
    path = tmp_path / "segment"
    with path.open("wb+") as file:
        group.commit(file.fileno())
        data = path.read_bytes()
        assert data[4096:] == group.to_bytes()
        # Sealing again and writing again is harmless.
        group.commit(file.fileno())
    assert path.read_bytes() == data
    offset = 4096
    for frame in frames:
        header = verify_frame(data, offset, SEED)
        assert (header.lsn, header.frame_bytes, frame.offset) == (frame.lsn, frame.frame_bytes, offset)
        offset += header.frame_bytes
    assert offset == len(data) == 4096 + group.size


def test_group_of_more_pieces_than_one_call_takes(tmp_path: Path) -> None:
    """A group of more iovecs than IOV_MAX, and of more bytes than one step, is written whole."""
    body = bytes(17_000)
    frames = [Frame(KIND_BATCH, lsn, payload=make_buffer(b"m", body), accepted_us=0) for lsn in range(1, 1200)]
    path = tmp_path / "segment"
    group = Group(frames, 0, SEED)
    with path.open("wb") as file:
        group.commit(file.fileno())
    data = path.read_bytes()
    assert data == group.to_bytes()
    assert [verify_frame(data, frame.offset, SEED).lsn for frame in frames] == list(range(1, 1200))


def test_short_writes_go_on(tmp_path: Path) -> None:
    """A write that the system cuts short (here: by a file size limit) goes on, and its error is reported."""
    resource = pytest.importorskip("resource", reason="file size limits need POSIX")
    signal = pytest.importorskip("signal")
    frames = mixed_frames(random.Random(6), 20)
    group = Group(frames, 0, SEED)
    path = tmp_path / "segment"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = group.size // 2 + 13
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with path.open("wb") as file, pytest.raises(OSError, match=r".") as caught:
            group.commit(file.fileno())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert path.stat().st_size == limit
    with path.open("wb") as file:
        group.commit(file.fileno())
    assert path.read_bytes() == group.to_bytes()


def test_failed_write_is_an_os_error(tmp_path: Path) -> None:
    """A descriptor that cannot be written to is reported with its errno."""
    path = tmp_path / "segment"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            Group(mixed_frames(random.Random(7), 3), 0, SEED).commit(fd)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EBADF


def test_empty_group(tmp_path: Path) -> None:
    """A group without frames writes nothing."""
    path = tmp_path / "segment"
    with path.open("wb") as file:
        Group([], 64, SEED).commit(file.fileno())
    assert path.stat().st_size == 0
    assert Group([], 64, SEED).to_bytes() == b""


# -- searching ----------------------------------------------------------------------------------------


def mark(kind: int, offset: int, seed: int = SEED, size: int = 40) -> bytes:
    return Group([Frame(kind, 0, payload=bytes(size), accepted_us=0)], offset, seed).to_bytes()


def test_marks_are_found_wherever_they_stand() -> None:
    """GROUP and FOOTER frames are found at any multiple of 64; others and those of other segments are not."""
    assert len(mark(KIND_GROUP, 0)) == MARK_BYTES
    for kind in (KIND_GROUP, KIND_FOOTER):
        for at in range(64, 1024, 64):
            data = b"\xee" * at + mark(kind, at) + b"\xee" * 100
            for start in range(0, at + 64, 64):
                assert find_mark(data, start, SEED) == at
            assert find_mark(data, at + 64, SEED) == -1
            assert find_mark(data[: at + MARK_BYTES - 1], 0, SEED) == -1
    assert find_mark(mark(KIND_LOST, 0), 0, SEED) == -1
    assert find_mark(mark(KIND_GROUP, 0, seed=1), 0, SEED) == -1
    assert find_mark(mark(KIND_GROUP, 0, size=100), 0, SEED) == -1
    assert find_mark(b"", 0, SEED) == -1


@given(st.integers(0, 300), st.sets(st.integers(0, 299), max_size=3), st.integers(0, 310))
def test_nonzero_bytes_are_found(size: int, places: set[int], start: int) -> None:
    """The first and the last byte that is not zero are found at any length and alignment."""
    data = bytearray(size)
    for place in places:
        if place < size:
            data[place] = 0x80
    expected = [place for place in range(start, size) if data[place]]
    assert first_nonzero(data, start) == (expected[0] if expected else -1)
    assert last_nonzero(data, start) == (expected[-1] if expected else -1)


def test_hardware_is_reported() -> None:
    """Whether the processor's instruction is used can be asked, for the status and for this test's meaning."""
    assert isinstance(framing.CRC32C_HARDWARE, bool)


# -- many frames --------------------------------------------------------------------------------------


def many(rng: random.Random, count: int) -> list[Frame]:
    """Frames of two tables at two schemas, and others between them, in LSN order."""
    infos = [SimpleNamespace(uuid=uuid4()) for _ in range(2)]
    frames: list[Frame] = []
    lsn = 0
    while len(frames) < count:
        lsn += rng.randint(1, 3)
        table = rng.choice(infos)
        kind = rng.choice((KIND_BATCH, KIND_BATCH, KIND_BATCH, KIND_LOST))
        frames.append(
            Frame(
                kind,
                lsn,
                table=table if kind == KIND_BATCH else None,  # type: ignore[arg-type]
                schema_id=rng.randrange(2),
                payload=bytes(rng.randrange(300)),
                accepted_us=0,
            )
        )
    return frames


@pytest.mark.parametrize("seed", range(20))
def test_runs_places_and_room_as_one_by_one(seed: int) -> None:
    """What is said of many frames at once is what a look at each says."""
    rng = random.Random(seed)
    frames = many(rng, 60)

    def alike(one: Frame, other: Frame) -> bool:
        return one.kind == other.kind == KIND_BATCH and (one.table, one.schema_id) == (other.table, other.schema_id)

    start = 0
    while start < len(frames):
        end = start + 1
        while end < len(frames) and alike(frames[start], frames[end]):
            end += 1
        assert run_end(frames, start) == end
        start = end

    start, end = sorted(rng.sample(range(60), 2))
    sizes = [frame.frame_bytes for frame in frames[start:end]]
    for room in (-1, 0, sizes[0] - 1, sizes[0], sum(sizes) // 2, sum(sizes) - 1, sum(sizes), 1 << 60):
        fitting = [count for count in range(len(sizes) + 1) if sum(sizes[:count]) <= room]
        count = max(fitting, default=0)
        assert fit(frames, start, end, room) == (start + count, sum(sizes[:count]))

    Group(frames, 4096, SEED)
    lsns, offsets, ends = (array("Q", data) for data in places(frames, start, end, 17))
    assert list(lsns) == [frame.lsn for frame in frames[start:end]]
    assert list(offsets) == [frame.offset for frame in frames[start:end]]
    assert list(ends) == list(accumulate(sizes, initial=17))[1:]
    assert places(frames, end, end, 17) == (b"", b"", b"")

    assert first_out_of_order(frames, 0) == -1
    assert first_out_of_order(frames, frames[0].lsn) == 0
    assert first_out_of_order([*frames, frames[30]], 0) == 60
    assert first_out_of_order([*frames[:7], frames[6], *frames[7:]], 0) == 7
    drop_payloads(frames[:5])
    assert [frame.payload is None for frame in frames] == [True] * 5 + [False] * 55


def test_many_of_something_else_is_refused() -> None:
    """What is no frame is a TypeError, not a crash."""
    with pytest.raises(TypeError):
        run_end([1], 0)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        first_out_of_order([1], 0)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        fit(["x"], 0, 1, 1)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        places([object()], 0, 1, 0)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        drop_payloads([b""])  # type: ignore[list-item]
