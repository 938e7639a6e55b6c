"""The floor of the transport: a stock pyarrow Flight server that stores nothing and acks each batch with a constant.

    python -m bench.bare_server

It prints its port and ends when its standard input is closed.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import pyarrow.flight as flight

ACK = b'{"lsn":12345,"durability_level":"memory","timestamp_us":1705334400000000,"error":null,"sequence":1}'


class BareServer(flight.FlightServerBase):  # type: ignore[misc]
    """Answers each batch of a DoExchange."""

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Ack each batch."""
        while True:
            try:
                reader.read_chunk()
            except StopIteration:
                return
            writer.write_metadata(ACK)


def main() -> None:
    """Serve until standard input ends."""
    server = BareServer("grpc://127.0.0.1:0")
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    threading.Thread(target=server.serve, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
