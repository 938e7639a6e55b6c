"""Spark writes beside a server that commits all the time: both find what they wrote, once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess
from tests.process import lake
from tests.process.clients import Stream, action, connect, create

from .spark import Spark, SparkError

pytestmark = [pytest.mark.engines, pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(1800)]

FIELDS = [("id", "int64!"), ("word", "utf8"), ("part", "int32")]
SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), ("word", pa.string()), ("part", pa.int32())])
#: Spark's ids are from here on, the server's are below.
SPARK_FROM = 1_000_000_000

INSERTS = 40
CHANGES = 20

Rows = dict[int, tuple[str | None, int | None]]


class _Writer:
    """A client that writes to the server until it is told to stop, and knows what it wrote."""

    def __init__(self, server: ServerProcess, table: str, *, keyed: bool) -> None:
        self.rows: Rows = {}
        self.stop = threading.Event()
        self.failure: BaseException | None = None
        self._server, self._table, self._keyed = server, table, keyed
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            with connect(self._server.location) as client:
                for number in range(1_000_000_000):
                    if self.stop.is_set():
                        return
                    self._write(client, number)
                    self.stop.wait(0.05)
        except BaseException as error:
            self.failure = error

    def _write(self, client: flight.FlightClient, number: int) -> None:
        # Every tenth write of a primary-key table deletes, and the ids of others come back later.
        first = number * 10 if not self._keyed else (number * 10) % 500
        ids = list(range(first, first + 10))
        words = [f"write {number}"] * 10
        parts = [i % 3 for i in ids]
        deletes = self._keyed and number % 10 == 9
        more = {"operation": "delete"} if deletes else {}
        tier = "iceberg_committed" if number % 8 == 0 else "disk"
        stream = Stream(client, self._table, SCHEMA, requested_durability=tier, **more)
        stream.write(pa.record_batch([pa.array(ids, pa.int64()), words, pa.array(parts, pa.int32())], schema=SCHEMA))
        errors = [ack["error"] for ack in stream.finish() if ack["error"] is not None]
        if errors and self._keyed and not deletes:
            # Spark has added a column: an upsert replaces the whole row, so one without it is refused.
            assert all("the table has the property 'arka.partial'" in error for error in errors), errors
            self.stop.set()
            return
        assert not errors
        for i, word, part in zip(ids, words, parts, strict=True):
            if deletes:
                self.rows.pop(i, None)
            else:
                self.rows[i] = (word, part)


def _found(server: ServerProcess, table: str) -> tuple[Rows, int]:
    rows = lake.load(server.data, table).scan().to_arrow().to_pylist()
    return {row["id"]: (row["word"], row["part"]) for row in rows}, len(rows)


#: What Spark says of a statement that lost a race; the last, where it met the other commit while it still read.
_LOST_RACE = ("ValidationException", "CommitFailedException", "the table has been concurrently modified")


def _try(spark: Spark, statement: str, refused: list[str]) -> bool:
    """Run a statement that may lose a race; whether it won."""
    try:
        spark.sql(statement)
    except SparkError as error:
        # A lost race is a definite outcome in each of Spark's words for it; anything else is a fault.
        text = str(error)
        assert any(word in text for word in _LOST_RACE), text
        refused.append(text)
        return False
    return True


@pytest.mark.parametrize("keyed", [False, True], ids=["append_only", "primary_key"])
def test_spark_writes_beside_a_live_server(
    server: ServerProcess, client: flight.FlightClient, spark: Spark, keyed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 INSERT all succeed; MERGE, DELETE and rewrite win or lose whole; rows are exact (R20, R30)."""
    more: dict[str, Any] = {"table_type": "primary_key", "primary_key": "id"} if keyed else {}
    spec = {"spec_id": 1, "fields": [{"source_id": 2, "field_id": 1000, "name": "part", "transform": "Identity"}]}
    create(client, "live", FIELDS, partition_spec=spec, **more)
    name = "arka.default.live"
    mine: Rows = {}
    refused: list[str] = []
    with _Writer(server, "live", keyed=keyed) as writer:
        for number in range(INSERTS):
            ids = [SPARK_FROM + number * 3 + i for i in range(3)]
            values = ", ".join(f"({i}L, 'spark {number}', {i % 3})" for i in ids)
            spark.sql(f"INSERT INTO {name} VALUES {values}")
            mine |= {i: (f"spark {number}", i % 3) for i in ids}
        for number in range(CHANGES):
            old, new = SPARK_FROM + number, SPARK_FROM + 1_000 + number
            source = f"SELECT * FROM VALUES ({old}L, 'merged', 0), ({new}L, 'merged', 1) AS v(id, word, part)"
            merge = (
                f"MERGE INTO {name} t USING ({source}) s ON t.id = s.id AND t.id >= {SPARK_FROM}L "
                "WHEN MATCHED THEN UPDATE SET word = s.word WHEN NOT MATCHED THEN INSERT *"
            )
            if _try(spark, merge, refused):
                mine[old] = ("merged", mine[old][1])
                mine[new] = ("merged", 1)
            gone = SPARK_FROM + 60 + number
            if _try(spark, f"DELETE FROM {name} WHERE id = {gone}L", refused):
                del mine[gone]
        maintained = [
            _try(spark, f"CALL arka.system.rewrite_data_files(table => 'default.live'{options})", refused)
            for options in ("", ", options => map('min-input-files', '2')")
        ]
        spark.sql("CALL arka.system.expire_snapshots(table => 'default.live', retain_last => 20)")
        spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('user.note' = 'set by another engine')")
        spark.sql(f"ALTER TABLE {name} ADD COLUMN extra string")
        spark.sql(f"INSERT INTO {name} VALUES ({SPARK_FROM + 5_000}L, 'with extra', 0, 'x')")
        mine[SPARK_FROM + 5_000] = ("with extra", 0)
    action(client, "Flush", name="live")
    with capsys.disabled():
        print(
            f"\n{len(refused)} of {2 * CHANGES + 2} MERGE, DELETE and rewrite lost a race; rewrites won: {maintained}"
        )
    found, count = _found(server, "live")
    assert count == len(found), "a row is there twice"
    assert {i: row for i, row in found.items() if i < SPARK_FROM} == writer.rows
    assert {i: row for i, row in found.items() if i >= SPARK_FROM} == mine
    assert spark.sql(f"SELECT count(*), count(DISTINCT id) FROM {name}") == [[count, count]]
    (described,) = [action(client, "DescribeTable", name="live")]
    assert [field["name"] for field in described["schema"]["fields"]] == ["id", "word", "part", "extra"]


