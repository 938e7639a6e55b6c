"""The commands ``arka wal``: looking at a log, and getting out what a damaged or stale one holds.

Owns: what a person reads of it, and the exit codes (``arka.exits``). Does not own the judgement: ``arka.wal.dump``,
``arka.wal.survey``, ``arka.wal.salvage``, ``arka.client.resubmit``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from arka.errors import ArkaError, ConfigurationError
from arka.exits import EXIT_CONFIGURATION, EXIT_DAMAGED, EXIT_FAILURE, fail
from arka.lineage import NO_STARTS
from arka.records import Tier

if TYPE_CHECKING:
    from arka.client.resubmit import Resubmitted
    from arka.wal.salvage import Salvage, SalvagedTable
    from arka.wal.spans import LsnSpan
    from arka.wal.survey import LogSurvey

#: Damaged places and missing ranges that are printed; ``salvage.json`` has them all.
_SHOWN: Final = 20


@click.group()
def wal() -> None:
    """Look at a log, or save what it holds. DIR is a data directory, or the log's own in it."""


_LOG_DIRECTORY: Final = click.argument(
    "directory", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False)
)


@wal.command()
@_LOG_DIRECTORY
@click.option("--damaged", is_flag=True, help="Only what is damaged.")
def dump(directory: Path, damaged: bool) -> None:
    """Print a line for each frame: file, offset, kind, LSN, rows, bytes, table, notes.

    Exit codes: 0 every CRC holds, 3 something is damaged.
    """
    from arka.storage.disk import PosixDisk
    from arka.wal.dump import dump_log

    broken = 0
    try:
        # Lines, not a table: a log has millions of frames, and a table is laid out when its last row is known.
        for frame in dump_log(_log_directory(directory), PosixDisk()):
            broken += not frame.crc_ok
            if frame.crc_ok and damaged:
                continue
            click.echo(
                f"{frame.file} {frame.offset:>10} {frame.kind:<7} lsn={frame.lsn} rows={frame.rows} "
                f"bytes={frame.size} {frame.table} {frame.note}".rstrip()
            )
    except ConfigurationError as error:
        fail(error, EXIT_CONFIGURATION)
    if broken:
        click.echo(f"arka: {broken} damaged places", err=True)
        sys.exit(EXIT_DAMAGED)


@wal.command()
@_LOG_DIRECTORY
def verify(directory: Path) -> None:
    """Judge a log as the next start would: segments, seal mark and log state. No server should be writing to it.

    Torn bytes were never acknowledged: the next start copies them aside and goes on.

    Exit codes: 0 a start would accept it, 3 it is damaged.
    """
    from arka.columns import show_table
    from arka.storage.disk import PosixDisk
    from arka.wal.dump import verify_log

    report = verify_log(_log_directory(directory), PosixDisk())
    headless = _find_headless(_log_directory(directory))
    rows = []
    for segment in report.segments:
        lsns = f"{segment.first_lsn}..{segment.last_lsn}" if segment.first_lsn else "none"
        torn = f"{segment.torn.start}..{segment.torn.end}" if segment.torn else ""
        state = f"{segment.state}, damaged" if segment.problem else segment.state
        rows.append((segment.file, str(segment.epoch), state, lsns, str(segment.frames), torn))
    show_table(f"log {report.log_uuid}", ("segment", "epoch", "state", "LSNs", "frames", "torn"), rows)
    if report.state is not None:
        click.echo(f"log state: epoch {report.state.epoch}, LSNs below {report.state.lsn_ceiling}")
    for note in report.notes:
        click.echo(f"arka: {note}; the other copy is whole, and the next start mends this one", err=True)
    for problem in [*report.problems, *headless]:
        click.echo(f"arka: {problem}", err=True)
    if headless or not report.ok:
        sys.exit(EXIT_DAMAGED)


