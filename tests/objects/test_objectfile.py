"""WAL objects as bytes: what goes in comes out, and no damage goes unnoticed."""

import struct
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka._core.framing import KIND_BATCH, KIND_GROUP, KIND_TABLE, Frame, Group, crc32c, crc_seed
from arka.errors import DataCorruption
from arka.records import MAX_LSN, TableInfo
from arka.wal.objectfile import (
    FOOTER_BYTES,
    HEADER_BYTES,
    ObjectHeader,
    ObjectRef,
    encode_object,
    object_key,
    parse_object,
)
from arka.wal.segment import GroupMark

from .tierbench import TABLE, batch_frame, make_table

LOG = UUID("5b7f7f1e-30f0-4bd1-8a9b-0d3a4c7a2f01")
PATH = "sim://store/n/wal/0000000003/0000000000000007.wal"
BEFORE = ObjectRef(epoch=2, first_lsn=3, last_lsn=6, checksum=0xDEADBEEF)


def make_frames(frames, *, segment=5, epoch=2):
    """A group as it stands in a segment."""
    mark = GroupMark(bytes(16), 0, 0, 0, len(frames)).to_frame(0)
    return Group([mark, *frames], 0, crc_seed(LOG, epoch, segment)).to_bytes()


def make_object(frames=None, tables=(TABLE,), before=BEFORE):
    data = make_frames(frames or [batch_frame(7), batch_frame(9)])
    encoded = encode_object(LOG, 3, 5, 2, first_lsn=7, last_lsn=9, tables=tables, frames=data, predecessor=before)
    return encoded, b"".join(encoded.parts)


@pytest.mark.parametrize("before", [None, BEFORE])
@pytest.mark.parametrize("tables", [(), (TABLE,), (TABLE, make_table(1, schema_id=1), make_table(2))])
def test_round_trip(tables, before):
    """Header, tables, frames and predecessor are read back as they were written."""
    encoded, data = make_object(tables=tables, before=before)
    assert encoded.size == len(data)
    parsed = parse_object(PATH, memoryview(data), LOG)
    assert parsed.ref == encoded.ref == ObjectRef(3, 7, 9, parsed.ref.checksum)
    header = parsed.header
    assert (header.epoch, header.segment, header.segment_epoch) == (3, 5, 2)
    assert (header.first_lsn, header.last_lsn, header.predecessor) == (7, 9, before)
    frames = list(parsed.frames())
    kinds = [frame.kind for _, frame in frames]
    assert kinds == [KIND_TABLE] * len(tables) + [KIND_GROUP, KIND_BATCH, KIND_BATCH]
    assert [frame.lsn for _, frame in frames if frame.kind == KIND_BATCH] == [7, 9]
    for info, (offset, frame) in zip(tables, frames, strict=False):
        payload = data[offset + 128 : offset + 128 + frame.payload_bytes]
        assert TableInfo.from_bytes(payload).schema_id == info.schema_id == frame.schema_id


@given(st.integers(1, 2**63), st.integers(1, MAX_LSN), st.integers(0, 2**32 - 1), st.booleans(), st.integers(0, 2**63))
def test_header_round_trip(epoch, lsn, checksum, has_predecessor, table_bytes):
    """A header is read back for any numbers in it."""
    before = ObjectRef(epoch, lsn, lsn, checksum) if has_predecessor else None
    header = ObjectHeader(LOG, epoch, 1, epoch, lsn, MAX_LSN, table_bytes, 0, before)
    data = header.to_bytes()
    assert len(data) == HEADER_BYTES
    assert ObjectHeader.from_bytes(PATH, memoryview(data)) == header


def test_layout_is_the_documented_one():
    """The offsets of OBJECT_FORMAT.md hold: other readers rely on it."""
    _, data = make_object()
    assert data[0:4] == b"ARKO"
    assert struct.unpack_from("<II", data, 4) == (crc32c(data[8:192]), 1)
    assert data[12:16] == bytes(4)
    assert data[16:32] == LOG.bytes
    fields = struct.unpack_from("<QQQQQQQQQQ", data, 32)
    assert fields[:5] == (3, 5, 2, 7, 9)
    table_bytes, frame_bytes = fields[5:7]
    assert fields[7:] == (2, 3, 6)
    assert struct.unpack_from("<I", data, 112) == (0xDEADBEEF,)
    assert not any(data[116:192])
    assert len(data) == 192 + table_bytes + frame_bytes + 64
    footer = data[-64:]
    assert footer[:4] == b"ARKE"
    assert struct.unpack_from("<IQI", footer, 4) == (crc32c(data[:-64]), len(data), crc32c(footer[:16]))
    assert not any(footer[20:])


