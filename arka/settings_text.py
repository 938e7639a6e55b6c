"""Write a setting's value for people: TOML spelling, byte sizes with units, secrets masked."""

from __future__ import annotations

import re
from typing import Any, Final

from arka.options import GIB, KIB, MIB

MASK: Final = "***"

SIZE_UNITS: Final = {"": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}

_SECRET_NAME: Final = r"secret|passw|token|credential|access.?key|account.?key|private|signature"
_SECRET_KEY: Final = re.compile(_SECRET_NAME, re.IGNORECASE)
_URL_PASSWORD: Final = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")
_URL_QUERY_SECRET: Final = re.compile(rf"([?&][^=&]*(?:{_SECRET_NAME})[^=&]*=)[^&]*", re.IGNORECASE)


def mask_secret(key: str, value: Any) -> Any:
    """Hide a secret: all of a string whose key's name says so, or the passwords in a URL."""
    if not isinstance(value, str):
        return value
    if _SECRET_KEY.search(key):
        return MASK
    return _URL_QUERY_SECRET.sub(rf"\1{MASK}", _URL_PASSWORD.sub(rf"\1:{MASK}@", value))


def format_size(amount: int) -> str:
    """Write bytes in the largest unit that divides them: ``64MiB``, ``1000``."""
    for unit, scale in reversed(SIZE_UNITS.items()):
        if amount and amount % scale == 0:
            return f"{amount // scale}{unit}"
    return str(amount)


def format_value(value: Any, *, is_size: bool = False) -> str:
    """Write a bool, number or string as TOML; a size in a unit as a string."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quote(value)
    if is_size and format_size(value) != str(value):
        return quote(format_size(value))
    return repr(value)


def quote(text: str) -> str:
    """Write a basic TOML string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\u{ord(match[0]):04x}", escaped) + '"'


__all__ = ["MASK", "SIZE_UNITS", "format_size", "format_value", "mask_secret", "quote"]
