"""pyiceberg's REST catalog, obeying the server's configuration and the catalog alone (R30).

Owns: which properties the file access of a table is made of. Does not own what is done with a table.

Overrides private parts of pyiceberg 0.12.0; ``tests/iceberg/test_pyiceberg_contract.py`` holds each of them.
"""

from __future__ import annotations

from pyiceberg.catalog.rest import RestCatalog, TableResponse
from pyiceberg.io import FileIO
from pyiceberg.table import CommitTableResponse, StagedTable, Table
from pyiceberg.table.update import TableRequirement, TableUpdate
from pyiceberg.typedef import EMPTY_DICT, Properties

from arka.iceberg.fileio import FILE_IO_CLASS
from arka.iceberg.timestamps import forward_updates


class ServerRestCatalog(RestCatalog):
    """A REST catalog whose tables' properties choose no credentials, hosts or code.

    The catalog's own answer may: it hands out credentials of a table in ``config`` and ``storage-credentials``.
    """

    def _load_file_io(self, properties: Properties = EMPTY_DICT, location: str | None = None) -> FileIO:
        # Local files are durable with this class alone.
        return super()._load_file_io({**properties, "py-io-impl": FILE_IO_CLASS}, location)

    def _response_to_table(self, identifier_tuple: tuple[str, ...], table_response: TableResponse) -> Table:
        made = super()._response_to_table(identifier_tuple, table_response)
        made.io = self._file_io_of(table_response)
        return made

    def _response_to_staged_table(
        self, identifier_tuple: tuple[str, ...], table_response: TableResponse
    ) -> StagedTable:
        made = super()._response_to_staged_table(identifier_tuple, table_response)
        made.io = self._file_io_of(table_response)
        return made

    def _file_io_of(self, response: TableResponse) -> FileIO:
        credentials = self._resolve_storage_credentials(response.storage_credentials, response.metadata_location)
        return self._load_file_io({**response.config, **credentials}, response.metadata_location)

    def commit_table(
        self, table: Table, requirements: tuple[TableRequirement, ...], updates: tuple[TableUpdate, ...]
    ) -> CommitTableResponse:
        """Commit; see ``RestCatalog.commit_table``. A snapshot is newer than what it is based on (R34)."""
        response: CommitTableResponse = super().commit_table(
            table, requirements, forward_updates(table.metadata, updates)
        )
        return response


__all__ = ["ServerRestCatalog"]
