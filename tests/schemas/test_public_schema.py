"""What of a table's schema leaves the server."""

from __future__ import annotations

import pyarrow as pa

from arka.flight.publicschema import public_schema
from arka.testing.ipcstreams import with_field_ids


def test_no_field_id_at_any_depth() -> None:
    """Only a column's doc goes out: field ids of structs, lists and maps below it do not either."""
    schema = pa.schema(
        [
            pa.field("a", pa.int64(), nullable=False, metadata={"doc": "first"}),
            pa.field("s", pa.struct([pa.field("x", pa.int64(), nullable=False), ("y", pa.list_(pa.string()))])),
            ("l", pa.list_(pa.field("element", pa.struct([("z", pa.int64())]), nullable=False))),
            ("m", pa.map_(pa.string(), pa.struct([("v", pa.date32())]))),
        ]
    )
    with_ids = with_field_ids(schema)
    assert "field_id" in with_ids.to_string(show_field_metadata=True)
    made = public_schema(with_ids)
    assert made.equals(schema, check_metadata=True)
    assert "field_id" not in made.to_string(show_field_metadata=True)
    assert b"field_id" not in made.serialize().to_pybytes()
