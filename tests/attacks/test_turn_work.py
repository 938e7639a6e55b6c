"""T22: no step of a task on trio's thread does more than a bounded amount of work, whatever an attack sends.

Work is counted (``turnwork``): the wall time of the longest step is printed, and asserted nowhere. Every attack of
the counted families runs for a moment, a few of them against one server.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from time import monotonic
from typing import Any

import pytest

from arka.flight import turns
from tests.attacks.attacker import FAMILIES, Attack, Attacker, load, raise_descriptors
from tests.attacks.turnwork import counted_server
from tests.attacks.wire import Wire

pytestmark = [pytest.mark.process, pytest.mark.slow]

ATTACKS = load()
#: How long an attack takes; more, up to so long, while it has sent less than so many bytes.
SECONDS = 0.3
LONGEST_S = 3.0
LEAST_BYTES = 100_000
#: Families whose inputs are counted.
COUNTED = ("http2", "grpc", "flight", "json")
#: How many attacks share a server.
TOGETHER = 7
#: The most that one step may do. A million calls take some 100 ms, so that these take 3 ms; the most come from a header
#: block of as many fields as are legal, some twenty a field.
BOUNDS = {
    "calls": 30_000,
    "received_bytes": 8 * 1024 * 1024,
    "sent_bytes": 8 * 1024 * 1024,
    "rows": 200_000,
    # As many WriteRequests of 64 KiB as fit a turn.
    "json_bytes": 1024 * 1024,
    # Longer schemas are read in a thread.
    "fields": 1_000,
    "messages": 8,
    "events": turns.TURN_UNITS,
    "headers": turns.TURN_UNITS // turns.HEADERS_UNITS + 1,
    # The last event may overdraw a turn: a header block of the most fields and bytes that are legal.
    "units": turns.TURN_UNITS + turns.HEADERS_UNITS + turns.FRAME_UNITS + 512 + 65_536 // turns.BLOCK_BYTES_PER_UNIT,
}


class PatientAttacker(Attacker):
    """An attacker that sends enough to show something, and no more: its time is short, and a counted server is slow."""

    def goes_on(self) -> bool:
        """Whether there is time left, or too little was sent yet."""
        if super().goes_on():
            return True
        if self.begun_at is None or self.stopped.is_set():
            return False
        return self.sent < LEAST_BYTES and monotonic() < self.begun_at + LONGEST_S

    def pause(self, seconds: float) -> bool:
        """Wait for a moment."""
        self.stopped.wait(min(seconds, 0.1))
        return self.goes_on()

    def hold(self) -> None:
        """What is open need not stay so: the next step is like the last."""
        self.stopped.wait(0.3)

    def create(self, on: Wire, fields: list[tuple[str, str]], name: str | None = None, **more: Any) -> str:
        """See ``Attacker.create``."""
        began = monotonic()
        try:
            return super().create(on, fields, name, **more)
        finally:
            passed = monotonic() - began
            self._ends_at += passed
            if self.begun_at is not None:
                self.begun_at += passed


def _groups() -> list[Any]:
    found = []
    for family, attacks in groupby(ATTACKS.values(), key=lambda attack: attack.family):
        several = list(attacks) if family in COUNTED else []
        for start in range(0, len(several), TOGETHER):
            found.append(pytest.param(several[start : start + TOGETHER], id=f"{family}-{start // TOGETHER}"))
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("attacks", _groups())
def test_steps_are_bounded(attacks: list[Attack], tmp_path):
    """Each attack, one after the other, against a server whose steps are counted."""
    raise_descriptors()
    broken = []
    with counted_server(tmp_path) as (address, counter):
        for attack in attacks:
            counter.take()
            attacker = PatientAttacker(address, SECONDS)
            try:
                if not attack.prepares:
                    attacker.begin()
                attack.run(attacker)
            except OSError:
                # The server closed the connection: as good an end as any.
                pass
            finally:
                attacker.close()
            assert attacker.begun_at is not None, f"{attack.name} never began"
            assert counter.settle(), f"{attack.name}: its connections stay"
            work = counter.take()
            print(f"{attack.name}: sent {attacker.sent:,} bytes: {work}")
            found = asdict(work)
            assert work.steps, f"{attack.name}: the server took no step"
            broken += [
                f"{attack.name}: {found[name]:,} {name} in a step, at most {bound:,} ({work.by})"
                for name, bound in BOUNDS.items()
                if found[name] > bound
            ]
    assert broken == []


def test_each_family_is_counted():
    """Every attack of a counted family is in one group."""
    names = [attack.name for group in _groups() for attack in group.values[0]]
    assert sorted(names) == sorted(attack.name for attack in ATTACKS.values() if attack.family in COUNTED)
    assert {ATTACKS[name].family for name in names} == set(COUNTED) <= set(FAMILIES)
