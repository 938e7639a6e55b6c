from collections.abc import Iterable, Sequence
from typing import Final

from typing_extensions import disjoint_base

TABLE_BYTES: Final[int]
METHOD: Final[int]
SCHEME: Final[int]
AUTHORITY: Final[int]
PATH: Final[int]
STATUS: Final[int]
PROTOCOL: Final[int]

class HeaderError(Exception): ...
class HeadersTooLarge(Exception): ...

@disjoint_base
class HuffmanCode:
    def __new__(cls, codes: Sequence[int], lengths: Sequence[int]) -> HuffmanCode: ...

@disjoint_base
class HeaderDecoder:
    max_header_list_size: int
    max_allowed_table_size: int
    @property
    def decoded_bytes(self) -> int: ...
    @property
    def pseudo(self) -> int: ...
    @property
    def table_bytes(self) -> int: ...
    def __new__(
        cls, code: HuffmanCode, static_table: Iterable[tuple[bytes, bytes]], max_header_list_size: int = 65536
    ) -> HeaderDecoder: ...
    def decode(self, block: bytes) -> list[tuple[bytes, bytes]]: ...
