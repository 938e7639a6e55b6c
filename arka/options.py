"""The options of every component: frozen data with a unit and bounds for each, no behaviour.

Owns: names, defaults, units, bounds. Does not own where values come from (``arka.settings``).

Each field's metadata holds ``help`` and its bounds: ``at_least`` / ``at_most`` for numbers, ``one_of`` or
``matches`` (a regular expression for the whole value) for strings; ``arka.settings`` checks them once.
The unit stands last in each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def option(
    default: Any,
    help: str,  # noqa: A002
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    one_of: tuple[str, ...] | None = None,
    matches: str | None = None,
) -> Any:
    """Declare one option: its default, one sentence of help, and its bounds."""
    bounds = {"at_least": at_least, "at_most": at_most, "one_of": one_of, "matches": matches}
    return field(default=default, metadata={"help": help, **bounds})


def pass_through(help: str) -> Any:  # noqa: A002
    """Declare a table of settings that Arka hands on unread: strings to strings."""
    return field(default_factory=dict, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where the server listens and what it calls itself."""

    data_dir: str = option("./arka_data", "Directory of the WAL, the lock file and the embedded defaults.")
    host: str = option("127.0.0.1", "Address that Flight listens on.")
    port: int = option(8815, "Flight port; 0 takes a free one.", at_least=0, at_most=65535)
    http_port: int = option(8816, "Reserved: nothing listens on it yet.", at_least=0, at_most=65535)
    insecure: bool = option(
        False, "Listen on addresses that other machines reach, although whoever connects may read, write and drop."
    )
    shared_group: str = option(
        "", "A group that may read the warehouse and an SQLite catalog; empty: the server's user alone may."
    )
    node_id: str = option(
        "arka-0", "This node's name in the object store.", matches=r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
    )
    drain_s: float = option(10.0, "Longest time from SIGTERM to exit.", at_least=0.1, at_most=3600)
    demo_tables: bool = option(False, "Register the example tables at start.")
    adopt_warehouse: bool = option(
        False, "Write the tables' paths again for a data directory that was moved or copied with its warehouse."
    )
    new_store: bool = option(False, "Go on with the disk's log in an empty object store, since the old one is lost.")
    take_over: bool = option(False, "Take the node's log from another data directory's server that still runs.")


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How the server logs."""

    format: str = option("console", "Lines for people, or one JSON object a line.", one_of=("console", "json"))
    level: str = option("info", "The least severe event that is logged.", one_of=("debug", "info", "warning", "error"))
    slow_turn_s: float = option(
        0.05,
        "A turn of the server's loop over this is logged with what ran, at most every 10 s.",
        at_least=0.005,
        at_most=60,
    )


#: What ``limits.index_bytes`` is unless it is set.
INDEX_BYTES = 128 * MIB
#: What ``limits.reads`` is unless it is set.
READS = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client, and all of them together, may use."""

    memory_bytes: int = option(
        GIB,
        "Ledger of all bytes held for clients: messages not yet on disk, what they decode to, windows, schemas, "
        "dictionaries, answers.",
        at_least=16 * MIB,
    )
    stream_share: float = option(
        0.25,
        "The part of memory_bytes that one stream's messages may hold while another stream waits for memory.",
        at_least=0.01,
        at_most=1,
    )
    connection_share: float = option(
        0.25, "The same for one connection while another connection waits.", at_least=0.01, at_most=1
    )
    peer_share: float = option(
        0.25,
        "The same for one client address while another address waits; of the connections too, while few are left.",
        at_least=0.01,
        at_most=1,
    )
    min_bytes_per_s: int = option(
        64 * KIB,
        "The rate, over 10 s, below which a stream with a granted message ends with overloaded while others wait "
        "for memory, or a read whose client takes less while other reads wait. 0 ends none.",
        at_least=0,
    )
    unread_bytes: int = option(
        64 * MIB,
        "Acks, error texts and handshakes that clients have not read, of all streams together; a stream that keeps "
        "too many of them is not read, then ended.",
        at_least=MIB,
    )
    disk_bytes: int = option(64 * GIB, "Bytes of WAL and parked writes.", at_least=64 * MIB)
    disk_free_bytes: int = option(GIB, "Free space kept beside what accepted writes still need.", at_least=0)
    stall_s: float = option(
        30.0,
        "How long writes wait, and their streams get no window, while the disk has no room; then they are refused.",
        at_least=0,
    )
    table_disk_share: float = option(
        0.5,
        "The part of disk_bytes that one table may hold of the log while others commit; then it is set apart.",
        at_least=0.01,
        at_most=1,
    )
    message_bytes: int = option(
        256 * MIB,
        "Largest gRPC message; a larger one ends its stream. At most half of memory_bytes.",
        at_least=64 * KIB,
    )
    batch_bytes: int = option(128 * MIB, "Largest batch body; a larger one gets an error ack.", at_least=64 * KIB)
    batch_rows: int = option(2**24, "Most rows of one batch.", at_least=1)
    partitions: int = option(
        10_000, "Most partitions that one batch may touch; not counted where it has no more rows.", at_least=1
    )
    dictionary_bytes: int = option(64 * MIB, "Most dictionary bytes held for one stream.", at_least=64 * KIB)
    index_bytes: int = option(
        INDEX_BYTES,
        "Memory that a commit worker keeps of primary-key tables between commits; the indexes themselves are on disk.",
        at_least=0,
    )
    reads: int = option(
        READS,
        "DoGets that run at a time, each in a process of its own; one client address has all but one at most.",
        at_least=1,
        at_most=64,
    )
    reads_waiting: int = option(
        256, "DoGets that wait for their turn or for an LSN; one client address has half of them at most.", at_least=1
    )
    flushes: int = option(
        256, "Flush calls that wait at a time; one client address has half of them at most.", at_least=1
    )
    read_buffer_bytes: int = option(
        16 * MIB, "Bytes of all answers of DoGet together that wait in memory for their clients.", at_least=MIB
    )
    read_disk_bytes: int = option(
        512 * MIB,
        "Bytes of all DoGets together that are copied from the log, since they are not committed yet.",
        at_least=MIB,
    )
    read_pin_s: float = option(
        300.0, "Longest time that a DoGet keeps the log from being released while it copies from it.", at_least=1
    )
    read_wait_s: float = option(
        30.0, "Longest time that a DoGet waits for the LSN that its wait_for_lsn names.", at_least=0.1
    )
    streams: int = option(10_000, "Open RPCs of all connections together.", at_least=1)
    streams_per_connection: int = option(
        1_000,
        "Open RPCs of one connection. A SETTINGS frame may change the window of each, in one step.",
        at_least=1,
        at_most=4_096,
    )
    connections: int = option(
        10_000,
        "Open connections: without a limit clients could take every descriptor. Above it idle ones end for others.",
        at_least=1,
    )
    actions: int = option(64, "Actions that change something, such as CreateTable, at a time.", at_least=1)
    unread_acks: int = option(
        1_000_000, "Acks a client may leave unread before its stream is no longer read.", at_least=1_000
    )
    unread_acks_timeout_s: float = option(60.0, "How long a stream may stay over unread_acks.", at_least=0.1)
    message_stall_s: float = option(60.0, "Longest pause inside one granted message.", at_least=0.1)
    idle_s: float = option(300.0, "Longest silence of a connection without RPCs.", at_least=0.1)
    handshake_s: float = option(10.0, "Longest time to the end of the HTTP/2 preface and SETTINGS.", at_least=0.1)
    keepalive_s: float = option(60.0, "Silence after which a PING is sent.", at_least=0.1)
    keepalive_timeout_s: float = option(20.0, "How long a PING may stay unanswered.", at_least=0.1)


