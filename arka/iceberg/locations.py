"""Where the files of a table lie: below its location, whatever its properties say (R30).

Owns: the one provider of file names. Does not own a table's location (``control``).

Iceberg's libraries let table properties choose folders, hashed paths and even the class that makes names. Anyone who
may change the table could send the server's files, and the requests that it signs, elsewhere.
"""

from __future__ import annotations

import re
from typing import Final

from pyiceberg.table.locations import LocationProvider, SimpleLocationProvider

#: Table properties that choose where pyiceberg puts files, or which class does; Arka acts on none of them.
REDIRECTING: Final = re.compile(r"write\.(?:data\.path|metadata\.path|object-storage\.|py-location-provider\.)")


def table_locations(location: str) -> LocationProvider:
    """Return what names the files of a table.

    Args:
        location: the table's location.
    """
    return SimpleLocationProvider(location.rstrip("/"), {})


__all__ = ["REDIRECTING", "table_locations"]
