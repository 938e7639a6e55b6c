"""Where a server's objects, warehouse and catalog can lie: each combination on components of its own kind.

Owns: the settings that lead a server, and plain pyiceberg, to them. Does not own the components' processes
(``arka.testing.services``) nor servers.

Nothing of a backend lies in a server's data directory: what survives the loss of that is all there (R14).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from arka.testing.services import PostgreSQL, SeaweedFS, unprivileged_folder

#: Every backend: where the objects and the warehouse are, then what the catalog is.
BACKENDS: Final = ("local-sqlite", "s3-sqlite", "s3-rest", "s3-postgres")
_REGION: Final = "us-east-1"


@dataclass(frozen=True)
class Backend:
    """One place for objects, warehouse and catalog, empty at first.

    Attributes:
        name: its kind, one of ``BACKENDS``.
        namespace: of the tables that this backend's tests make: a REST catalog is shared with other backends.
        settings: what a server needs to use it, by key.
        catalog: what ``pyiceberg.catalog.load_catalog`` needs to open it, its name ``arka`` first.
    """

    name: str
    namespace: str
    settings: Mapping[str, str]
    catalog: Mapping[str, str] = field(repr=False)

    def behind(self, port: int, proxy_port: int) -> Backend:
        """The same for a server that reaches the catalog, which listens on ``port``, by another port alone."""
        uri = self.settings["iceberg.catalog_uri"].replace(f":{port}", f":{proxy_port}")
        return replace(self, settings={**self.settings, "iceberg.catalog_uri": uri})


class Components:
    """The services that backends are made on; each is started when it is first needed.

    Ends all of them when it is left.
    """

    def __init__(self, folder: Path) -> None:
        """Say where files go.

        Args:
            folder: for everything but PostgreSQL's, which needs one that others can reach.
        """
        self._folder = folder
        self._stack = ExitStack()
        self._seaweedfs: SeaweedFS | None = None
        self._postgresql: PostgreSQL | None = None
        self._numbers = count(1)

    @property
    def seaweedfs(self) -> SeaweedFS:
        """The object store and REST catalog."""
        if self._seaweedfs is None:
            self._seaweedfs = self._stack.enter_context(SeaweedFS(self._folder / "seaweedfs"))
        return self._seaweedfs

    @property
    def postgresql(self) -> PostgreSQL:
        """The database server."""
        if self._postgresql is None:
            folder = self._stack.enter_context(unprivileged_folder())
            self._postgresql = self._stack.enter_context(PostgreSQL(folder / "postgresql"))
        return self._postgresql

    def backend(self, name: str) -> Backend:
        """Make an empty backend of a kind."""
        number = next(self._numbers)
        folder = self._folder / f"{name}-{number}"
        folder.mkdir(parents=True)
        place = f"{name}-{number}"
        settings: dict[str, str] = {}
        catalog: dict[str, str] = {}
        if name == "local-sqlite":
            settings["object_store.url"] = (folder / "objects").as_uri()
            warehouse = (folder / "warehouse").as_uri()
        else:
            weed = self.seaweedfs
            settings["object_store.url"] = f"s3://{weed.bucket}/{place}/objects"
            settings |= {f"object_store.config.{key}": value for key, value in obstore_settings(weed).items()}
            warehouse = f"s3://{weed.bucket}/{place}/warehouse"
            catalog |= pyiceberg_settings(weed)
        if name.endswith("-sqlite"):
            uri = f"sqlite:///{folder / 'catalog.db'}"
        elif name.endswith("-postgres"):
            database = place.replace("-", "_")
            self.postgresql.create_database(database)
            uri = self.postgresql.uri(database)
        elif name.endswith("-rest"):
            uri = self.seaweedfs.catalog_uri
            warehouse = f"s3://{self.seaweedfs.table_bucket}"
            catalog["credential"] = settings["iceberg.catalog.credential"] = rest_credential(self.seaweedfs)
        else:
            raise ValueError(f"{name}: no such backend")
        settings |= {"iceberg.catalog_uri": uri, "iceberg.warehouse": warehouse}
        catalog |= {"type": "rest" if name.endswith("-rest") else "sql", "uri": uri, "warehouse": warehouse}
        return Backend(name, f"ns{number}", settings, catalog)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def obstore_settings(weed: SeaweedFS) -> dict[str, str]:
    """Name an S3 service as obstore does."""
    return {
        "aws_endpoint": weed.s3_endpoint,
        "aws_access_key_id": weed.access_key,
        "aws_secret_access_key": weed.secret_key,
        "aws_region": _REGION,
        "aws_virtual_hosted_style_request": "false",
    }


def pyiceberg_settings(weed: SeaweedFS) -> dict[str, str]:
    """Name an S3 service as pyiceberg does."""
    return {
        "s3.endpoint": weed.s3_endpoint,
        "s3.access-key-id": weed.access_key,
        "s3.secret-access-key": weed.secret_key,
        "s3.region": _REGION,
    }


def rest_credential(weed: SeaweedFS) -> str:
    """What the REST catalog takes for client id and secret."""
    return f"{weed.access_key}:{weed.secret_key}"


__all__ = ["BACKENDS", "Backend", "Components", "obstore_settings", "pyiceberg_settings", "rest_credential"]
