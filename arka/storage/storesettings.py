"""The settings of an object store that its library refuses, each named in one line.

Owns: which keys of ``object_store.config`` obstore never sees, and which key or variable an error of it is about. Does
not own opening a store (``arka.storage.objects``). Imports nothing of obstore.

obstore takes settings of its HTTP client apart from those of a store. Given among the latter they make it panic, with a
trace and an error that is no ``Exception``, so they are refused before it sees them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

from arka.errors import ConfigurationError
from arka.redaction import MASK, is_harmless, shown, shown_url

#: What obstore prefixes the names of its settings with, by store; the environment's variables begin alike.
_PREFIXES: Final = ("aws_", "google_", "azure_")

#: Settings of the HTTP client, without prefix.
_CLIENT_OPTIONS: Final = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_content_type",
        "default_headers",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_max_frame_size",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "read_timeout",
        "timeout",
        "user_agent",
    }
)
_SCHEMES: Final = "file:///path, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"


def check_store_settings(config: Mapping[str, str]) -> None:
    """Check the keys that obstore must not see.

    Raises:
        ConfigurationError: naming the first of them.
    """
    for key in config:
        name = key.lower()
        bare = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
        if bare == "allow_http":
            raise ConfigurationError(
                f"object_store.config.{key}: not a setting of the store; plain HTTP is used where the endpoint begins "
                'with http://, so set aws_endpoint = "http://..." and leave this out'
            )
        if bare in _CLIENT_OPTIONS:
            raise ConfigurationError(
                f"object_store.config.{key}: a setting of the HTTP client, which the server sets itself: leave it out"
            )


def explain(
    url: str, config: Mapping[str, str], error: BaseException, attempt: Callable[[Mapping[str, str]], object]
) -> str:
    """Say in one line why a store does not open, with the key or variable that the error is about.

    Args:
        url: of the store.
        config: its settings.
        error: what opening it raised.
        attempt: opens it with other settings.
    """
    reason = first_line(error)
    url = shown_url(url)
    if "recognise URL" in reason or "Unable to convert URL" in reason:
        return f"object_store.url {url!r}: no object store that this server knows; expected {_SCHEMES}"
    for key in config:
        if reason != _reason_of(attempt, {name: value for name, value in config.items() if name != key}):
            value = shown(f"object_store.config.{key}", config[key])
            reason = reason if value != MASK else reason.replace(config[key], MASK)
            return f"object_store.config.{key} = {value!r}: {reason} (object_store.url {url!r})"
    variable = next(
        (
            name
            for name, value in os.environ.items()
            if name.lower().startswith(_PREFIXES) and value and f'"{value}"' in reason
        ),
        None,
    )
    if variable is not None:
        reason = reason if is_harmless(variable) else reason.replace(os.environ[variable], MASK)
        return f"The variable {variable}, which the object store reads: {reason} (object_store.url {url!r})"
    return f"object_store.url {url!r} cannot be opened: {reason}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without obstore's debugging output."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason_of(attempt: Callable[[Mapping[str, str]], object], config: Mapping[str, str]) -> str | None:
    try:
        attempt(config)
    except Exception as error:
        return first_line(error)
    return None


__all__ = ["check_store_settings", "explain", "first_line"]
