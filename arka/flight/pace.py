"""The least rate of granted messages: who holds memory that others wait for has to use it (T25).

Owns: how fast each stream with a granted message in progress sends, and the end of those that are too slow while others
wait. Does not own grants (``arka.flight.flow``), the ledger, nor when to look: each connection that waits does that.

A stream is judged by the bytes of ten seconds in which it was seen with a granted message in progress each time, the
same message or others. So a client gains nothing by ending one slow message and beginning another. A client that does
not read its acks, so that its messages are not taken, holds memory as well.
"""

from __future__ import annotations

from typing import Final, Protocol

import structlog

from arka.errors import AdmissionRejected
from arka.options import Limits
from arka.tiers.accounts import Account
from arka.tiers.admission import Ledger

log = structlog.get_logger(__name__)

#: Seconds over which a rate is taken.
PACE_S: Final = 10.0
#: Seconds between two looks at a stream while somebody waits, and the pause in which no look makes a new beginning.
LOOK_S: Final = 1.0
_PAUSE_S: Final = 3 * LOOK_S
#: Most streams in one look: some milliseconds.
_LOOK_STREAMS: Final = 1000
#: Seconds until the next look when this one did not come to all streams.
_SOON_S: Final = 0.01


class Paced(Protocol):
    """The inbound half of a stream, as far as its rate goes."""

    account: Account | None
    paced: bool

    @property
    def holds_grant(self) -> bool:
        """Whether a granted message is in progress, or is not taken because the client does not read its acks."""
        ...

    @property
    def progress_bytes(self) -> int:
        """Payload that has come on the stream so far."""
        ...

    def fail(self, error: Exception) -> None:
        """End the stream and free what it holds."""
        ...


class _Sample:
    """A stream, and since when it has been seen with a granted message each time."""

    __slots__ = ("bytes", "seen_at", "since", "stream")

    def __init__(self, stream: Paced) -> None:
        self.stream = stream
        self.seen_at = self.since = -1e9
        self.bytes = 0


class Pace:
    """Watches all streams of a server that have a granted message in progress. Used from trio's thread only."""

    def __init__(self, ledger: Ledger, limits: Limits) -> None:
        self._ledger = ledger
        self._least = limits.min_bytes_per_s
        # In the order of the next looks.
        self._samples: dict[Paced, _Sample] = {}
        self._next_at = -1e9
        # How many streams the look that is under way has still to come to.
        self._left = 0
        # How many streams that look has ended.
        self._ended = 0

    def __len__(self) -> int:
        return len(self._samples)

    def join(self, stream: Paced) -> None:
        """Watch a stream, whose message was granted, until a look finds that none is in progress."""
        stream.paced = True
        self._samples[stream] = _Sample(stream)

    def leave(self, stream: Paced) -> None:
        """Forget a stream: it is over."""
        stream.paced = False
        self._samples.pop(stream, None)

    def look(self, now: float) -> float:
        """Look at streams if it is time for that; ends those that are too slow while others wait.

        Args:
            now: trio time.

        Returns:
            When to call again, as long as somebody waits.
        """
        if now < self._next_at:
            return self._next_at
        if not self._left:
            self._left = len(self._samples)
        self._left = min(self._left, len(self._samples))
        for _ in range(min(self._left, _LOOK_STREAMS)):
            stream = next(iter(self._samples))
            sample = self._samples.pop(stream)
            if self._stays(sample, now):
                self._samples[stream] = sample
            else:
                stream.paced = False
            self._left -= 1
        if self._ended and not self._left:
            # One line, however many there are.
            log.info("streams.too_slow", streams=self._ended, least_bytes_per_s=self._least)
            self._ended = 0
        self._next_at = now + (_SOON_S if self._left else LOOK_S)
        return self._next_at

    def _stays(self, sample: _Sample, now: float) -> bool:
        stream = sample.stream
        if not stream.holds_grant:
            return False
        progress = stream.progress_bytes
        if now - sample.seen_at > _PAUSE_S:
            sample.since, sample.bytes = now, progress
        sample.seen_at = now
        took_s = now - sample.since
        if took_s < PACE_S:
            return True
        came = progress - sample.bytes
        sample.since, sample.bytes = now, progress
        if came >= self._least * took_s or not self._ledger.others_wait(stream.account):
            return True
        self._ended += 1
        stream.fail(
            AdmissionRejected(
                f"{came} bytes of a message came in {took_s:.0f} s while others waited for memory, expected are "
                f"{self._least} a second (limits.min_bytes_per_s): send faster, or in smaller messages"
            )
        )
        return False


__all__ = ["LOOK_S", "PACE_S", "Pace", "Paced"]
