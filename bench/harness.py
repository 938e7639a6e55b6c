"""Measurements beside their floors: run interleaved, reported as ratios.

Owns: how often and in which order the two sides run, the statistics, and the JSON line. Does not own what is
measured (the other modules) nor the pages that are made of it (``report``).

Timings on shared machines move by tens of percent within minutes, so a figure alone says little: the floor runs right
before or after each run of ours, and what counts is the median of the pairs' ratios.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("BENCH_RESULTS", ROOT / "bench" / "results.jsonl"))
#: Pairs of runs.
PAIRS = 5


@dataclass
class Result:
    """What came of one measurement.

    Attributes:
        name: unique; what ``python -m bench NAME`` takes.
        what: one line for people.
        unit: of values and floors.
        floor: what the floor is; empty for a figure that stands alone.
        target: as in ``>= 1.2``: of the ratio to the floor, or of the value where there is no floor.
        values: of ours, one a run.
        floors: of the floor, the run beside each.
        notes: further figures, by name.
    """

    name: str
    what: str
    unit: str
    floor: str = ""
    target: str = ""
    values: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The median of the pairs' ratios."""
        if not self.floors:
            return None
        return statistics.median(ours / floor for ours, floor in zip(self.values, self.floors, strict=True))

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if not self.target:
            return None
        word, bound = self.target.split()
        figure = self.ratio if self.floors else statistics.median(self.values)
        assert figure is not None
        return figure >= float(bound) if word == ">=" else figure <= float(bound)

    def as_json(self) -> dict[str, Any]:
        """The result as one JSON value."""
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "floor": self.floor,
            "target": self.target,
            "met": self.met,
            "n": len(self.values),
            "min": min(self.values),
            "median": statistics.median(self.values),
            "p99": quantile(self.values, 0.99),
            "floor_median": statistics.median(self.floors) if self.floors else None,
            "ratio": self.ratio,
            "values": self.values,
            "floors": self.floors,
            "notes": self.notes,
            **machine(),
        }


Measurement = Callable[[], Iterator[Result]]
#: Every measurement by name, in the order of the table; filled by ``load``.
MEASUREMENTS: dict[str, Measurement] = {}
#: The modules that have them, in the order of the table.
MODULES = (
    "bench.transport",
    "bench.tiers",
    "bench.upserts",
    "bench.keys",
    "bench.transforms",
    "bench.replay",
    "bench.peers.nats",
    "bench.peers.kafka",
    "bench.peers.pyiceberg_append",
    "bench.sweeps",
)


def load() -> None:
    """Import all modules that have measurements."""
    for module in MODULES:
        import_module(module)


def measurement(name: str) -> Callable[[Measurement], Measurement]:
    """Register a function that yields results under a name."""

    def register(function: Measurement) -> Measurement:
        MEASUREMENTS[name] = function
        return function

    return register


def pairs(result: Result, ours: Callable[[], float], floor: Callable[[], float], *, count: int = PAIRS) -> Result:
    """Run both sides ``count`` times, taking turns at going first, after one run of each that does not count."""
    ours()
    floor()
    for number in range(count):
        for side in (ours, floor) if number % 2 else (floor, ours):
            (result.values if side is ours else result.floors).append(side())
    return result


def quantile(values: list[float], share: float) -> float:
    """The value below which a share of them lies."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python "
        f"{platform.python_version()}",
    }


def run(names: list[str]) -> int:
    """Run measurements by name, or all; prints a line each and appends them to ``results.jsonl``."""
    load()
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        sys.stderr.write(f"unknown: {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}\n")
        return 2
    for name in names or MEASUREMENTS:
        for result in MEASUREMENTS[name]():
            record(result, name)
    return 0


def record(result: Result, name: str) -> None:
    """Append a result to ``results.jsonl``, with the measurement that it is of, and print its line."""
    measured = {"measurement": name, "measured_at": datetime.now(UTC).isoformat(timespec="seconds")}
    with RESULTS.open("a") as file:
        file.write(json.dumps(result.as_json() | measured) + "\n")
    sys.stdout.write(describe(result) + "\n")
    sys.stdout.flush()


def describe(result: Result) -> str:
    """One line for people."""
    line = f"{result.name:24} {statistics.median(result.values):12,.6g} {result.unit}"
    if result.floors:
        line += f"   floor {statistics.median(result.floors):12,.6g}   ratio {result.ratio:.2f}"
    if result.target:
        line += f"   target {result.target} {'met' if result.met else 'MISSED'}"
    return line
