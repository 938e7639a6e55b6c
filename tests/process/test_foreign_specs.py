"""Partition specs that other engines add and remove while writes wait: every row is there once (R27)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.table.update import RemovePartitionSpecsUpdate
from pyiceberg.transforms import BucketTransform, IdentityTransform

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import NUMBERS, Stream, action, connect, create, numbers

pytestmark = pytest.mark.process


@pytest.mark.parametrize("keyed", [False, True], ids=["append-only", "primary-key"])
def test_spec_of_waiting_writes_is_removed(make_server: Callable[..., ServerProcess], keyed: bool) -> None:
    """Writes over the limit were accepted under a spec that is gone when they are committed: another one takes them."""
    server = make_server(iceberg__commit_interval_s=60, limits__partitions=10, iceberg__adopt_s=0.1).start()
    more: dict[str, Any] = {"primary_key": "n", "table_type": "primary_key"} if keyed else {}
    with connect(server.location) as client, lake.open_catalog(server.data) as catalog:
        create(client, "t", **more)
        with catalog.load_table("default.t").update_spec() as update:
            update.add_field("n", BucketTransform(2), "two")
        action(client, "DescribeTable", name="t")
        stream = Stream(client, "t", NUMBERS, requested_durability="disk")
        stream.write(numbers(range(40)))
        stream.write(numbers(range(40, 45)))
        assert [ack for ack in stream.finish() if ack["error"]] == []
        foreign = catalog.load_table("default.t")
        old = foreign.metadata.default_spec_id
        with foreign.update_spec() as update:
            update.remove_field("two")
            update.add_field("n", IdentityTransform(), "each")
        foreign = catalog.load_table("default.t")
        catalog.commit_table(foreign, (), (RemovePartitionSpecsUpdate(spec_ids=[old]),))
        assert old not in catalog.load_table("default.t").metadata.specs()
        action(client, "Flush", name="t")
        assert action(client, "DescribeTable", name="t")["state"] == "active"
    assert sorted(lake.rows(server.data, "t")["n"].to_pylist()) == list(range(45))


def test_column_dropped_under_an_idle_stream(make_server: Callable[..., ServerProcess]) -> None:
    """What is accepted before the server hears of it names the column in its last ack; later writes are refused."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    schema = pa.schema([("n", pa.int64()), ("v", pa.string())])
    with connect(server.location) as client:
        create(client, "t", [("n", "int64"), ("v", "utf8")])
        stream = Stream(client, "t", schema, requested_durability="iceberg_committed")
        stream.write(pa.record_batch({"n": [0], "v": ["a"]}, schema=schema))
        while stream.ack()["durability_level"] != "iceberg_committed":
            pass
        with lake.open_catalog(server.data) as catalog, catalog.load_table(("default", "t")).update_schema() as update:
            update.delete_column("v")
        stream.write(pa.record_batch({"n": [1], "v": ["b"]}, schema=schema))
        while (ack := stream.ack())["durability_level"] != "iceberg_committed":
            assert ack["error"] is None
        assert (ack["error"], ack["dropped_columns"]) == (None, ["v"])
        stream.write(pa.record_batch({"n": [2], "v": ["c"]}, schema=schema))
        assert stream.ack()["code"] == "schema_mismatch"
        assert sorted(lake.column(server.data, "t", "n")) == [0, 1]
    server.kill()
