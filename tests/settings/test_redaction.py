"""No secret in what is shown, logged or answered (arka.redaction)."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from click.testing import CliRunner

from arka import exits, redaction
from arka.cli import main_server
from arka.errors import ArkaError, ConfigurationError
from arka.logs import configure_logging
from arka.options import LogOptions
from arka.settings import load_settings, show_settings
from arka.storage.storesettings import explain

SECRET = "hunter2-3f"


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    redaction.forget()
    yield
    redaction.forget()


@pytest.mark.parametrize(
    "variable",
    [
        "ARKA_ICEBERG_CATALOG__S3__SESSION_TOKEN",
        "ARKA_ICEBERG_CATALOG__ADLS__SAS_TOKEN__ACCOUNT",
        "ARKA_ICEBERG_CATALOG__ADLS__CONNECTION_STRING",
        "ARKA_ICEBERG_CATALOG__HEADER__X_API",
        "ARKA_ICEBERG_CATALOG__SSL__CLIENT__KEY",
        "ARKA_ICEBERG_CATALOG__AUTH__BASIC",
        "ARKA_ICEBERG_CATALOG__NEVER_HEARD_OF",
        "ARKA_OBJECT_STORE_CONFIG__AWS_ACCESS_KEY_ID",
        "ARKA_OBJECT_STORE_CONFIG__GOOGLE_SERVICE_ACCOUNT_KEY",
        "ARKA_OBJECT_STORE_CONFIG__AZURE_STORAGE_SAS_KEY",
        "ARKA_OBJECT_STORE_CONFIG__SSE_CUSTOMER",
        "ARKA_OBJECT_STORE_CONFIG__NEVER_HEARD_OF",
    ],
)
def test_unknown_entries_are_masked(variable):
    """A name that is not known to be harmless hides its value, whatever it is called."""
    shown = "\n".join(show_settings(load_settings(environment={variable: SECRET})))
    assert SECRET not in shown
    assert redaction.MASK in shown


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ARKA_ICEBERG_CATALOG__S3__REGION", "eu-central-1"),
        ("ARKA_ICEBERG_CATALOG__TYPE", "rest"),
        ("ARKA_OBJECT_STORE_CONFIG__AWS_ENDPOINT", "http://127.0.0.1:9000"),
        ("ARKA_OBJECT_STORE_CONFIG__REGION", "eu-central-1"),
        ("ARKA_OBJECT_STORE_URL", "abfss://container@account.dfs.core.windows.net/prefix"),
        ("ARKA_ICEBERG_CATALOG_URI", "postgresql+psycopg2://db:5432/arka?sslmode=require"),
    ],
)
def test_harmless_values_are_shown(variable, value):
    """What helps an operator and is no secret stays."""
    assert value in "\n".join(show_settings(load_settings(environment={variable: value})))


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg2://arka:{SECRET}@db/catalog",
        f"postgresql+psycopg2://arka:x/{SECRET}@db/catalog",
        f"postgresql+psycopg2://arka:x?{SECRET}@db/catalog",
        f"postgresql+psycopg2://db/catalog?user=a&password={SECRET}",
        f"http://{SECRET}@catalog/",
        f"http://catalog/?key={SECRET}&x=1",
        f"http://catalog/?{SECRET}",
        f"http://catalog/#access={SECRET}",
        f"https://a/b?sig={SECRET}&sv=2020",
        f"abfss://container:{SECRET}@account/x",
        f"HTTP://u:{SECRET}@HOST",
    ],
)
def test_urls_show_where_and_not_with_what(url):
    """User parts, unknown parameters and fragments of a URL are masked, alone and inside of a text."""
    for text in (url, f"cannot open '{url}' now", f'["{url}"]', f"{url}: refused"):
        for shown in (redaction.redact(text), str(ArkaError(text)), repr(ConfigurationError(text))):
            assert SECRET not in shown
    for key in ("iceberg.catalog_uri", "object_store.url", "iceberg.warehouse", "iceberg.catalog.s3.endpoint"):
        assert SECRET not in redaction.shown(key, url)


@pytest.mark.parametrize(
    "text",
    [
        f'invalid dsn "host=db password={SECRET} port=1"',
        f"{{'s3.secret-access-key': '{SECRET}', 'a': 1}}",
        f"Authorization: Bearer {SECRET}",
        f"Max retries exceeded with url: /v1/config?token={SECRET} (Caused by",
        f"client_secret={SECRET}&grant_type=x",
    ],
)
def test_secrets_are_found_by_their_shape(text):
    """Libraries quote what they were told in forms of their own."""
    assert SECRET not in redaction.redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "Table not found: default.users",
        "file:///var/lib/arka/t@1/x is gone",
        "sqlite:////data/catalog.db: is it running twice?",
        "s3://bucket/a@b/c",
        "commit token 00ff12: expected 3, found 4",
        "property 'arka.owner' is 'a 1-2-3', expected NODE LOG-UUID",
        "listening on grpc://127.0.0.1:8815",
    ],
)
def test_other_texts_stay_as_they_are(text):
    """What holds no secret is not changed."""
    redaction.remember(["arka", "memory-only", ""])
    assert redaction.redact(text) == text


def test_known_secrets_are_found_by_their_value():
    """A value that was given to a store is found wherever a library repeats it, in any spelling."""
    secret = "a+b/c\"d'e=="
    known = redaction.secrets_of(
        {"object_store.config": {"aws_secret_access_key": secret, "aws_region": "eu-central-1", "x": "unknown-1x"}},
        ["postgresql://u:pass%2Fword-1@h/d"],
        {"AWS_SESSION_TOKEN": "session-9", "AWS_PROFILE": "default-profile", "HOME_TOKEN": "not-ours-1"},
    )
    assert known >= {secret, "unknown-1x", "pass/word-1", "session-9"}
    assert not {"eu-central-1", "default-profile", "not-ours-1"} & known
    redaction.remember(known)
    for form in (secret, repr(secret), json.dumps(secret), "a%2Bb%2Fc%22d%27e%3D%3D", "(session-9)", "x=pass/word-1"):
        shown = redaction.redact(f"refused {form} at eu-central-1")
        assert redaction.MASK in shown
        assert not any(value in shown for value in known)
    assert redaction.redact("asession-9b") == "asession-9b"


@pytest.mark.parametrize("style", ["json", "console"])
def test_no_line_of_the_log_holds_a_secret(style):
    """Fields, messages, tracebacks with their causes, and lines of other libraries."""
    redaction.remember([SECRET])
    stream = io.StringIO()
    configure_logging(LogOptions(format=style), stream)
    try:
        try:
            raise OSError(f"http://u:{SECRET}@h refused")
        except OSError as error:
            raise ValueError(f"refused {SECRET}") from error
    except ValueError:
        structlog.get_logger().exception("server.failed", uri=f"http://u:{SECRET}@h", bare=SECRET, nested=[SECRET])
        logging.getLogger("other").exception("told %s", SECRET)
    assert stream.getvalue().count("server.failed") == 1
    assert "told" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_refusals_of_a_store_hold_no_secret(monkeypatch):
    """What obstore says of a setting or variable may quote its value."""

    def attempt(config):
        raise ValueError(f"bad value {config.get('never_heard_of', '')}")

    said = explain(f"s3://u:{SECRET}@b/p", {"never_heard_of": SECRET}, ValueError(f"bad value {SECRET}"), attempt)
    assert "object_store.config.never_heard_of" in said
    assert SECRET not in said
    monkeypatch.setenv("AWS_NEVER_HEARD_OF", SECRET)
    said = explain("s3://b/p", {}, ValueError(f'failed to parse "{SECRET}"'), attempt)
    assert "AWS_NEVER_HEARD_OF" in said
    assert SECRET not in said


def test_wrong_types_are_masked_in_refusals(tmp_path):
    """A secret that is no string is not quoted in its refusal."""
    config = tmp_path / "arka.toml"
    config.write_text('[iceberg.catalog]\n"s3.secret-access-key" = ["81726354"]\n"x" = 81726354.5\n')
    with pytest.raises(ConfigurationError) as caught:
        load_settings(config=config, environment={})
    assert "s3.secret-access-key" in str(caught.value)
    assert "81726354" not in str(caught.value)


def test_commands_complain_without_secrets(capsys):
    """The line on stderr that ends a command is masked too; an OSError is no error of Arka's."""
    exits.complain(OSError(f"cannot reach http://u:{SECRET}@h"))
    assert SECRET not in capsys.readouterr().err
    done = CliRunner().invoke(main_server, ["--show-config", "--catalog-uri", f"postgresql://u:{SECRET}@h/d"])
    assert done.exit_code == 0
    assert SECRET not in done.output


@pytest.mark.parametrize(
    "piece", ["a.", "a", "/", "?", "=", "://", "secret", "@", ":", "a://a", "?a=", "password ", "bearer "]
)
def test_texts_of_clients_cost_linear_work(piece):
    """Work that grows with the square of 200 kB would not end: the limit of a test's time ends it."""
    text = piece * (200_000 // len(piece))
    assert len(redaction.redact(text)) <= 4 * len(text)
