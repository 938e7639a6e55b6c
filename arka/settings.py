"""One typed tree of settings: defaults < TOML file < environment < flags, with the origin of each value.

Owns: where values come from, how text becomes a value, the bounds check, the defaults that derive from the
data directory. Does not own names, defaults and bounds (``arka.options``) and opens nothing but the TOML
file.

A key is ``table.name``. ``server.drain_s`` is ``drain_s`` in TOML's table ``[server]`` and
``ARKA_SERVER_DRAIN_S`` in the environment. The pass-through tables hold strings for pyiceberg and obstore:
``[iceberg.catalog]`` and ``ARKA_ICEBERG_CATALOG__S3__ACCESS_KEY_ID`` (``s3.access-key-id``), and
``[object_store.config]`` and ``ARKA_OBJECT_STORE_CONFIG__AWS_REGION`` (``aws_region``).
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Final, get_type_hints
from urllib.parse import urlsplit

from arka import failpoints
from arka.errors import ConfigurationError
from arka.options import Settings
from arka.redaction import shown as shown_value
from arka.settings_shared import shared_s3_properties
from arka.settings_text import SIZE_UNITS, format_size, format_value, quote

DEFAULT_ORIGIN: Final = "default"
DERIVED_ORIGIN: Final = "default, under server.data_dir"
SHARED_ORIGIN: Final = "default, from object_store.config"

#: Variables of the build and of the test tools that share the prefix; no settings.
FOREIGN_VARIABLES: Final = frozenset({"ARKA_DEBUG", "ARKA_EXT", failpoints.VARIABLE, failpoints.TESTING})

_TRUE: Final = frozenset({"true", "yes", "on", "1"})
_FALSE: Final = frozenset({"false", "no", "off", "0"})
_SIZE: Final = re.compile(r"(\d+) ?([KMGT]iB)?")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as ``arka.options`` declares it.

    Attributes:
        key: ``table.name``.
        kind: bool, int, float, str, or dict for a pass-through table.
        default: its default; an empty string where the default derives from the data directory.
        help: one sentence.
        at_least: lower bound of a number, or None.
        at_most: upper bound of a number, or None.
        one_of: the legal words of a string, or None.
        matches: a regular expression for the whole string, or None.
    """

    key: str
    kind: type
    default: Any
    help: str
    at_least: float | None = None
    at_most: float | None = None
    one_of: tuple[str, ...] | None = None
    matches: str | None = None

    @property
    def variable(self) -> str:
        """The environment variable; for a pass-through table the prefix of its variables."""
        name = "ARKA_" + self.key.upper().replace(".", "_")
        return name + "__" if self.kind is dict else name

    @property
    def is_size(self) -> bool:
        """Whether the value is a number of bytes, and so may be written as ``64MiB``."""
        return self.kind is int and self.key.endswith(("_bytes", ".bytes"))


def _declared() -> Iterator[Setting]:
    for table, options in get_type_hints(Settings).items():
        hints = get_type_hints(options)
        for item in fields(options):
            kind = hints[item.name] if isinstance(hints[item.name], type) else dict
            default = item.default if item.default is not MISSING else {}
            yield Setting(f"{table}.{item.name}", kind, default, **item.metadata)


#: Every setting by key, in the order of ``arka.options``.
SETTINGS: Final[Mapping[str, Setting]] = {setting.key: setting for setting in _declared()}


