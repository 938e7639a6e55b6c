"""Memory acks against a bare pyarrow server that stores nothing: the transport and the way to the log's buffer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.flight as flight

from bench import loads
from bench.harness import Result, measurement, pairs, quantile
from bench.servers import action, arka_server, bare_server, connect, create_table

FLOOR = "bare pyarrow DoExchange server that stores nothing, same client"


@contextmanager
def both() -> Iterator[tuple[str, str]]:
    """Run both servers; gives their locations, ours first."""
    with arka_server() as server, bare_server() as bare:
        with connect(server.location) as client:
            create_table(client, loads.TABLE, loads.numbers(1).schema)
        yield server.location, bare


def settle(client: flight.FlightClient, ours: bool) -> None:
    """Let Arka bring down what it has taken: a burst begins with room for it, and nobody works beside the floor."""
    if ours:
        action(client, "Flush", name=loads.TABLE)


def _throughput(name: str, what: str, rows: int, count: int, target: str) -> Result:
    batch = loads.numbers(rows)
    unit, per = ("batches/s", count) if rows == 1 else ("MB/s", count * batch.nbytes / 1e6)

    def side(location: str) -> float:
        with connect(location) as client:
            seconds = loads.pump(client, batch, count).seconds
            settle(client, location == ours)
            return per / seconds

    with both() as (ours, floor):
        result = Result(name, what, unit, FLOOR, target)
        return pairs(result, lambda: side(ours), lambda: side(floor))


@measurement("one-row")
def one_row() -> Iterator[Result]:
    """One stream of one-row batches."""
    yield _throughput("one-row", "1-row batches, 1 stream, memory acks", 1, 60_000, ">= 1.2")


@measurement("medium")
def medium() -> Iterator[Result]:
    """One stream of 320 kB batches."""
    yield _throughput(
        "medium", "10,000-row batches (320 kB), 1 stream, memory acks, 640 MB at a time", 10_000, 2_000, ">= 1.0"
    )


@measurement("large")
def large() -> Iterator[Result]:
    """One stream of 3.2 MB batches."""
    yield _throughput(
        "large", "100,000-row batches (3.2 MB), 1 stream, memory acks, 640 MB at a time", 100_000, 200, ">= 1.2"
    )


@measurement("round-trip")
def round_trip() -> Iterator[Result]:
    """Round trips of one row while commits go on."""
    batch = loads.numbers(1)
    half: dict[str, list[float]] = {"ours": [], "floor": []}

    def side(location: str, word: str) -> float:
        with connect(location) as client:
            taken = loads.round_trips(client, batch, 5_000)
        half[word].append(quantile(taken, 0.99) * 1e6)
        return quantile(taken, 0.5) * 1e6

    with both() as (ours, floor):
        middle = Result(
            "round-trip-p50", "round trip of 1 row, memory ack, p50, commits running", "us", FLOOR, "<= 1.1"
        )
        yield pairs(middle, lambda: side(ours, "ours"), lambda: side(floor, "floor"))
    late = Result("round-trip-p99", "the same, p99", "us", FLOOR, "<= 2.0")
    late.values, late.floors = half["ours"][1:], half["floor"][1:]
    yield late


def _many(result: Result, streams: int, batch: pa.RecordBatch, count: int, per: float) -> Result:
    fairness = []

    def side(location: str, *, ours: bool) -> float:
        seconds, rates = loads.pump_all(location, batch, streams, count)
        with connect(location) as client:
            settle(client, ours)
        if ours:
            fairness.append(sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates)))
        return per / seconds

    with both() as (ours, floor):
        pairs(result, lambda: side(ours, ours=True), lambda: side(floor, ours=False))
    result.notes["jain_fairness"] = min(fairness)
    return result


@measurement("hundred-streams")
def hundred_streams() -> Iterator[Result]:
    """A hundred streams of one-row batches."""
    result = Result("hundred-streams", "100 streams of 1-row batches, sum, memory acks", "batches/s", FLOOR, ">= 2.0")
    yield _many(result, 100, loads.numbers(1), 600, 60_000)


@measurement("eight-streams")
def eight_streams() -> Iterator[Result]:
    """Eight streams of 320 kB batches."""
    batch = loads.numbers(10_000)
    result = Result("eight-streams", "8 streams of 320 kB batches, sum, memory acks", "MB/s", FLOOR, ">= 1.2")
    yield _many(result, 8, batch, 250, 8 * 250 * batch.nbytes / 1e6)
