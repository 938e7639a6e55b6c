"""Logging: one line for each event, in the chosen format, with UTC time, from Arka and from its libraries."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from arka.logs import EVENT_RATE, EventLimit, configure_logging
from arka.options import LogOptions
from arka.rates import Rate


@pytest.fixture
def configured():
    """Give a function that configures logging to a buffer."""

    def configure(**options) -> io.StringIO:
        stream = io.StringIO()
        configure_logging(LogOptions(**options), stream)
        return stream

    return configure


def test_json_is_one_object_a_line(configured):
    """Each event is one JSON object: event, level, UTC timestamp and its facts."""
    stream = configured(format="json")
    structlog.get_logger().info("server.ready", flight="grpc://h:1", path=object)
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert (event["event"], event["level"], event["flight"]) == ("server.ready", "info", "grpc://h:1")
    assert event["timestamp"].endswith("Z")


def test_levels_filter(configured):
    """Nothing below the level is written."""
    stream = configured(level="warning")
    log = structlog.get_logger()
    log.info("stream.closed")
    log.warning("disk.slow")
    assert "stream.closed" not in stream.getvalue()
    assert "disk.slow" in stream.getvalue()


@pytest.mark.parametrize(("level", "debug_seen"), [("info", False), ("debug", True)])
def test_libraries_log_in_the_same_format(configured, level, debug_seen):
    """A library's warnings come in Arka's format; its chatter only at debug."""
    stream = configured(format="json", level=level)
    logging.getLogger("pyiceberg").warning("slow by %d s", 3)
    logging.getLogger("pyiceberg").info("chatter")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (events[0]["event"], events[0]["logger"], events[0]["level"]) == (
        "slow by 3 s",
        "pyiceberg",
        "warning",
    )
    assert (len(events) == 2) == debug_seen


@pytest.mark.parametrize("style", ["json", "console"])
def test_tracebacks_hold_no_local_variables(configured, style):
    """A logged exception has its traceback, and not the values of locals: rows and credentials."""
    stream = configured(format=style)
    secret = "hunter" + "2"
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception("stream.failed")
    assert "broken" in stream.getvalue()
    assert "test_logs.py" in stream.getvalue()
    assert secret not in stream.getvalue()


def test_console_has_no_colour_codes_off_a_terminal(configured):
    """A log file stays readable."""
    stream = configured()
    structlog.get_logger().error("wal.poisoned")
    assert "\x1b" not in stream.getvalue()


def test_an_event_that_comes_too_often_is_left_out(configured):
    """However often a client causes an event or a library complains, a bounded number of lines is written (T22)."""
    stream = configured(format="json")
    library = logging.getLogger("some.library")
    for number in range(2 * EVENT_RATE.burst):
        structlog.get_logger().info("action.malformed", number=number)
        library.warning("complaint %d", number)
    structlog.get_logger().info("server.ready")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len([event for event in events if event["event"] == "action.malformed"]) < 1.5 * EVENT_RATE.burst
    assert len([event for event in events if event.get("logger") == "some.library"]) < 1.5 * EVENT_RATE.burst
    assert events[-1]["event"] == "server.ready"


def test_how_many_lines_were_left_out_is_said():
    """The next line of the event that is written says it; other events do not."""
    now = [0.0]
    limit = EventLimit(Rate(2, 1.0), lambda: now[0])
    for _ in range(2):
        assert limit(None, "info", {"event": "a.b"}) == {"event": "a.b"}
    for _ in range(3):
        with pytest.raises(structlog.DropEvent):
            limit(None, "info", {"event": "a.b"})
    assert limit(None, "info", {"event": "c.d"}) == {"event": "c.d"}
    now[0] = 1.0
    assert limit(None, "info", {"event": "a.b"}) == {"event": "a.b", "left_out": 3}
    record = logging.LogRecord("a.b", logging.WARNING, "", 0, "text %d", (1,), None)
    assert not limit.filter(record)
    now[0] = 2.0
    assert limit.filter(record)
    assert record.getMessage() == "text 1 (lines left out: 1)"
