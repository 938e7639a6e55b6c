"""The commands of ``docs/recovery.md``, run from the page's own text: every row is there once (R38)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import NUMBERS, Stream, connect, create, numbers, write_all

pytestmark = pytest.mark.process

PAGE = Path(__file__).parents[2] / "docs" / "recovery.md"
ARKA = Path(sys.executable).with_name("arka")


def commands(section: str) -> list[str]:
    """The command lines of one section of the page."""
    found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert found is not None, f"{PAGE} has no section {section!r}"
    return [line for block in re.findall(r"```sh\n(.*?)```", found[1], re.S) for line in block.splitlines()]


def follow(section: str, server: ServerProcess, *, codes: tuple[int, ...] = (0,)) -> str:
    """Run a section's commands on a server that is not running; it runs in the end. Returns what they printed."""
    said = ""
    for line in commands(section):
        if line.startswith("arka-server"):
            assert line == "arka-server --data-dir DATA_DIR"
            server.start()
            continue
        text = line.replace("DATA_DIR", str(server.data))
        if "TIME" in text:
            (aside,) = server.data.glob("wal.discarded-*")
            text = text.replace("TIME", aside.name.removeprefix("wal.discarded-"))
        if "URL" in text:
            text = text.replace("URL", server.location)
        done = subprocess.run([ARKA, *text.split()[1:]], capture_output=True, text=True, timeout=120, check=False)
        said += done.stdout + done.stderr
        assert done.returncode in codes, (text, done.returncode, said)
    return said


def rows(server: ServerProcess, name: str) -> list[int]:
    found: list[int] = lake.rows(server.data, name)["n"].to_pylist()
    return sorted(found)


def write_at_disk(server: ServerProcess, name: str, values: range, key: str | None = None) -> None:
    """Write rows that reach the disk and, since nothing is uploaded, no further."""
    with connect(server.location) as client:
        more = {} if key is None else {"idempotency_key": key}
        stream = Stream(client, name, NUMBERS, requested_durability="disk", **more)
        for value in values:
            stream.write(numbers([value]))
        assert [ack for ack in stream.finish() if ack["error"]] == []


@pytest.mark.parametrize("keyed", [False, True])
def test_object_store(make_server: Callable[..., ServerProcess], keyed: bool) -> None:
    """A store that is gone: what Iceberg holds is left out, what only the disk holds is sent again, each row once."""
    server = make_server(iceberg__commit_interval_s=0.1).start()
    with connect(server.location) as client:
        create(client, "t")
        create(client, "p", primary_key="n", table_type="primary_key")
        write_all(client, "t", [numbers([n]) for n in range(5)])
        write_all(client, "p", [numbers([n]) for n in range(5)])
    server.stop()
    late = make_server(object_store__linger_s=60, iceberg__commit_interval_s=60).start()
    write_at_disk(late, "t", range(5, 9), "k" if keyed else None)
    late.kill()
    shutil.rmtree(server.data / "objects")
    refused = make_server()
    with pytest.raises(Exception, match="holds no epoch of node"):
        refused.start()
    said = follow("The object store", server)
    assert "left out: 10 writes that their table's own mark says are in it" in said
    with connect(server.location) as client:
        write_all(client, "t", [numbers([9])])
    assert rows(server, "t") == list(range(10))
    assert rows(server, "p") == list(range(5))
    server.stop()


def test_page_has_no_other_commands() -> None:
    """Whatever the page tells people to run is run by a test of this file."""
    sections = re.findall(r"^## (.*)$", PAGE.read_text(), re.M)
    assert sections == ["The object store"]
