"""Mutate what HTTP/2 clients send; whatever comes in, the connection goes on, resets a stream, or ends in order.

The invariants, for each case:

1. no exception leaves a connection, and none that is not the peer's fault is logged (``connection.failed``,
   ``rpc.failed``);
2. when the connection has ended nothing is charged to the ledger, nothing waits for it, no RPC runs;
3. the splitter finds the same events in the same bytes, whole and in pieces;
4. what the server has said are whole frames, none of them longer than the peer accepts.

Each case is run on the splitter alone; every ``--every``-th also on a whole connection.

Run:  python tests/fuzz/fuzz_wire.py --cases 200000 --seed 1
One case again:  python tests/fuzz/fuzz_wire.py --seed 1 --first 1234 --cases 1
"""

from __future__ import annotations

import argparse
import logging
import random
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import hpack
import structlog
import trio
import trio.testing

sys.path.insert(0, str(Path(__file__).parents[2]))

from arka._core import wire
from arka._core.wire import FlightMessage, MessageAssembler, Splitter, WireError
from arka.flight.grpc import Call, Route
from arka.flight.http2 import ConnectionFactory
from arka.options import MIB, Limits
from arka.tiers.admission import Ledger
from tests.transport.peer import (
    CONTINUATION,
    DATA,
    ECHO,
    END_HEADERS,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    SETTINGS,
    WINDOW_UPDATE,
    WRITES,
    data,
    echo,
    flight_data,
    frame,
    goaway,
    grpc_message,
    rst_stream,
    settings,
    window_update,
)

LIMITS = Limits(memory_bytes=16 * MIB, message_bytes=MIB, batch_bytes=64 * 1024, streams_per_connection=4)
EDGES = [0, 1, 2, 3, 7, 8, 9, 127, 128, 255, 16_384, 16_385, 65_535, 65_536, 2**20, 2**24 - 1, 2**31 - 1, 2**32 - 1]


def encode_request(encoder: hpack.Encoder, path: str, **extra: str) -> bytes:
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "fuzz")]
    fields.append(("content-type", "application/grpc"))
    return encoder.encode(fields + [(name.replace("_", "-"), value) for name, value in extra.items()])


def make_frames(rng: random.Random) -> list[bytes]:
    """An honest client's frames, more or less."""
    encoder = hpack.Encoder()
    frames = [settings({rng.choice([1, 3, 4, 5]): rng.choice([16_384, 65_535])})]
    stream_id = 1
    live: list[int] = []
    for _ in range(rng.randrange(1, 14)):
        what = rng.randrange(12)
        if what < 3 or not live:
            path = rng.choice([ECHO, WRITES, WRITES, "/no.Such/Method"])
            extra = {}
            if rng.random() < 0.2:
                extra = rng.choice(
                    [{"grpc_timeout": "1S"}, {"content_length": "30"}, {"b_bin": "AAEC"}, {"x": "y" * 99}]
                )
            block = encode_request(encoder, path, **extra)
            end = rng.random() < 0.1
            if rng.random() < 0.2:
                cut = rng.randrange(len(block) + 1)
                frames.append(frame(HEADERS, int(end), stream_id, block[:cut]))
                frames.append(frame(CONTINUATION, END_HEADERS, stream_id, block[cut:]))
            else:
                frames.append(frame(HEADERS, END_HEADERS | end, stream_id, block))
            if not end:
                live.append(stream_id)
            stream_id += 2
        elif what < 9:
            target = rng.choice(live)
            message = rng.choice([make_message, make_batch])(rng)
            cut = rng.randrange(len(message) + 1) if rng.random() < 0.3 else len(message)
            padding = rng.randrange(256) if rng.random() < 0.2 else None
            frames.append(data(target, message[:cut], padding=padding))
            if cut < len(message):
                frames.append(data(target, message[cut:]))
            if rng.random() < 0.2:
                live.remove(target)
                frames.append(data(target, end=True))
        elif what == 9:
            target = rng.choice(live)
            live.remove(target)
            frames.append(rst_stream(target))
        else:
            frames.append(
                rng.choice(
                    [
                        frame(PING, 0, 0, rng.randbytes(8)),
                        window_update(0, 1000),
                        window_update(rng.choice(live), 1000),
                        goaway(0),
                        frame(PRIORITY, 0, stream_id, bytes(5)),
                        settings({4: rng.choice(EDGES[:-3])}),
                        frame(0xBE, 0xFF, 0, rng.randbytes(5)),
                    ]
                )
            )
    return frames


