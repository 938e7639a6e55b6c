"""Settings that an object store's library refuses end the start with one line that names the key, not with a panic."""

from __future__ import annotations

import pytest

from arka.errors import ConfigurationError
from arka.options import ObjectStoreOptions
from arka.storage.objects import open_object_store

ACCOUNT = {"azure_storage_account_name": "people"}


def refusal(url: str, config: dict[str, str], capfd: pytest.CaptureFixture[str]) -> str:
    """What opening a store says; the library must not have said anything itself."""
    with pytest.raises(ConfigurationError) as caught:
        open_object_store(ObjectStoreOptions(url=url, config=config))
    assert capfd.readouterr() == ("", "")
    text = str(caught.value)
    assert "\n" not in text
    assert "Debug source" not in text
    return text


@pytest.mark.parametrize(
    ("url", "key", "more"),
    [
        ("s3://b/p", "AWS_ALLOW_HTTP", {}),
        ("s3://b/p", "aws_allow_http", {"aws_region": "here"}),
        ("s3://b/p", "allow_http", {}),
        ("gs://b/p", "google_allow_http", {}),
        ("az://b/p", "azure_allow_http", ACCOUNT),
        ("s3://b/p", "timeout", {}),
        ("s3://b/p", "aws_connect_timeout", {}),
        ("s3://b/p", "proxy_url", {}),
        ("s3://b/p", "AWS_HTTP2_ONLY", {}),
        ("gs://b/p", "google_timeout", {}),
        ("az://b/p", "azure_user_agent", ACCOUNT),
    ],
)
def test_options_of_the_http_client(
    url: str, key: str, more: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Options of the HTTP client, which make obstore panic, are named; for plain HTTP with what to write instead."""
    text = refusal(url, {**more, key: "true"}, capfd)
    assert text.startswith(f"object_store.config.{key}: ")
    assert ("aws_endpoint" in text) == ("allow_http" in key.lower())


@pytest.mark.parametrize(
    ("url", "config", "key"),
    [
        ("s3://b/p", {"aws_region": "here", "nonsense": "x"}, "nonsense"),
        ("s3://b/p", {"aws_region": "here", **ACCOUNT}, "azure_storage_account_name"),
        ("gs://b/p", {"aws_region": "here"}, "aws_region"),
        ("az://b/p", {**ACCOUNT, "aws_region": "here"}, "aws_region"),
        ("s3://b/p", {"virtual_hosted_style_request": "maybe"}, "virtual_hosted_style_request"),
        ("s3://b/p", {"aws_region": "here", "aws_skip_signature": "banana"}, "aws_skip_signature"),
        ("s3://b/p", {"aws_checksum_algorithm": "7"}, "aws_checksum_algorithm"),
        ("gs://b/p", {"google_service_account": "/nowhere/at/all"}, "google_service_account"),
        ("http://x/y", {"aws_region": "here"}, "aws_region"),
        ("s3://b/p", {"": "x"}, ""),
        ("s3://b/p", {"retry_config": "x"}, "retry_config"),
    ],
)
def test_key_is_named(url: str, config: dict[str, str], key: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Keys of other stores, unknown ones and values of the wrong kind: the one that is wrong is named."""
    assert f"object_store.config.{key} = " in refusal(url, config, capfd)


def test_secret_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """The value of a key that may hold a secret is not in the message."""
    text = refusal("gs://b/p", {"aws_secret_access_key": "hunter2"}, capfd)
    assert "aws_secret_access_key" in text
    assert "hunter2" not in text


@pytest.mark.parametrize("url", ["ftp://b/p", "hdfs://b/p", "gcs://b/p", "s3://", "memory://x"])
def test_unknown_scheme(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A URL of no store says which there are."""
    text = refusal(url, {}, capfd)
    assert url in text
    assert "s3://bucket/prefix" in text


def test_variable_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A variable that obstore reads by itself is named like a key."""
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "perhaps")
    assert "AWS_VIRTUAL_HOSTED_STYLE_REQUEST" in refusal("s3://b/p", {"aws_region": "here"}, capfd)


@pytest.mark.parametrize("variable", ["AWS_ALLOW_HTTP", "AWS_TIMEOUT", "AWS_PROXY_URL", "AWS_NONSENSE"])
def test_variables_that_mean_nothing(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of other programs that obstore leaves alone do no harm."""
    monkeypatch.setenv(variable, "true")
    open_object_store(ObjectStoreOptions(url="s3://b/p", config={"aws_region": "here"}))


def test_good_settings() -> None:
    """What stores do take, in any spelling, is taken."""
    for url, config in (
        ("s3://b/p", {"AWS_REGION": "here", "endpoint": "http://127.0.0.1:1", "virtual_hosted_style_request": "false"}),
        ("az://b/p", ACCOUNT),
        ("gs://b/p", {"google_skip_signature": "true"}),
    ):
        open_object_store(ObjectStoreOptions(url=url, config=config))
