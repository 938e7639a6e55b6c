"""Foreign engines that read the current snapshot of a table, from the metadata file that its catalog names.

Each engine runs in a process of its own, since they bring thread pools, signal handlers (chdb takes SIGSEGV and
SIGTSTP) and a server (Sail's, on loopback), and none of it is to get in the way of a test's process or of each other:

    python -m tests.readers ENGINE FOLDER METADATA...

writes what it reads as ``FOLDER/0.arrow``, ``FOLDER/1.arrow`` and so on.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.flight as flight
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import StringValue
from pyiceberg.table import StaticTable

Row = dict[str, Any]

#: Ends only what hangs.
TIMEOUT_S = 240.0


def open_duckdb() -> Any:
    """Open a DuckDB that reads Iceberg; its extensions are loaded by path, since nothing can be downloaded."""
    connection = duckdb.connect(config={"allow_unsigned_extensions": "true"})
    for name in ("parquet", "json", "avro", "httpfs", "iceberg"):
        spec = importlib.util.find_spec(f"duckdb_extension_{name}")
        assert spec is not None
        folder = Path(next(iter(spec.submodule_search_locations or ()))) / "extensions"
        (path,) = folder.rglob(f"v{duckdb.__version__}/**/{name}.duckdb_extension")
        connection.execute(f"LOAD '{path}'")
    return connection


def _by_duckdb(metadata: str) -> pa.Table:
    with open_duckdb() as connection:
        return connection.execute(f"SELECT * FROM iceberg_scan('{metadata}')").to_arrow_table()


def _by_polars(metadata: str) -> pa.Table:
    import polars

    return polars.scan_iceberg(metadata).collect().to_arrow()


def _by_daft(metadata: str) -> pa.Table:
    import daft

    return daft.read_iceberg(StaticTable.from_metadata(metadata)).to_arrow()


def _by_chdb(metadata: str) -> pa.Table:
    import chdb

    # It reads what lies below its working directory.
    os.chdir("/")
    folder, _, name = metadata.removeprefix("file://").rpartition("/metadata/")
    chosen = f"SETTINGS iceberg_metadata_file_path = 'metadata/{name}'"
    return chdb.query(f"SELECT * FROM icebergLocal('{folder}', {chosen})", "ArrowTable")


def _by_pysail(metadata: str) -> pa.Table:
    """Ask Sail's Flight SQL server.

    It takes a folder and picks the newest metadata file in it, which may be one of a commit that lost: it gets a
    folder with the right one alone.
    """
    from pysail.flight import FlightSqlServer

    with tempfile.TemporaryDirectory(prefix="arka-sail-") as folder:
        (Path(folder) / "metadata").mkdir()
        shutil.copy(metadata.removeprefix("file://"), Path(folder) / "metadata")
        server = FlightSqlServer("127.0.0.1", 0)
        server.start(background=True)
        try:
            host, port = server.listening_address
            with flight.connect(f"grpc://{host}:{port}") as client:
                return _ask_flight_sql(client, f"SELECT * FROM iceberg.`{folder}`")
        finally:
            server.stop()


def _ask_flight_sql(client: flight.FlightClient, query: str) -> pa.Table:
    # CommandStatementQuery has the query as field 1, as StringValue has its value.
    command = AnyMessage(
        type_url="type.googleapis.com/arrow.flight.protocol.sql.CommandStatementQuery",
        value=StringValue(value=query).SerializeToString(),
    )
    info = client.get_flight_info(flight.FlightDescriptor.for_command(command.SerializeToString()))
    return pa.concat_tables([client.do_get(endpoint.ticket).read_all() for endpoint in info.endpoints])


ENGINES: dict[str, Callable[[str], pa.Table]] = {
    "duckdb": _by_duckdb,
    "polars": _by_polars,
    "daft": _by_daft,
    "chdb": _by_chdb,
    "pysail": _by_pysail,
}


def read(engine: str, *metadata: str) -> list[list[Row]]:
    """Let an engine read tables.

    Args:
        engine: one of ``ENGINES``.
        metadata: URLs of metadata files on the local disk (``Table.metadata_location``).

    Returns:
        The rows of each, in no order.

    Raises:
        AssertionError: it failed; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="arka-reader-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.readers", engine, folder, *metadata],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"RUST_LOG": "error"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{engine} ended with {done.returncode}\n{done.stdout.decode(errors='replace')}"
        found = []
        for number in range(len(metadata)):
            with pa.OSFile(f"{folder}/{number}.arrow") as source:
                found.append(pa.ipc.open_file(source).read_all().to_pylist())
        return found


def main(arguments: Sequence[str]) -> int:
    """Read in this process."""
    engine, folder, *metadata = arguments
    for number, location in enumerate(metadata):
        table = ENGINES[engine](location)
        with pa.OSFile(f"{folder}/{number}.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    # Without Python's own end, in which threads of an engine's may still ask for the GIL and abort (daft 0.6.14 does at
    # times). What was read is in closed files; an error has ended the process before.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