@dataclass(frozen=True, slots=True)
class WalOptions:
    """The log on the local disk."""

    segment_bytes: int = option(128 * MIB, "Preallocated size of a segment.", at_least=MIB)
    group_bytes: int = option(16 * MIB, "Most bytes of one group commit.", at_least=64 * KIB)
    group_linger_s: float = option(
        0.005,
        "How long frames whose writers ask for no more than a memory ack wait for company; others go at once.",
        at_least=0,
        at_most=1,
    )
    release_grace_s: float = option(
        10.0, "How long a segment that nothing needs stays after its checkpoint.", at_least=0
    )


@dataclass(frozen=True, slots=True)
class ObjectStoreOptions:
    """The object tier."""

    url: str = option("", "Object store URL: file:///path, s3://bucket/prefix; empty: DATA/objects.")
    linger_s: float = option(0.05, "How long frames wait for company before an upload.", at_least=0, at_most=60)
    bytes: int = option(32 * MIB, "Size at which an upload starts without waiting.", at_least=64 * KIB)
    uploads: int = option(4, "Uploads at a time.", at_least=1, at_most=64)
    retry_s: float = option(0.2, "First pause after a failed request; doubles up to 5 s.", at_least=0.001)
    heartbeat_s: float = option(
        2.0,
        "How often the server shows in the store that it runs, and looks whether the log is still its own.",
        at_least=0.1,
        at_most=600,
    )
    config: Mapping[str, str] = pass_through("The store's own settings, as obstore names them (credentials, region).")


