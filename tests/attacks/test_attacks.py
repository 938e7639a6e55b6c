"""The list of attacks: what each says of itself."""

from __future__ import annotations

from tests.attacks.attacker import FAMILIES, load

ATTACKS = load()


def test_there_are_enough_attacks():
    """Each says what it tries to buy, and which rule forbids it; no family is without one."""
    assert len(ATTACKS) >= 40
    assert {attack.family for attack in ATTACKS.values()} == set(FAMILIES)
    assert [attack.name for attack in ATTACKS.values() if not attack.what or not attack.rule] == []
