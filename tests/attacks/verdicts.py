"""What an attack's figures mean: a verdict for each promise, and the table.

Owns: the bounds, and how a row is written. Does not own the measurement (``harness``).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.attacks.harness import Measured, Pair

MIB = 1024 * 1024
#: A neighbour's p99 beside the attack, as a multiple of that beside the control.
P99_RATIO = 3.0
#: Its longest ack: within so many milliseconds, or the same multiple.
LONGEST_MS = 250.0
LONGEST_RATIO = 3.0
#: Anonymous memory beyond limits.memory_bytes: what a server needs of its own.
SLACK_BYTES = 200 * MIB
#: Seconds beyond server.drain_s that a process takes to end.
DRAIN_SLACK_S = 1.0
#: The neighbour's kinds of calls whose latency is judged.
JUDGED = ("disk",)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise, and whether it held."""

    promise: str
    held: bool
    detail: str


def timeless(measured: Measured) -> list[Verdict]:
    """The promises that do not depend on how fast the machine is."""
    verdicts = [
        Verdict(
            "the server runs on",
            measured.died is None,
            "" if measured.died is None else f"it ended with {measured.died}",
        ),
        Verdict(
            "memory",
            measured.anonymous_bytes <= measured.memory_bytes + SLACK_BYTES,
            f"{measured.anonymous_bytes // MIB} MiB of {(measured.memory_bytes + SLACK_BYTES) // MIB}",
        ),
        Verdict("SIGTERM", _drained(measured), _seconds(measured.ended_s)),
        Verdict("no fault of its own in the log", not measured.complaints, "; ".join(measured.complaints)),
        Verdict("the neighbour's rows", *_rows(measured.account)),
        Verdict("the neighbour is never refused", *_refusals(measured)),
    ]
    failed = [pair.cost["failed"] for pair in measured.pairs if pair.cost.get("failed")]
    return [*verdicts, Verdict("the attack itself ran", not failed, "; ".join(failed))]


def timed(measured: Measured) -> list[Verdict]:
    """The promises about what a neighbour feels; they mean something on a quiet machine only."""
    verdicts = []
    for kind in JUDGED:
        ratio = ratio_of(measured.pairs, kind, "p99")
        verdicts.append(Verdict(f"p99 ({kind})", ratio is None or ratio <= P99_RATIO, _ratio(ratio)))
        longest = [pair.attacked[kind]["max"] for pair in measured.pairs if pair.attacked[kind]["max"] is not None]
        found = statistics.median(longest) if longest else None
        ratio = ratio_of(measured.pairs, kind, "max")
        held = found is None or found <= LONGEST_MS or (ratio is not None and ratio <= LONGEST_RATIO)
        verdicts.append(Verdict(f"longest ({kind})", held, f"{_ms(found)} ms, {_ratio(ratio)}"))
    return verdicts


def ratio_of(pairs: Iterable[Pair], kind: str, figure: str) -> float | None:
    """The median of the pairs' ratios of attack to control; None where there is no control."""
    ratios = [
        pair.attacked[kind][figure] / pair.controlled[kind][figure]
        for pair in pairs
        if pair.controlled and pair.attacked[kind][figure] is not None and pair.controlled[kind][figure]
    ]
    return statistics.median(ratios) if ratios else None


def _drained(measured: Measured) -> bool:
    return measured.ended_s is not None and measured.ended_s <= measured.drain_s + DRAIN_SLACK_S


def _rows(account: dict[str, Any]) -> tuple[bool, str]:
    if "failed" in account:
        return False, account["failed"]
    parts = []
    for table, found in account.items():
        for word in ("missing", "twice", "strange"):
            if found[word]:
                parts.append(f"{table}: {word} {found[word]}")
        if not found["acked"]:
            parts.append(f"{table}: nothing was acknowledged")
    return not parts, "; ".join(parts)


def _refusals(measured: Measured) -> tuple[bool, str]:
    parts = [
        f"{kind}: {error} ({count})"
        for pair in measured.pairs
        for kind, found in pair.attacked.items()
        for error, count in found["errors"].items()
    ]
    return not parts, "; ".join(parts)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}x"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    return "killed" if value is None else f"{value:.1f} s"


HEADER = (
    "| attack | rule | sent | connections | CPU | disk ack p50 / p99 / longest (ms) | beside the control | "
    "p99, longest | memory | fds, threads | disk | SIGTERM | verdict |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(measured: Measured) -> str:
    """One line of the table."""
    costs = [pair.cost for pair in measured.pairs]
    median = lambda key: statistics.median(cost.get(key, 0) for cost in costs) if costs else 0  # noqa: E731
    broken = [verdict for verdict in (*timeless(measured), *timed(measured)) if not verdict.held]
    cells = [
        f"`{measured.attack.name}`",
        measured.attack.rule,
        f"{median('sent') / 1e6:.1f} MB",
        f"{median('connections'):.0f}",
        f"{median('cpu_s'):.1f} s",
        _latency([pair.attacked for pair in measured.pairs]),
        _latency([pair.controlled for pair in measured.pairs if pair.controlled]),
        f"{_ratio(ratio_of(measured.pairs, 'disk', 'p99'))}, {_ratio(ratio_of(measured.pairs, 'disk', 'max'))}",
        f"{measured.anonymous_before // MIB} → {measured.anonymous_bytes // MIB} MiB",
        f"{measured.descriptors}, {measured.threads}",
        f"{measured.disk_bytes / 1e6:.0f} MB",
        _seconds(measured.ended_s),
        "holds" if not broken else "**" + ", ".join(verdict.promise for verdict in broken) + "**",
    ]
    return "| " + " | ".join(cells) + " |"


def _latency(windows: list[dict[str, dict[str, Any]]]) -> str:
    figures = []
    for name in ("p50", "p99", "max"):
        values = [window["disk"][name] for window in windows if window["disk"][name] is not None]
        figures.append(_ms(statistics.median(values) if values else None))
    return " / ".join(figures)


def describe(measured: Measured) -> str:
    """What broke, and what the server answered: lines for people."""
    lines = [row(measured)]
    lines += [
        f"  BROKEN {verdict.promise}: {verdict.detail[:400]}"
        for verdict in (*timeless(measured), *timed(measured))
        if not verdict.held
    ]
    for pair in measured.pairs[:1]:
        lines.append(f"  answers: {pair.cost.get('outcomes')}")
        for kind in ("iceberg", "read"):
            beside, control = pair.attacked[kind], pair.controlled.get(kind, {})
            lines.append(
                f"  {kind}: n={beside['n']} p50={_ms(beside['p50'])} longest={_ms(beside['max'])} ms; "
                f"beside the control n={control.get('n')} longest={_ms(control.get('max'))} ms"
            )
    return "\n".join(lines)