@dataclass(frozen=True, slots=True)
class IcebergOptions:
    """The Iceberg tier."""

    catalog_uri: str = option("", "SqlCatalog or REST URI; empty: sqlite:///DATA/catalog.db.")
    warehouse: str = option("", "Warehouse URL; empty: file://DATA/warehouse.")
    commit_interval_s: float = option(0.5, "Pause between the commits of one table.", at_least=0.01)
    commit_bytes: int = option(256 * MIB, "Most Arrow bytes of one commit.", at_least=MIB)
    target_file_bytes: int = option(64 * MIB, "Arrow bytes after which an encoder starts a new file.", at_least=MIB)
    adopt_s: float = option(
        1.0,
        "Age after which a table's schema, spec and properties are loaded again when a stream opens.",
        at_least=0,
        at_most=3600,
    )
    job_deadline_s: float = option(120.0, "Longest time of one job in a worker.", at_least=1)
    encode_workers: int = option(
        2, "Worker processes that encode Parquet; a large commit is divided among them.", at_least=1, at_most=64
    )
    commit_workers: int = option(1, "Worker processes that commit.", at_least=1, at_most=64)
    retry_s: float = option(0.2, "First pause after a failed commit; doubles up to 5 s.", at_least=0.001)
    keep_snapshots: int = option(100, "Snapshots kept by the expiry inside each commit.", at_least=2)
    stock_commit: bool = option(False, "Commit through pyiceberg's public path (slower).")
    catalog: Mapping[str, str] = pass_through(
        "The catalog's own properties, as pyiceberg names them (type, credentials, s3.*)."
    )


@dataclass(frozen=True, slots=True)
class IdempotencyOptions:
    """How long a write's key is remembered, and how many are."""

    retention_s: float = option(86_400.0, "Kept at least this long after iceberg_committed.", at_least=0)
    keys: int = option(
        20_000_000,
        "Keys remembered, some 40 bytes each; then new keys are refused, but for tables with few: an eighth more.",
        at_least=1_000,
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """All options of one server; a field's name is its TOML table and the first part of its key."""

    server: ServerOptions = field(default_factory=ServerOptions)
    log: LogOptions = field(default_factory=LogOptions)
    limits: Limits = field(default_factory=Limits)
    wal: WalOptions = field(default_factory=WalOptions)
    object_store: ObjectStoreOptions = field(default_factory=ObjectStoreOptions)
    iceberg: IcebergOptions = field(default_factory=IcebergOptions)
    idempotency: IdempotencyOptions = field(default_factory=IdempotencyOptions)


__all__ = [
    "GIB",
    "INDEX_BYTES",
    "KIB",
    "MIB",
    "IcebergOptions",
    "IdempotencyOptions",
    "Limits",
    "LogOptions",
    "ObjectStoreOptions",
    "ServerOptions",
    "Settings",
    "WalOptions",
    "option",
    "pass_through",
]
