from typing import Final

from typing_extensions import Buffer

SPECIAL: Final[int]

def encode_run(
    lsns: Buffer,
    rows: Buffer,
    tiers: Buffer,
    start: int,
    stop: int,
    *,
    tier: int,
    through_lsn: int,
    first_sequence: int,
    head: bytes,
    middle: bytes,
    tail: bytes,
    last_only: bool,
    exact: bool,
    budget: int,
) -> tuple[bytes, int]: ...
