"""The transport alone, for conformance and load tools: an echo service and an acknowledging DoExchange.

Run:  python tests/transport/h2spec_server.py PORT      then  h2spec --strict --port PORT
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import structlog
import trio

sys.path.insert(0, str(Path(__file__).parents[2]))

from arka.flight.grpc import Call, Health, Route
from arka.flight.http2 import ConnectionFactory
from arka.options import Limits
from arka.tiers.admission import Ledger
from tests.transport.peer import ECHO, echo, grpc_message, proto_field

ACK = grpc_message(
    proto_field(3, b'{"lsn": 12345,"durability_level":"memory","timestamp_us":1705334400000000,"error":null}')
)


class Acks:
    """How many equal acks are due."""

    def __init__(self) -> None:
        self.due = 0

    def take(self, budget: int) -> bytes:
        count = min(self.due, max(1, budget // len(ACK)))
        self.due -= count
        return ACK * count


async def exchange(call: Call) -> None:
    """Acknowledge each batch and forget it."""
    acks = Acks()
    call.attach_outbox(acks)
    while (message := await call.receive()) is not None:
        message.charge.release()
        if message.body_bytes:
            acks.due += 1
            call.wake()
    await call.wait_outbox_drained()


async def serve(port: int) -> None:
    health = Health(["arrow.flight.protocol.FlightService"])
    health.set_serving(True)
    routes = {
        ECHO: Route(echo),
        "/arrow.flight.protocol.FlightService/DoExchange": Route(exchange, flight_data=True),
        **health.routes(),
    }
    limits = Limits()
    factory = ConnectionFactory(routes, Ledger(limits.memory_bytes), limits)
    await trio.serve_tcp(factory.serve, port, host="127.0.0.1")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    trio.run(serve, parser.parse_args().port)
