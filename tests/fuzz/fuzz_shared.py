"""Batches whose rows share bytes (views, dictionaries, runs, list views), broken in ways that fit together.

Each case makes a batch as a client's library would lay it out, changes some of its offsets, sizes, views, indices or
run ends, and decodes it. What its rows mean is read from the same numbers without Arrow (``sharedarrays``). A finding
is

1. a crash, or a case that takes more than ``CPU_S`` seconds of CPU;
2. an exception that is not an InvalidRequest with a code of the wire contract;
3. an accepted batch whose rows differ from the independent reading, or of which a row means nothing, or that a commit
   could not store (R17);
4. a refused batch of which nothing was changed and which is within the limits;
5. more memory than ``ALLOCATED_BYTES``, or an accepted batch that means more than ``limits.batch_bytes`` (T23).

Cases run in a process of their own, whose death is a finding of the case that it ran.

Run:  python tests/fuzz/fuzz_shared.py --cases 50000 --seed 1, or --minutes 30
One case again:  python tests/fuzz/fuzz_shared.py --worker --seed 1 --first 1234 --cases 1
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[2]))

from arka._core import ipc
from arka.errors import InvalidRequest
from arka.flight.canonical import UnsupportedType, canonical_type
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.options import MIB, Limits
from arka.testing.ipcstreams import StreamMessage, make_table, write_stream
from tests.fuzz.fuzz_ipc import CODES, EDGES, Oracle
from tests.fuzz.ipcbytes import Flat, write_message
from tests.fuzz.sharedarrays import Bad, Shared, flatten, is_view, make, read, sizes, view_of

LIMITS = Limits(batch_bytes=MIB, batch_rows=20_000, dictionary_bytes=256 * 1024)
#: CPU of one case; the slowest takes some hundredths of a second.
CPU_S = 20.0
#: What Arrow may allocate for one case: some copies of what a batch may mean.
ALLOCATED_BYTES = 24 * MIB
#: Memory of a worker's process.
PROCESS_BYTES = 8 * 1024 * MIB
#: Cases of one process.
_CHUNK = 2_000
_POOLS: list[pa.MemoryPool] = []


class Finding(AssertionError):
    """What the server did is wrong."""


# -- changes ---------------------------------------------------------------------------------------------


def _edge(rng: random.Random, near: int) -> int:
    return rng.choice([near - 1, near + 1, rng.choice(EDGES) * rng.choice((1, -1)), rng.randrange(-3, 300)])


def change(rng: random.Random, columns: list[Shared]) -> bool:
    """Change something of one array; returns whether there was something."""
    arrays = [array for column in columns for array in column.walk() if array.length]
    if not arrays:
        return False
    array = rng.choice(arrays)
    row = rng.randrange(array.length)
    if is_view(array.type):
        _change_view(rng, array, row)
    elif "sizes" in array.numbers and rng.random() < 0.5:
        array.numbers["sizes"][row] = _edge(rng, array.numbers["sizes"][row])
    elif "sizes" in array.numbers and rng.random() < 0.5:
        # Both, so that the end stays what it was.
        by = _edge(rng, 0) % 1000
        array.numbers["offsets"][row] += by
        array.numbers["sizes"][row] -= by
    elif array.numbers:
        name = rng.choice(sorted(array.numbers))
        numbers = array.numbers[name]
        if not numbers or name == "values":
            return False
        _change_numbers(rng, numbers)
    else:
        return _change_frame(rng, array)
    return True


def _change_numbers(rng: random.Random, numbers: list[int]) -> None:
    place = rng.randrange(len(numbers))
    how = rng.randrange(5)
    if how == 0:
        numbers[place] = _edge(rng, numbers[place])
    elif how == 1:
        # All that follow with it: a hole, or an overlap.
        by = rng.choice([-1, 1, 2, -7, 64])
        numbers[place:] = [number + by for number in numbers[place:]]
    elif how == 2:
        other = rng.randrange(len(numbers))
        numbers[place], numbers[other] = numbers[other], numbers[place]
    elif how == 3:
        numbers[place:] = [numbers[place]] * (len(numbers) - place)
    else:
        numbers.sort(reverse=True)


def _change_view(rng: random.Random, array: Shared, row: int) -> None:
    views = array.numbers["views"]
    length, text, buffer, offset = views[row]
    how = rng.randrange(7)
    if how == 0:
        views[row] = (_edge(rng, length), text, buffer, offset)
    elif how == 1:
        views[row] = (length, text, _edge(rng, buffer), offset)
    elif how == 2:
        views[row] = (length, text, buffer, _edge(rng, offset))
    elif how == 3:
        views[row] = (length, b"????" + text[4:], buffer, offset)
    elif how == 4:
        # The whole of a buffer for every row, with the right prefix.
        place = rng.randrange(len(array.data))
        whole = view_of(array.data[place], place, 0)
        views[:] = [whole] * len(views)
    elif how == 5:
        # In the middle of a character, where there is one.
        place = rng.randrange(len(array.data))
        start = rng.randrange(len(array.data[place]) + 1)
        views[row] = view_of(array.data[place][start:], place, start)
    else:
        views[row] = (rng.randrange(13), rng.randbytes(12), buffer, offset)


def _change_frame(rng: random.Random, array: Shared) -> bool:
    array.null_count = rng.choice([0, 1, array.length, array.length + 1, -1, 2**40])
    return True


# -- one case ----------------------------------------------------------------------------------------------


def make_case(rng: random.Random) -> tuple[list[Shared], int, int]:
    """Make columns; returns them with their rows and how many changes were made."""
    rows = rng.choice([0, 1, 3, 10, 100, 1_000, 8_000])
    depth = rng.choice([0, 1, 2, 3] if rows <= 1_000 else [0, 1])
    columns = [make(rng, rows, depth) for _ in range(rng.randrange(1, 4))]
    changes = sum(change(rng, columns) for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 3])))
    return columns, rows, changes


def messages_of(rng: random.Random, columns: list[Shared], rows: int) -> tuple[list[StreamMessage], bool, str | None]:
    """Write schema, dictionaries and batch; returns them, whether each buffer has bytes of its own, and the codec."""
    schema = pa.schema([(f"c{number}", column.type) for number, column in enumerate(columns)])
    head = write_stream(schema, [])[0]
    codec = rng.choice([None, None, "lz4", "zstd"])
    share = rng.random() < 0.2
    flat, dictionaries = Flat(rows), list[Shared]()
    for column in columns:
        flatten(column, flat, dictionaries)
    out = [head]
    for identity, values in zip(ipc.schema_dictionary_ids(head.header), dictionaries, strict=True):
        held = Flat(values.length)
        flatten(values, held, [])
        out.append(write_message(held, dictionary=identity, codec=codec))
    return [*out, write_message(flat, codec=codec, share=share)], not share, codec


def expected(columns: list[Shared], rows: int) -> list[list[Any]] | None:
    """What the columns mean; None: a row means nothing."""
    try:
        return [[read(column, row) for row in range(rows)] for column in columns]
    except Bad:
        return None


def decode(table: Any, messages: list[StreamMessage]) -> DecodedBatch:
    """Feed one stream to a decoder; returns its batch."""
    decoder = BatchDecoder(table, LIMITS)
    decoder.set_schema(messages[0].header)
    for message in messages[1:-1]:
        decoder.add_dictionary(message)
    decoder.needs_thread(messages[-1])
    return decoder.decode(messages[-1])


def run_case(seed: int, case: int) -> str:
    """Run one case; returns how it ended.

    Raises:
        Finding: see above.
    """
    rng = random.Random(f"{seed}:{case}")
    columns, rows, changes = make_case(rng)
    wanted = [canonical_type(column.type) for column in columns]
    table = make_table(pa.schema([(f"c{number}", type_) for number, type_ in enumerate(wanted)]))
    messages, apart, codec = messages_of(rng, columns, rows)
    meant = sum(sum(sizes(column)) for column in columns)
    held = sum(len(message.body) for message in messages)
    # What no row sees is counted with what they see: rows or children, whichever are more (T23).
    counted = sum(sum(sizes(array)) for column in columns for array in column.walk())
    # The bitmap of a compressed batch is not looked at: Arrow drops it where the count of nulls is 0.
    trusts_counts = codec is not None and any(array.null_count is not None for c in columns for array in c.walk())
    # Its peak is that of one case. What it gave out may live longer than the case, so it stays.
    pool = pa.proxy_memory_pool(pa.system_memory_pool())
    _POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        decoded = decode(table, messages)
    except InvalidRequest as error:
        if error.code not in CODES:
            raise Finding(f"refused with {error.code}: {error}") from error
        _check_allocated(pool)
        few = all(array.length <= LIMITS.batch_rows for column in columns for array in column.walk())
        if (
            not changes
            and apart
            and few
            and counted + held < LIMITS.batch_bytes // 4
            and not _has_large_dictionary(columns)
        ):
            raise Finding(f"nothing of it is wrong: {error}") from error
        return "changed, refused" if changes else "too large, refused" if meant > LIMITS.batch_bytes else "refused"
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    _check_allocated(pool)
    # A larger body is refused before it comes here (limits.batch_bytes).
    if meant > 2 * LIMITS.batch_bytes and len(messages[-1].body) <= LIMITS.batch_bytes:
        raise Finding(f"accepted, although it means {meant} bytes")
    meaning = expected(columns, rows)
    if meaning is None and not trusts_counts:
        raise Finding("accepted, although a row of it means nothing")
    found = [column.to_pylist() for column in decoded.batch.columns]
    if trusts_counts or meaning is None:
        return "changed, taken at its word"
    for number, (one, other) in enumerate(zip(found, meaning, strict=True)):
        if one != other:
            place = next(row for row in range(rows) if one[row] != other[row])
            raise Finding(
                f"column {number} ({columns[number].type}) row {place}: {one[place]!r}, means {other[place]!r}"
            )
    Oracle(table).store(decoded.batch)
    return "changed, accepted" if changes else "accepted"


def _has_large_dictionary(columns: list[Shared]) -> bool:
    """Whether a dictionary's values may be over limits.dictionary_bytes."""
    return any(
        sum(sizes(array.children[0])) + sum(map(len, array.children[0].data)) > LIMITS.dictionary_bytes // 4
        for column in columns
        for array in column.walk()
        if pa.types.is_dictionary(array.type)
    )


