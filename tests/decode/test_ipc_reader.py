"""The bounds-checked reader: right about what pyarrow writes, and deaf to everything else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import ModuleType

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka._core import ipc
from arka._core.buffers import FrameBuffer
from arka.flight.layout import plan_layout
from arka.testing.ipcstreams import StreamMessage, write_stream

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        ("name", pa.string()),
        ("word", pa.dictionary(pa.int32(), pa.string())),
        ("s", pa.struct([("x", pa.int32()), ("w", pa.dictionary(pa.int8(), pa.string()))])),
        ("l", pa.list_(pa.float64())),
        ("view", pa.string_view()),
    ]
)
BATCH = pa.record_batch(
    [
        pa.array([1, 2, 3]),
        pa.array(["a", None, "ccc"]),
        pa.array(["x", "y", "x"]).dictionary_encode(),
        pa.StructArray.from_arrays(
            [pa.array([1, None, 3], pa.int32()), pa.DictionaryArray.from_arrays(pa.array([0, 0, 0], pa.int8()), ["q"])],
            fields=list(SCHEMA.field("s").type),
        ),
        pa.array([[1.0], None, []]),
        pa.array(["short", "one that is longer than twelve bytes", None], pa.string_view()),
    ],
    schema=SCHEMA,
)


def messages(compression: str | None = None) -> dict[int, list[StreamMessage]]:
    found: dict[int, list[StreamMessage]] = {}
    for message in write_stream(SCHEMA, [BATCH], compression=compression):
        found.setdefault(ipc.message_type(message.header), []).append(message)
    return found


def test_the_reader_agrees_with_the_oracle(oracle: ModuleType) -> None:
    """Types, versions, lengths, nodes and buffers are what the flatbuffer says."""
    for kind, group in messages().items():
        for message in group:
            expected = oracle.read_message(message.header)
            assert ipc.metadata_version(message.header) == expected.scalar(0, "<h") == 4
            assert expected.scalar(1, "<B") == kind
            assert ipc.body_length(message.header) == expected.scalar(3, "<q") == len(message.body)
    (batch,) = messages()[ipc.RECORD_BATCH]
    layout = ipc.BatchLayout(batch.header)
    table = oracle.read_message(batch.header).table(2)
    assert (layout.rows, layout.body_bytes) == (3, len(batch.body))
    assert layout.nodes == table.pairs(1)
    assert layout.buffers == table.pairs(2)
    assert layout.variadic_counts == [1]
    assert layout.codec == ipc.CODEC_NONE


def test_a_schema_tells_its_dictionaries_depth_first() -> None:
    """Ids come in the order in which fields are met, parents before children."""
    (schema,) = messages()[ipc.SCHEMA]
    assert ipc.schema_dictionary_ids(schema.header) == [0, 1]
    assert ipc.schema_endianness(schema.header) == 0


def test_a_dictionary_batch_becomes_a_record_batch() -> None:
    """The values of a dictionary are readable as the one-column batch that they are."""
    found = []
    for message in messages()[ipc.DICTIONARY_BATCH]:
        identity, is_delta, header = ipc.dictionary_batch(message.header)
        assert not is_delta
        assert ipc.message_type(header) == ipc.RECORD_BATCH
        frame = FrameBuffer(header, len(message.body))
        frame.body[:] = message.body
        schema = pa.schema([("values", pa.string())])
        batch = pa.ipc.read_record_batch(pa.py_buffer(frame).slice(128), schema)
        found.append((identity, batch.column(0).to_pylist()))
    assert found == [(0, ["x", "y"]), (1, ["q"])]


@pytest.mark.parametrize(("codec", "number"), [("lz4", ipc.CODEC_LZ4_FRAME), ("zstd", ipc.CODEC_ZSTD)])
def test_compressed_sizes_are_summed_without_decompressing(codec: str, number: int) -> None:
    """The length prefixes give the size that a body becomes (T14)."""
    (plain,) = messages()[ipc.RECORD_BATCH]
    (compressed,) = messages(codec)[ipc.RECORD_BATCH]
    layout = ipc.BatchLayout(compressed.header)
    assert layout.codec == number
    plain_layout = ipc.BatchLayout(plain.header)
    expected = sum(length for _, length in plain_layout.buffers)
    assert plain_layout.uncompressed_bytes(plain.buffer) == expected
    assert layout.uncompressed_bytes(compressed.buffer) == expected


@pytest.mark.parametrize("kind", [ipc.SCHEMA, ipc.DICTIONARY_BATCH, ipc.RECORD_BATCH])
def test_no_cut_message_is_read_past_its_end(kind: int) -> None:
    """A message cut at any byte is refused, or says what the whole one says: it reads nothing else."""
    header = messages()[kind][0].header
    readers: dict[int, Callable[[bytes], object]] = {
        ipc.SCHEMA: ipc.schema_dictionary_ids,
        ipc.DICTIONARY_BATCH: lambda it: ipc.dictionary_batch(it)[:2],
        ipc.RECORD_BATCH: lambda it: (ipc.BatchLayout(it).nodes, ipc.BatchLayout(it).buffers),
    }
    read = readers[kind]
    whole = read(header)
    refused = 0
    for cut in range(len(header)):
        try:
            assert read(header[:cut]) == whole
        except ValueError:
            refused += 1
    assert refused >= len(header) // 2


def _words(header: bytes) -> st.SearchStrategy[bytes]:
    edges = [0, 1, 4, 8, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]

    def put(change: tuple[int, int, int]) -> bytes:
        at, width, value = change
        work = bytearray(header)
        work[at : at + width] = struct.pack("<Q", value)[:width]
        return bytes(work[: len(header)])

    places = st.tuples(st.integers(0, len(header) - 1), st.sampled_from([1, 2, 4, 8]), st.sampled_from(edges))
    return places.map(put)


HEADERS = [message.header for group in messages().values() for message in group]


@given(st.sampled_from(HEADERS).flatmap(_words) | st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(header: bytes) -> None:
    """Garbage raises ValueError from every reader; nothing else, and nothing outside is read."""
    for reader in (
        ipc.message_type,
        ipc.metadata_version,
        ipc.body_length,
        ipc.schema_endianness,
        ipc.schema_dictionary_ids,
        ipc.dictionary_batch,
        ipc.BatchLayout,
    ):
        try:
            made = reader(header)
        except ValueError:
            continue
        if isinstance(made, ipc.BatchLayout):
            size = made.body_bytes
            assert all(at >= 0 and at + length <= size for at, length in made.buffers if length)
            assert sum(length for _, length in made.buffers if length) <= size
            assert len(made.nodes) == made.node_count


@pytest.mark.parametrize(("levels", "problem"), [(70, "nests deeper"), (40, "more than")])
def test_a_schema_that_names_itself_many_times_is_refused(levels: int, problem: str) -> None:
    """Shared vectors of children cannot make a few bytes stand for 2**64 fields."""
    # One Field table whose children are two offsets to the next one, and so on, built backwards.
    data = bytearray()

    def emit(part: bytes) -> int:
        data[0:0] = part
        return len(data)

    # Places are counted from the end, since the front grows.
    below = emit(struct.pack("<HH", 4, 4) + struct.pack("<i", 4)) - 4
    for _ in range(levels):
        vector = emit(struct.pack("<III", 2, 0, 0))
        struct.pack_into("<II", data, 4, vector - 4 - below, vector - 8 - below)
        table = emit(struct.pack("<HHHHHHHH", 16, 8, 0, 0, 0, 0, 0, 4) + struct.pack("<iI", 16, 0)) - 16
        struct.pack_into("<I", data, 20, table - 4 - vector)
        below = table
    fields = emit(struct.pack("<II", 1, 0))
    struct.pack_into("<I", data, 4, fields - 4 - below)
    schema = emit(struct.pack("<HHHH", 8, 8, 0, 4) + struct.pack("<iI", 8, 0)) - 8
    struct.pack_into("<I", data, 12, schema - 4 - fields)
    message = emit(struct.pack("<HHHHHH", 12, 12, 0, 8, 4, 0) + struct.pack("<iIB3x", 12, 0, 1)) - 12
    struct.pack_into("<I", data, 16, message - 4 - schema)
    root = emit(struct.pack("<I", 0))
    struct.pack_into("<I", data, 0, root - message)
    header = bytes(data)
    assert ipc.message_type(header) == ipc.SCHEMA
    with pytest.raises(ValueError, match=problem):
        ipc.schema_dictionary_ids(header)


def _check(schema: pa.Schema, batch: pa.RecordBatch, **changes: int) -> tuple[int, int, int, int] | None:
    """Check one batch after overwriting a node: ``node``, ``length``, ``nulls``."""
    (_, message) = write_stream(schema, [batch])
    header = bytearray(message.header)
    if changes:
        layout = ipc.BatchLayout(message.header)
        nodes = layout.nodes
        encoded = b"".join(struct.pack("<qq", *node) for node in nodes)
        at = bytes(header).index(encoded) + 16 * changes["node"]
        length, nulls = nodes[changes["node"]]
        struct.pack_into("<qq", header, at, changes.get("length", length), changes.get("nulls", nulls))
    made = ipc.BatchLayout(bytes(header))
    return made.check(plan_layout(schema, required=True).plan, message.buffer, 1000)


NULLS = pa.schema([pa.field("a", pa.int64())])
THREE = pa.record_batch([pa.array([1, None, 3])], schema=NULLS)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"node": 0, "nulls": 0}, ipc.FOUND_NULL_COUNT),
        ({"node": 0, "nulls": 2}, ipc.FOUND_NULL_COUNT),
        ({"node": 0, "nulls": 4}, ipc.FOUND_NULL_COUNT),
        ({"node": 0, "nulls": -1}, ipc.FOUND_NULL_COUNT),
        ({"node": 0, "length": 2}, ipc.FOUND_LENGTH),
        ({"node": 0, "length": -1}, ipc.FOUND_LENGTH),
        ({"node": 0, "length": 2**62}, ipc.FOUND_LENGTH),
    ],
)
def test_a_node_that_lies_is_found(changes: dict[str, int], found: int | None) -> None:
    """Null counts are held against the bitmap, lengths against the batch; Arrow believes a count of 0."""
    finding = _check(NULLS, THREE, **changes)
    assert (finding and finding[0]) == found


def test_nulls_without_a_bitmap_are_found() -> None:
    """A null count needs a bitmap that shows which."""
    batch = pa.record_batch([pa.array([1, 2, 3])], schema=NULLS)
    finding = _check(NULLS, batch, node=0, nulls=1)
    assert finding is not None
    assert finding[0] == ipc.FOUND_SHORT_BUFFER


def test_every_bit_of_a_long_bitmap_counts() -> None:
    """Counting is right at lengths around words and bytes."""
    for length in (1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1000):
        for null in {0, length // 2, length - 1}:
            values = [None if index == null else index for index in range(length)]
            batch = pa.record_batch([pa.array(values, pa.int64())], schema=NULLS)
            assert _check(NULLS, batch) is None
            finding = _check(NULLS, batch, node=0, nulls=0)
            assert finding is not None
            assert finding == (ipc.FOUND_NULL_COUNT, 0, 1, 0)


def test_a_range_looks_at_values_that_are_there() -> None:
    """Values in the place of nulls are of no account; others are, at both ends."""
    schema = pa.schema([("d", pa.date32())])
    ranges = {"d": (-10, 10)}
    plan = plan_layout(schema, ranges=ranges).plan
    for values, inside in (
        ([-10, 10], True),
        ([-11, 0], False),
        ([0, 11], False),
        ([None, 5], True),
        ([None, 11], False),
    ):
        array = pa.array(values, pa.int32()).cast(pa.date32())
        if None in values:
            buffers = array.buffers()
            wild = struct.pack("<ii", 2**31 - 1, values[1] or 0)
            array = pa.Array.from_buffers(pa.date32(), 2, [buffers[0], pa.py_buffer(wild)])
        (_, message) = write_stream(schema, [pa.record_batch([array], schema=schema)])
        finding = ipc.BatchLayout(message.header).check(plan, message.buffer, 1000)
        assert (finding is None) == inside


def test_views_in_a_nulls_place_are_emptied() -> None:
    """What a null's view claims is neither counted nor kept; a valid view's negative length is refused."""
    views = struct.pack("<i12x", 5) + struct.pack("<i12x", -7) + struct.pack("<i12x", 100)
    cleaned, total = ipc.clean_views(views, b"\x05", 0, 3)
    assert total == 105
    assert cleaned[16:32] == bytes(16)
    assert ipc.clean_views(views, b"\x05", 1, 2)[1] == 100
    with pytest.raises(ValueError, match="negative"):
        ipc.clean_views(views, None, 0, 3)
    for offset, length in ((0, 4), (-1, 1), (2, 2), (2**40, 1)):
        with pytest.raises(ValueError, match="views"):
            ipc.clean_views(views, None, offset, length)
    with pytest.raises(ValueError, match="validity"):
        ipc.clean_views(views, b"", 0, 3)


def test_a_plan_takes_known_kinds_only() -> None:
    """A rule without a meaning is refused where it is made."""
    with pytest.raises(ValueError, match="unknown node kind"):
        ipc.LayoutPlan([(99, 0, 0, 0, 0)])
    with pytest.raises(TypeError, match="bytes"):
        ipc.message_type(bytearray(8))  # type: ignore[arg-type]
