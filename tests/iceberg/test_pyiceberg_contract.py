"""The parts of pyiceberg and trio-parallel that are not public and that Arka overrides or calls.

Each is held as it was when the code that relies on it was written. A failure here means: read what changed
there, then change ``arka.iceberg`` or this test.
"""

from __future__ import annotations

import inspect
import io
import struct
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg import table as pyiceberg_table
from pyiceberg.avro.decoder import StreamingBinaryDecoder, new_decoder
from pyiceberg.avro.decoder_fast import CythonBinaryDecoder
from pyiceberg.avro.encoder import BinaryEncoder
from pyiceberg.avro.file import AvroOutputFile
from pyiceberg.avro.reader import DoubleReader, StructReader
from pyiceberg.catalog import Catalog, MetastoreCatalog
from pyiceberg.catalog.rest import RestCatalog
from pyiceberg.catalog.sql import IcebergTables, SqlCatalog
from pyiceberg.io import FileIO, InputFile, OutputFile
from pyiceberg.io import pyarrow as pyiceberg_pyarrow
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.manifest import DataFile, ManifestFile, ManifestWriter, ManifestWriterV2, write_manifest_list
from pyiceberg.schema import pre_order_visit
from pyiceberg.table import update as table_update
from pyiceberg.table.locations import LocationProvider, SimpleLocationProvider
from pyiceberg.table.metadata import TableMetadataV2, new_table_metadata
from pyiceberg.table.snapshots import Snapshot, SnapshotSummaryCollector, update_snapshot_summaries
from pyiceberg.table.sorting import UNSORTED_SORT_ORDER
from pyiceberg.utils.decimal import unscaled_to_decimal
from pyiceberg.utils.schema_conversion import ConvertSchemaToAvro

from arka.iceberg import avrodoubles, sqlcatalog
from arka.iceberg.fileio import WarehouseFileIO
from arka.iceberg.partition import new_partition_spec
from arka.iceberg.schema import new_iceberg_schema


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_version_is_the_one_that_was_read() -> None:
    """The overrides were written against this version; pyproject pins it."""
    assert version("pyiceberg") == "0.12.0"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (SqlCatalog._convert_orm_to_iceberg, ["self", "orm_table"]),
        (
            MetastoreCatalog._update_and_stage_table,
            ["self", "current_table", "table_identifier", "requirements", "updates"],
        ),
        (MetastoreCatalog._parse_metadata_version, ["metadata_location"]),
        (SqlCatalog._write_metadata, ["metadata", "io", "metadata_path"]),
        (Catalog._delete_old_metadata, ["io", "base", "metadata"]),
        (SqlCatalog.commit_table, ["self", "table", "requirements", "updates"]),
        (table_update._apply_table_update, ["update", "base_metadata", "context"]),
        (
            table_update._update_table_metadata_log,
            ["base_metadata", "metadata_location", "last_updated_ms"],
        ),
        (table_update._TableMetadataUpdateContext, []),
        (
            ManifestWriterV2.__init__,
            ["self", "spec", "schema", "output_file", "snapshot_id", "avro_compression"],
        ),
        (ManifestWriterV2.content, ["self"]),
        (
            write_manifest_list,
            [
                "format_version",
                "output_file",
                "snapshot_id",
                "parent_snapshot_id",
                "sequence_number",
                "avro_compression",
            ],
        ),
        (ManifestFile.fetch_manifest_entry, ["self", "io", "discard_deleted"]),
        (Snapshot.manifests, ["self", "io"]),
        (SnapshotSummaryCollector.add_file, ["self", "data_file", "schema", "partition_spec"]),
        (update_snapshot_summaries, ["summary", "previous_summary"]),
        (pyiceberg_pyarrow.compute_statistics_plan, ["schema", "table_properties"]),
        (pyiceberg_pyarrow.ID2ParquetPathVisitor.primitive, ["self", "primitive"]),
        (pre_order_visit, ["obj", "visitor"]),
        (unscaled_to_decimal, ["unscaled", "scale"]),
        (LocationProvider.new_data_location, ["self", "data_file_name", "partition_key"]),
        (pyiceberg_table.Table._do_commit, ["self", "updates", "requirements"]),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else "",
)
def test_signatures(function: Any, parameters: list[str]) -> None:
    """What is overridden or called takes what it took."""
    assert _parameters(function) == parameters


@pytest.mark.parametrize(
    ("ours", "overriding", "further"),
    [
        (
            sqlcatalog.ServerSqlCatalog,
            {"__init__", "_load_file_io", "_update_and_stage_table", "commit_table"},
            {"_apply", "_look_before_commit", "all_pointers", "drop_loaded", "last_look"},
        ),
        (
            sqlcatalog.LeanSqlCatalog,
            {"__init__", "_convert_orm_to_iceberg", "commit_table"},
            {"_apply", "_remember"},
        ),
    ],
)
def test_our_overrides_override_something(ours: type, overriding: set[str], further: set[str]) -> None:
    """Each method of our catalogs that means to replace one of pyiceberg's does, and no other one does."""
    names = {name for name, member in vars(ours).items() if inspect.isfunction(member)}
    assert names == overriding | further
    for name in overriding:
        assert callable(getattr(SqlCatalog, name))
    for name in further:
        assert not hasattr(SqlCatalog, name)


