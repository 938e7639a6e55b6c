"""Talk to an Arka server with pyarrow alone: create a table, write, read acks, meet errors.

    arka-server --demo-tables &
    python examples/flight_client.py

Nothing here imports Arka: any Arrow Flight client in any language does the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import threading
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

#: The table that this program creates, writes and drops.
TABLE = "page_views"
SCHEMA = pa.schema(
    [
        pa.field("view_id", pa.int64(), nullable=False),
        pa.field("page", pa.string()),
        pa.field("viewed_at", pa.timestamp("us")),
    ]
)


def call(client: flight.FlightClient, action: str, request: dict[str, Any] | None = None) -> list[Any]:
    """Run a Flight action; bodies and results are JSON."""
    body = b"" if request is None else json.dumps(request).encode()
    return [json.loads(result.body.to_pybytes()) for result in client.do_action(flight.Action(action, body))]


def create_table(client: flight.FlightClient) -> None:
    """Create an append-only table with one Iceberg partition a day."""
    fields = [
        {"name": "view_id", "type": "int64", "nullable": False},
        {"name": "page", "type": "utf8"},
        {"name": "viewed_at", "type": "timestamp[us]"},
    ]
    day = {"source_id": 2, "field_id": 1000, "name": "view_day", "transform": "Day"}
    request = {
        "name": TABLE,
        "schema_json": json.dumps({"fields": fields}),
        "partition_spec": {"spec_id": 1, "fields": [day]},
    }
    print("CreateTable:", *call(client, "CreateTable", request))
    print("ListTables:", *call(client, "ListTables"))


def make_batch(first_id: int, rows: int) -> pa.RecordBatch:
    """Make some page views; real programs send 10,000 to 100,000 rows a batch."""
    noon = datetime.datetime(2024, 1, 15, 12)
    return pa.record_batch(
        [
            pa.array(range(first_id, first_id + rows), pa.int64()),
            pa.array([f"/page/{n % 7}" for n in range(rows)]),
            pa.array([noon + datetime.timedelta(seconds=n) for n in range(rows)], pa.timestamp("us")),
        ],
        schema=SCHEMA,
    )


def write(
    client: flight.FlightClient,
    batches: list[pa.RecordBatch],
    durability: str,
    keys: list[str] | None = None,
    table: str = TABLE,
) -> list[dict[str, Any]]:
    """Write batches and return their acks, read in a second thread while the first still writes.

    Args:
        client: a connected client.
        batches: one write each; the n-th has ``sequence`` n in its acks.
        durability: the last tier to wait for; acks of every tier before it come too.
        keys: an idempotency key for each batch: sent again with the same key, a write adds nothing.
        table: the table's name.
    """
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(table))
    acks: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def read_acks() -> None:
        try:
            for chunk in reader:
                acks.append(json.loads(chunk.app_metadata.to_pybytes()))
        except pa.ArrowException as error:
            failures.append(error)

    with writer:
        writer.write_metadata(json.dumps({"table_name": table, "requested_durability": durability}).encode())
        writer.begin(batches[0].schema)
        reading = threading.Thread(target=read_acks)
        reading.start()
        for number, batch in enumerate(batches):
            if keys is None:
                writer.write_batch(batch)
            else:
                writer.write_with_metadata(batch, json.dumps({"idempotency_key": keys[number]}).encode())
        writer.done_writing()
        reading.join()
    if failures:
        raise failures[0]
    return acks


def show_acks(acks: list[dict[str, Any]]) -> None:
    """Print one line for each ack."""
    for ack in acks:
        if ack["error"] is not None:
            print(f"  write {ack['sequence']} was refused: [{ack['code']}] {ack['error']}")
            continue
        extra = f", Iceberg snapshot {ack['snapshot_id']}" if ack.get("snapshot_id") else ""
        extra += ", seen before" if ack.get("duplicate") else ""
        print(f"  write {ack['sequence']}: LSN {ack['lsn']} reached {ack['durability_level']}{extra}")


def meet_errors(client: flight.FlightClient) -> None:
    """Provoke the usual errors; each message says what to do."""
    try:
        write(client, [make_batch(0, 1)], "memory", table="no_such_table")
    except pa.ArrowException as error:
        print(f"  unknown table: {first_line(error)}")
    try:
        write(client, [pa.record_batch({"view_id": ["not a number"]})], "memory")
    except pa.ArrowException as error:
        print(f"  wrong schema: {first_line(error)}")
    try:
        write(client, [make_batch(0, 1)], "for_ever")
    except pa.ArrowException as error:
        print(f"  unknown durability: {first_line(error)}")
    # One bad write costs that write alone: the stream goes on, and the error is in its ack.
    nulls = pa.record_batch([pa.array([None], pa.int64()), ["/"], [None]], schema=SCHEMA)
    print("  null in a required column, then a good batch:")
    show_acks(write(client, [nulls, make_batch(100, 1)], "disk"))


def first_line(error: Exception) -> str:
    """The server's message without what gRPC adds to it."""
    text = str(error)
    return text[max(text.find("["), 0) :].splitlines()[0]


def main() -> int:
    """Run on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("location", nargs="?", default="grpc://localhost:8815", help="where the server listens")
    arguments = parser.parse_args()
    with flight.FlightClient(arguments.location) as client:
        try:
            create_table(client)
        except flight.FlightUnavailableError as error:
            print(f"No server on {arguments.location}: start one with `arka-server` ({error})", file=sys.stderr)
            return 1
        print("Three writes, down to a committed Iceberg snapshot:")
        show_acks(write(client, [make_batch(10 * n, 10) for n in range(3)], "iceberg_committed"))
        print("The same write twice, with an idempotency key:")
        for _ in range(2):
            show_acks(write(client, [make_batch(30, 10)], "disk", keys=["batch-2024-01-15-001"]))
        print("Errors:")
        meet_errors(client)
        print("DropTable:", *call(client, "DropTable", {"name": TABLE}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