def test_a_column_that_spark_renames_goes_on(server: ServerProcess, client: flight.FlightClient, spark: Spark) -> None:
    """DDL of Spark on a live table: an open stream is bound by field id, new streams use the new names (R27)."""
    create(client, "ddl", FIELDS)
    stream = Stream(client, "ddl", SCHEMA, requested_durability="iceberg_committed")
    stream.write(pa.record_batch([pa.array([1], pa.int64()), ["a"], pa.array([1], pa.int32())], schema=SCHEMA))
    stream.acks(4)
    spark.sql("ALTER TABLE arka.default.ddl RENAME COLUMN word TO term")
    spark.sql("ALTER TABLE arka.default.ddl ALTER COLUMN part TYPE bigint")
    stream.write(pa.record_batch([pa.array([2], pa.int64()), ["b"], pa.array([2], pa.int32())], schema=SCHEMA))
    with contextlib.closing(stream.writer):
        assert [ack["error"] for ack in stream.acks(4)] == [None] * 4
    rows = sorted(spark.sql("SELECT id, term, part FROM arka.default.ddl"))
    assert rows == [[1, "a", 1], [2, "b", 2]]


def test_metadata_tables_of_spark_open(
    client: flight.FlightClient, spark: Spark, make_spark: Callable[..., Spark]
) -> None:
    """Files, entries, snapshots, history and partitions of both kinds of table can be listed."""
    for kind, more in (("plain", {}), ("keyed", {"table_type": "primary_key", "primary_key": "id"})):
        create(client, kind, FIELDS, **more)
        for word in ("a", "b"):
            stream = Stream(client, kind, SCHEMA, requested_durability="iceberg_committed")
            stream.write(pa.record_batch([pa.array([1], pa.int64()), [word], pa.array([1], pa.int32())], schema=SCHEMA))
            stream.finish()
        for listing in ("files", "entries", "all_entries", "snapshots", "history", "manifests", "refs", "partitions"):
            assert spark.sql(f"SELECT * FROM arka.default.{kind}.{listing}")
