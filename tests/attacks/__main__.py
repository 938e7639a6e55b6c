"""Run attacks and print the table: ``python -m tests.attacks [NAME or FAMILY …] --pairs 7``; without a name, all.

A row is printed as soon as it is there; the whole table is written as Markdown at the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench.harness import ROOT, machine
from tests.attacks.attacker import Attack, load
from tests.attacks.harness import run_attacks
from tests.attacks.verdicts import HEADER, describe, row, timed, timeless

#: Where the table goes; not part of the repository.
TABLE = ROOT / "build" / "attacks.md"


def choose(names: list[str]) -> list[Attack]:
    """Attacks by name, by family, or by part of a name; all for no name."""
    known = load()
    chosen = [
        attack
        for attack in known.values()
        if not names or any(name in (attack.name, attack.family) or name in attack.name for name in names)
    ]
    if not chosen:
        raise SystemExit(f"no attack is called {' or '.join(names)}; there are {', '.join(known)}")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack")
    parser.add_argument("--setting", action="append", default=[], metavar="KEY=VALUE", help="of the server")
    parser.add_argument("--no-control", action="store_true", help="attacks alone: stops, memory and rows")
    parser.add_argument("--list", action="store_true", help="say what there is, run nothing")
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    chosen = choose(options.names)
    if options.list:
        for attack in chosen:
            print(f"{attack.family:8} {attack.name:32} {attack.rule:10} {attack.what}")
        return 0
    # Ended from outside, it ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = dict(pair.split("=", 1) for pair in options.setting)
    load_before = os.getloadavg()[0]
    rows, broken = [], 0
    for attack in chosen:
        measured = run_attacks(
            [attack] * options.pairs,
            drained=attack,
            seconds=options.seconds,
            settings=settings,
            control=not options.no_control,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        rows.append(row(measured))
        verdicts = [*timeless(measured), *(timed(measured) if not options.no_control else [])]
        broken += any(not verdict.held for verdict in verdicts)
        print(describe(measured), flush=True)
    about = machine()
    said = " ".join(
        [
            f"Commit {about['commit']}, {datetime.now(UTC):%Y-%m-%d}, {about['machine']};",
            f"{options.pairs} pairs of {options.seconds:g} s; load before the run {load_before:.1f};",
            f"settings beside the defaults: {', '.join(options.setting) or 'none'}.",
        ]
    )
    table = "\n".join([said, "", HEADER, *rows, ""])
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(table)
    print(table)
    print(f"{len(chosen)} attacks, {broken} of them broke a promise")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
