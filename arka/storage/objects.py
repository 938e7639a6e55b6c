"""Object stores: S3 and its like through obstore, and local folders through an adapter that fsyncs.

Owns: how a put becomes create-only and durable, and what a failure means. Does not own keys or bytes
(``arka.tiers.objects``, ``arka.tiers.epochs``). Blocking calls run in threads of their own limiter.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
import obstore.exceptions
import trio
from obstore.store import from_url

from arka import failpoints
from arka.errors import ConfigurationError
from arka.options import ObjectStoreOptions
from arka.privacy import make_folder, private_opener
from arka.redaction import shown_url
from arka.storage.ports import Buffer, ObjectExists, ObjectMeta, ObjectStore, StoreRefused, StoreUnavailable
from arka.storage.storesettings import check_store_settings, explain, first_line

T = TypeVar("T")

#: Requests at a time beside the uploads: epoch reads and heartbeats must not queue behind large puts.
_SPARE_REQUESTS: Final = 4
#: Folder of objects that are being written; its name is no legal first part of a key.
_STAGING: Final = ".staging"

#: One request's longest time, and obstore's own retries: short, since the tiers retry for ever and say so.
_REQUEST_TIMEOUT: Final = "60s"
_CONNECT_TIMEOUT: Final = "5s"
_RETRIES: Final = 2
_RETRY_TIMEOUT: Final = timedelta(seconds=10)
#: Settings and variables that hold an endpoint, in the order in which they are looked at.
_ENDPOINTS: Final = ("aws_endpoint_url_s3", "aws_endpoint_url", "aws_endpoint", "endpoint_url", "endpoint")


async def _run_in_thread(job: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """Run a request. Cancelled, it goes on in its thread unwatched: a dead store must not hold up a drain."""
    return await trio.to_thread.run_sync(job, abandon_on_cancel=True, limiter=limiter)


class FileObjectStore:
    """Objects as files below one folder: complete and fsynced before they can be seen.

    The folder stays the one that it was when this process met it first. One that is gone, or has another in its place
    (a mount point whose mount is gone), is a store that does not answer: nothing is made there, and that nothing is
    found there means nothing.
    """

    def __init__(self, root: Path, requests: int, *, stays: bool = True) -> None:
        """Use ``root``; it is made by the first put.

        Args:
            root: absolute.
            requests: calls at a time.
            stays: the root has to stay the folder that it was; else one that is gone is made again.
        """
        self._root = root
        self._stays = stays
        self._limiter = trio.CapacityLimiter(requests)
        # Folders whose names, and those of all folders above them, this process has fsynced.
        self._durable: set[Path] = set()
        # The inode of the root; None before it was met. A device number may change when a file system is mounted again.
        self._met: int | None = None

    @property
    def url(self) -> str:
        """The folder as a URL."""
        return self._root.as_uri()

    async def put_new(self, key: str, parts: Sequence[Buffer]) -> None:
        """See ``ports.ObjectStore.put_new``."""
        await self._run(partial(self._put, key, parts))

    async def get(self, key: str) -> bytes:
        """See ``ports.ObjectStore.get``."""

        def job() -> bytes:
            try:
                return (self._root / key).read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise KeyError(key) from None

        return await self._run(job)

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """See ``ports.ObjectStore.get_range``."""

        def job() -> bytes:
            try:
                with (self._root / key).open("rb") as file:
                    file.seek(start)
                    return file.read(length)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise KeyError(key) from None

        return await self._run(job)

    async def list_keys(self, prefix: str, *, start_after: str | None = None) -> list[ObjectMeta]:
        """See ``ports.ObjectStore.list_keys``."""
        return await self._run(partial(self._list, prefix, start_after))

    async def delete(self, keys: Sequence[str]) -> None:
        """See ``ports.ObjectStore.delete``."""

        def job() -> None:
            for key in keys:
                path = self._root / key
                try:
                    path.unlink()
                except (FileNotFoundError, NotADirectoryError):
                    continue
                _sync_directory(path.parent)
                failpoints.hit("store.deleted")

        await self._run(job)

    async def _run(self, job: Callable[[], T]) -> T:
        def checked() -> T:
            # On both sides: what was done between two looks at the same folder was done in it.
            self._check_root()
            try:
                return job()
            finally:
                self._check_root()

        try:
            return await _run_in_thread(checked, self._limiter)
        except OSError as error:
            raise StoreUnavailable(f"{self.url}: {error}") from error

    def _check_root(self) -> None:
        """Check that the root is the folder that it was.

        Raises:
            StoreUnavailable: it is gone, or another one.
        """
        if not self._stays:
            return
        # Read before the look: another thread may make the root and meet it meanwhile.
        met = self._met
        try:
            found = self._root.stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            if met is None:
                # The first put makes it.
                return
            raise StoreUnavailable(f"{self.url} is gone: it was moved, or is not mounted") from None
        if met is None:
            self._met = found
        elif found != met:
            raise StoreUnavailable(
                f"{self.url} is not the folder that it was: something is mounted there, or is not mounted any more. "
                "If it is the right one, restart the server"
            )

    def _put(self, key: str, parts: Sequence[Buffer]) -> None:
        staging = self._root / _STAGING
        self._make_folder(staging)
        staged = staging / secrets.token_hex(16)
        target = self._root / key
        try:
            with open(staged, "xb", opener=private_opener) as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            failpoints.hit("store.staged")
            self._make_folder(target.parent)
            try:
                # A link fails where the name is taken, and the name appears with all of the bytes or not at all.
                os.link(staged, target)
            except FileExistsError:
                # Whoever made it may have failed before its name was durable: an earlier attempt of ours, say,
                # and the caller takes what exists for durable.
                _sync_directory(target.parent)
                raise ObjectExists(key) from None
            failpoints.hit("store.linked")
            _sync_directory(target.parent)
            failpoints.hit("store.named")
        finally:
            staged.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder at or below the root, durably with all above it.

        One that is there already is fsynced too, once: whoever made it may have died before its name was durable.
        """
        if folder in self._durable and folder.is_dir():
            return
        if folder != self._root:
            self._make_folder(folder.parent)
            make_folder(folder)
            _sync_directory(folder.parent)
        elif self._met is not None and not folder.is_dir():
            # One that went away meanwhile is not made again.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        else:
            _make_root(folder)
        self._durable.add(folder)

    def _list(self, prefix: str, start_after: str | None) -> list[ObjectMeta]:
        # The deepest folder that the prefix names: nothing outside it can match.
        top = self._root / prefix.rpartition("/")[0]
        found = []
        for folder, folders, files in os.walk(top, onerror=_check_absent):
            if Path(folder) == self._root and _STAGING in folders:
                folders.remove(_STAGING)
            for name in files:
                path = Path(folder) / name
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and (start_after is None or key > start_after):
                    try:
                        size = path.stat().st_size
                    except FileNotFoundError:
                        # Deleted since its folder was read.
                        continue
                    found.append(ObjectMeta(key, size))
        return sorted(found, key=lambda meta: meta.key)