def make_message(rng: random.Random) -> bytes:
    return grpc_message(rng.randbytes(rng.choice([0, 1, 30, 1000])))


def make_batch(rng: random.Random) -> bytes:
    body = bytes(rng.choice([0, 1, 64, 5_000, 12_000, 66_000]))
    return grpc_message(flight_data(header=b"H" * rng.randrange(300), app_metadata=b"{}", body=body))


def mutate(rng: random.Random, frames: list[bytes]) -> bytes:
    """Break some of it: in frames' fields, in their order, in the bytes."""
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 5])):
        at = rng.randrange(len(frames))
        raw = bytearray(frames[at])
        how = rng.randrange(11)
        if how == 0 and raw:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif how == 1 and len(raw) >= 9:
            raw[0:3] = (rng.choice(EDGES) & 0xFFFFFF).to_bytes(3, "big")
        elif how == 2 and len(raw) >= 9:
            raw[3] = rng.choice([*range(12), 0xBE])
        elif how == 3 and len(raw) >= 9:
            raw[4] = rng.choice([0, 1, 4, 5, 8, 9, 0x20, 0x2D, 0xFF, rng.randrange(256)])
        elif how == 4 and len(raw) >= 9:
            raw[5:9] = struct.pack(">I", rng.choice([0, 1, 2, 3, 5, 7, 99, 2**31 - 1, 2**32 - 1]))
        elif how == 5 and len(raw) > 9:
            spot = rng.randrange(9, len(raw))
            raw[spot : spot + 4] = struct.pack(">I", rng.choice(EDGES))[: len(raw) - spot]
        elif how == 6:
            frames.insert(rng.randrange(len(frames) + 1), bytes(raw))
        elif how == 7 and len(frames) > 1:
            del frames[at]
            continue
        elif how == 8:
            other = rng.randrange(len(frames))
            frames[at], frames[other] = frames[other], frames[at]
            continue
        elif how == 9:
            raw = raw[: rng.randrange(len(raw) + 1)]
        else:
            kind = rng.choice([DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION, rng.randrange(256)])
            size = rng.choice([0, 1, 4, 5, 6, 8, 9, 100])
            raw += frame(kind, rng.randrange(256), rng.choice([0, 1, 3, 5, 99]), rng.randbytes(size))
        frames[at] = bytes(raw)
    return b"".join(frames)


def split_events(raw: bytes, chunks: list[bytes]) -> list[object]:
    """What the splitter makes of a connection's bytes."""
    splitter = Splitter(MIB)
    for stream_id in (1, 3, 5, 7):
        assembler = MessageAssembler(stream_id != 5, LIMITS.message_bytes, LIMITS.batch_bytes)
        assembler.window = 100_000
        splitter.open(stream_id, assembler)
    events: list[object] = []
    try:
        for chunk in chunks:
            while chunk:
                taken = 0
                for target in splitter.targets():
                    part = chunk[taken : taken + len(target)]
                    target[: len(part)] = part
                    taken += len(part)
                splitter.received(taken)
                chunk = chunk[taken:]
                while kind := splitter.next():
                    detail: object = None
                    if kind == wire.MESSAGE:
                        message = splitter.message
                        if isinstance(message, FlightMessage):
                            body = None if message.buffer is None else bytes(message.buffer)
                            detail = (message.descriptor, message.header, message.app_metadata, message.oversized, body)
                        else:
                            detail = message
                    elif kind == wire.CONTROL:
                        detail = splitter.frame
                    events.append((kind, splitter.stream_id if kind != wire.PREFACE else 0, detail))
    except WireError as error:
        events.append(("error", error.code))
    return events


