"""File access comes from the server's configuration; table properties redirect nothing (R30)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog.rest import TableResponse

from arka.iceberg import catalogs
from arka.iceberg.restcatalog import ServerRestCatalog

SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("s", pa.string())])

#: What others may put into a table's properties.
HOSTILE = {
    "s3.endpoint": "http://127.0.0.1:1",
    "s3.access-key-id": "theirs",
    "s3.signer": "S3V4RestSigner",
    "s3.proxy-uri": "http://127.0.0.1:1",
    "adls.account-host": "127.0.0.1:1",
    "gcs.service.host": "http://127.0.0.1:1",
    "hf.endpoint": "http://127.0.0.1:1",
    "client.region": "nowhere",
    "py-io-impl": "os.path.join",
    "write.py-location-provider.impl": "os.path.join",
    "write.object-storage.enabled": "true",
}


def _rows(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch({"n": pa.array(numbers, pa.int64()), "s": ["x"] * len(numbers)}, schema=SCHEMA)


@pytest.mark.parametrize("kind", ["lean", "stock", "keyed"])
def test_properties_that_others_set_redirect_nothing(make_lake: Any, tmp_path: Any, kind: str) -> None:
    """Set later by another writer, they change neither the file access nor where files lie."""
    lake = make_lake(stock_commit=kind == "stock")
    info = lake.create(SCHEMA, (1, "identity"), key=["n"] if kind == "keyed" else ())
    lake.append(info, [_rows(1)], 0)
    elsewhere = dict.fromkeys(("write.data.path", "write.metadata.path"), f"file://{tmp_path}/elsewhere")
    # Stock pyiceberg could not even write this: it takes the class from the new properties.
    other = catalogs.connect(lake.config)
    with other.load_table(tuple(info.name)).transaction() as transaction:
        transaction.set_properties(HOSTILE | elsewhere)
    other.close()
    adopted = lake.reload(info)
    lake.append(adopted, [_rows(1)], 1)
    lake.append(adopted, [_rows(2)], 2)
    loaded = catalogs.catalog(lake.config).load_table(tuple(info.name))
    assert not HOSTILE.keys() & (loaded.io.properties.keys() - {"py-io-impl"})
    assert type(loaded.io).__name__ == "WarehouseFileIO"
    assert HOSTILE.items() <= loaded.properties.items()
    root = info.location + "/"
    entries = [
        entry for m in loaded.current_snapshot().manifests(loaded.io) for entry in m.fetch_manifest_entry(loaded.io)
    ]
    assert all(entry.data_file.file_path.startswith(root + "data/") for entry in entries)
    assert loaded.metadata_location.startswith(root + "metadata/")
    assert not list((tmp_path / "elsewhere").rglob("*.avro"))


def _response(**more: Any) -> TableResponse:
    metadata = {
        "format-version": 2,
        "table-uuid": "9c12d441-03fe-4693-9a96-a0705ddf69c1",
        "location": "s3://bucket/t",
        "last-sequence-number": 0,
        "last-updated-ms": 1,
        "last-column-id": 1,
        "current-schema-id": 0,
        "schemas": [{"type": "struct", "schema-id": 0, "fields": []}],
        "default-spec-id": 0,
        "partition-specs": [{"spec-id": 0, "fields": []}],
        "last-partition-id": 999,
        "default-sort-order-id": 0,
        "sort-orders": [{"order-id": 0, "fields": []}],
        "properties": HOSTILE,
    }
    body = {"metadata-location": "s3://bucket/t/metadata/1.json", "metadata": metadata, **more}
    return TableResponse.model_validate(body)


@pytest.mark.parametrize("method", ["_response_to_table", "_response_to_staged_table"])
def test_a_rest_catalog_hands_out_what_it_answers_itself(method: str) -> None:
    """The configuration and the catalog's answer count; the table's properties do not."""
    catalog = object.__new__(ServerRestCatalog)
    catalog.properties = {"s3.access-key-id": "ours", "s3.region": "here"}
    catalog._auth_manager = None
    config = {"s3.session-token": "handed-out", "py-io-impl": "pyiceberg.io.fsspec.FsspecFileIO"}
    credentials = [{"prefix": "s3://bucket/", "config": {"s3.secret-access-key": "also-handed-out"}}]
    made = getattr(catalog, method)(("default", "t"), _response(config=config, **{"storage-credentials": credentials}))
    assert type(made.io).__name__ == "WarehouseFileIO"
    assert {name: value for name, value in made.io.properties.items() if name != "py-io-impl"} == {
        "s3.access-key-id": "ours",
        "s3.region": "here",
        "s3.session-token": "handed-out",
        "s3.secret-access-key": "also-handed-out",
    }
