"""Let pyiceberg read the doubles of Avro files exactly.

Owns: how a ``double`` of a manifest becomes a Python float, in every process that reads manifests. Does not own what a
manifest holds (``manifests``).

The compiled decoder of pyiceberg 0.12 returns a double as a C float: 0.1 becomes 0.10000000149, 1e300 infinity. Whoever
writes such a partition value again writes another one. So doubles are read from their eight bytes. All other types are
exact there. ``fileio`` imports this module, and no manifest is read without it. Held by
tests/iceberg/test_pyiceberg_contract.py, which fails as soon as pyiceberg is right: then this module can go.

Source: Avro specification, "Binary encoding"; Iceberg table spec, "Avro" (appendix A).
"""

from __future__ import annotations

import struct
from typing import Final

from pyiceberg.avro.decoder import BinaryDecoder
from pyiceberg.avro.reader import DoubleReader

_DOUBLE: Final = struct.Struct("<d")


def read_double(self: DoubleReader, decoder: BinaryDecoder) -> float:
    """Read a double; stands in for pyiceberg's ``DoubleReader.read``."""
    value: float = _DOUBLE.unpack(decoder.read(_DOUBLE.size))[0]
    return value


DoubleReader.read = read_double  # type: ignore[method-assign]

__all__ = ["read_double"]
