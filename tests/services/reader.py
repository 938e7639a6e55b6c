"""Acks that are read while a test does other things."""

from __future__ import annotations

import threading

import pyarrow as pa
import pyarrow.flight as flight

from arka.testing.services import wait_for
from tests.process.clients import CALL_TIMEOUT_S, Ack, Stream


class Reader:
    """Reads a stream's acks as they come, in a thread of its own.

    Attributes:
        acks: so far.
        failure: the error that the stream ended with, if it did.
    """

    def __init__(self, stream: Stream) -> None:
        self.acks: list[Ack] = []
        self.failure: BaseException | None = None
        self._stream = stream
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def count(self, tier: str) -> int:
        """How many acks of a tier have come."""
        return sum(ack["durability_level"] == tier for ack in tuple(self.acks))

    def wait(self, tier: str, count: int) -> None:
        """Wait for this many acks of a tier; none may be an error."""
        wait_for(lambda: self.count(tier) >= count or not self._thread.is_alive() or self._errors(), f"acks of {tier}")
        assert self.failure is None
        assert self._errors() == [], self._errors()
        assert self.count(tier) == count

    def finish(self) -> list[Ack]:
        """Wait until the server ends the stream with OK, and close it; returns all acks."""
        self.join()
        if self.failure is not None:
            raise self.failure
        self._stream.writer.close()
        return self.acks

    def join(self) -> None:
        """Wait until the stream has ended, however it does."""
        self._thread.join(CALL_TIMEOUT_S)
        assert not self._thread.is_alive(), self.acks[-3:]

    def _errors(self) -> list[Ack]:
        return [ack for ack in tuple(self.acks) if ack["error"] is not None]

    def _run(self) -> None:
        try:
            for ack in self._stream.rest():
                self.acks.append(ack)
        except (flight.FlightError, pa.ArrowException) as error:
            self.failure = error
