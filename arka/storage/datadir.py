"""The data directory: one server at a time, and where that server is to be found.

Owns: the lock file and ``server.json``. Does not own what else lies in the directory.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit
from uuid import UUID, uuid4

from arka import failpoints
from arka.errors import ConfigurationError
from arka.privacy import FILE_MODE, make_file, make_folder, make_folders, private_opener, share_folder


@contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for this process; makes it if it is not there.

    The kernel drops the lock when the process ends, however it ends: a stale file is no obstacle.

    Raises:
        ConfigurationError: another process holds it (named with its pid), or it cannot be made.
    """
    try:
        make_folders(data_dir.parent)
        if make_folder(data_dir):
            # Engines of the shared group pass through it on their way to warehouse and catalog.
            share_folder(data_dir, passage=True)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        raise ConfigurationError(f"Cannot use the data directory {data_dir}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigurationError(
                f"The data directory {data_dir} is held by the server with pid {holder}: stop it, or choose another"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def announce(data_dir: Path, *, flight: str, http: str | None) -> Iterator[None]:
    """Say in ``server.json`` where the server listens, for as long as it does.

    Args:
        data_dir: the data directory.
        flight: the Flight address as a URL.
        http: the operations address, or None where there is none.
    """
    path = data_dir / "server.json"
    staged = data_dir / ".server.json.tmp"
    make_file(staged)
    staged.write_text(json.dumps({"pid": os.getpid(), "flight": flight, "http": http}) + "\n")
    staged.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def disk_uuid(data_dir: Path) -> UUID:
    """Return the data directory's identity, made at its first use and durable on return (R13).

    Raises:
        ConfigurationError: the file that holds it is no UUID.
    """
    path = data_dir / "disk-id"
    try:
        return UUID(path.read_text().strip())
    except FileNotFoundError:
        found = uuid4()
    except ValueError:
        raise ConfigurationError(f"{path} does not hold a UUID: restore it, or use another directory") from None
    staged = data_dir / ".disk-id.tmp"
    with open(staged, "w", opener=private_opener) as file:
        file.write(f"{found}\n")
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
    descriptor = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    failpoints.hit("start.disk_id")
    return found


def _nearest(path: Path) -> Path:
    """Return the path, or its nearest folder that exists: it may not have been made yet."""
    while not path.exists():
        path = path.parent
    return path


def device_of(path: Path) -> int:
    """Return the number of the file system that holds ``path``, or will; links and mounts are followed."""
    return _nearest(path).stat().st_dev


def shares_device(folder: Path, url: str) -> bool:
    """Say whether what lies under ``url`` is on the file system of a folder; a remote URL is not."""
    parts = urlsplit(url)
    return parts.scheme == "file" and device_of(Path(unquote(parts.path))) == device_of(folder)


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds ``path``, as an unprivileged writer sees them."""
    status = os.statvfs(_nearest(path))
    return status.f_bavail * status.f_frsize


__all__ = ["announce", "device_of", "disk_uuid", "free_bytes", "lock_data_dir", "shares_device"]
