"""Write a setting's value for people: TOML spelling, byte sizes with units."""

from __future__ import annotations

import re
from typing import Any, Final

from arka.options import GIB, KIB, MIB

SIZE_UNITS: Final = {"": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}


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


__all__ = ["SIZE_UNITS", "format_size", "format_value", "quote"]
