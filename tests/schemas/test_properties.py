"""The properties that CreateTable takes and refuses (R30)."""

from __future__ import annotations

import pytest

from arka.errors import InvalidRequest
from arka.flight.properties import check_properties
from arka.tableproperties import CLEANED, FORMER_DEFAULTS, TABLE_TYPE, cleaning, problem_of

ALLOWED = {
    "write.parquet.compression-codec": "ZSTD",
    "write.parquet.row-group-size-bytes": "1048576",
    "write.parquet.bloom-filter-enabled.column.größe": "true",
    "write.parquet.bloom-filter-fpp.column.id": "0.01",
    "write.metadata.metrics.default": "truncate(16)",
    "write.metadata.metrics.column.a b": "none",
    "write.target-file-size-bytes": "1000000",
    "history.expire.max-snapshot-age-ms": "5000",
    "history.expire.min-snapshots-to-keep": "3",
    "commit.manifest.min-count-to-merge": "10",
    "commit.manifest-merge.enabled": "false",
    "commit.retry.num-retries": "0",
    "commit.retry.total-timeout-ms": "1800000",
    "comment": "",
    "user.anything at all": "multi\nline",
}


@pytest.mark.parametrize("name", ALLOWED)
def test_a_listed_property_passes(name: str) -> None:
    """What the protocol lists is taken as it is."""
    assert check_properties({name: ALLOWED[name]}) == {name: ALLOWED[name]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # U+017F is an s, and U+212A a k, to a comparison that ignores the case of every script.
        ("write.metadata.metrics.default", "count\u017f"),
        ("write.metadata.metrics.column.a", "count\u017f"),
        ("write.parquet.compression-codec", "\u017fnappy"),
        ("commit.manifest-merge.enabled", "fal\u017fe"),
        ("write.parquet.stats-enabled.column.a", "fal\u017fe"),
        ("write.target-file-size-bytes", "\uff11"),
        ("write.target-file-size-bytes", "1\n"),
        ("write.target-file-size-bytes", "\u0661"),
        ("user.a", "half \ud800"),
        ("user.a", "nul \0"),
        ("user.a\0b", "x"),
        ("user.a\nb", "x"),
        ("user.\ud800", "x"),
        ("comment", "\udfff"),
    ],
)
def test_look_alikes_and_unusual_characters_are_refused(name: str, value: str) -> None:
    """What another reader takes for something else, or cannot hold, is refused before the table exists (R17)."""
    with pytest.raises(InvalidRequest, match="properties") as caught:
        check_properties({name: value})
    assert repr(name) in caught.value.detail
    caught.value.detail.encode()


@pytest.mark.parametrize(
    "name",
    [
        "s3.endpoint",
        "s3.access-key-id",
        "s3.signer.uri",
        "client.region",
        "adls.connection-string",
        "gcs.service.host",
        "hdfs.host",
        "hf.endpoint",
        "oss.endpoint",
        "uri",
        "warehouse",
        "token",
        "py-io-impl",
        "io-impl",
        "py-catalog-impl",
        "write.data.path",
        "write.metadata.path",
        "write.folder-storage.path",
        "write.object-storage.enabled",
        "write.object-storage.partitioned-paths",
        "write.object-storage.path",
        "write.py-location-provider.impl",
        "write.location-provider.impl",
        "write.metadata.delete-after-commit.enabled",
        "write.metadata.previous-versions-max",
        "write.parquet.",
        "write.parquet.nonsense",
        "write.delete.mode",
        "schema.name-mapping.default",
        "owner",
        "user",
        "user.",
        "User.x",
        "comment ",
        "arka.owner",
        "arka.cleaned",
        "arka.table-type",
        "arka.primary-key",
        "arka.11111111-2222-3333-4444-555555555555.committed-lsn",
        "ARKA.merge",
        "gc.enabled",
    ],
)
def test_any_other_name_is_refused_by_name(name: str) -> None:
    """A name that is not listed is refused, since some of them redirect files or load code."""
    with pytest.raises(InvalidRequest) as caught:
        check_properties({"comment": "fine", name: "1"})
    assert repr(name) in caught.value.detail
    assert "write.parquet.*" in caught.value.detail


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("write.parquet.compression-codec", "lzo"),
        ("write.parquet.compression-level", "23"),
        ("write.parquet.page-size-bytes", "0"),
        ("write.parquet.bloom-filter-enabled.column.id", "yes"),
        ("write.parquet.bloom-filter-fpp.column.id", "1.5"),
        ("write.metadata.metrics.column.id", "truncate"),
        ("write.target-file-size-bytes", "1e6"),
        ("history.expire.min-snapshots-to-keep", "0"),
        ("commit.manifest-merge.enabled", "1"),
        ("commit.retry.num-retries", "-1"),
        ("commit.retry.min-wait-ms", "1s"),
        ("commit.retry.max-wait-ms", "10\n"),
    ],
)
def test_a_value_is_checked(name: str, value: str) -> None:
    """A value that a library would fail on later is refused with what is expected."""
    with pytest.raises(InvalidRequest, match="expected") as caught:
        check_properties({name: value})
    assert repr(value) in caught.value.detail


def test_each_former_default_goes_at_exactly_its_value() -> None:
    """Cleaning takes what older releases wrote, and nothing that a user may have chosen."""
    made = {TABLE_TYPE: "append_only"}
    assert cleaning(made | dict(FORMER_DEFAULTS)) == tuple(FORMER_DEFAULTS)
    for name, value in FORMER_DEFAULTS.items():
        assert cleaning(made | {name: value}) == (name,)
        assert cleaning(made | {name: value.upper() + "1"}) == ()
    assert cleaning(made) == ()


def test_cleaning_happens_once_and_on_arkas_tables_alone() -> None:
    """A value that a user sets afterwards stays; a table that Arka did not make is left as it is."""
    assert cleaning({TABLE_TYPE: "append_only", CLEANED: "1", **FORMER_DEFAULTS}) is None
    assert cleaning(FORMER_DEFAULTS) is None


def test_own_properties_that_others_set_are_judged() -> None:
    """The registry says of each ``arka.*`` property whether it can take effect."""
    assert problem_of({"arka.partial": "null", "arka.merge": "first", "x": "y"}, keyed=True) is None
    assert "expected last or first" in (problem_of({"arka.merge": "newest"}, keyed=True) or "")
    assert "primary_key tables only" in (problem_of({"arka.merge": "last"}, keyed=False) or "")


@pytest.mark.parametrize(("codec", "level"), [("gzip", "10"), ("GZIP", "22"), ("brotli", "12")])
def test_a_level_that_the_codec_does_not_have_is_refused(codec: str, level: str) -> None:
    """Codec and level are checked together: the encoder refuses a level that its codec does not know (R17)."""
    wanted = {"write.parquet.compression-codec": codec, "write.parquet.compression-level": level}
    with pytest.raises(InvalidRequest, match=rf"compression-level.*{level}.*{codec}"):
        check_properties(wanted)
    assert check_properties(wanted | {"write.parquet.compression-level": "9"})
    assert check_properties(wanted | {"write.parquet.compression-codec": "zstd"})
