"""The example tables that ``--demo-tables`` registers: the ones that the README's first client writes to."""

from __future__ import annotations

import pyarrow as pa

from arka.records import PartitionRequest, TableDefinition, TableName, TableType


def demo_definitions() -> list[TableDefinition]:
    """Return ``events``, append-only, and ``users``, with a primary key; each partitioned by a day."""
    events = pa.schema(
        [
            pa.field("event_id", pa.int64(), nullable=False),
            pa.field("user_id", pa.int64()),
            pa.field("timestamp", pa.timestamp("us"), nullable=False),
            pa.field("kind", pa.string()),
            pa.field("value", pa.float64()),
        ]
    )
    users = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("name", pa.string()),
            pa.field("email", pa.string()),
            pa.field("signup", pa.timestamp("us")),
        ]
    )
    return [
        TableDefinition(
            TableName.parse("events"),
            events,
            partition=(PartitionRequest(2, 1000, "event_day", "day"),),
        ),
        TableDefinition(
            TableName.parse("users"),
            users,
            TableType.PRIMARY_KEY,
            ("id",),
            (PartitionRequest(3, 1000, "signup_day", "day"),),
        ),
    ]


__all__ = ["demo_definitions"]
