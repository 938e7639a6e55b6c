"""The example tables that ``--demo-tables`` registers: the ones that the README's first client writes to."""

from __future__ import annotations

import pyarrow as pa

from arka.records import PartitionRequest, TableDefinition, TableName


def demo_definitions() -> list[TableDefinition]:
    """Return ``events``: append-only, partitioned by the day of its timestamp.

    ``users``, a primary-key table, is registered from the version on that has such tables.
    """
    events = pa.schema(
        [
            pa.field("event_id", pa.int64(), nullable=False),
            pa.field("user_id", pa.int64()),
            pa.field("timestamp", pa.timestamp("us"), nullable=False),
            pa.field("kind", pa.string()),
            pa.field("value", pa.float64()),
        ]
    )
    return [
        TableDefinition(
            TableName.parse("events"),
            events,
            partition=(PartitionRequest(2, 1000, "event_day", "day"),),
        )
    ]


__all__ = ["demo_definitions"]