def test_every_byte_counts():
    """A flip of any bit-pattern at any byte is found, and named with the object's path."""
    _, data = make_object(frames=[batch_frame(7)], tables=())
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 + at % 255
        with pytest.raises(DataCorruption) as found:
            parse_object(PATH, memoryview(damaged), LOG)
        assert found.value.path == PATH
        assert 0 <= found.value.offset <= len(data)


def test_every_length_counts():
    """An object that was cut anywhere, or that goes on behind its end, is found."""
    _, data = make_object(frames=[batch_frame(7)], tables=())
    for length in range(len(data)):
        with pytest.raises(DataCorruption, match=r"0000000007\.wal"):
            parse_object(PATH, memoryview(data[:length]), LOG)
    for more in (b"\0", data[-FOOTER_BYTES:], data):
        with pytest.raises(DataCorruption):
            parse_object(PATH, memoryview(data + more), LOG)


def test_other_log_is_refused():
    """An object of another log is not read (R1)."""
    _, data = make_object()
    with pytest.raises(DataCorruption, match=str(LOG)):
        parse_object(PATH, memoryview(data), UUID(int=7))


def test_newer_version_is_refused():
    """A version that is not known is not guessed at."""
    _, data = make_object()
    header = bytearray(data[:HEADER_BYTES])
    header[8] = 2
    header[4:8] = crc32c(header[8:]).to_bytes(4, "little")
    with pytest.raises(DataCorruption, match="version"):
        ObjectHeader.from_bytes(PATH, memoryview(header))


def test_frames_of_another_segment_are_found():
    """Frame CRCs are seeded: frames under a header that names another segment or epoch do not pass (R8)."""
    frames = make_frames([batch_frame(7)])
    for segment, segment_epoch in ((6, 2), (5, 3)):
        encoded = encode_object(
            LOG, 3, segment, segment_epoch, first_lsn=7, last_lsn=7, tables=(), frames=frames, predecessor=None
        )
        parsed = parse_object(PATH, memoryview(b"".join(encoded.parts)), LOG)
        with pytest.raises(DataCorruption) as found:
            list(parsed.frames())
        assert (found.value.path, found.value.offset) == (PATH, HEADER_BYTES)


def test_cut_frame_is_found():
    """A frame that reaches beyond its section is damage, also where the object's own CRC holds."""
    frames = make_frames([batch_frame(7)])[:-64]
    encoded = encode_object(LOG, 3, 5, 2, first_lsn=7, last_lsn=7, tables=(), frames=frames, predecessor=None)
    parsed = parse_object(PATH, memoryview(b"".join(encoded.parts)), LOG)
    with pytest.raises(DataCorruption):
        list(parsed.frames())


def test_keys_sort_like_lsns():
    """The keys of an epoch list in LSN order, and epochs in theirs."""
    refs = [(epoch, lsn) for epoch in (1, 9, 10, 2**31) for lsn in (1, 9, 10, 99, 100, MAX_LSN)]
    keys = [object_key("n", epoch, lsn) for epoch, lsn in refs]
    assert keys == sorted(keys)
    assert ObjectRef(1, 9, 10, 0).key("n") == "n/wal/0000000001/0000000000000009.wal"


def test_format_page_lists_the_sizes():
    """OBJECT_FORMAT.md names the sizes that the code uses."""
    import arka.wal.objectfile as module

    text = (Path(module.__file__).parent / "OBJECT_FORMAT.md").read_text()
    assert f"[header, {HEADER_BYTES} bytes]" in text
    assert f"[footer, {FOOTER_BYTES} bytes]" in text


def test_frame_without_table_is_kept():
    """Control frames need no table."""
    frames = [Frame(5, 7, payload=bytes(16), accepted_us=0)]
    encoded = encode_object(
        LOG, 3, 5, 2, first_lsn=7, last_lsn=7, tables=(), frames=make_frames(frames), predecessor=None
    )
    parsed = parse_object(PATH, memoryview(b"".join(encoded.parts)), LOG)
    assert [frame.lsn for _, frame in parsed.frames()] == [0, 7]
