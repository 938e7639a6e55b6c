"""Position deletes: files that say which rows of one data file are no longer there.

Owns: writing and reading such files. Does not own which rows are dead (``arka.iceberg.rowdelta``) nor manifests.

Each names the rows of one data file alone, with that file's whole path as lower and upper bound: of all delete files,
every reader takes these.

Source: Iceberg table spec, "Position Delete Files" and "Delete Formats".
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.io import FileIO
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.table.locations import LocationProvider
from pyiceberg.typedef import Record

from arka.iceberg.fileio import write_file
from arka.records import FIELD_ID_KEY

#: Field ids that Iceberg reserves for the columns of position deletes.
PATH_ID: Final = 2147483546
POSITION_ID: Final = 2147483545
#: Positions that a worker remembers of the delete files it wrote; 8 bytes each.
_REMEMBERED_POSITIONS: Final = 1 << 22

_SCHEMA: Final = pa.schema(
    [
        # Parquet's type is string all the same.
        pa.field(
            "file_path", pa.dictionary(pa.int32(), pa.string()), nullable=False, metadata={FIELD_ID_KEY: str(PATH_ID)}
        ),
        pa.field("pos", pa.int64(), nullable=False, metadata={FIELD_ID_KEY: str(POSITION_ID)}),
    ]
)


class DeadRows:
    """Reads delete files, and remembers what was written: files are never written twice under one name."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, pa.Array] = OrderedDict()
        self._count = 0

    def read(self, path: str, io: FileIO) -> pa.Array:
        """Return the positions that the delete file with this path names; sorted int64.

        Raises:
            OSError: the warehouse failed.
        """
        known = self._known.get(path)
        if known is not None:
            self._known.move_to_end(path)
            return known
        with io.new_input(path).open() as source:
            return pq.read_table(source, columns=["pos"]).column("pos").combine_chunks().cast(pa.int64())

    @property
    def memory_bytes(self) -> int:
        """About what it takes."""
        return 8 * self._count

    def remember(self, path: str, positions: pa.Array) -> None:
        """Keep what was written under a name."""
        # A copy: it may be a slice of what a whole commit kills.
        self._known[path] = pa.array(positions.to_numpy().copy())
        self._count += len(positions)
        while self._count > _REMEMBERED_POSITIONS:
            _, dropped = self._known.popitem(last=False)
            self._count -= len(dropped)


@dataclass(frozen=True, slots=True)
class LiveFile:
    """A data file of the current snapshot.

    Attributes:
        path: its URL.
        manifest: the path of the manifest that names it.
        spec_id: the partition spec that it was written under.
        partition: its values, as the manifest has them.
        rows: how many it has, dead ones included.
        sequence_number: of the snapshot that added it.
    """

    path: str
    manifest: str
    spec_id: int
    partition: Record
    rows: int
    sequence_number: int


def live_rows(first: int, count: int, dead: pa.Array) -> pa.BooleanArray:
    """Say of each of ``count`` rows from ``first`` on whether it is not among the dead positions (int64)."""
    return pc.invert(pc.is_in(pa.array(range(first, first + count), pa.int64()), value_set=dead))


def _column_sizes(footer: pq.FileMetaData) -> dict[int, int]:
    """Return the bytes of each column of a delete file, by field id."""
    sizes = dict.fromkeys((PATH_ID, POSITION_ID), 0)
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for column, field_id in enumerate((PATH_ID, POSITION_ID)):
            sizes[field_id] += group.column(column).total_compressed_size
    return sizes


def write_deletes(io: FileIO, locations: LocationProvider, data: LiveFile, positions: pa.Array) -> DataFile:
    """Write a delete file.

    Args:
        io: the warehouse.
        locations: says where the table's files lie.
        data: the file whose rows are dead.
        positions: their numbers; int64, sorted, each once, at least one.

    Raises:
        OSError: the warehouse refused.

    Durability: durable on return, or at the end of the batch that is open.
    """
    paths = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), len(positions)), [data.path])
    table = pa.table([paths, positions], schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, _SCHEMA, compression="zstd", store_schema=False) as writer:
        writer.write_table(table)
    footer = writer.writer.metadata
    location = locations.new_data_location(f"deletes-{uuid4()}.parquet")
    size = write_file(io, location, sink.getvalue())
    path = data.path.encode()
    made = DataFile.from_args(
        content=DataFileContent.POSITION_DELETES,
        file_path=location,
        file_format=FileFormat.PARQUET,
        partition=data.partition,
        record_count=len(positions),
        file_size_in_bytes=size,
        # Never null: pyiceberg's inspection does not expect it.
        column_sizes=_column_sizes(footer),
        value_counts={PATH_ID: len(positions), POSITION_ID: len(positions)},
        null_value_counts={PATH_ID: 0, POSITION_ID: 0},
        nan_value_counts={},
        # Not shortened: equal bounds say that no other data file is meant.
        lower_bounds={PATH_ID: path, POSITION_ID: struct.pack("<q", positions[0].as_py())},
        upper_bounds={PATH_ID: path, POSITION_ID: struct.pack("<q", positions[-1].as_py())},
        key_metadata=None,
        split_offsets=None,
        equality_ids=None,
        sort_order_id=None,
    )
    made.spec_id = data.spec_id
    return made


__all__ = ["PATH_ID", "POSITION_ID", "DeadRows", "LiveFile", "live_rows", "write_deletes"]
