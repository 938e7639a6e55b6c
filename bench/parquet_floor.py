"""The floor of the way to Iceberg: one core that writes the same rows as Parquet, and does nothing else.

    python -m bench.parquet_floor ARROW-FILE SECONDS

It prints Arrow bytes a second.
"""

from __future__ import annotations

import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    """Write the file's rows again and again."""
    source, seconds = sys.argv[1], float(sys.argv[2])
    pa.set_cpu_count(1)
    table = pa.ipc.open_file(source).read_all()
    with tempfile.TemporaryDirectory(prefix="arka-bench-", dir="/dev/shm") as folder:
        started = time.perf_counter()
        done = 0
        while time.perf_counter() - started < seconds:
            pq.write_table(table, f"{folder}/out.parquet", compression="zstd")
            done += table.nbytes
        sys.stdout.write(f"{done / (time.perf_counter() - started)}\n")


if __name__ == "__main__":
    main()