def test_commit_table_works_as_assumed() -> None:
    """The SQL catalog stages, writes metadata, and swaps on the location it staged from, in this order."""
    source = inspect.getsource(SqlCatalog.commit_table)
    steps = [
        "current_table = self.load_table(table_identifier)",
        "self._update_and_stage_table(current_table, table.name(), requirements, updates)",
        "self._write_metadata(",
        "IcebergTables.metadata_location == current_table.metadata_location",
        "session.commit()",
    ]
    places = [source.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)
    assert hasattr(IcebergTables, "metadata_location")


def test_load_table_converts_through_the_override() -> None:
    """Loading asks the database for the location and our override for the metadata."""
    assert "self._convert_orm_to_iceberg(result)" in inspect.getsource(SqlCatalog.load_table)


def test_metadata_is_frozen_and_updates_copy() -> None:
    """Metadata can be shared: it refuses assignment, and applying an update leaves it as it was."""
    schema = new_iceberg_schema(pa.schema([("n", pa.int64())]))
    metadata = new_table_metadata(
        schema=schema,
        partition_spec=new_partition_spec(schema, ()),
        sort_order=UNSORTED_SORT_ORDER,
        location="file:///t",
        properties={},
    )
    assert isinstance(metadata, TableMetadataV2)
    with pytest.raises(ValueError, match="frozen"):
        metadata.location = "file:///other"
    before = metadata.model_dump_json()
    update = table_update.SetPropertiesUpdate(updates={"a": "b"})
    ours = sqlcatalog.apply_updates(metadata, (update,), "file:///t/metadata/1.json")
    theirs = table_update.update_table_metadata(metadata, (update,), metadata_location="file:///t/metadata/1.json")
    assert metadata.model_dump_json() == before
    same = {"last_updated_ms"}
    assert ours.model_dump(exclude=same) == theirs.model_dump(exclude=same)
    assert ours.properties == {"a": "b"}


def test_retry_is_read_from_table_properties() -> None:
    """Pyiceberg's own retry obeys the property that the stock path sets to zero."""
    source = inspect.getsource(pyiceberg_table.Transaction.commit_transaction)
    assert "properties = self._table.metadata.properties" in source
    assert "for attempt in range(num_retries + 1)" in source
    assert pyiceberg_table.TableProperties.COMMIT_NUM_RETRIES == "commit.retry.num-retries"


def test_file_access_is_made_in_one_place_of_each_catalog() -> None:
    """Table properties reach the file access through the methods that the server's catalogs override (R30)."""
    loading = inspect.getsource(SqlCatalog._convert_orm_to_iceberg)
    assert "io=self._load_file_io(metadata.properties, metadata_location)" in loading
    for method in ("_response_to_table", "_response_to_staged_table"):
        source = inspect.getsource(getattr(RestCatalog, method))
        assert "**table_response.metadata.properties" in source
        assert source.count("_load_file_io") == 1
    assert "_update_and_stage_table" in inspect.getsource(SqlCatalog.commit_table)


def test_manifests_are_opened_by_one_method() -> None:
    """A manifest's Avro header is written where plain names are put in."""
    assert "file_schema=self._with_partition(self.version)" in inspect.getsource(ManifestWriter.new_writer)
    assert "self._write_header()" in inspect.getsource(AvroOutputFile.__enter__)
    converter = inspect.getsource(ConvertSchemaToAvro.field)
    assert "make_compatible_name(original_name)" in converter


def test_data_files_take_a_spec_id_afterwards() -> None:
    """A data file's spec id is an attribute of its own, set after the record is made."""
    file = DataFile.from_args(file_path="f", spec_id=3)
    with pytest.raises(AttributeError):
        _ = file.spec_id
    file.spec_id = 3
    assert file.spec_id == 3


def test_location_providers_only_ask_for_a_path() -> None:
    """A partition key is asked for its path and nothing else."""

    class Folder:
        def to_path(self) -> str:
            return "a=1"

    folder: Any = Folder()
    provider = SimpleLocationProvider("file:///t", {})
    assert provider.new_data_location("f.parquet", folder) == "file:///t/data/a=1/f.parquet"


def test_file_io_interface() -> None:
    """Our file access implements all that pyiceberg's interface asks for."""
    assert {"new_input", "new_output", "delete"} == FileIO.__abstractmethods__
    assert {"__len__", "exists", "open"} == InputFile.__abstractmethods__
    assert {"__len__", "exists", "to_input_file", "create"} == OutputFile.__abstractmethods__
    assert Catalog._load_file_io