def _check_allocated(pool: pa.MemoryPool) -> None:
    used = pool.max_memory() or 0
    if used > ALLOCATED_BYTES:
        raise Finding(f"{used} bytes of memory for one batch")


# -- processes -----------------------------------------------------------------------------------------------


def work(seed: int, first: int, cases: int) -> None:
    """Run cases in this process, which a crash may end: says each before it runs it."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (PROCESS_BYTES, PROCESS_BYTES))
    for case in range(first, first + cases):
        print(f"case {case}", flush=True)
        # Ends the process, whatever it is in.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            print(f"= {run_case(seed, case)}", flush=True)
        except UnsupportedType:
            print("= no such table", flush=True)
        except Finding as finding:
            print(f"! {finding}"[:500].replace("\n", " "), flush=True)


def run_apart(seed: int, first: int, cases: int) -> tuple[Counter[str], list[str]]:
    """Run cases in processes of their own; returns how they ended, and the findings."""
    endings: Counter[str] = Counter()
    findings: list[str] = []
    start, end = first, first + cases
    while start < end:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        command += ["--seed", str(seed), "--first", str(start), "--cases", str(end - start)]
        worker = subprocess.run(command, capture_output=True, text=True, check=False)
        case = start - 1
        for line in worker.stdout.splitlines():
            mark, _, rest = line.partition(" ")
            if mark == "case":
                case = int(rest)
            elif mark == "=":
                endings[rest] += 1
            elif mark == "!":
                findings.append(f"case {case}: {rest}")
        if worker.returncode == 0:
            break
        if case < start:
            raise RuntimeError(f"a worker died before its first case\n{worker.stderr}")
        findings.append(f"case {case}: its process ended with {worker.returncode} {worker.stderr[:2000]}")
        start = case + 1
    return endings, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=0.0, help="as many cases as go into it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--worker", action="store_true", help="run the cases in this process")
    options = parser.parse_args()
    if options.worker:
        work(options.seed, options.first, options.cases)
        return 0
    ends_at = time.monotonic() + options.minutes * 60
    endings: Counter[str] = Counter()
    findings: list[str] = []
    at = options.first
    while time.monotonic() < ends_at if options.minutes else at < options.first + options.cases:
        count = _CHUNK if options.minutes else min(_CHUNK, options.first + options.cases - at)
        some, found = run_apart(options.seed, at, count)
        at += count
        endings += some
        findings += found
        for finding in found:
            print(f"--seed {options.seed} {finding}", flush=True)
        print(f"{at - options.first} cases, {dict(sorted(endings.items()))}", file=sys.stderr, flush=True)
    print(f"shared: {at - options.first} cases, {len(findings)} findings, {dict(sorted(endings.items()))}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
