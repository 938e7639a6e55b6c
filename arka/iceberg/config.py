"""Where a worker finds the catalog and the warehouse, in a form that crosses process boundaries.

Owns: one frozen record and how its URI picks a kind of catalog. Imports nothing heavy: the server process
builds these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from arka.errors import ConfigurationError
from arka.options import INDEX_BYTES, IcebergOptions

#: Tables that share a worker wait so long for one whose index is made, before that goes elsewhere (R19).
_BUILD_S: Final = 2.0
#: pyiceberg's name for the catalog; part of the key of each row of a SQL catalog, so it never changes.
CATALOG_NAME: Final = "arka"
#: The file at the top of a warehouse by which it is known again.
MARKER_FILE: Final = "arka-warehouse.json"
#: The file in the data directory that names the warehouse and the catalog of its log.
JOINED_FILE: Final = "warehouse.json"


@dataclass(frozen=True, slots=True)
class CatalogConfig:
    """Everything that the jobs in the workers need to know.

    Attributes:
        uri: of the catalog: ``sqlite:///…``, ``postgresql+psycopg2://…`` or ``http(s)://…`` (REST).
        warehouse: URL under which tables are made.
        properties: further pyiceberg properties (credentials, ``s3.*``), as sorted pairs.
        keep_snapshots: snapshots that the expiry inside each commit leaves.
        target_file_bytes: Arrow bytes after which an encoder starts a new file.
        stock_commit: commit through pyiceberg's public path; primary-key tables never do.
        index_dir: directory of the key indexes of primary-key tables, on the local disk.
        attempts_dir: directory of the journals of encode attempts, on the local disk.
        index_bytes: memory that a worker keeps of such tables between commits.
        index_build_s: seconds of one job that may be spent on reading keys for an index; what is left is the next
            one's.
        joined: the file that says which warehouse and catalog this node has been joined to; empty for none.
        partitions: most partitions of one write (``limits.partitions``).
        apart: whether the process holds up none but tables whose indexes are made.
    """

    uri: str
    warehouse: str
    properties: tuple[tuple[str, str], ...] = ()
    keep_snapshots: int = 100
    target_file_bytes: int = 64 * 2**20
    stock_commit: bool = False
    index_dir: str = ""
    attempts_dir: str = ""
    index_bytes: int = INDEX_BYTES
    index_build_s: float = _BUILD_S
    joined: str = ""
    partitions: int = 10_000
    apart: bool = False

    @property
    def is_rest(self) -> bool:
        """Whether the catalog speaks REST; anything else is a database that SQLAlchemy opens."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def catalog_digest(self) -> str:
        """What tells this catalog from others, without its password."""
        return hashlib.sha256(self.uri.encode()).hexdigest()[:16]

    def is_joined(self) -> bool:
        """Whether this node has used this catalog before: then it is there, and is never made (R28)."""
        try:
            joined = json.loads(Path(self.joined).read_bytes()) if self.joined else {}
        except (OSError, ValueError):
            return False
        return isinstance(joined, dict) and joined.get("catalog") == self.catalog_digest

    def is_marked(self) -> bool:
        """Whether the warehouse was given a marker when this node was joined to it."""
        try:
            joined = json.loads(Path(self.joined).read_bytes()) if self.joined else {}
        except (OSError, ValueError):
            return False
        return isinstance(joined, dict) and joined.get("url") == self.warehouse and bool(joined.get("marked"))

    @classmethod
    def from_options(
        cls,
        options: IcebergOptions,
        data_dir: Path,
        properties: Mapping[str, str],
        *,
        index_bytes: int = INDEX_BYTES,
        partitions: int = 10_000,
    ) -> CatalogConfig:
        """Fill in what options leave empty.

        Args:
            options: the Iceberg options.
            data_dir: the server's data directory; the embedded catalog and warehouse live in it.
            properties: further pyiceberg properties, beside ``options.catalog``.
            index_bytes: see the attribute.
            partitions: see the attribute.

        Raises:
            ConfigurationError: the catalog URI has no scheme.
        """
        root = data_dir.absolute()
        # SQLAlchemy decodes %xx in a database's path.
        uri = options.catalog_uri or f"sqlite:///{str(root / 'catalog.db').replace('%', '%25')}"
        if ":" not in uri:
            raise ConfigurationError(
                f"iceberg.catalog_uri {uri!r} has no scheme: expected sqlite:///PATH, "
                f"postgresql+psycopg2://HOST/DB or http(s)://HOST"
            )
        return cls(
            uri=uri,
            warehouse=(options.warehouse or f"file://{root}/warehouse").rstrip("/"),
            properties=tuple(sorted({**options.catalog, **properties}.items())),
            keep_snapshots=options.keep_snapshots,
            target_file_bytes=options.target_file_bytes,
            stock_commit=options.stock_commit,
            index_dir=str(root / "keyindex"),
            attempts_dir=str(root / "attempts"),
            index_bytes=index_bytes,
            partitions=partitions,
            joined=str(root / JOINED_FILE),
            index_build_s=min(_BUILD_S, options.job_deadline_s / 4),
        )


__all__ = ["CATALOG_NAME", "JOINED_FILE", "MARKER_FILE", "CatalogConfig"]
