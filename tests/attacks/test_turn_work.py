"""T22: no step of a task on trio's thread does more than a bounded amount of work, whatever an attack sends.

Work is counted (``turnwork``): the wall time of the longest step is printed, and asserted nowhere.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest

from arka.flight import turns
from tests.attacks.attacker import Attacker, load, raise_descriptors
from tests.attacks.turnwork import counted_server

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    # The listener of a server in this process may be closed by the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ATTACKS = load()
#: Families whose inputs go straight to the connection's reader.
COUNTED = ("http2",)
SECONDS = 0.2
#: The most that one step may do. Calls are of Python and of C functions; the most come from a header block of as many
#: fields as are legal, some twenty a field.
BOUNDS = {
    "calls": 30_000,
    "received_bytes": 8 * 1024 * 1024,
    "rows": 200_000,
    "events": turns.TURN_UNITS,
    "headers": turns.TURN_UNITS // turns.HEADERS_UNITS + 1,
    # The last event may overdraw a turn: a header block of the most fields and bytes that are legal.
    "units": turns.TURN_UNITS + turns.HEADERS_UNITS + turns.FRAME_UNITS + 512 + 65_536 // turns.BLOCK_BYTES_PER_UNIT,
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", COUNTED)
def test_steps_are_bounded(family, tmp_path):
    """Each attack of a family, one after the other, against one server whose steps are counted."""
    raise_descriptors()
    broken = []
    with counted_server(tmp_path) as (address, counter):
        for attack in ATTACKS.values():
            if attack.family != family:
                continue
            counter.take()
            attacker = Attacker(address, SECONDS)
            try:
                if not attack.prepares:
                    attacker.begin()
                attack.run(attacker)
            except OSError:
                # The server closed the connection: as good an end as any.
                pass
            finally:
                attacker.close()
            assert counter.settle(), f"{attack.name}: its connections stay"
            work = counter.take()
            print(f"{attack.name}: {work}")
            found = asdict(work)
            broken += [
                f"{attack.name}: {found[name]:,} {name} in a step, at most {bound:,} ({work.by})"
                for name, bound in BOUNDS.items()
                if found[name] > bound
            ]
    assert broken == []
