"""Tests that have to fail on an engine that breaks their rule; ``tests/README.md`` lists all mutants by rule.

Each runs in a process of its own, and so do the servers that it starts: all of them are broken the same way.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.broken import MUTANTS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]

#: By mutant: the tests that catch it, as arguments of pytest.
CAUGHT_BY = {
    "copies_start": ("tests/process/test_moved_directory.py", "test_copy"),
    "tokens_are_ignored": ("tests/tiers/test_copies.py", "both_at_once or ran_on"),
    "superseded_metadata_goes_at_once": ("tests/iceberg/test_commit.py", "superseded"),
    "private_properties": ("tests/iceberg/test_private_properties.py", "new_table_holds"),
    "old_connections_are_trusted": ("tests/iceberg/test_pointer.py", "went_back"),
    "waiting_files_are_trusted": ("tests/iceberg/test_pointer.py", "files_of_rows"),
    "files_of_commits_are_leftovers": ("tests/iceberg/test_attempts.py", "that_a_commit_names"),
    "reads_of_what_was_set_aside": ("tests/tiers/test_aside.py", "leave_it_out"),
    "set_apart_without_a_word": ("tests/tiers/test_apart.py", "with_a_word"),
    "starts_without_a_deadline": ("tests/tiers/test_watch.py", "one_deadline"),
    "streams_without_order": ("tests/flight/test_ordering.py", "behind_a_refusal"),
    "damage_counts_against_all": ("tests/tiers/test_activity.py", "kill_of_an_idle"),
    "new_stores_without_copies": ("tests/tiers/test_new_store.py", "copies_of_checkpoints or parked"),
    "reads_believe_marks": ("tests/iceberg/test_reads_of_marks.py", "not_ours"),
    "reads_know_no_commit": ("tests/tiers/test_reads.py", "undid_names"),
    "backups_without_a_look": ("tests/process/test_backup_whole.py", "compacted"),
    "backups_keep_their_block": ("tests/process/test_backup.py", "sent_again_after_a_restore"),
    "missing_segments_are_not_missed": ("tests/wal/test_named_segments.py", "segment_that_is_gone"),
    "missing_state_is_an_empty_disk": ("tests/wal/test_named_segments.py", "state_or_mark"),
    "settings_of_others": ("tests/iceberg/test_pyiceberg_contract.py", "where_settings"),
    "doubles_are_floats": ("tests/iceberg/test_exact_partitions.py", "merged"),
    "imports_from_the_working_directory": ("tests/process/test_surroundings.py", "path"),
    "drops_by_name": ("tests/iceberg/test_drops.py", "another_table_meanwhile"),
    "purges_without_a_look": ("tests/iceberg/test_drops.py", "around_others"),
    "files_of_older_columns": ("tests/iceberg/test_align.py", "not_committed"),
    "second_names_are_renames": ("tests/tiers/test_names.py", "two_names"),
    "schema_ids_are_believed": ("tests/tiers/test_schema_ids.py", "two_sets"),
}


@pytest.mark.parametrize("name", sorted(CAUGHT_BY))
def test_catches(name: str) -> None:
    """A test of the rule fails on the broken engine, in an assertion of its own."""
    where, which = CAUGHT_BY[name]
    path = os.pathsep.join((str(Path(__file__).parent / "startup"), str(ROOT)))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-cov", where, "-k", which]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "BROKEN_ENGINE": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert re.search(r"^FAILED|\d+ failed", ran.stdout, re.MULTILINE), ran.stdout[-3000:]


def test_each_mutant_has_a_test() -> None:
    """Every broken engine is one that some test has to catch."""
    assert MUTANTS.keys() == CAUGHT_BY.keys()