def check_splitter(rng: random.Random, raw: bytes) -> str:
    """Invariant 3; returns how it ended."""
    raw = PREFACE + raw
    whole = split_events(raw, [raw])
    cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(rng.choice([1, 3, 10, 40])))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    split = split_events(raw, pieces)
    # A prefix's event depends on how much of the frame is there; nothing else does.
    drop = lambda events: [e for e in events if e[0] != wire.PREFIX]  # noqa: E731
    assert drop(split) == drop(whole), f"split {drop(split)} whole {drop(whole)}"
    return "wire error" if whole and isinstance(whole[-1], tuple) and whole[-1][0] == "error" else "wire ok"


async def take_writes(call: Call) -> None:
    """A write stream's handler, with an answer for each write."""
    while (message := await call.receive()) is not None:
        assert isinstance(message, FlightMessage)
        message.charge.release()
        await call.send(b"ack")


class Complaints:
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        self.entries: list[dict[str, object]] = []
        self.reasons: Counter[str] = Counter()

    def __call__(self, _logger: object, method: str, event: dict[str, object]) -> dict[str, object]:
        if method in ("error", "exception", "critical"):
            self.entries.append(dict(event))
        if event["event"] == "connection.closed":
            self.reasons[str(event["reason"]).split(":")[0]] += 1
        raise structlog.DropEvent


async def check_connection(rng: random.Random, raw: bytes, complaints: Complaints) -> None:
    """Invariants 1, 2 and 4 on one connection."""
    ledger = Ledger(LIMITS.memory_bytes)
    routes = {ECHO: Route(echo), WRITES: Route(take_writes, flight_data=True)}
    factory = ConnectionFactory(routes, ledger, LIMITS)
    client, server = trio.testing.memory_stream_pair()
    said = bytearray()
    hog = ledger.try_request(LIMITS.memory_bytes - 2 * 65_536) if rng.random() < 0.2 else None
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await factory.serve(server)
            await trio.aclose_forcefully(server)

        async def listen() -> None:
            try:
                while received := await client.receive_some():
                    said.extend(received)
            except trio.BrokenResourceError:
                return

        nursery.start_soon(serve)
        nursery.start_soon(listen)
        raw = PREFACE + raw
        cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(rng.choice([0, 0, 1, 3])))
        try:
            for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True):
                await client.send_all(raw[a:b])
                await trio.testing.wait_all_tasks_blocked()
            if rng.random() < 0.2:
                factory.start_drain()
            if hog is not None:
                hog.release()
            await trio.testing.wait_all_tasks_blocked()
            await client.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        if hog is not None:
            hog.release()
    assert factory.connections == 0
    assert factory.calls == 0
    statistics = ledger.statistics()
    assert statistics.charged_bytes == 0, statistics
    assert statistics.waiting == 0, statistics
    assert not complaints.entries, complaints.entries
    at = 0
    while at < len(said):
        at += 9 + int.from_bytes(said[at : at + 3], "big")
    assert at == len(said), "the server stopped in the middle of a frame"


async def run(options: argparse.Namespace) -> Counter[str]:
    complaints = Complaints()
    structlog.configure(
        processors=[complaints],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    )
    outcomes: Counter[str] = Counter()
    started = time.perf_counter()
    for case in range(options.first, options.first + options.cases):
        rng = random.Random(f"{options.seed}/{case}")
        raw = mutate(rng, make_frames(rng))
        try:
            outcomes[check_splitter(rng, raw)] += 1
            if case % options.every == 0 or options.cases == 1:
                await check_connection(rng, raw, complaints)
                outcomes["connections"] += 1
        except BaseException:
            print(f"FAILED: --seed {options.seed} --first {case} --cases 1\n{raw.hex()}", flush=True)
            raise
        if options.progress and case % 20_000 == 0 and case > options.first:
            print(f"{case} cases, {time.perf_counter() - started:.0f} s, {dict(outcomes)}", flush=True)
    return outcomes + complaints.reasons


def main(arguments: list[str] | None = None) -> Counter[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="how many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--every", type=int, default=4, help="run each n-th case on a whole connection")
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args(arguments)
    outcomes = trio.run(run, options, clock=trio.testing.MockClock(autojump_threshold=0))
    print(f"seed {options.seed}, {options.cases} cases: {dict(sorted(outcomes.items()))}")
    return outcomes


if __name__ == "__main__":
    main()
