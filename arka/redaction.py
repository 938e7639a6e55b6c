"""Secrets in texts: which settings are shown, what of a URL is, and what is taken out of errors and log lines.

Owns: the names whose values are known to be harmless, and the secrets that this process knows. All other values are
masked: a new library's credential has a name that nobody here has heard of. Does not own what is logged or shown.

Two rules find a secret in a free text: its shape (the user part, query and fragment of a URL; ``password=...``), and
its value, once ``remember`` was told of it. Imports nothing but the language: every error passes here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import quote, quote_plus, unquote

MASK: Final = "***"

_OBSTORE_NAMES: Final = """
    region default_region bucket bucket_name endpoint endpoint_url endpoint_url_s3 virtual_hosted_style_request
    imdsv1_fallback skip_signature unsigned_payload checksum_algorithm conditional_put copy_if_not_exists
    request_payer s3_express metadata_endpoint container_name use_emulator use_fabric_endpoint disable_tagging
    project_id allow_http user_agent timeout connect_timeout proxy_url
"""
_PYICEBERG_NAMES: Final = """
    type s3.region s3.endpoint s3.force-virtual-addressing s3.connect-timeout s3.request-timeout s3.resolve-region
    s3.proxy-uri s3.signer.uri s3.signer.endpoint client.region glue.region glue.endpoint glue.id dynamodb.region
    dynamodb.endpoint gcs.project-id gcs.endpoint gcs.service.host gcs.default-bucket-location adls.account-host
    hdfs.host hdfs.port rest.sigv4-enabled rest.signing-region rest.signing-name oauth2-server-uri prefix
    pool_pre_ping pool-pre-ping init_catalog_tables init-catalog-tables echo uri warehouse
    downcast-ns-timestamp-to-us-on-write header.x-iceberg-access-delegation
"""
_PARAMETER_NAMES: Final = """
    sslmode connect_timeout timeout mode uri cache immutable nolock charset application_name client_encoding region
    warehouse max_keys list-type prefix delimiter encoding-type start-after
"""
#: Entries of pass-through tables that are no secrets, as their libraries spell them, without a store's prefix.
_HARMLESS: Final = frozenset([*_OBSTORE_NAMES.split(), *_PYICEBERG_NAMES.split()])
_STORE_PREFIXES: Final = ("aws_", "azure_storage_", "azure_", "google_")
#: The two tables whose entries are unknown to Arka.
_TABLES: Final = ("object_store.config.", "iceberg.catalog.")
#: Parameters of a URL's query that are no secrets.
_HARMLESS_PARAMETERS: Final = frozenset(_PARAMETER_NAMES.split())
#: URLs whose user part names a container.
_CONTAINER_SCHEMES: Final = frozenset({"abfs", "abfss", "wasb", "wasbs"})
#: Names in the environment and in free texts that say that a secret follows.
_SECRET_NAME: Final = (
    r"secret|passw|passphrase|token|credential|access.?key|account.?key|api.?key|private|signature|sas_|pwd"
)
_SECRET: Final = re.compile(_SECRET_NAME, re.IGNORECASE)
_ENVIRONMENT: Final = ("ARKA_", "AWS_", "AZURE_", "GOOGLE_", "GCP_", "PG")

# Each of these is linear in the text, of which clients choose parts: no unbounded repetition begins a match.
_URL: Final = re.compile(r"[A-Za-z0-9+.-]{1,24}://[^\s'\"<>|\\^`{}]*")
_PARAMETER: Final = re.compile(r"([?&;])([^\s=&;?'\"]{1,64})=([^\s&;'\"]+)")
_ASSIGNMENT: Final = re.compile(
    r"((?:secret|password|passwd|passphrase|pwd|api[ _.-]?key|access[ _.-]?key|credential)[\w.-]{0,40}"
    r"['\"]?\s{0,4}[=:]\s{0,4}['\"]?"
    r"|authorization['\"]?\s{0,4}[=:]\s{0,4}['\"]?(?:bearer |basic )?|bearer )([^\s'\",;&)}\]]+)",
    re.IGNORECASE,
)
#: What every match of ``_ASSIGNMENT`` has in lower case.
_WORDS: Final = (
    "secret", "passw", "passphrase", "pwd", "apikey", "api_key", "api-key", "api.key", "api key", "accesskey",
    "access_key", "access-key", "access.key", "access key", "credential", "authorization", "bearer ",
)  # fmt: skip
#: Shorter values are parts of common words.
_LEAST: Final = 6

#: The secrets that this process knows, longest first, and what finds them.
_known: tuple[str, ...] = ()
_spellings: tuple[str, ...] = ()
_pattern: re.Pattern[str] | None = None


def is_harmless(entry: str) -> bool:
    """Say whether an entry of a pass-through table is known to be no secret.

    Args:
        entry: its name in that table.
    """
    name = entry.lower()
    bare = next((name.removeprefix(prefix) for prefix in _STORE_PREFIXES if name.startswith(prefix)), name)
    return name in _HARMLESS or bare in _HARMLESS


def shown(key: str, value: Any) -> Any:
    """Return what people may see of a setting's value.

    Args:
        key: ``table.name``, in a pass-through table ``table.name.ENTRY``.
        value: as it was given, of any type.
    """
    entry = next((key.removeprefix(table) for table in _TABLES if key.startswith(table)), None)
    if (entry is not None and not is_harmless(entry)) or (entry is None and _SECRET.search(key)):
        return MASK
    return shown_url(value) if isinstance(value, str) else value


def shown_url(url: str) -> str:
    """Return a URL without its user part, its fragment and the values of its query, but for harmless ones."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return redact(url)
    user, at, rest = _split_user(rest)
    if at and (scheme.lower() not in _CONTAINER_SCHEMES or ":" in user):
        user = MASK
    rest, hash_, fragment = rest.partition("#")
    rest, question, query = rest.partition("?")
    return f"{scheme}://{user}{at}{rest}{question}{_shown_query(query)}{hash_}{MASK if fragment else ''}"


