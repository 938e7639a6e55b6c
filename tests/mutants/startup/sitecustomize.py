"""Breaks the engine in each Python process that starts with this folder on its path; see ``tests.mutants.broken``."""

from __future__ import annotations

import os

if name := os.environ.get("BROKEN_ENGINE"):
    from tests.mutants.broken import MUTANTS

    MUTANTS[name]()