@wal.command()
@_LOG_DIRECTORY
@click.option(
    "--to", "out", metavar="OUT", type=click.Path(path_type=Path), help="Copy what is intact into this new folder."
)
@click.option("--resubmit", "location", metavar="URL", help="Send the writes to the server at grpc://HOST:PORT.")
@click.option("--above", metavar="LSN", type=click.IntRange(min=0), help="With --resubmit: only writes above this LSN.")
@click.option(
    "--keyless",
    is_flag=True,
    help="With --resubmit: also writes without an idempotency key. Those that the server has already are doubled, "
    "unless they lie above everything that it has of this log: see --above.",
)
@click.option(
    "--durability",
    metavar="TIER",
    default="disk",
    show_default=True,
    help="With --resubmit: the tier whose ack is waited for.",
)
@click.option("--discard", is_flag=True, help="Set the log aside: the next start begins without it.")
@click.option("--yes", is_flag=True, help="With --discard: do not ask.")
def salvage(
    directory: Path,
    out: Path | None,
    location: str | None,
    above: int | None,
    keyless: bool,
    durability: str,
    discard: bool,
    yes: bool,
) -> None:
    """Save what is intact of a log that a start refuses, because it is damaged or stale.

    Without an option it says what is intact and what is missing. DIR is only read, but for --discard, and no
    server should be writing to it.

    \b
    --to OUT        an Arrow IPC stream for each table (batches with arka.lsn, arka.key and arka.operation
                    as custom metadata) and salvage.json: what is there, what is missing, what is damaged
    --resubmit URL  sends the writes to a running server, in LSN order for each table. One that its table's own
                    mark of this log says is committed is left out, unless it was set aside. One whose idempotency
                    key the server knows is a duplicate there, and adds nothing; keys are forgotten
                    idempotency.retention_s after their commit
    --discard       renames DIR/wal to DIR/wal.discarded-<time>; nothing is deleted

    Typical: salvage --to, then --discard, start the server, then salvage --resubmit on the discarded folder.

    Exit codes: 0 nothing is missing; 1 not everything that was to be sent was acked, or another failure;
    2 usage; 3 writes are missing: --to did not find all LSNs of the log, or --resubmit did not find some that
    the server's tables do not say are committed. Without an option, 3 also says that a start refuses the log.
    """  # noqa: D301 (the escape is click's)
    if discard and (out is not None or location is not None):
        raise click.UsageError("--discard goes with neither --to nor --resubmit: copy or send first")
    if location is None and (above is not None or keyless):
        raise click.UsageError("--above and --keyless are for --resubmit")
    if yes and not discard:
        raise click.UsageError("--yes is for --discard")
    try:
        tier = Tier.parse(durability)
        if discard:
            _discard(directory, ask=not yes)
        else:
            sys.exit(_salvage(_log_directory(directory), out, location, tier, above or 0, keyless=keyless))
    except ArkaError as error:
        usage = isinstance(error, ConfigurationError) or error.code == "invalid_request"
        fail(error, EXIT_CONFIGURATION if usage else EXIT_FAILURE)
    except OSError as error:
        fail(error, EXIT_FAILURE)


@wal.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--to", "out", metavar="OUT", type=click.Path(path_type=Path), help="Copy them into this folder.")
def aside(directory: Path, out: Path | None) -> None:
    """List the writes that were set aside: their own data could not be written to their table.

    DIR is a data directory; a server may be running on it. With --to each write becomes an Arrow IPC stream,
    NAMESPACE.TABLE-LSN.arrows, with arka.lsn, arka.key, arka.operation and arka.reason as custom metadata of its batch.

    Exit codes: 0 all could be read, 3 one is damaged.
    """
    from arka.errors import DataCorruption
    from arka.wal.asidefile import copy_aside, find_asides, parse_aside, read_aside

    found = find_asides(directory)
    code = 0
    for path in found:
        try:
            write = parse_aside(str(path), "/".join(path.parts[-4:]), path.read_bytes())
            rows = read_aside(write)
        except DataCorruption as error:
            click.echo(f"arka: damaged: {error.detail}", err=True)
            code = EXIT_DAMAGED
            continue
        key = rows.key.decode(errors="replace")
        line = f"lsn={write.lsn} table={rows.table.name} uuid={write.table} rows={rows.batch.num_rows} key={key}"
        click.echo(f"{line} reason={write.reason}")
        if out is not None:
            click.echo(f"copied to {copy_aside(write, rows, out)}")
    click.echo(f"{len(found)} writes are set aside")
    sys.exit(code)


def _salvage(
    log_directory: Path, out: Path | None, location: str | None, tier: Tier, above_lsn: int, *, keyless: bool
) -> int:
    """Do what was asked for, say what came of it, and return the exit code."""
    from arka.storage.disk import PosixDisk
    from arka.wal.salvage import LogReader, copy_log
    from arka.wal.survey import survey_log

    disk = PosixDisk()
    survey = survey_log(log_directory, disk)
    headless = _find_headless(log_directory)
    code = EXIT_DAMAGED if survey.missing or headless else 0
    copied = copy_log(survey, disk, out) if out is not None else None
    _show_survey(survey)
    _list("damaged", headless)
    if copied is not None:
        _show_copied(copied, out)
        # A lost state file loses no write: that it is gone is said, and a start is refused without it.
        code = 0 if copied.complete else EXIT_DAMAGED
    if location is not None:
        from arka.client.resubmit import SentLog, resubmit
        from arka.wal.asidefile import asides_of

        reader = LogReader(survey, disk)
        epochs = [mark.epoch for mark in (survey.state, survey.seal) if mark is not None]
        log = None
        if survey.log_uuid is not None:
            asides = asides_of(log_directory.absolute().parent, survey.log_uuid)
            lineage = NO_STARTS if survey.state is None else survey.state.lineage
            log = SentLog(survey.log_uuid, max([0, *survey.epochs, *epochs]), asides, lineage)
        sent = resubmit(reader.writes(), location, durability=tier, above_lsn=above_lsn, keyless=keyless, log=log)
        _show_sent(sent, location, tier)
        beyond = [found for found in survey.missing if found.span.last is None or found.span.last > sent.held_through]
        code = max(code if out is not None else 0, EXIT_DAMAGED if beyond or reader.unreadable else 0)
        if not sent.complete:
            code = EXIT_FAILURE
    return code


