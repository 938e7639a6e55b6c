"""The warehouse's marker, and what a data directory remembers of its warehouse (R28, R29).

Owns: the marker ``arka-warehouse.json`` at the top of the warehouse, and ``warehouse.json`` in the data directory. Does
not own when a marker is made or what a wrong one means (``arka.tiers.warehouse``), nor which data directory may start
(``arka.storage.place``).

The marker names the warehouse by a UUID. Where the warehouse lies inside a data directory it names that directory's
real path too. It is made once and never replaced, except by ``--adopt-warehouse``.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import trio

from arka.iceberg.config import JOINED_FILE, MARKER_FILE, CatalogConfig
from arka.privacy import make_folder, private_opener, share_file, share_folder
from arka.storage.ports import CatalogUnavailable, ObjectExists, ObjectStore, StoreRefused, StoreUnavailable

T = TypeVar("T")

#: Where a folder cannot be written to, by whom it belongs to or how it is mounted.
_CLOSED = (PermissionError,)


@dataclass(frozen=True, slots=True)
class Marker:
    """What the marker says.

    Attributes:
        uuid: the warehouse.
        data_dir: the real path of the data directory that holds it; empty where none does.
        url: the warehouse as paths in it begin, where a data directory holds it.
    """

    uuid: UUID
    data_dir: str = ""
    url: str = ""

    def to_bytes(self) -> bytes:
        """The marker's file."""
        fields = {"warehouse": str(self.uuid)}
        if self.data_dir:
            fields |= {"data_dir": self.data_dir, "url": self.url}
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, where: str, data: bytes) -> Marker:
        """Read a marker's file.

        Raises:
            CatalogUnavailable: it is no marker.
        """
        try:
            fields = json.loads(data)
            return cls(UUID(fields["warehouse"]), str(fields.get("data_dir", "")), str(fields.get("url", "")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CatalogUnavailable(f"{where} is no marker of a warehouse: {error!r}") from error


def read_marker_file(root: Path) -> Marker | None:
    """Read the marker of a local warehouse; None where there is none.

    Raises:
        CatalogUnavailable: it cannot be read, or is none.
    """
    path = root / MARKER_FILE
    try:
        return Marker.from_bytes(str(path), path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CatalogUnavailable(f"{path} cannot be read: {error}") from error


def write_file(path: Path, data: bytes, *, replace: bool, shared: bool = False) -> bool:
    """Write a small file whole and durably; returns whether it is the one that is there now.

    Args:
        path: where; its folder exists.
        data: its bytes.
        replace: take the place of a file that is there.
        shared: whether the server's shared group may read it.

    Raises:
        OSError: the disk refused.
    """
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(staged, "xb", opener=private_opener) as file:
            if shared:
                share_file(file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            staged.replace(path)
        else:
            try:
                os.link(staged, path)
            except FileExistsError:
                return False
            finally:
                _sync_directory(path.parent)
    finally:
        staged.unlink(missing_ok=True)
    _sync_directory(path.parent)
    return True


class MarkedWarehouse:
    """``ports.Warehouse`` for a warehouse in a folder or an object store."""

    def __init__(self, config: CatalogConfig, data_dir: Path, store: ObjectStore | None) -> None:
        """Join the warehouse to the data directory; nothing is read yet.

        Args:
            config: the warehouse and the catalog.
            data_dir: where what is known of them is kept.
            store: the warehouse as a store of objects, if it is no local folder.
        """
        self._config = config
        self._joined = data_dir / JOINED_FILE
        self._store = store
        self._root = local_root(config.warehouse)
        self._inside = holds(data_dir, self._root)
        self._data_dir = os.path.realpath(data_dir)

    @property
    def url(self) -> str:
        """See ``ports.Warehouse``."""
        return self._config.warehouse

    async def read_marker(self) -> UUID | None:
        """See ``ports.Warehouse``."""
        if self._root is not None:
            root = self._root
            found = await self._run(lambda: read_marker_file(root))
        else:
            found = await self._read_remote()
        return None if found is None else found.uuid

    async def make_marker(self, uuid: UUID) -> UUID | None:
        """See ``ports.Warehouse``."""
        marker = Marker(uuid, self._data_dir, self.url) if self._inside else Marker(uuid)
        try:
            if self._root is not None:
                root = self._root
                await self._run(lambda: _make_file(root, marker))
            else:
                assert self._store is not None
                with suppress(ObjectExists):
                    await self._store.put_new(MARKER_FILE, [marker.to_bytes()])
        except (*_CLOSED, StoreRefused):
            return None
        except OSError as error:
            raise CatalogUnavailable(f"{self.url}: its marker cannot be made: {error}") from error
        except StoreUnavailable as error:
            raise CatalogUnavailable(str(error)) from error
        return await self.read_marker()

    async def known(self) -> UUID | None:
        """See ``ports.Warehouse``; one that was known under another URL does not count."""

        def job() -> UUID | None:
            try:
                joined = json.loads(self._joined.read_bytes())
                return UUID(joined["warehouse"]) if joined["url"] == self.url else None
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                return None

        return await self._run(job)

    async def know(self, uuid: UUID) -> None:
        """See ``ports.Warehouse``; the data directory's own path and its catalog are remembered with it."""
        await self._run(lambda: write_joined(self._config, self._joined.parent, uuid, marked=True))

    async def _read_remote(self) -> Marker | None:
        assert self._store is not None
        try:
            return Marker.from_bytes(f"{self.url}/{MARKER_FILE}", await self._store.get(MARKER_FILE))
        except KeyError:
            return None
        except StoreUnavailable as error:
            raise CatalogUnavailable(str(error)) from error

    @staticmethod
    async def _run(job: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(job, abandon_on_cancel=True)


def write_joined(config: CatalogConfig, data_dir: Path, uuid: UUID, *, marked: bool) -> None:
    """Remember in the data directory which warehouse and catalog it has been joined to, and where it lies itself.

    Raises:
        OSError: the disk refused.
    """
    fields = {
        "warehouse": str(uuid),
        "url": config.warehouse,
        "catalog": config.catalog_digest,
        "data_dir": os.path.realpath(data_dir),
        "marked": marked,
    }
    write_file(data_dir / JOINED_FILE, json.dumps(fields, indent=1).encode() + b"\n", replace=True)


def local_root(warehouse: str) -> Path | None:
    """Return the folder of a local warehouse; percent signs mean themselves. None for any other warehouse."""
    return Path(warehouse.removeprefix("file:").removeprefix("//")) if warehouse.startswith("file:") else None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(directory: Path) -> None:
    """Make a warehouse's directory and its missing parents, durably."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    if make_folder(directory):
        share_folder(directory)
    _sync_directory(directory.parent)


def holds(data_dir: Path, root: Path | None) -> bool:
    """Say whether a data directory holds a local warehouse."""
    return root is not None and Path(os.path.realpath(root)).is_relative_to(os.path.realpath(data_dir))


def _make_file(root: Path, marker: Marker) -> None:
    _make_directory(root)
    write_file(root / MARKER_FILE, marker.to_bytes(), replace=False, shared=True)


__all__ = ["MarkedWarehouse", "Marker", "holds", "local_root", "read_marker_file", "write_file", "write_joined"]
