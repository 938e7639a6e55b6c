"""The demonstration's own checks: a comparison that could not fail would prove nothing."""

from __future__ import annotations

import datetime
import math

import pyarrow as pa
import pytest
from pyiceberg.catalog import load_catalog
from pyiceberg.transforms import DayTransform

UTC = datetime.UTC
SCHEMA = pa.schema(
    [("id", pa.int64()), ("x", pa.float64()), ("s", pa.string()), ("time_hour", pa.timestamp("us", tz="UTC"))]
)
ROWS = [
    (1, 1.5, "a", datetime.datetime(2013, 1, 1, 23, tzinfo=UTC)),
    (1, 1.5, "a", datetime.datetime(2013, 1, 1, 23, tzinfo=UTC)),
    (2, None, "", datetime.datetime(2013, 1, 2, 0, tzinfo=UTC)),
    (3, math.nan, None, datetime.datetime(2013, 1, 2, 1, tzinfo=UTC)),
    (None, math.inf, "é", datetime.datetime(2013, 12, 31, 1, tzinfo=UTC)),
]


def table(rows, schema=SCHEMA) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)


@pytest.fixture
def find_difference(example):
    return example("demo").find_difference


def test_order_and_chunks_do_not_matter(find_difference):
    """The same rows in another order, other chunks, other column order and wider types are equal."""
    expected = table(ROWS)
    actual = pa.concat_tables([table(ROWS[3:]), table(ROWS[:3])])
    widened = actual.set_column(2, "s", actual["s"].cast(pa.large_string()))
    assert find_difference(expected, widened.select(["time_hour", "s", "x", "id"])) is None


def test_empty_tables_are_equal(find_difference):
    """No rows are no difference."""
    assert find_difference(SCHEMA.empty_table(), SCHEMA.empty_table()) is None


def changed(row: int, column: int, value: object) -> list[tuple[object, ...]]:
    rows = [list(r) for r in ROWS]
    rows[row][column] = value
    return [tuple(r) for r in rows]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (ROWS[:-1], "4 rows, expected 5"),
        ([*ROWS, ROWS[0]], "6 rows, expected 5"),
        ([ROWS[0], ROWS[2], *ROWS[2:]], "'id'"),
        (changed(0, 0, 7), "'id'"),
        (changed(0, 1, 1.5000000000000002), "'x'"),
        (changed(2, 1, math.nan), "'x'"),
        (changed(3, 1, None), "'x'"),
        (changed(2, 2, None), "'s'"),
        (changed(3, 2, ""), "'s'"),
        (changed(4, 2, "e"), "'s'"),
        (changed(0, 3, datetime.datetime(2013, 1, 1, 22, 59, 59, 999999, tzinfo=UTC)), "'time_hour'"),
    ],
)
def test_every_kind_of_difference_is_found(find_difference, rows, named):
    """A lost, doubled or changed row is found: also null for NaN, null for the empty string, one bit."""
    assert named in find_difference(table(ROWS), table(rows))


def test_missing_columns_and_other_types_are_differences(find_difference):
    """A column too few or a type that does not hold the values is said, not raised."""
    expected = table(ROWS)
    assert "columns" in find_difference(expected, expected.drop_columns("x"))
    texts = expected.set_column(0, "id", pa.array(["a", "b", "c", "d", "e"]))
    assert "types" in find_difference(expected, texts)


@pytest.fixture
def warehouse(tmp_path):
    """Make the table as the server would, with plain pyiceberg."""
    catalog = load_catalog(
        "arka", type="sql", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=f"file://{tmp_path}/warehouse"
    )
    catalog.create_namespace("default")
    made = catalog.create_table("default.flights", SCHEMA)
    with made.update_spec() as update:
        update.add_field("time_hour", DayTransform(), "day")
    made.append(table(ROWS))
    yield tmp_path
    catalog.close()


def test_read_back_passes_on_what_was_sent(example, warehouse):
    """Both pyiceberg and DuckDB read the rows of a day-partitioned table back equal."""
    example("demo").check_read_back(table(ROWS), warehouse)


def test_read_back_fails_on_anything_else(example, warehouse):
    """One changed value fails the demonstration."""
    demo = example("demo")
    with pytest.raises(demo.DemoFailed, match="pyiceberg read something else"):
        demo.check_read_back(table(changed(0, 0, 9)), warehouse)


def test_real_flights_are_all_there(example):
    """The data set is the real one: 336,776 rows, 19 columns, its nulls as nulls."""
    flights = example("demo").load_flights()
    assert (flights.num_rows, flights.num_columns) == (336_776, 19)
    assert flights["dep_time"].null_count == 8255
    assert flights["tailnum"].null_count == 2512
    assert flights.schema.field("time_hour").type == pa.timestamp("us", tz="UTC")
