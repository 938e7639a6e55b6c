"""What survives the loss of the log's disk, as far as the settings can tell (R14).

Owns: the answer for each tier, and the words for the start's warning. Does not own what a tier promises.

A ``file://`` URL never survives: nothing that Arka can see tells a shared mount from a folder of this machine. Of a
catalog in an SQLite file the device decides.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from arka.storage.datadir import device_of

_SAME_DEVICE = "it lies on the file system of the data directory: its acks do not survive the loss of this disk"
_LOCAL = "it lies in a local folder: nothing tells whether that survives the loss of this machine"


def local_reason(data_dir: Path, url: str) -> str | None:
    """Say why what lies under a URL does not survive the loss of the data directory's disk; None if it does.

    Args:
        data_dir: the data directory.
        url: of an object store, a warehouse or a catalog.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        path = Path(unquote(parts.path)).absolute()
    elif parts.scheme.partition("+")[0] == "sqlite":
        path = Path("/", parts.path.lstrip("/"))
    else:
        return None
    if device_of(path) == device_of(data_dir):
        return _SAME_DEVICE
    return _LOCAL if parts.scheme == "file" else None


def local_tiers(data_dir: Path, *, object_store: str, warehouse: str, catalog: str) -> dict[str, str | None]:
    """Say of the two last tiers why they do not survive the loss of the data directory's disk; None if they do.

    Args:
        data_dir: the data directory.
        object_store: its URL.
        warehouse: its URL.
        catalog: its URI.
    """
    return {
        "object_storage": local_reason(data_dir, object_store),
        "iceberg_committed": local_reason(data_dir, warehouse) or local_reason(data_dir, catalog),
    }


__all__ = ["local_reason", "local_tiers"]
