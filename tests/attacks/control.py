"""The control: a well-behaved client that spends what an attack spent, in the same time.

It writes as many bytes as the attack sent, in batches of at most 1 MiB with disk acks, at an even pace, over as plain
a connection as the attack's; and it spends the rest of the attack's CPU on itself, so that both leave the same cores
to the server. What a neighbour feels beside it is what that much honest work costs on this machine.

Owns: the pace. Does not own what is compared (``harness``).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time

import pyarrow as pa

from tests.attacks.attacker import Attacker, cpu_s
from tests.attacks.payloads import NUMBERS, stream_of, write_message

#: Steps a second at which bytes and CPU are spent.
_STEPS_PER_S = 20
_MOST_ROWS = 128 * 1024
_ROW_BYTES = 8


def spend(attacker: Attacker, sent: int, cpu: float, seconds: float) -> None:
    """Write ``sent`` bytes and use ``cpu`` seconds, evenly over ``seconds``."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    steps = max(1, math.ceil(seconds * _STEPS_PER_S))
    per_step = sent / steps
    batches = max(1, math.ceil(per_step / (_MOST_ROWS * _ROW_BYTES)))
    rows = max(1, int(per_step / batches / _ROW_BYTES))
    schema, batch = stream_of(pa.record_batch([pa.array(range(rows), pa.int64())], schema=NUMBERS))
    message = write_message(batch)
    stream_id = on.open("DoExchange")
    on.put(stream_id, write_message(schema, path=(table,), metadata={"acks": "watermark"}))
    attacker.begin()
    started, before = time.monotonic(), cpu_s()
    for step in range(steps):
        share = (step + 1) / steps
        while on.sent < sent * share and attacker.goes_on():
            on.put(stream_id, message)
        while cpu_s() - before < cpu * share and time.monotonic() - started < seconds * share:
            pass
        if not attacker.pause(started + seconds * share - time.monotonic()):
            break
    attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="host:port")
    parser.add_argument("--sent", type=int, required=True, help="bytes")
    parser.add_argument("--cpu", type=float, required=True, help="seconds")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    host, _, port = options.address.rpartition(":")
    # A second more, so that all of it is spent.
    attacker = Attacker((host, int(port)), options.seconds + 1)
    before = cpu_s()
    spend(attacker, options.sent, options.cpu, options.seconds)
    attacker.close()
    sys.stdout.write(json.dumps({"sent": attacker.sent, "cpu_s": cpu_s() - before}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
