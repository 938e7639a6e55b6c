"""The quick form of ``make attack``: each attack for a moment, without a word about time.

One server for each family, with little memory, so that what is not counted shows. Held are the promises that do not
depend on the machine: the server runs on, its memory stays within limits.memory_bytes + 200 MiB, a drain ends in
server.drain_s whatever runs, the neighbour is never refused, and its rows are all there exactly once.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.attacker import FAMILIES, load
from tests.attacks.harness import run_attacks
from tests.attacks.verdicts import timeless

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.long]

ATTACKS = load()
#: What runs when the server gets SIGTERM: what holds threads, windows, or answers.
DRAINED = {
    "http2": "zero-windows",
    "grpc": "trickled-messages",
    "flight": "unread-rejections",
    "ipc": "view-bomb",
    "json": "type-text",
    "reads": "waiting-reads",
    "actions": "flushes",
    "storage": "bulk-writers",
}
SETTINGS = {"limits.memory_bytes": "64MiB"}
SECONDS = 1.0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_neighbour_is_served_whatever_others_send(family, tmp_path):
    """T22 to T27, R30, R31: no attack of a family ends the server, its memory, its drain or a neighbour's rows."""
    attacks = [attack for attack in ATTACKS.values() if attack.family == family]
    measured = run_attacks(
        attacks,
        drained=ATTACKS[DRAINED[family]],
        seconds=SECONDS,
        settings=SETTINGS,
        folder=tmp_path,
        control=False,
        say=print,
    )
    for pair in measured.pairs:
        print(f"{pair.name}: {pair.attacked['disk']}, {pair.cost.get('outcomes')}")
    broken = [f"{verdict.promise}: {verdict.detail}" for verdict in timeless(measured) if not verdict.held]
    assert broken == []


def test_the_page_has_each_attack():
    """docs/hardening.md says of each attack what the attack says of itself."""
    page = (Path(__file__).parents[2] / "docs" / "hardening.md").read_text()
    rows = [f"| `{attack.name}` | {attack.family} | {attack.rule} | {attack.what} |" for attack in ATTACKS.values()]
    assert [row for row in rows if row not in page] == []
    assert page.count("\n| `") - page.count("\n| `limits.") - page.count("\n| `idempotency.") == len(rows)


def test_there_are_enough_attacks():
    """Each says what it tries to buy, and which rule forbids it; no family is without one."""
    assert len(ATTACKS) >= 40
    assert {attack.family for attack in ATTACKS.values()} == set(FAMILIES)
    assert [attack.name for attack in ATTACKS.values() if not attack.what or not attack.rule] == []
