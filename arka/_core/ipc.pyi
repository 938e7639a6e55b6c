from collections.abc import Iterable
from typing import Final

from typing_extensions import Buffer, disjoint_base

from arka._core.buffers import FrameBuffer

NONE: Final[int]
SCHEMA: Final[int]
DICTIONARY_BATCH: Final[int]
RECORD_BATCH: Final[int]
CODEC_NONE: Final[int]
CODEC_LZ4_FRAME: Final[int]
CODEC_ZSTD: Final[int]
KIND_NULL: Final[int]
KIND_BOOL: Final[int]
KIND_FIXED: Final[int]
KIND_VARIABLE: Final[int]
KIND_LIST: Final[int]
KIND_STRUCT: Final[int]
KIND_VIEW: Final[int]
KIND_LIST_VIEW: Final[int]
KIND_RUNS: Final[int]
KIND_UNION: Final[int]
KIND_DENSE_UNION: Final[int]
FLAG_REQUIRED: Final[int]
FLAG_NEVER_NULL: Final[int]
FLAG_TOP: Final[int]
FLAG_RANGE_32: Final[int]
FLAG_RANGE_64: Final[int]
FOUND_LENGTH: Final[int]
FOUND_NULL_COUNT: Final[int]
FOUND_SHORT_BUFFER: Final[int]
FOUND_NULL_ENTRY: Final[int]
FOUND_REQUIRED_NULLS: Final[int]
FOUND_OUT_OF_RANGE: Final[int]
MAX_DEPTH: Final[int]
MAX_FIELDS: Final[int]
MAX_TEXT_BYTES: Final[int]
MAX_METADATA_BYTES: Final[int]
MAX_BATCH_HEADER_BYTES: Final[int]

def message_type(header: bytes) -> int: ...
def metadata_version(header: bytes) -> int: ...
def body_length(header: bytes) -> int: ...
def schema_endianness(header: bytes) -> int: ...
def schema_dictionary_ids(header: bytes) -> list[int]: ...
def dictionary_batch(header: bytes) -> tuple[int, bool, bytes]: ...
def clean_views(views: Buffer, validity: Buffer | None, offset: int, length: int) -> tuple[bytes, int]: ...

@disjoint_base
class LayoutPlan:
    @property
    def node_count(self) -> int: ...
    def __new__(cls, rules: Iterable[tuple[int, int, int, int, int]]) -> LayoutPlan: ...

@disjoint_base
class BatchLayout:
    @property
    def rows(self) -> int: ...
    @property
    def body_bytes(self) -> int: ...
    @property
    def codec(self) -> int: ...
    @property
    def node_count(self) -> int: ...
    @property
    def buffer_count(self) -> int: ...
    @property
    def variadic_count(self) -> int: ...
    @property
    def nodes(self) -> list[tuple[int, int]]: ...
    @property
    def buffers(self) -> list[tuple[int, int]]: ...
    @property
    def variadic_counts(self) -> list[int]: ...
    def __new__(cls, header: bytes) -> BatchLayout: ...
    def uncompressed_bytes(self, frame: FrameBuffer) -> int: ...
    def fits(self, plan: LayoutPlan) -> bool: ...
    def variable_bytes(self, plan: LayoutPlan) -> int: ...
    def check(self, plan: LayoutPlan, frame: FrameBuffer, max_length: int) -> tuple[int, int, int, int] | None: ...
