"""Settings: precedence, spelling, bounds, messages, derived defaults."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka.errors import ConfigurationError
from arka.options import MIB, Settings
from arka.settings import DERIVED_ORIGIN, SETTINGS, Given, load_settings, show_settings
from arka.settings_text import format_size, quote


def refusal(**sources) -> str:
    sources.setdefault("environment", {})
    with pytest.raises(ConfigurationError) as raised:
        load_settings(**sources)
    return raised.value.detail


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "arka.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_later_source_wins_and_is_named(tmp_path):
    """Defaults < TOML < environment < flags, and the origin says which of them it was."""
    config = toml(tmp_path, "[server]\nport = 1\nhttp_port = 2\ndrain_s = 3\n")
    environment = {"ARKA_SERVER_PORT": "11", "ARKA_SERVER_HTTP_PORT": "12"}
    loaded = load_settings(config=config, environment=environment, flags=[Given("server.port", "21", "--port")])
    server = loaded.settings.server
    assert (server.port, server.http_port, server.drain_s, server.host) == (21, 12, 3.0, "127.0.0.1")
    assert [loaded.origins[f"server.{name}"] for name in ("port", "http_port", "drain_s", "host")] == [
        "--port",
        "ARKA_SERVER_HTTP_PORT",
        str(config),
        "default",
    ]


def test_variable_of_a_key_is_spelled_as_documented():
    """``server.drain_s`` is ``ARKA_SERVER_DRAIN_S``; no two settings share a variable."""
    assert SETTINGS["server.drain_s"].variable == "ARKA_SERVER_DRAIN_S"
    assert SETTINGS["object_store.linger_s"].variable == "ARKA_OBJECT_STORE_LINGER_S"
    assert len({setting.variable for setting in SETTINGS.values()}) == len(SETTINGS)


def test_every_option_is_a_setting_with_help_and_legal_default():
    """No option can be added without a sentence of help, and no default is outside its own bounds."""
    for table in fields(Settings):
        for item in fields(table.default_factory):
            assert SETTINGS[f"{table.name}.{item.name}"].help.endswith(".")
    assert load_settings(environment={}).settings.server.port == 8815


@pytest.mark.parametrize(
    ("text", "amount"),
    [("65536", 65536), ("64KiB", 65536), ("64 MiB", 64 * MIB), ("1GiB", 1024 * MIB), (" 2TiB ", 2**41)],
)
def test_sizes_take_units(text, amount):
    """A byte size is a plain number or one with a binary unit, from every source."""
    assert load_settings(environment={"ARKA_WAL_GROUP_BYTES": text}).settings.wal.group_bytes == amount


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("server.port", "-1", "must be at least 0"),
        ("server.port", "65536", "must be at most 65535"),
        ("server.port", "8815.5", "expected a whole number"),
        ("server.port", "", "expected a whole number"),
        ("server.drain_s", "0.09", "must be at least 0.1"),
        ("server.drain_s", "nan", "expected a number of seconds"),
        ("server.drain_s", "inf", "expected a number of seconds"),
        ("server.drain_s", "5s", "expected a number of seconds"),
        ("server.demo_tables", "maybe", "expected true or false"),
        ("server.node_id", "a/b", "must match"),
        ("server.node_id", "", "must match"),
        ("server.host", "a\0b", "expected a string"),
        ("log.format", "xml", "must be one of console, json"),
        ("log.level", "INFO", "must be one of debug, info, warning, error"),
        ("limits.memory_bytes", "1MiB", "must be at least 16MiB"),
        ("limits.memory_bytes", "64MB", "expected a number of bytes such as"),
        ("limits.memory_bytes", "-64MiB", "expected a number of bytes such as"),
        ("limits.memory_bytes", "1.5GiB", "expected a number of bytes such as"),
    ],
)
def test_refusal_names_key_value_bound_and_origin(key, value, expected):
    """One line tells what to change: the key, what was given, what is legal, where it was given."""
    detail = refusal(environment={SETTINGS[key].variable: value})
    assert detail.startswith(f"{key} = {quote(value)} (from {SETTINGS[key].variable}): ")
    assert expected in detail
    assert "\n" not in detail


@pytest.mark.parametrize("edge", ["0.1", "3600"])
def test_bounds_are_inclusive(edge):
    """A value at its bound is legal."""
    assert load_settings(environment={"ARKA_SERVER_DRAIN_S": edge}).settings.server.drain_s == float(edge)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("port = true", "expected a whole number"),
        ("port = 1.0", "expected a whole number"),
        ("drain_s = true", "expected a number of seconds"),
        ("drain_s = nan", "expected a number of seconds"),
        ("host = 5", "expected a string"),
        ("host = ['a']", "expected a string"),
        ("demo_tables = 1", "expected true or false"),
    ],
)
def test_toml_values_have_their_type(tmp_path, line, expected):
    """A TOML value of another type is refused, not guessed at."""
    assert expected in refusal(config=toml(tmp_path, f"[server]\n{line}\n"))


def test_every_problem_is_reported_at_once(tmp_path):
    """One start shows all that is wrong, a line each."""
    config = toml(tmp_path, "[server]\nport = -1\n[limits]\nstreams = 0\n")
    assert len(refusal(config=config, environment={"ARKA_LOG_LEVEL": "x"}).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("[server]\nprot = 1", "server.prot", "server.port"),
        ("port = 1", "port", "server.port"),
        ("[sever]\nport = 1", "sever.port", "server.port"),
        ("[wal]\ngroup_byte = 1", "wal.group_byte", "wal.group_bytes"),
        ("[server.port]\nx = 1", "server.port.x", "server.port"),
        ("[objectstore]\nlinger_s = 1.0", "objectstore.linger_s", "object_store.linger_s"),
    ],
)
def test_unknown_toml_key_names_the_nearest(tmp_path, text, unknown, nearest):
    """A misspelt key is an error that shows the right spelling, never silently ignored."""
    config = toml(tmp_path, text)
    assert refusal(config=config) == f"{unknown} (from {config}): no such setting; the nearest is {nearest}"


def test_unknown_variable_names_the_nearest():
    """A misspelt ARKA_ variable is an error; other programs' variables and the build's are not."""
    assert refusal(environment={"ARKA_SERVER_PROT": "1"}).endswith("the nearest is ARKA_SERVER_PORT")
    load_settings(environment={"PATH": "/bin", "ARKA_DEBUG": "1", "ARKA_EXT": "lsn", "ARKANSAS": "1"})


def test_unreadable_files_are_configuration_errors(tmp_path):
    """A missing file, broken TOML and broken UTF-8 each say which file and why."""
    assert "No such file" in refusal(config=tmp_path / "none.toml")
    assert "not TOML" in refusal(config=toml(tmp_path, "[server\n"))
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    assert "not TOML" in refusal(config=tmp_path / "latin.toml")


def test_pass_through_tables_reach_their_readers(tmp_path):
    """Catalog and store settings keep the names that pyiceberg and obstore know, whatever their source."""
    config = toml(
        tmp_path,
        '[iceberg.catalog]\ntype = "rest"\n"s3.region" = "eu"\ns3.endpoint = "http://x"\n'
        "retries = 3\nssl = true\n"
        '[object_store.config]\naws_region = "eu"\n',
    )
    environment = {
        "ARKA_ICEBERG_CATALOG__S3__ACCESS_KEY_ID": "AK",
        "ARKA_ICEBERG_CATALOG_URI": "http://catalog",
        "ARKA_OBJECT_STORE_CONFIG__AWS_REGION": "us",
    }
    settings = load_settings(config=config, environment=environment).settings
    assert settings.iceberg.catalog == {
        "type": "rest",
        "s3.region": "eu",
        "s3.endpoint": "http://x",
        "retries": "3",
        "ssl": "true",
        "s3.access-key-id": "AK",
    }
    assert settings.object_store.config == {"aws_region": "us"}
    assert settings.iceberg.catalog_uri == "http://catalog"


def test_pass_through_tables_are_tables(tmp_path):
    """A plain value where a table belongs is refused, and so is a list in one."""
    assert "expected a table" in refusal(config=toml(tmp_path, '[iceberg]\ncatalog = "x"\n'))
    assert "expected a string" in refusal(config=toml(tmp_path, "[iceberg.catalog]\nx = [1]\n"))
    assert "expected a table" in refusal(environment={"ARKA_ICEBERG_CATALOG__": "x"})


def test_catalog_table_cannot_contradict_the_named_settings():
    """URI and warehouse have one place each."""
    detail = refusal(environment={"ARKA_ICEBERG_CATALOG__WAREHOUSE": "s3://b"})
    assert "set iceberg.warehouse instead" in detail


def test_derived_defaults_follow_the_data_directory(tmp_path, monkeypatch):
    """A relative data directory becomes absolute, and objects, catalog and warehouse lie in it."""
    monkeypatch.chdir(tmp_path)
    loaded = load_settings(environment={"ARKA_SERVER_DATA_DIR": "some data"})
    settings = loaded.settings
    assert settings.server.data_dir == f"{tmp_path}/some data"
    assert settings.object_store.url == f"file://{tmp_path}/some%20data/objects"
    assert settings.iceberg.catalog_uri == f"sqlite:///{tmp_path}/some data/catalog.db"
    assert settings.iceberg.warehouse == f"file://{tmp_path}/some data/warehouse"
    assert loaded.origins["iceberg.warehouse"] == DERIVED_ORIGIN
    assert loaded.origins["server.data_dir"] == "ARKA_SERVER_DATA_DIR"


@pytest.mark.parametrize("name", ["plain", "two words", "100%", "a%20b", "Straße"])
def test_plain_pyiceberg_finds_the_derived_catalog_and_warehouse(tmp_path, name):
    """Whatever the directory is called, the derived URLs mean files in it to pyiceberg and SQLAlchemy."""
    import pyarrow as pa
    from pyiceberg.catalog import load_catalog

    data = tmp_path / name
    data.mkdir()
    iceberg = load_settings(environment={"ARKA_SERVER_DATA_DIR": str(data)}).settings.iceberg
    catalog = load_catalog("arka", type="sql", uri=iceberg.catalog_uri, warehouse=iceberg.warehouse)
    catalog.create_namespace("default")
    table = catalog.create_table("default.t", pa.schema([("x", pa.int64())]))
    table.append(pa.table({"x": [1, 2]}))
    assert catalog.load_table("default.t").scan().to_arrow().num_rows == 2
    catalog.close()
    assert (data / "catalog.db").exists()
    assert list((data / "warehouse").rglob("*.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["what?", "c#"])
def test_directory_that_no_iceberg_reader_can_name_is_refused(tmp_path, name):
    """A path with '?' or '#' is refused unless catalog and warehouse lie elsewhere."""
    environment = {"ARKA_SERVER_DATA_DIR": str(tmp_path / name)}
    assert "cannot hold an Iceberg warehouse" in refusal(environment=environment)
    elsewhere = {"ARKA_ICEBERG_WAREHOUSE": "s3://lake", "ARKA_ICEBERG_CATALOG_URI": "http://catalog"}
    load_settings(environment=environment | elsewhere)


@pytest.mark.parametrize(
    ("key", "url", "expected"),
    [
        ("object_store.url", "objects", "expected a URL"),
        ("object_store.url", "file://objects/here", "three slashes"),
        ("iceberg.warehouse", "/srv/warehouse", "expected a URL"),
        ("iceberg.catalog_uri", "catalog.db", "expected a URL"),
    ],
)
def test_urls_are_urls(key, url, expected):
    """A path where a URL belongs is refused at the start, not at the first upload."""
    assert expected in refusal(environment={SETTINGS[key].variable: url})


def test_bounds_between_settings():
    """A batch limit above the message limit could never be reached: it is refused, both named."""
    detail = refusal(environment={"ARKA_LIMITS_MESSAGE_BYTES": "1MiB"})
    assert "limits.batch_bytes" in detail
    assert "limits.message_bytes = 1MiB (from ARKA_LIMITS_MESSAGE_BYTES)" in detail


def test_shown_settings_load_again(tmp_path):
    """``--show-config`` is itself a legal TOML file that gives the same settings."""
    environment = {"ARKA_SERVER_DATA_DIR": str(tmp_path / 'q"uo\\te'), "ARKA_ICEBERG_CATALOG__S3__REGION": "a\nb"}
    loaded = load_settings(environment=environment)
    config = toml(tmp_path, "\n".join(show_settings(loaded)))
    assert load_settings(config=config, environment={}).settings == loaded.settings


def test_shown_settings_carry_their_origins():
    """Each line ends with where its value came from."""
    lines = list(show_settings(load_settings(environment={"ARKA_SERVER_PORT": "1"})))
    assert "server.port = 1  # ARKA_SERVER_PORT" in lines
    assert 'limits.memory_bytes = "1GiB"  # default' in lines


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ARKA_ICEBERG_CATALOG__S3__SECRET_ACCESS_KEY", "hunter2"),
        ("ARKA_ICEBERG_CATALOG__CREDENTIAL", "id:hunter2"),
        ("ARKA_ICEBERG_CATALOG__TOKEN", "hunter2"),
        ("ARKA_OBJECT_STORE_CONFIG__AWS_SECRET_ACCESS_KEY", "hunter2"),
        ("ARKA_OBJECT_STORE_CONFIG__AZURE_STORAGE_ACCOUNT_KEY", "hunter2"),
        ("ARKA_ICEBERG_CATALOG_URI", "postgresql+psycopg2://arka:hunter2@db/catalog"),
        ("ARKA_ICEBERG_CATALOG_URI", "http://catalog/?token=hunter2&x=1"),
    ],
)
def test_secrets_are_masked(variable, value):
    """No secret appears in what ``--show-config`` prints."""
    shown = "\n".join(show_settings(load_settings(environment={variable: value})))
    assert "hunter2" not in shown
    assert "***" in shown


def test_secrets_are_masked_in_refusals():
    """Nor in an error that quotes the value."""
    detail = refusal(
        environment={
            "ARKA_OBJECT_STORE_URL": "file://u:hunter2@host/x",
            "ARKA_OBJECT_STORE_CONFIG__TOKEN": "a",
        }
    )
    assert "hunter2" not in detail


def test_flags_of_an_embedding_program_may_be_values(tmp_path):
    """A program gives values of the right type as they are; an unknown key is refused all the same."""
    flags = [Given("server.drain_s", 2, "program"), Given("limits.memory_bytes", 32 * MIB, "program")]
    settings = load_settings(environment={}, flags=flags).settings
    assert (settings.server.drain_s, settings.limits.memory_bytes) == (2.0, 32 * MIB)
    assert "nearest is server.drain_s" in refusal(flags=[Given("server.drain", 2, "program")])


def test_settings_are_frozen():
    """Nothing changes a setting after the check."""
    settings = load_settings(environment={}).settings
    with pytest.raises(FrozenInstanceError):
        settings.server.port = 1


@given(st.text())
def test_quoted_text_is_toml(text):
    """Any text is written as a TOML string that reads back the same."""
    surrogate_free = text.encode("utf-8", "ignore").decode()
    assert tomllib.loads(f"x = {quote(surrogate_free)}") == {"x": surrogate_free}


@given(st.integers(min_value=64 * 1024, max_value=2**50))
def test_formatted_size_reads_back(amount):
    """A size in its printed unit is the same number of bytes."""
    variable = {"ARKA_WAL_GROUP_BYTES": format_size(amount)}
    assert load_settings(environment=variable).settings.wal.group_bytes == amount


@given(st.dictionaries(st.from_regex(r"ARKA_[A-Z_]{0,20}", fullmatch=True), st.text(max_size=8), max_size=4))
def test_any_environment_loads_or_is_refused(environment):
    """No environment gets anything but settings or a ConfigurationError."""
    with suppress(ConfigurationError):
        load_settings(environment=environment)


S3_STORE = {
    "ARKA_OBJECT_STORE_URL": "s3://bucket/objects",
    "ARKA_OBJECT_STORE_CONFIG__AWS_ACCESS_KEY_ID": "id",
    "ARKA_OBJECT_STORE_CONFIG__SECRET_ACCESS_KEY": "secret",
    "ARKA_OBJECT_STORE_CONFIG__AWS_ENDPOINT": "http://127.0.0.1:1",
    "ARKA_ICEBERG_WAREHOUSE": "s3://bucket/warehouse",
}


def test_warehouse_beside_the_store_shares_its_credentials():
    """What obstore is given for S3 reaches pyiceberg under its own names, and says where it came from."""
    loaded = load_settings(environment=S3_STORE)
    assert loaded.settings.iceberg.catalog == {
        "s3.access-key-id": "id",
        "s3.secret-access-key": "secret",
        "s3.endpoint": "http://127.0.0.1:1",
    }
    shown = "\n".join(show_settings(loaded))
    assert 'iceberg.catalog."s3.endpoint" = "http://127.0.0.1:1"  # default, from object_store.config' in shown
    assert 'secret"' not in shown


@pytest.mark.parametrize(
    "more",
    [
        {"ARKA_ICEBERG_WAREHOUSE": "gs://bucket/warehouse"},
        {"ARKA_ICEBERG_CATALOG__S3__REGION": "eu-central-1"},
        {"ARKA_OBJECT_STORE_URL": "file:///objects"},
    ],
)
def test_other_stores_get_no_credentials(more):
    """A warehouse elsewhere, or in an S3 with settings of its own, is not told the object store's secrets."""
    catalog = load_settings(environment=S3_STORE | more).settings.iceberg.catalog
    assert not {"s3.access-key-id", "s3.secret-access-key", "s3.endpoint"} & catalog.keys()