@dataclass(frozen=True, slots=True)
class Given:
    """A value that somebody gave.

    Attributes:
        key: the setting's key; in a pass-through table ``table.name.KEY``.
        value: text from the environment or a flag; a TOML value from a file.
        origin: where it was given: a file, a variable, a flag. For people.
    """

    key: str
    value: object
    origin: str


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The settings and where each value came from.

    Attributes:
        settings: checked, with the derived defaults filled in and the data directory absolute.
        origins: origin by key, for each key of ``SETTINGS`` and each entry of a pass-through table.
    """

    settings: Settings
    origins: Mapping[str, str]


def load_settings(
    *,
    config: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Sequence[Given] = (),
) -> LoadedSettings:
    """Build the settings; the last of defaults, file, environment and flags that gives a key wins.

    Args:
        config: a TOML file, or None.
        environment: variables by name; the process's own if None. Those without the prefix ``ARKA_`` are
            ignored.
        flags: what was given on the command line or by an embedding program, as text or as values.

    Raises:
        ConfigurationError: one line for each problem: unknown names (with the nearest legal one), values
            that cannot be read, values out of bounds. Each line names key, value, bound and origin.
    """
    problems: list[str] = []
    given = [
        *_from_toml(config),
        *_from_environment(os.environ if environment is None else environment, problems),
        *flags,
    ]
    values: dict[str, Any] = {key: setting.default for key, setting in SETTINGS.items()}
    values.update({key: {} for key, setting in SETTINGS.items() if setting.kind is dict})
    origins = dict.fromkeys(SETTINGS, DEFAULT_ORIGIN)
    for item in given:
        setting, entry = _find(item.key)
        if setting is None:
            problems.append(_unknown(item.key, item.origin, SETTINGS))
            continue
        try:
            value = _read(setting, item.value)
            _check_bounds(setting, value)
        except ValueError as error:
            shown = format_value(shown_value(item.key, item.value))
            problems.append(f"{item.key} = {shown} (from {item.origin}): {error}")
            continue
        if entry:
            values[setting.key][entry] = value
        else:
            values[item.key] = value
        origins[item.key] = item.origin
    if not problems:
        _derive(values, origins, problems)
        _check_together(values, origins, problems)
    if problems:
        raise ConfigurationError("\n".join(problems))
    return LoadedSettings(_build(values), origins)


def show_settings(loaded: LoadedSettings) -> Iterator[str]:
    """Write each setting as ``key = value  # origin``: legal TOML, secrets masked."""
    for key, setting in SETTINGS.items():
        table, name = key.split(".")
        value = getattr(getattr(loaded.settings, table), name)
        if setting.kind is not dict:
            shown = format_value(shown_value(key, value), is_size=setting.is_size)
            yield f"{key} = {shown}  # {loaded.origins[key]}"
            continue
        for entry in sorted(value):
            full = f"{key}.{entry}"
            yield f"{key}.{quote(entry)} = {quote(shown_value(full, value[entry]))}  # {loaded.origins[full]}"


def _from_toml(config: Path | None) -> Iterator[Given]:
    if config is None:
        return
    try:
        document = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"Cannot read {config}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Cannot read {config}: not TOML: {error}") from error
    for key, value in _flatten(document, ""):
        yield Given(key, value, str(config))


