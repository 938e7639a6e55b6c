"""Run measurements: ``python -m bench [NAME …]``; without a name, all of them."""

from __future__ import annotations

import sys

from bench import keys as keys
from bench import replay as replay
from bench import tiers as tiers
from bench import transforms as transforms
from bench import transport as transport
from bench import upserts as upserts
from bench.harness import run
from bench.peers import kafka as kafka
from bench.peers import nats as nats
from bench.peers import pyiceberg_append as pyiceberg_append

sys.exit(run(sys.argv[1:]))
