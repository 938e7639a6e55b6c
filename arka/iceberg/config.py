"""Where a worker finds the catalog and the warehouse, in a form that crosses process boundaries.

Owns: one frozen record and how its URI picks a kind of catalog. Imports nothing heavy: the server process
builds these.
"""

from __future__ import annotations

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
    apart: bool = False

    @property
    def is_rest(self) -> bool:
        """Whether the catalog speaks REST; anything else is a database that SQLAlchemy opens."""
        return self.uri.startswith(("http://", "https://"))

    @classmethod
    def from_options(
        cls,
        options: IcebergOptions,
        data_dir: Path,
        properties: Mapping[str, str],
        *,
        index_bytes: int = INDEX_BYTES,
    ) -> CatalogConfig:
        """Fill in what options leave empty.

        Args:
            options: the Iceberg options.
            data_dir: the server's data directory; the embedded catalog and warehouse live in it.
            properties: further pyiceberg properties, beside ``options.catalog``.
            index_bytes: see the attribute.

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
            index_build_s=min(_BUILD_S, options.job_deadline_s / 4),
        )


__all__ = ["CATALOG_NAME", "CatalogConfig"]
