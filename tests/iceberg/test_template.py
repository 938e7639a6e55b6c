"""What the process that workers are forked from has imported."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import gc, json, sys
import arka.iceberg.template as template
print(json.dumps({
    "failure": template.failure,
    "pandas": "pandas" in sys.modules,
    "finders": [type(finder).__name__ for finder in sys.meta_path if type(finder).__module__.startswith("arka")],
    "collects": gc.isenabled(),
    "frozen": gc.get_freeze_count(),
}))
"""


def test_what_is_imported_once_for_all_workers():
    """Everything that jobs need and not pandas, which pyarrow would import; nothing of how that is done is left."""
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True, text=True)
    found = json.loads(answer.stdout)
    assert found.pop("frozen") > 100_000
    assert found == {"failure": None, "pandas": False, "finders": [], "collects": True}