def test_small_s3_objects_take_one_request() -> None:
    """Pyiceberg makes its S3 file system in the method that we extend, and that can be made again."""
    assert _parameters(PyArrowFileIO._initialize_s3_fs) == ["self", "netloc"]
    io = WarehouseFileIO(
        {
            "s3.endpoint": "http://127.0.0.1:1",
            "s3.region": "us-east-1",
            "s3.access-key-id": "me",
            "s3.secret-access-key": "s",
        }
    )
    file: Any = io.new_output("s3://bucket/key")
    (arguments,) = file._filesystem.__reduce__()[1]
    assert arguments["allow_delayed_open"] is True
    assert arguments["access_key"] == "me"
    assert arguments["endpoint_override"] == "http://127.0.0.1:1"


def test_where_settings_come_from():
    """All of pyiceberg's own settings come through two methods of its Config, which ``isolation`` replaces (R40)."""
    program = (
        "import os\n"
        "os.environ['PYICEBERG_MAX_WORKERS'] = 'many'\n"
        "from pyiceberg.utils.config import Config\n"
        "assert Config().config['max-workers'] == 'many'\n"
        "assert isinstance(Config.__dict__['_from_configuration_files'], staticmethod)\n"
        "assert isinstance(Config.__dict__['_from_environment_variables'], staticmethod)\n"
        "import arka.iceberg.isolation\n"
        "import pyiceberg.catalog\n"
        "assert dict(Config().config) == {}\n"
        "assert dict(pyiceberg.catalog._ENV_CONFIG.config) == {}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_doubles_are_still_read_as_floats() -> None:
    """The compiled decoder loses what ``avrodoubles`` brings back: a failure here means that the module can go."""
    decoder = new_decoder(struct.pack("<3d", 0.1, 1e300, 5e-324))
    assert type(decoder) is CythonBinaryDecoder
    assert [decoder.read_double() for _ in range(3)] == [0.10000000149011612, float("inf"), 0.0]


def test_where_doubles_are_read() -> None:
    """Every double of an Avro file comes through ``DoubleReader.read``, which ``avrodoubles`` replaces."""
    assert DoubleReader.read is avrodoubles.read_double
    assert set(vars(DoubleReader)) - {"__module__", "__doc__", "__abstractmethods__", "_abc_impl"} == {"read", "skip"}
    program = (
        "import inspect\n"
        "from pyiceberg.avro.reader import DoubleReader\n"
        "assert 'return decoder.read_double()' in inspect.getsource(DoubleReader.read)\n"
        "theirs = DoubleReader.read\n"
        "import arka.iceberg.fileio\n"
        "assert DoubleReader.read is not theirs\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
    # A reader of records asks its fields' readers when it is made.
    assert "reading_callbacks.append((pos, field.read))" in inspect.getsource(StructReader.__init__)


@pytest.mark.parametrize(
    "bits", [0x3FB999999999999A, 0x7E37E43C8800759C, 1, 1 << 63, 0x7FF0000000000000, 0x7FF8000000000001]
)
def test_doubles_are_read_exactly(bits: int) -> None:
    """A double has all of its bits, and what follows it is found."""
    decoder = new_decoder(struct.pack("<QQ", bits, bits))
    assert [struct.pack("<d", DoubleReader().read(decoder)) for _ in range(2)] == [struct.pack("<Q", bits)] * 2


@pytest.mark.parametrize(
    ("write", "read", "values"),
    [
        ("write_int", "read_int", [0, -1, 63, 64, -65, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63)]),
        (
            "write_float",
            "read_float",
            [0.0, -0.0, 1.401298464324817e-45, 3.4028234663852886e38, 0.10000000149011612, float("-inf")],
        ),
        ("write_boolean", "read_boolean", [True, False]),
        ("write_bytes", "read_bytes", [b"", b"\xff" * 300, bytes(70_000)]),
        ("write_utf8", "read_utf8", ["", "a\0\u00e4\U0001f642", "x" * 70_000]),
    ],
)
def test_all_other_values_are_exact(write: str, read: str, values: list[Any]) -> None:
    """The compiled decoder reads the other types as the one in Python does, to the last bit."""
    raw = io.BytesIO()
    for value in values:
        getattr(BinaryEncoder(raw), write)(value)
    fast, slow = new_decoder(raw.getvalue()), StreamingBinaryDecoder(raw.getvalue())
    found = [getattr(fast, read)() for _ in values]
    assert list(map(repr, found)) == list(map(repr, values)) == [repr(getattr(slow, read)()) for _ in values]


def test_fixed_bytes_are_exact() -> None:
    """Decimals, UUIDs and fixed columns are read as bytes."""
    raw = bytes(range(256))
    fast = new_decoder(raw)
    assert [fast.read(length) for length in (0, 1, 16, 239)] == [b"", raw[:1], raw[1:17], raw[17:]]