def _check_absent(error: OSError) -> None:
    """Let a listing go on only where a folder is not there: "nothing" must not stand for "cannot be read"."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _make_root(root: Path) -> None:
    """Make the root and its missing parents, durably."""
    missing = []
    folder = root
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        make_folder(path)
        _sync_directory(path.parent)
    if not missing:
        # A mount point's parent may be closed to us; its name is not ours to make durable then.
        with suppress(PermissionError):
            _sync_directory(root.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteObjectStore:
    """Objects in a remote store, by obstore's blocking calls (its async ones need another event loop)."""

    def __init__(self, store: Any, url: str, requests: int) -> None:
        """Wrap an obstore store whose prefix is part of it.

        Args:
            store: any of obstore's stores that has create-only puts.
            url: for people.
            requests: calls at a time.
        """
        self._store = store
        self._url = url
        self._limiter = trio.CapacityLimiter(requests)

    @property
    def url(self) -> str:
        """Where the store is, without credentials."""
        return self._url

    async def put_new(self, key: str, parts: Sequence[Buffer]) -> None:
        """See ``ports.ObjectStore.put_new``."""
        # One request: a multipart upload is not create-only. The parts as they are: a copy of a mapped segment on the
        # heap would stay there as long as the error of a failed attempt does, one for each attempt of an outage.
        try:
            await self._run(key, lambda: obstore.put(self._store, key, iter(parts), mode="create", use_multipart=False))
        except KeyError as error:
            raise self._no_bucket(error) from error

    async def get(self, key: str) -> bytes:
        """See ``ports.ObjectStore.get``."""
        return await self._run(key, lambda: obstore.get(self._store, key).bytes().to_bytes())

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """See ``ports.ObjectStore.get_range``."""

        def job() -> bytes:
            try:
                if length:
                    return bytes(obstore.get_range(self._store, key, start=start, length=length))
            except obstore.exceptions.BaseError:
                # Stores answer a range that begins behind the end with an error of no type of its own.
                if obstore.head(self._store, key)["size"] > start:
                    raise
            else:
                obstore.head(self._store, key)
            return b""

        return await self._run(key, job)

    async def list_keys(self, prefix: str, *, start_after: str | None = None) -> list[ObjectMeta]:
        """See ``ports.ObjectStore.list_keys``."""
        # Stores list whole path segments: ask for the folder, choose by the prefix here.
        folder = prefix.rpartition("/")[0]

        def job() -> list[ObjectMeta]:
            pages = obstore.list(self._store, folder or None, offset=start_after)
            metas = [ObjectMeta(item["path"], item["size"]) for page in pages for item in page]
            return sorted((meta for meta in metas if meta.key.startswith(prefix)), key=lambda meta: meta.key)

        try:
            return await self._run(prefix, job)
        except KeyError as error:
            raise self._no_bucket(error) from error

    async def delete(self, keys: Sequence[str]) -> None:
        """See ``ports.ObjectStore.delete``."""

        def job() -> None:
            for key in keys:
                try:
                    obstore.delete(self._store, key)
                except (FileNotFoundError, obstore.exceptions.NotFoundError):
                    continue

        if keys:
            await self._run(keys[0], job)

    def _no_bucket(self, error: KeyError) -> StoreUnavailable:
        """Say "not found" where no object was asked for: it is the bucket, and it may come to be."""
        return StoreUnavailable(f"{self._url}: {error.__cause__}")

    async def _run(self, key: str, job: Callable[[], T]) -> T:
        try:
            return await _run_in_thread(job, self._limiter)
        except obstore.exceptions.AlreadyExistsError as error:
            raise ObjectExists(key) from error
        except (FileNotFoundError, obstore.exceptions.NotFoundError) as error:
            raise KeyError(key) from error
        except (
            obstore.exceptions.PermissionDeniedError,
            obstore.exceptions.UnauthenticatedError,
            obstore.exceptions.NotSupportedError,
        ) as error:
            # A start ends with it; later it is waited for, since it may be mended in the store.
            raise StoreRefused(f"{self._url}: {key}: {error}") from error
        except (obstore.exceptions.BaseError, OSError) as error:
            raise StoreUnavailable(f"{self._url}: {key}: {error}") from error


