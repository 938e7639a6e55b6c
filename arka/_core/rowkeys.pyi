from collections.abc import Sequence
from typing import Final

import pyarrow as pa
from typing_extensions import Buffer

HASH_BYTES: Final[int]
DROPPED: Final[int]
REPLACES: Final[int]
IF_ABSENT: Final[int]
REMOVES: Final[int]

def is_key_type(kind: pa.DataType) -> bool: ...
def hash_keys(columns: Sequence[pa.Array], secret: bytes) -> bytearray: ...
def settle(hashes: Buffer, deletes: Buffer, *, first: bool) -> bytearray: ...
