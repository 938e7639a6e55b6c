"""The first hour: the snippets of the documentation, run as programs of their own, and clients that do not wait (R41).

The snippets have what a reader of the first page types, and beside that only what pyarrow itself demands: ``begin``
before a batch, ``to_pybytes`` on a buffer, ``done_writing`` where acks are read to their end.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import action, create

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]

BEGIN = """
import json
import pyarrow as pa
import pyarrow.flight as flight
client = flight.FlightClient("LOCATION")
"""
CREATE_USERS = """
create_req = {
    "name": "people",
    "schema_json": json.dumps({"fields": [
        {"name": "id", "data_type": "Int64", "nullable": False},
        {"name": "name", "data_type": "Utf8", "nullable": True},
        {"name": "score", "data_type": "Float64", "nullable": True},
        {"name": "signup", "data_type": {"Timestamp": ["Microsecond", None]}, "nullable": True},
    ]}),
    "primary_key": "id",
    "table_type": "primary_key",
    "partition_spec": {
        "spec_id": 1,
        "fields": [{
            "source_id": 3,
            "field_id": 1000,
            "name": "signup_day",
            "transform": "Day"
        }]
    }
}

result = client.do_action(
    flight.Action("CreateTable", json.dumps(create_req).encode())
)
"""
LIST_TABLES = """
result = client.do_action(flight.Action("ListTables", b""))
for response in result:
    tables = json.loads(response.body.to_pybytes())
    print(tables)
"""
DROP_USERS = """
drop_req = {"name": "people"}
client.do_action(
    flight.Action("DropTable", json.dumps(drop_req).encode())
)
"""
BATCH = """
import datetime
batch = pa.record_batch(
    [pa.array([1, 2]), pa.array(["Ada", "Grace"]), pa.array([1.5, 2.5]),
     pa.array([datetime.datetime(2024, 1, 15), datetime.datetime(2024, 1, 16)], pa.timestamp("us"))],
    schema=pa.schema([pa.field("id", pa.int64(), nullable=False), ("name", pa.string()), ("score", pa.float64()),
                      ("signup", pa.timestamp("us"))]))
"""
#: A descriptor and no WriteRequest at all.
WRITE = """
write_request = {"table_name": "people", "requested_durability": "disk"}
descriptor = flight.FlightDescriptor.for_path("people")

writer, reader = client.do_exchange(descriptor)
writer.begin(batch.schema)
writer.write_batch(batch)
writer.done_writing()

for chunk in reader:
    ack = json.loads(chunk.app_metadata.to_pybytes())
    print(f"LSN {ack['lsn']} reached {ack['durability_level']}")
"""
#: Conditional durability and a key, with the batch or before it.
WRITE_REQUESTS = """
date, sequence_number = "2024-01-15", 1
for write_req in [
    {"table_name": "people", "requested_durability": "memory"},
    {"table_name": "people", "requested_durability": "disk"},
    {"table_name": "people", "requested_durability": "iceberg_committed"},
    {"table_name": "people", "idempotency_key": f"batch-{date}-{sequence_number}"},
    {"table_name": "people", "requested_durability": "disk", "idempotency_key": "batch-2024-01-15-001"},
]:
    for together in (True, False):
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_path("people"))
        metadata = json.dumps(write_req).encode()
        writer.begin(batch.schema)
        if together:
            writer.write_with_metadata(batch, metadata)
        else:
            writer.write_metadata(metadata)
            writer.write_batch(batch)
        writer.done_writing()
        acks = [json.loads(chunk.app_metadata.to_pybytes()) for chunk in reader]
        print([ack["durability_level"] for ack in acks], {ack["error"] for ack in acks})
"""


def run_program(text: str, location: str, cwd: Path) -> str:
    """Run a program of a reader's; it must end by itself and without an error; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", text.replace("LOCATION", location)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_tables(client: flight.FlightClient, wanted: Callable[[list[str]], bool]) -> None:
    """Wait until the list of tables is as wanted: nobody waited for the actions' answers."""
    deadline = time.monotonic() + 60
    while not wanted(tables := action(client, "ListTables")):
        assert time.monotonic() < deadline, tables
        time.sleep(0.05)