def open_object_store(options: ObjectStoreOptions) -> ObjectStore:
    """Open the store that ``options.url`` names; nothing is asked of it yet.

    Args:
        options: the URL (``file``, ``s3``, ``gs``, ``az``, ``memory``), the store's own settings, and how
            many uploads run at a time.

    Raises:
        ConfigurationError: the URL or a setting is none of obstore's.
    """
    requests = options.uploads + _SPARE_REQUESTS
    parts = urlsplit(options.url)
    if parts.scheme == "file":
        return FileObjectStore(Path(unquote(parts.path)), requests)
    check_store_settings(options.config)

    def attempt(config: Mapping[str, str]) -> Any:
        try:
            return from_url(  # type: ignore[call-overload]
                options.url,
                config=dict(config) or None,
                client_options={
                    "timeout": _REQUEST_TIMEOUT,
                    "connect_timeout": _CONNECT_TIMEOUT,
                    "allow_http": _wants_http(config),
                },
                retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRY_TIMEOUT},
            )
        except BaseException as error:
            # obstore's panics are no Exception: what it cannot take must not look like a bug of the server's.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(first_line(error)) from None

    try:
        store = attempt(options.config)
    except (obstore.exceptions.BaseError, ValueError, TypeError) as error:
        raise ConfigurationError(explain(options.url, options.config, error, attempt)) from error
    return RemoteObjectStore(store, shown_url(options.url), requests)


def open_folder(root: Path) -> ObjectStore:
    """Open a local folder as a store of copies, which may be lost; it is made by a put where it is not there."""
    return FileObjectStore(root, _SPARE_REQUESTS, stays=False)


def _wants_http(config: Mapping[str, str]) -> bool:
    """Whether the endpoint is an ``http://`` one, from the settings or the environment: who writes that means it."""
    given = {name.lower(): value for name, value in config.items()}
    endpoint = next((given[name] for name in _ENDPOINTS if name in given), None)
    if endpoint is None:
        endpoint = next((os.environ[name.upper()] for name in _ENDPOINTS if name.upper() in os.environ), "")
    return endpoint.startswith("http://")


async def read_range(path: Path, start: int, end: int) -> memoryview:
    """Map ``[start, end)`` of a segment, which is never shortened (R9).

    No heap is used: what waits for an outage to end costs page cache, which the kernel may take back.

    Raises:
        OSError: the file is gone or shorter.

    Cancellation: nothing stays mapped.
    """
    aligned = start - start % mmap.ALLOCATIONGRANULARITY

    def job() -> memoryview:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < end:
                raise OSError(f"{path} ends at {size}, expected at least {end}")
            mapped = mmap.mmap(file.fileno(), end - aligned, access=mmap.ACCESS_READ, offset=aligned)
        mapped.madvise(mmap.MADV_WILLNEED)
        return memoryview(mapped)[start - aligned :]

    return await trio.to_thread.run_sync(job)


__all__ = ["FileObjectStore", "RemoteObjectStore", "open_folder", "open_object_store", "read_range"]
