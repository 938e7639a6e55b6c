"""Run measurements: ``python -m bench [NAME …]``; without a name, all of them."""

from __future__ import annotations

import sys

from bench.harness import run

sys.exit(run(sys.argv[1:]))