def _find_headless(log_directory: Path) -> list[str]:
    """Say that the log's state or its seal mark is gone (R39)."""
    from arka.storage.disk import PosixDisk
    from arka.wal.named import find_headless

    try:
        gone = find_headless(log_directory, PosixDisk())
    except ArkaError:
        # It is damaged, which is said with the rest.
        return []
    return [] if gone is None else [gone.detail]


def _span(span: LsnSpan) -> str:
    return f"{span.first}..{'?' if span.last is None else span.last}"


def _show_survey(survey: LogSurvey) -> None:
    intact = ", ".join(map(_span, survey.intact[:_SHOWN])) or "none"
    more = f" and {len(survey.intact) - _SHOWN} more ranges" if len(survey.intact) > _SHOWN else ""
    click.echo(f"log {survey.log_uuid}: intact LSNs {intact}{more}")
    for torn in survey.torn:
        click.echo(
            f"torn: {torn.size} bytes of {torn.file} from byte {torn.offset} on, behind LSN {torn.after_lsn}, were "
            "never acknowledged on disk"
        )
    _list("damaged", [error.detail for error in survey.damaged])
    _list("missing", [f"LSNs {_span(found.span)}: {found.reason}" for found in survey.missing])


def _list(word: str, lines: list[str]) -> None:
    for line in lines[:_SHOWN]:
        click.echo(f"arka: {word}: {line}", err=True)
    if len(lines) > _SHOWN:
        click.echo(f"arka: {word}: and {len(lines) - _SHOWN} more", err=True)


def _show_copied(salvage: Salvage, out: Path | None) -> None:
    from arka.columns import show_table

    names = ("file", "table", "writes", "rows", "with key", "deletes", "LSNs")
    show_table(f"copied to {out}", names, map(_row, salvage.tables))
    _list("unreadable", [f"LSN {lsn}: {error.detail}" for lsn, error in salvage.unreadable])


def _row(copied: SalvagedTable) -> tuple[str, ...]:
    counts = (copied.writes, copied.rows, copied.keyed, copied.deletes)
    return (
        copied.file,
        str(copied.table.name),
        *map(str, counts),
        f"{copied.first_lsn}..{copied.last_lsn}",
    )


def _show_sent(sent: Resubmitted, location: str, tier: Tier) -> None:
    click.echo(f"sent to {location}: {sent.acked} writes acked at {tier.word}, {sent.duplicates} were there already")
    if sent.different:
        click.echo(f"of those, {sent.different} have other bytes there: encoded by another library, or other rows")
    if sent.below:
        click.echo(f"left out: {sent.below} writes that are not above the LSN of --above")
    if sent.committed:
        click.echo(f"left out: {sent.committed} writes that their table's own mark says are in it")
    if sent.keyless:
        click.echo(f"left out: {sent.keyless} writes without an idempotency key; see --keyless")
    if sent.dropped:
        columns = ", ".join(sorted(sent.dropped))
        click.echo(f"left out: values of columns that their table has no more: {columns}")
    _list("refused", [f"{count} writes: {reason}" for reason, count in sent.refused.most_common()])


def _discard(directory: Path, *, ask: bool) -> None:
    from arka.storage.datadir import lock_data_dir
    from arka.storage.disk import PosixDisk
    from arka.wal.survey import survey_log

    log_directory = _log_directory(directory).absolute()
    if log_directory.name != "wal":
        raise ConfigurationError(f"{directory} is no data directory: there is no wal/ in it to set aside")
    data_dir = log_directory.parent
    disk = PosixDisk()
    with lock_data_dir(data_dir):
        _show_survey(survey_log(log_directory, disk))
        if ask and not click.confirm(f"Set {log_directory} aside? The next start will not know what is in it"):
            raise click.Abort
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = data_dir / f"wal.discarded-{stamp}"
        if aside.exists():
            raise ConfigurationError(f"{aside} exists already: wait a second")
        disk.rename(log_directory, aside)
        disk.sync_directory(data_dir)
    click.echo(f"{log_directory} is {aside} now")


def _log_directory(directory: Path) -> Path:
    from arka.wal.logstate import STATE_NAME
    from arka.wal.seal import SEAL_NAME

    inner = directory / "wal"
    log_directory = inner if inner.is_dir() else directory
    known = ((log_directory / name).is_file() for name in (STATE_NAME, SEAL_NAME))
    if not any(log_directory.glob("*.wal")) and not any(known):
        fail(
            ConfigurationError(f"No log in {directory}: expected a data directory or its wal/"),
            EXIT_CONFIGURATION,
        )
    return log_directory


__all__ = ["wal"]