def _flatten(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    """Yield ``(dotted key, value)`` for each value that is no table, empty tables left out."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _from_environment(environment: Mapping[str, str], problems: list[str]) -> Iterator[Given]:
    by_variable = {setting.variable: setting for setting in SETTINGS.values()}
    tables = [setting for setting in SETTINGS.values() if setting.kind is dict]
    for name in sorted(environment):
        if not name.startswith("ARKA_") or name in FOREIGN_VARIABLES:
            continue
        table = next((t for t in tables if name.startswith(t.variable) and name != t.variable), None)
        if table is not None:
            entry = _entry_name(table, name.removeprefix(table.variable))
            yield Given(f"{table.key}.{entry}", environment[name], name)
        elif name in by_variable and by_variable[name].kind is not dict:
            yield Given(by_variable[name].key, environment[name], name)
        else:
            problems.append(_unknown(name, "the environment", by_variable))


def _entry_name(table: Setting, suffix: str) -> str:
    """Spell an entry as its reader does: pyiceberg ``s3.access-key-id``, obstore ``aws_region``."""
    if table.key == "iceberg.catalog":
        return suffix.lower().replace("__", ".").replace("_", "-")
    return suffix.lower()


def _find(key: str) -> tuple[Setting | None, str]:
    """Return a key's setting (None for an unknown key), and its entry if that is a pass-through table."""
    table, _, rest = key.partition(".")
    name, _, entry = rest.partition(".")
    setting = SETTINGS.get(f"{table}.{name}")
    if setting is None or (setting.kind is dict) != bool(entry):
        return None, ""
    return setting, entry


def _unknown(given: str, origin: str, legal: Mapping[str, Setting]) -> str:
    """Say that a name is unknown, and which legal one is nearest, by the whole name or by its last part."""

    def likeness(name: str) -> float:
        whole = SequenceMatcher(None, given, name).ratio()
        last = SequenceMatcher(None, given.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return max(whole, 0.99 * last)

    if given in legal:  # a pass-through table that was given a plain value
        return f"{given} (from {origin}): expected a table of strings"
    return f"{given} (from {origin}): no such setting; the nearest is {max(legal, key=likeness)}"


def _read(setting: Setting, value: object) -> Any:
    """Turn what was given into the setting's type.

    Raises:
        ValueError: saying what was expected.
    """
    if setting.kind is bool:
        word = str(value).lower()
        if isinstance(value, (bool, str)) and word in _TRUE | _FALSE:
            return word in _TRUE
        raise ValueError("expected true or false")
    if setting.kind is dict:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, (str, int)):
            return str(value)
        raise ValueError("expected a string")
    if setting.kind is str:
        if isinstance(value, str) and "\0" not in value:
            return value
        raise ValueError("expected a string")
    return _read_number(setting, value)


def _read_number(setting: Setting, value: object) -> int | float:
    if setting.is_size and isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError("expected a number of bytes such as 65536, 64MiB or 1GiB")
        return int(match[1]) * SIZE_UNITS[match[2] or ""]
    if setting.kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
            return int(value)
        raise ValueError("expected a whole number")
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError("expected a number of seconds" if setting.key.endswith("_s") else "expected a number")


def _check_bounds(setting: Setting, value: Any) -> None:
    if setting.at_least is not None and value < setting.at_least:
        raise ValueError(f"must be at least {_bound(setting, setting.at_least)}")
    if setting.at_most is not None and value > setting.at_most:
        raise ValueError(f"must be at most {_bound(setting, setting.at_most)}")
    if setting.one_of is not None and value not in setting.one_of:
        raise ValueError(f"must be one of {', '.join(setting.one_of)}")
    if setting.matches is not None and not re.fullmatch(setting.matches, value):
        raise ValueError(f"must match {setting.matches}")


def _bound(setting: Setting, bound: float) -> str:
    return format_size(int(bound)) if setting.is_size else f"{bound:g}"


def _derive(values: dict[str, Any], origins: dict[str, str], problems: list[str]) -> None:
    """Fill in what derives from the data directory or another setting, and make that directory absolute."""
    data = Path(os.path.abspath(Path(values["server.data_dir"]).expanduser()))
    values["server.data_dir"] = str(data)
    derived = {
        "object_store.url": (data / "objects").as_uri(),
        # SQLAlchemy decodes %xx in a database's path, and nothing else.
        "iceberg.catalog_uri": f"sqlite:///{str(data / 'catalog.db').replace('%', '%25')}",
        # Iceberg locations are not decoded by pyiceberg and duckdb: the path as it is.
        "iceberg.warehouse": f"file://{data / 'warehouse'}",
    }
    for key, url in derived.items():
        if not values[key]:
            values[key] = url
            origins[key] = DERIVED_ORIGIN
    shared = shared_s3_properties(
        values["object_store.url"],
        values["object_store.config"],
        values["iceberg.warehouse"],
        values["iceberg.catalog"],
    )
    values["iceberg.catalog"] |= shared
    origins.update({f"iceberg.catalog.{key}": SHARED_ORIGIN for key in shared})
    embedded = [key for key in derived if key != "object_store.url" and origins[key] == DERIVED_ORIGIN]
    if embedded and re.search(r"[?#]", str(data)):
        problems.append(
            f"server.data_dir = {data} (from {origins['server.data_dir']}): a path with '?' or '#' cannot "
            f"hold an Iceberg warehouse; choose another, or set {' and '.join(embedded)}"
        )


def _check_together(values: Mapping[str, Any], origins: Mapping[str, str], problems: list[str]) -> None:
    """Check what takes more than one value, or a value in its final form."""

    def refuse(key: str, why: str) -> None:
        problems.append(f"{key} = {format_value(shown_value(key, values[key]))} (from {origins[key]}): {why}")

    for key in ("object_store.url", "iceberg.catalog_uri", "iceberg.warehouse"):
        url = values[key]
        scheme, separator, _ = url.partition("://")
        if not separator or not scheme:
            refuse(key, "expected a URL such as file:///absolute/path or s3://bucket/prefix")
        elif scheme == "file" and urlsplit(url).netloc not in ("", "localhost"):
            refuse(key, "a file URL needs an absolute path, so three slashes: file:///absolute/path")
    if values["limits.batch_bytes"] > values["limits.message_bytes"]:
        refuse(
            "limits.batch_bytes",
            f"must be at most limits.message_bytes = {format_size(values['limits.message_bytes'])} "
            f"(from {origins['limits.message_bytes']})",
        )
    for key, owner in (("uri", "iceberg.catalog_uri"), ("warehouse", "iceberg.warehouse")):
        if key in values["iceberg.catalog"]:
            origin = origins[f"iceberg.catalog.{key}"]
            problems.append(f"iceberg.catalog.{key} (from {origin}): set {owner} instead")


def _build(values: Mapping[str, Any]) -> Settings:
    tables = {
        table: options(**{item.name: values[f"{table}.{item.name}"] for item in fields(options)})
        for table, options in get_type_hints(Settings).items()
    }
    return Settings(**tables)


__all__ = [
    "DEFAULT_ORIGIN",
    "DERIVED_ORIGIN",
    "FOREIGN_VARIABLES",
    "SETTINGS",
    "SHARED_ORIGIN",
    "Given",
    "LoadedSettings",
    "Setting",
    "Settings",
    "load_settings",
    "show_settings",
]