def redact(text: str) -> str:
    """Return a text without secrets: by their shape, and those of ``remember`` by their value.

    Args:
        text: an error's, or a whole log line.
    """
    if "://" in text:
        text = _URL.sub(lambda found: shown_url(found[0]), text)
    if "=" in text:
        text = _PARAMETER.sub(lambda found: found[1] + _shown_parameter(found[0][1:]), text)
    # Expressions are slow where a search for words is not, and most errors are made for a client's bad rows.
    lower = text.lower()
    if any(word in lower for word in _WORDS):
        text = _ASSIGNMENT.sub(rf"\g<1>{MASK}", text)
    if _pattern is not None and any(spelling in text for spelling in _spellings):
        text = _pattern.sub(MASK, text)
    return text


def secrets_of(
    tables: Mapping[str, Mapping[str, str]], urls: Iterable[str], environment: Mapping[str, str]
) -> set[str]:
    """Collect the secrets that settings and environment hold.

    Args:
        tables: the pass-through tables by their key.
        urls: of store, catalog and warehouse.
        environment: variables by name.
    """
    found = set()
    for values in tables.values():
        for entry, value in values.items():
            if not is_harmless(entry) and (_SECRET.search(entry) or _looks_secret(value)):
                found.add(value)
        urls = [*urls, *(value for value in values.values() if "://" in value)]
    for url in urls:
        found |= _url_secrets(url)
    found |= {value for name, value in environment.items() if name.startswith(_ENVIRONMENT) and _SECRET.search(name)}
    return found


def remember(secrets: Iterable[str]) -> None:
    """Take these values out of every text from now on; short ones are found by their shape alone."""
    global _known, _spellings, _pattern
    _known = tuple(sorted({*_known, *(value for value in secrets if len(value) >= _LEAST)}, key=len, reverse=True))
    spellings = {
        spelling
        for value in _known
        for spelling in (value, quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1], repr(value)[1:-1])
    }
    _spellings = tuple(sorted(spellings, key=len, reverse=True))
    _pattern = re.compile("|".join(_bounded(value) for value in _spellings)) if _spellings else None


def forget() -> None:
    """Forget every value that ``remember`` was told of."""
    global _known, _spellings, _pattern
    _known, _spellings, _pattern = (), (), None


def known() -> tuple[str, ...]:
    """Return what ``remember`` was told of, for a process that is started."""
    return _known


def _bounded(value: str) -> str:
    """A pattern of a value that is not part of a longer word."""
    before = r"(?<![A-Za-z0-9])" if value[0].isalnum() else ""
    after = r"(?![A-Za-z0-9])" if value[-1].isalnum() else ""
    return before + re.escape(value) + after


def _looks_secret(value: str) -> bool:
    """Whether the value of an unknown name is worth looking for: a common word would be found everywhere."""
    return len(value) >= 8 and not (value.isalpha() and value.islower()) and not value.isdigit() and "://" not in value


def _split_user(rest: str) -> tuple[str, str, str]:
    """Split what follows ``://`` behind its user part."""
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    if not at and "@" in rest and ":" in authority and not authority.rpartition(":")[2].isdigit():
        # A password with a character that should have been encoded: all before the last @ may be part of it.
        user, at, _ = rest.rpartition("@")
    return user, at, rest[len(user) + len(at) :]


def _shown_query(query: str) -> str:
    parts = re.split(r"([&;])", query)
    return "".join(part if part in ("&", ";", "") else _shown_parameter(part) for part in parts)


def _shown_parameter(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    if not equals:
        return MASK
    return parameter if unquote(name).lower() in _HARMLESS_PARAMETERS else f"{name}={MASK}"


def _url_secrets(url: str) -> set[str]:
    """The parts of a URL that ``shown_url`` masks."""
    _, separator, rest = url.partition("://")
    if not separator:
        return set()
    user, _, rest = _split_user(rest)
    found = {unquote(user.partition(":")[2]), user.partition(":")[2]}
    for parameter in re.split("[&;]", rest.partition("?")[2].partition("#")[0]):
        name, _, value = parameter.partition("=")
        if unquote(name).lower() not in _HARMLESS_PARAMETERS and _SECRET.search(name):
            found |= {value, unquote(value)}
    return found


__all__ = ["MASK", "forget", "is_harmless", "known", "redact", "remember", "secrets_of", "shown", "shown_url"]
