"""Set up logging: structlog for Arka's own events, the standard library's for everybody else's.

Owns: format, level, timestamps (UTC), destination, that each line passes ``arka.redaction``, and how many lines of one
event are written: whatever a client causes again and again costs a bounded part of the disk (T22). An event's name is
``tier.verb``, its facts are key=value. Only structlog's synchronous calls are used: the asynchronous family needs
asyncio.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, TextIO

import structlog
import structlog.tracebacks
from structlog.typing import EventDict, Processor

from arka.options import LogOptions
from arka.rates import Rate
from arka.redaction import redact

#: Libraries talk at warning level; their debug output helps only with ``log.level = debug``.
_FOREIGN_LEVEL = logging.WARNING

#: Lines of one event: more than a server that works ever writes. With a traceback each that is some MB at once.
EVENT_RATE: Final = Rate(1000, 10.0)


class EventLimit:
    """Leaves out lines of an event that comes too often; the next one that is written says how many (``left_out``).

    A structlog processor. May be called by any thread.
    """

    def __init__(self, rate: Rate = EVENT_RATE, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing written.

        Args:
            rate: lines of one event.
            clock: seconds.
        """
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        # Tokens as of a time, and lines left out since the last one that was written. There are few events and loggers.
        self._state: dict[str, tuple[float, float, int]] = {}

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        """Pass a line on, or leave it out.

        Raises:
            structlog.DropEvent: it is left out.
        """
        left_out = self._take(str(event.get("event")))
        if left_out is None:
            raise structlog.DropEvent
        if left_out:
            event["left_out"] = left_out + event.get("left_out", 0)
        return event

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a library's line is written; they are counted by logger."""
        left_out = self._take(record.name)
        if left_out:
            record.msg = f"{record.getMessage()} (lines left out: {left_out})"
            record.args = ()
        return left_out is not None

    def _take(self, name: str) -> int | None:
        """Count a line.

        Returns:
            How many were left out before it; None if it is left out itself.
        """
        now = self._clock()
        with self._lock:
            tokens, since, left_out = self._state.get(name, (float(self._rate.burst), now, 0))
            tokens = self._rate.tokens(tokens, now - since)
            if tokens < 1:
                self._state[name] = (tokens, now, left_out + 1)
                return None
            self._state[name] = (tokens - 1, now, 0)
            return left_out


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
    limit = EventLimit()
    final = _renderers(options.format, colors=destination.isatty())
    structlog.configure(
        processors=[limit, *shared, *final, _redacted],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=destination),
        # Log lines are rare; a cached logger would escape a later configuration and tests' captures.
        cache_logger_on_first_use=False,
    )
    foreign = logging.StreamHandler(destination)
    foreign.addFilter(limit.filter)
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


__all__ = ["EVENT_RATE", "EventLimit", "configure_logging"]
