"""Schemas and batches of thousands of columns: linear work, short errors, and threads (T16, T23, T24)."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

from arka.errors import DETAIL_CHARACTERS, ErrorCode, InvalidRequest
from arka.flight import decode
from arka.flight.decode import THREAD_SCHEMA_BYTES, BatchDecoder
from arka.options import Limits
from arka.records import Operation
from arka.testing.ipcstreams import make_table, write_stream
from tests.linecount import lines_run


def columns(count: int, prefix: str = "c", type_: pa.DataType | None = None) -> pa.Schema:
    return pa.schema([(f"{prefix}{number}", type_ or pa.int64()) for number in range(count)])


@pytest.mark.parametrize(
    ("stream", "nested"),
    [("other", False), ("case", False), ("narrow", False), ("other", True), ("case", True), ("narrow", True)],
)
def test_work_grows_with_the_columns_alone(stream: str, nested: bool) -> None:
    """Four times the columns are four times the work, whether they differ by name, by case, by type, or in a struct."""

    def compare(count: int) -> str:
        prefix = {"other": "d", "case": "C", "narrow": "c"}[stream]
        sent, table = columns(count, prefix, pa.bool_()), columns(count)
        if nested:
            sent, table = (pa.schema([("s", pa.struct(list(one)))]) for one in (sent, table))
        header = write_stream(sent, [])[0].header
        with pytest.raises(InvalidRequest) as caught:
            BatchDecoder(make_table(table), Limits()).set_schema(header)
        assert caught.value.code is ErrorCode.SCHEMA_MISMATCH
        return caught.value.detail

    small, large = (lines_run(lambda count=count: compare(count)) for count in (250, 1000))
    assert large < 6 * small
    detail = compare(3000)
    assert len(detail) < DETAIL_CHARACTERS // 2
    assert "more" in detail[-40:]


def test_a_text_of_megabytes_in_a_schema_is_cut() -> None:
    """An error names a column by the first kilobyte of its name."""
    header = write_stream(pa.schema([("\0é" * 1_000_000, pa.int64()), ("b", pa.int64())]), [])[0].header
    with pytest.raises(InvalidRequest) as caught:
        BatchDecoder(make_table(columns(2)), Limits()).set_schema(header)
    assert len(caught.value.detail) < 4096
    assert "(2000000 characters)" in caught.value.detail


@pytest.mark.parametrize("cast", [False, True])
def test_a_batch_of_many_columns_is_decoded_in_a_thread(cast: bool) -> None:
    """One row of 10,000 columns has few bytes and takes as long as megabytes; one of 50 columns does not."""
    for count, threaded in ((50, False), (10_000, True)):
        schema = columns(count, type_=pa.int32() if cast else pa.int64())
        batch = pa.record_batch([pa.array([1], field.type) for field in schema], schema=schema)
        stream = write_stream(schema, [batch])
        decoder = BatchDecoder(make_table(columns(count)), Limits())
        assert (len(stream[0].header) > THREAD_SCHEMA_BYTES) is threaded
        decoder.set_schema(stream[0].header)
        assert decoder.needs_thread(stream[1], Operation.UPSERT) is threaded
        assert decoder.decode(stream[1]).rows == 1


def test_a_wide_streams_operations_are_planned_with_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads the schema plans each operation, as does one that binds the stream to a changed table."""
    table = make_table(columns(500), key_columns=["c0"])
    decoder = BatchDecoder(table, Limits())
    header = write_stream(columns(500), [])[0].header
    decoder.set_schema(header)
    assert decoder.wide

    def plan(*_arguments: object, **_options: object) -> object:
        raise AssertionError("an operation was planned when it was asked for")

    for bind in (lambda: None, lambda: decoder.rebind(replace(table, schema_id=table.schema_id + 1), Operation.UPSERT)):
        bind()
        with monkeypatch.context() as patched:
            patched.setattr(decode, "plan_layout", plan)
            for operation in Operation:
                decoder.check_operation(operation)