def test_seed_snippets(server: ServerProcess, client: flight.FlightClient, tmp_path: Path) -> None:
    """Each snippet runs to its end as a program and does what it says, although it reads no answer of its actions."""
    run_program(BEGIN + CREATE_USERS, server.location, tmp_path)
    wait_tables(client, lambda tables: "default.people" in tables)
    assert "'default.people'" in run_program(BEGIN + LIST_TABLES, server.location, tmp_path)
    said = run_program(BEGIN + BATCH + WRITE, server.location, tmp_path).splitlines()
    assert [line.split(maxsplit=2)[2] for line in said] == ["reached memory", "reached disk"]
    said = run_program(BEGIN + BATCH + WRITE_REQUESTS, server.location, tmp_path).splitlines()
    tiers = ["memory", "disk", "object_storage", "iceberg_committed"]
    counts = [count for count in (1, 2, 4, 2, 2) for _ in range(2)]
    assert said == [f"{tiers[:count]} {{None}}" for count in counts]
    found = lake.load(server.data, "people")
    assert [str(field.transform) for field in found.spec().fields] == ["day"]
    run_program(BEGIN + DROP_USERS, server.location, tmp_path)
    wait_tables(client, lambda tables: "default.people" not in tables)


def test_whole_session_in_one_program(server: ServerProcess, client: flight.FlightClient, tmp_path: Path) -> None:
    """All of it in one program, where a later action waits for an earlier one that nobody reads."""
    for actions in (CREATE_USERS, DROP_USERS + CREATE_USERS, CREATE_USERS + DROP_USERS + CREATE_USERS):
        said = run_program(BEGIN + actions + BATCH + WRITE + LIST_TABLES, server.location, tmp_path)
        assert "reached disk" in said
        assert "default.people" in said
    run_program(BEGIN + DROP_USERS + CREATE_USERS, server.location, tmp_path)
    action(client, "Flush", name="people")
    assert action(client, "ListTables") == ["default.people"]
    assert lake.rows(server.data, "people").num_rows == 0
    action(client, "DropTable", name="people")


@pytest.mark.parametrize("pause_s", [None, 0.0, 0.002, 0.02])
def test_actions_that_nobody_reads(
    server: ServerProcess, client: flight.FlightClient, table: str, pause_s: float | None, tmp_path: Path
) -> None:
    """CreateTable and DropTable happen whenever their client leaves: at once, with its process, or in the middle."""
    leave = "" if pause_s is None else f"import time; time.sleep({pause_s}); del result\n"
    names = [f"{table}_{number}" for number in range(4)]
    fields = '[{"name": "n", "type": "int64", "nullable": False}]'
    for name in names:
        made = f'result = client.do_action(flight.Action("CreateTable", json.dumps({{"name": "{name}", '
        made += f'"schema_json": {{"fields": {fields}}}}}).encode()))\n'
        run_program(BEGIN + made + leave, server.location, tmp_path)
    wait_tables(client, lambda tables: {f"default.{name}" for name in names} <= set(tables))
    for name in names:
        gone = f'result = client.do_action(flight.Action("DropTable", json.dumps({{"name": "{name}"}}).encode()))\n'
        run_program(BEGIN + gone + leave, server.location, tmp_path)
    wait_tables(client, lambda tables: not {f"default.{name}" for name in names} & set(tables))
    log = server.log.read_text()
    for name in names:
        for kind in ("CreateTable", "DropTable"):
            assert re.search(rf"action\.done .*action={kind}.*subject=default\.{name}\b", log), (kind, name)


def test_readme(server: ServerProcess, client: flight.FlightClient, tmp_path: Path) -> None:
    """The README's Python snippets run in their order, in one program, against a server with the data where it says."""
    text = (ROOT / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 4
    program = "\n".join(snippets).replace("grpc://localhost:8815", server.location)
    program = program.replace("sqlite:///arka_data/catalog.db", f"sqlite:///{server.data}/catalog.db")
    # The table is read once what was written is committed.
    flush = 'list(client.do_action(flight.Action("Flush", b\'{"name": "people"}\')))\n'
    program = program.replace("from pyiceberg", flush + "from pyiceberg", 1)
    said = run_program(program, server.location, tmp_path)
    assert [line.split(maxsplit=2)[2] for line in said.splitlines()[:2]] == ["reached memory", "reached disk"]
    assert "Grace" in said
    create(client, "people", [("id", "int64!"), ("name", "utf8")])
    action(client, "DropTable", name="people")
