"""How the commands ``arka-server`` and ``arka`` end: exit codes, and errors as lines for a person.

Owns: the numbers. Does not own which error means which (``arka.cli``).

Exit codes of both commands:
    0    done; a server stopped as asked, and everything accepted is as safe as its last ack said
    1    any other failure; the last lines say which
    2    usage or configuration: nothing was started
    3    stored data is damaged; the message names file and offset
    4    fenced: another process owns this node's log now
    128+n  a second signal n came during the drain, which was cut short
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, NoReturn

import click

from arka.redaction import redact

EXIT_FAILURE: Final = 1
EXIT_CONFIGURATION: Final = 2
EXIT_DAMAGED: Final = 3
EXIT_FENCED: Final = 4
EXIT_SIGNAL: Final = 128


def complain(error: BaseException) -> None:
    """Say on stderr what went wrong, the program's name first."""
    program = Path(sys.argv[0]).name
    for line in redact(str(error)).splitlines() or [type(error).__name__]:
        click.echo(f"{program}: {line}", err=True)


def fail(error: BaseException, code: int) -> NoReturn:
    """Say what went wrong and end with this exit code."""
    complain(error)
    sys.exit(code)


__all__ = [
    "EXIT_CONFIGURATION",
    "EXIT_DAMAGED",
    "EXIT_FAILURE",
    "EXIT_FENCED",
    "EXIT_SIGNAL",
    "complain",
    "fail",
]
