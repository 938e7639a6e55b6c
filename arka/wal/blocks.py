"""Blocks: magic, CRC-32C over the rest, format version; how every file of the log begins.

Owns: the first twelve bytes of segment headers, seal marks and log state slots, and their check.
"""

from __future__ import annotations

import struct
from typing import Final

from arka._core.framing import crc32c
from arka.errors import ConfigurationError, DataCorruption

#: Of all files in the log's directory; a reader refuses any other.
FORMAT_VERSION: Final = 2

_PREFIX: Final = struct.Struct("<III")


def magic(text: bytes) -> int:
    """The magic number that reads as ``text`` (four ASCII letters) in a dump."""
    return int.from_bytes(text, "little")


def seal_block(block: bytes) -> bytes:
    """Put the CRC of bytes 8 to the end into bytes 4 to 8."""
    return block[:4] + crc32c(block[8:]).to_bytes(4, "little") + block[8:]


def check_block(path: str, data: memoryview, offset: int, size: int, expected_magic: int, what: str) -> None:
    """Check the block of ``size`` bytes at ``offset``.

    Raises:
        DataCorruption: it is cut off, something else, or damaged.
        ConfigurationError: another version of Arka wrote it.
    """
    block = data[offset : offset + size]
    if len(block) < size:
        raise DataCorruption(path, offset, f"a {what} of {size} bytes", f"{len(block)} bytes")
    found_magic, found_crc, version = _PREFIX.unpack_from(block)
    if found_magic != expected_magic:
        raise DataCorruption(path, offset, f"{what} magic {expected_magic:#010x}", f"{found_magic:#010x}")
    crc = crc32c(block[8:])
    if crc != found_crc:
        raise DataCorruption(path, offset + 4, f"CRC-32C {crc:#010x} over the {what}", f"{found_crc:#010x}")
    if version != FORMAT_VERSION:
        raise ConfigurationError(
            f"{path} has log format {version}, this version of Arka reads {FORMAT_VERSION}: "
            "start the version that wrote it"
        )


__all__ = ["FORMAT_VERSION", "check_block", "magic", "seal_block"]
