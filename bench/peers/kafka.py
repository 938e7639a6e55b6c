"""Apache Kafka, ``acks=all`` and ``flush.messages=1``: one broker (KRaft) and its own Java producer, both from Maven.

The broker fsyncs every batch that it appends, and a producer puts messages that wait into one batch (``batch.size``,
16 KiB by default, and ``linger.ms``). So three comparisons of small messages are made:

    kafka-messages   the producer as it comes, beside one write a message
    kafka-single     the producer without batches (``batch.size`` 0): each message a write of its own on both sides
    kafka-batched    the producer as it comes, beside record batches of as many rows as go into 16 KiB
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from arka.testing.services import Service, free_ports
from bench import peers
from bench.harness import Result, measurement, pairs

HERE = Path(__file__).parent / "kafka_client"
FLOOR = "Kafka, acks=all, flush.messages=1"
CLUSTER = "AAAAAAAAAAAAAAAAAAAAAA"
HEAP = "-Xmx1g"
#: Fewer than others have: three comparisons, and a virtual machine that is slow to start.
PAIRS = 3
#: Leaves a setting of the producer as it comes.
DEFAULT = -1
#: As many rows of 300 bytes go into a batch of Kafka's default size.
BATCH_ROWS = 16_384 // peers.SMALL_BYTES
#: Sends these writes: writers, messages of each, bytes of a message, batch.size; returns seconds.
Write = Callable[[int, int, int, int], float]


class Kafka(Service):
    """A broker that is its own controller, on loopback, its log in the folder."""

    def __init__(self, folder: Path, class_path: str) -> None:
        """Say where the data is to be.

        Args:
            folder: made if it is missing.
            class_path: the broker's.
        """
        super().__init__(folder)
        self._class_path = class_path
        with free_ports(2) as (self.port, self._controller):
            pass

    def spawn(self) -> None:
        """See ``Service.spawn``; the first start formats the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{self._controller}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self.folder / "log"),
            "log.flush.interval.messages": "1",
        }
        self._settings.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        if not (self.folder / "log").exists():
            tool = [*self._java, "kafka.tools.StorageTool", "format", "-t", CLUSTER, "-c", str(self._settings)]
            subprocess.run(tool, check=True, capture_output=True)
        super().spawn()

    @property
    def _settings(self) -> Path:
        return self.folder / "server.properties"

    @property
    def _java(self) -> Sequence[str]:
        return ("java", HEAP, "-cp", self._class_path)

    def _command(self) -> Sequence[str]:
        return (*self._java, "kafka.Kafka", str(self._settings))

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@cache
def class_path() -> str | None:
    """What Maven says that Kafka needs, fetched where it was not; None, and a word, where that cannot be had."""
    missing = [program for program in ("java", "javac", "mvn") if shutil.which(program) is None]
    if missing:
        sys.stdout.write(f"kafka: skipped; {', '.join(missing)} not found\n")
        return None
    with tempfile.TemporaryDirectory(prefix="arka-bench-") as folder:
        found = Path(folder) / "class-path"
        command = ["mvn", "-q", "-B", "-f", str(HERE / "pom.xml"), "dependency:build-classpath"]
        maven = subprocess.run(
            [*command, f"-Dmdep.outputFile={found}"], capture_output=True, text=True, check=False, timeout=600
        )
        if maven.returncode != 0:
            sys.stdout.write(f"kafka: skipped; Maven failed: {maven.stdout.strip()[-300:]}\n")
            return None
        return found.read_text().strip()


@contextmanager
def kafka(class_path: str) -> Iterator[Write]:
    """Run a broker and a process of producers; gives what writes with them."""
    folder = Path(tempfile.mkdtemp(prefix="arka-bench-"))
    service = Kafka(folder, class_path)
    command = ["java", HEAP, "-cp", class_path, str(HERE / "Writers.java")]
    try:
        service.start()
        with subprocess.Popen(
            [*command, f"127.0.0.1:{service.port}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            asking, answering = process.stdin, process.stdout

            def write(writers: int, count: int, size: int, batch: int) -> float:
                asking.write(f"{writers} {count} {size} {batch}\n")
                asking.flush()
                answer = answering.readline()
                assert answer, "the producers' process has failed"
                return float(answer)

            try:
                yield write
            finally:
                asking.close()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()
    finally:
        service.kill()
        shutil.rmtree(folder, ignore_errors=True)


@measurement("kafka-messages")
def kafka_messages() -> Iterator[Result]:
    """Small messages, each acked on disk."""
    path = class_path()
    if path is None:
        return
    with peers.arka(peers.small()) as ours, kafka(path) as theirs:

        def compare(name: str, writers: int, total: int, batch_bytes: int, rows: int, how: str, target: str) -> Result:
            batch = peers.small(rows)
            count = total // writers
            writes = count // rows
            what = f"disk-acked messages of 300 B, {peers.writers(writers)}; {how}"
            return pairs(
                Result(f"kafka-{name}-{writers}", what, "messages/s", FLOOR, target),
                lambda: writers * writes * rows / peers.write(ours, batch, writers, writes),
                lambda: total / theirs(writers, count, peers.SMALL_BYTES, batch_bytes),
                count=PAIRS,
            )

        # The broker's code is compiled while it runs.
        theirs(1, 50_000, peers.SMALL_BYTES, DEFAULT)
        for writers in (1, 100):
            how = "each a write of its own, while the producer puts several into one (its defaults)"
            yield compare("messages", writers, 20_000, DEFAULT, 1, how, ">= 5.0")
            how = "each a write of its own, in Kafka too (batch.size 0)"
            yield compare("single", writers, 6_000, 0, 1, how, "")
            how = f"{BATCH_ROWS} rows a write, as many as the producer puts into one (its defaults)"
            yield compare("batched", writers, 50 * 100 * BATCH_ROWS // 2, DEFAULT, BATCH_ROWS, how, "")


@measurement("kafka-bytes")
def kafka_bytes() -> Iterator[Result]:
    """Large messages, each acked on disk."""
    path = class_path()
    if path is None:
        return
    batch = peers.large()
    count = 300
    what = f"disk-acked messages of 320 kB, {peers.writers(1)}"
    result = Result("kafka-bytes", what, "MB/s", FLOOR, ">= 1.2")
    total = count * peers.LARGE_BYTES / 1e6
    with peers.arka(batch) as ours, kafka(path) as theirs:
        yield pairs(
            result,
            lambda: total / peers.write(ours, batch, 1, count),
            lambda: total / theirs(1, count, peers.LARGE_BYTES, DEFAULT),
            count=PAIRS,
        )
