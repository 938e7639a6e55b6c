"""Set up logging: structlog for Arka's own events, the standard library's for everybody else's.

Owns: format, level, timestamps (UTC), destination, and that each line passes ``arka.redaction``. An event's name is
``tier.verb``, its facts are key=value. Only structlog's synchronous calls are used: the asynchronous family needs
asyncio.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
import structlog.tracebacks
from structlog.typing import Processor

from arka.options import LogOptions
from arka.redaction import redact

#: Libraries talk at warning level; their debug output helps only with ``log.level = debug``.
_FOREIGN_LEVEL = logging.WARNING


def configure_logging(options: LogOptions, stream: TextIO | None = None) -> None:
    """Direct every log line of the process to one stream in one format.

    Args:
        options: format and level; checked already.
        stream: where to; the process's stderr if None. Writes block when its reader does.
    """
    destination = sys.stderr if stream is None else stream
    level = logging.getLevelNamesMapping()[options.level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    final = _renderers(options.format, colors=destination.isatty())
    structlog.configure(
        processors=[*shared, *final, _redacted],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=destination),
        # Log lines are rare; a cached logger would escape a later configuration and tests' captures.
        cache_logger_on_first_use=False,
    )
    foreign = logging.StreamHandler(destination)
    foreign.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final, _redacted],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [foreign]
    root.setLevel(level if level == logging.DEBUG else max(level, _FOREIGN_LEVEL))


def _redacted(_logger: object, _method: str, line: object) -> str:
    """Take secrets out of a finished line: also out of tracebacks and of what libraries say."""
    return redact(str(line))


def _renderers(name: str, *, colors: bool) -> list[Processor]:
    if name == "json":
        # Without local variables: they hold rows and credentials.
        tracebacks = structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        )
        return [tracebacks, structlog.processors.JSONRenderer(default=str)]
    return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]


__all__ = ["configure_logging"]
