"""Table properties that a client sets with CreateTable.

Owns: the refusals. Does not own which properties there are and what their values look like
(``arka.tableproperties``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from arka.errors import InvalidRequest, quote
from arka.tableproperties import ALLOWED, MAX_BYTES, rule_of

#: Characters that a name, and a value, must not have: controls, and halves of surrogate pairs.
_UNUSUAL_NAME: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UNUSUAL_VALUE: Final = re.compile(r"[\x00\ud800-\udfff]")
_CODEC: Final = "write.parquet.compression-codec"
_LEVEL: Final = "write.parquet.compression-level"
#: The highest level of each codec that takes fewer than zstd, the default.
_HIGHEST_LEVEL: Final = {"gzip": 9, "brotli": 11}


def check_text(text: str, where: str, what: str) -> None:
    """Check a text that is kept with a table and that nobody parses.

    Raises:
        InvalidRequest: a character that not all catalogs can hold.
    """
    if (found := _UNUSUAL_VALUE.search(text)) is not None:
        raise InvalidRequest(f"{where} has the character {found[0]!r} in {what}, which is not legal")


def check_properties(properties: Mapping[str, str]) -> dict[str, str]:
    """Check the properties of a CreateTable request (R30).

    Args:
        properties: names and values as the client gave them.

    Returns:
        A copy.

    Raises:
        InvalidRequest: naming the property, what was found and what is expected.
    """
    for key, value in properties.items():
        # Catalogs keep properties in databases and in JSON that others parse; not all of them hold these.
        if (found := _UNUSUAL_NAME.search(key)) is not None:
            raise InvalidRequest(
                f"properties: the name {quote(key)} has the character {found[0]!r}, which is not legal there"
            )
        check_text(value, f"properties: {quote(key)}", "its value")
    size = sum(len(key.encode()) + len(value.encode()) for key, value in properties.items())
    if size > MAX_BYTES:
        raise InvalidRequest(f"properties: {size} bytes in all, at most {MAX_BYTES} are legal")
    for key, value in properties.items():
        if not key:
            raise InvalidRequest("properties: a property has no name")
        rule = rule_of(key)
        if rule is None:
            raise InvalidRequest(f"properties: {quote(key)} cannot be set; expected {ALLOWED}")
        if not rule.pattern.match(value):
            raise InvalidRequest(f"properties: {quote(key)} is {quote(value)}, expected {rule.expected}")
    highest = _HIGHEST_LEVEL.get(properties.get(_CODEC, "").lower())
    if highest is not None and int(properties.get(_LEVEL, "1")) > highest:
        raise InvalidRequest(
            f"properties: {_LEVEL!r} is {quote(properties[_LEVEL])}, expected a whole number from 1 to {highest} for "
            f"{properties[_CODEC]}"
        )
    return dict(properties)


__all__ = ["check_properties", "check_text"]
