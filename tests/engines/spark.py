"""A Spark session in a process of its own, asked through lines of JSON.

``Spark`` is the near side. The far side is this module run as a program:

    python -m tests.engines.spark SETTINGS.json

It answers each line on standard input, ``{"sql": ...}``, ``{"open": METADATA}``, ``{"count": METADATA}`` or
``{"parse": METADATA}``, with one line, ``{"value": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

#: What is fetched from Maven; the Spark version is that of the extra ``engines`` in pyproject.toml.
JARS: Final = (
    "org.apache.iceberg:iceberg-spark-runtime-4.0_2.13:1.10.1",
    "org.xerial:sqlite-jdbc:3.46.0.0",
)
#: Ends only what hangs.
FETCH_TIMEOUT_S: Final = 600.0


class EngineMissing(Exception):
    """Spark, Java or its jars are not on this machine."""


class SparkError(Exception):
    """Spark refused a statement, with what it said."""


def fetch_jars() -> list[Path]:
    """Fetch the jars once, into the user's cache.

    Raises:
        EngineMissing: no Maven, or no registry.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "arka-engines"
    cache.mkdir(parents=True, exist_ok=True)
    found = []
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for artifact in JARS:
            _, name, version = artifact.split(":")
            jar = cache / f"{name}-{version}.jar"
            found.append(jar)
            if jar.exists():
                continue
            maven = shutil.which("mvn")
            if maven is None:
                raise EngineMissing("`mvn` is not installed")
            wanted = [f"-Dartifact={artifact}", "-Dtransitive=false"]
            for goal in (["dependency:get", *wanted], ["dependency:copy", *wanted, f"-DoutputDirectory={cache}"]):
                done = subprocess.run(
                    [maven, "--batch-mode", "--quiet", *goal], capture_output=True, text=True, timeout=FETCH_TIMEOUT_S
                )
                if done.returncode != 0:
                    raise EngineMissing(f"Maven does not get {artifact}: {(done.stdout + done.stderr)[-500:]}")
    return found


class Spark:
    """A Spark session on a catalog of its own name, ``arka``."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        """Start the session.

        Args:
            folder: for its scratch files and its log.
            settings: of the Spark catalog ``arka``; none for a session that only opens metadata files.

        Raises:
            EngineMissing: Java, the package or the jars are missing.
        """
        if shutil.which("java") is None:
            raise EngineMissing("`java` is not installed")
        try:
            import pyspark  # noqa: F401
        except ImportError:
            raise EngineMissing("pyspark is not installed (extra `engines`)") from None
        folder.mkdir(parents=True, exist_ok=True)
        plan = folder / "spark.json"
        jars = [str(jar) for jar in fetch_jars()]
        plan.write_text(json.dumps({"jars": jars, "folder": str(folder), "catalog": dict(settings or {})}))
        self.log = folder / "spark.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engines.spark", str(plan)],
                cwd=Path(__file__).parents[2],
                env=os.environ | {"SPARK_LOCAL_IP": "127.0.0.1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._read() == "ready"

    def ask(self, kind: str, value: str) -> Any:
        """Ask for one thing.

        Raises:
            SparkError: it could not.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({kind: value}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def sql(self, statement: str) -> list[list[Any]]:
        """Run a statement and return its rows; values that JSON does not have come as text.

        Raises:
            SparkError: Spark refused it.
        """
        found: list[list[Any]] = self.ask("sql", statement)
        return found

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"Spark ended: {self.log.read_text(errors='replace')[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise SparkError(answer["error"])
        return answer["value"]

    def __enter__(self) -> Spark:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _session(plan: Mapping[str, Any]) -> Any:
    from pyspark.sql import SparkSession

    folder = plan["folder"]
    builder = (
        SparkSession.builder.master("local[2]")
        .config("spark.jars", ",".join(plan["jars"]))
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.memory", "2g")
        .config("spark.ui.enabled", "false")
        .config("spark.local.dir", f"{folder}/local")
        .config("spark.sql.warehouse.dir", f"{folder}/hive")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.sql.extensions", "org.apache.iceberg.spark.extensions.IcebergSparkSessionExtensions")
    )
    if plan["catalog"]:
        builder = builder.config("spark.sql.catalog.arka", "org.apache.iceberg.spark.SparkCatalog")
        # What others commit is seen at once.
        builder = builder.config("spark.sql.catalog.arka.cache-enabled", "false")
        for key, value in plan["catalog"].items():
            builder = builder.config(f"spark.sql.catalog.arka.{key}", value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


def _answer(session: Any, kind: str, value: str) -> Any:
    match kind:
        case "sql":
            return [list(row) for row in session.sql(value).collect()]
        case "open":
            return [list(row) for row in session.read.format("iceberg").load(value).collect()]
        case "count":
            # Every column is read, not the footers' counts alone.
            frame = session.read.format("iceberg").load(value)
            return sum(1 for _ in frame.toLocalIterator())
        case "parse":
            # Iceberg's own parser, whose checks are the strictest of all.
            text = Path(value.removeprefix("file://")).read_text()
            return session._jvm.org.apache.iceberg.TableMetadataParser.fromJson(text).uuid()
        case _:
            raise ValueError(f"unknown question {kind!r}")


def main() -> None:
    """Answer the lines of standard input."""
    # Spark and the JVM write to standard output as they like: answers keep the real one.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = _session(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps({"value": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        ((kind, value),) = json.loads(line).items()
        try:
            answer = {"value": _answer(session, kind, value)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer, default=str), file=answers, flush=True)
    session.stop()


if __name__ == "__main__":
    main()


__all__ = ["EngineMissing", "Spark", "SparkError", "fetch_jars"]
