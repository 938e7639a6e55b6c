"""A simulated object store: delays, refuses, loses responses, and lets puts land after their caller gave up.

Owns: the worst that a remote store and the network before it may do to single requests. Everything happens in the
calling task, on trio's clock, so that tests under a mock clock are exact; contents are plain bytes in memory.

Faults come from an explicit plan (``SimStore.plan``), else from a seeded random generator. A late put is applied
lazily: before the first request that comes when its time has passed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeVar

import trio

from arka.storage.ports import Buffer, ObjectExists, ObjectMeta, StoreUnavailable

T = TypeVar("T")

#: The operations that ``SimStore.plan`` knows.
OPERATIONS: Final = frozenset({"put_new", "get", "get_range", "list_keys", "delete"})


class Outcome(Enum):
    """What becomes of a request."""

    #: it is applied and answered.
    ANSWERED = "answered"
    #: it fails and was not applied.
    REFUSED = "refused"
    #: it was applied and fails: the response is lost.
    LOST = "lost"
    #: it fails, and is applied ``Fault.late_s`` later: it was on its way all the time. Writes only.
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to happen to one request.

    Attributes:
        outcome: how it ends.
        delay_s: how long it takes until it is applied (or refused).
        reply_s: how long the answer takes from there.
        gate: waited for before it is applied; for tests that set an order.
        reply_gate: waited for before it is answered.
        late_s: for LATE: seconds from the failure to the moment at which it is applied all the same.
    """

    outcome: Outcome = Outcome.ANSWERED
    delay_s: float = 0.0
    reply_s: float = 0.0
    gate: trio.Event | None = None
    reply_gate: trio.Event | None = None
    late_s: float = 0.0


@dataclass(slots=True)
class Request:
    """One request as the store saw it; steps are numbers that rise over all requests of the store.

    Attributes:
        operation: one of OPERATIONS.
        key: the key, the first of several, or the listing's prefix.
        begun: the step at which it was sent.
        begun_s: the same on trio's clock.
        ended: the step at which its caller learnt the outcome; None while it is under way or if it was cancelled.
        answered: whether that was an answer (ObjectExists and KeyError are), not a failure.
    """

    operation: str
    key: str
    begun: int
    begun_s: float
    ended: int | None = None
    answered: bool = False


@dataclass(frozen=True, slots=True)
class _Late:
    due_s: float
    apply: Callable[[], object]


class SimStore:
    """``ObjectStore`` in memory.

    Args:
        rng: decides the faults of requests that have no plan; seed it. None for no faults but planned ones.
        fault_share: the share of requests that the generator lets fail, 0 to 1.
        max_delay_s: the longest that the generator lets a request or its answer take, or a late put be late.

    Attributes:
        objects: what the store holds; tests may look and change.
        requests: all requests so far, in the order in which they were sent.
        away: while set, every request fails before it is applied.
    """

    def __init__(self, rng: random.Random | None = None, *, fault_share: float = 0.0, max_delay_s: float = 0.0) -> None:
        self._rng = rng
        self.fault_share = fault_share
        self.max_delay_s = max_delay_s
        self.objects: dict[str, bytes] = {}
        #: Told each object that is deleted.
        self.on_delete: Callable[[str, bytes], None] = lambda key, data: None
        self.requests: list[Request] = []
        self.away = False
        self._plans: list[tuple[str, str, list[Fault]]] = []
        self._late: list[_Late] = []
        self._steps = 0

    # -- faults -----------------------------------------------------------------------------------

    def plan(self, operation: str, *faults: Fault, key: str = "") -> None:
        """Say what happens to the next requests of an operation, one fault each.

        Args:
            operation: one of OPERATIONS.
            faults: in the order of the requests.
            key: only requests whose key holds this text count.
        """
        if operation not in OPERATIONS:
            raise ValueError(f"unknown operation {operation!r}: expected one of {sorted(OPERATIONS)}")
        self._plans.append((operation, key, list(faults)))

    def calm(self) -> None:
        """No faults from here on: neither planned nor random ones, and no outage. Late puts still come."""
        self._plans.clear()
        self.fault_share = 0.0
        self.max_delay_s = 0.0
        self.away = False

    def settle(self) -> None:
        """Apply all late puts now."""
        late, self._late = self._late, []
        for write in late:
            write.apply()

    def of(self, operation: str, key: str = "") -> list[Request]:
        """The requests of one operation whose key holds ``key``, in the order in which they were sent."""
        return [request for request in self.requests if request.operation == operation and key in request.key]

    # -- ObjectStore ------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """A name for messages."""
        return "sim://store"

    async def put_new(self, key: str, parts: Sequence[Buffer]) -> None:
        """See ``ports.ObjectStore.put_new``."""
        data = b"".join(bytes(part) for part in parts)

        def apply() -> None:
            if key in self.objects:
                raise ObjectExists(key)
            self.objects[key] = data

        await self._request("put_new", key, apply, late=lambda: self.objects.setdefault(key, data))

    async def get(self, key: str) -> bytes:
        """See ``ports.ObjectStore.get``."""
        return await self._request("get", key, lambda: self.objects[key])

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """See ``ports.ObjectStore.get_range``."""
        return await self._request("get_range", key, lambda: self.objects[key][start : start + length])

    async def list_keys(self, prefix: str, *, start_after: str | None = None) -> list[ObjectMeta]:
        """See ``ports.ObjectStore.list_keys``."""

        def apply() -> list[ObjectMeta]:
            keys = sorted(key for key in self.objects if key.startswith(prefix) and key > (start_after or ""))
            return [ObjectMeta(key, len(self.objects[key])) for key in keys]

        return await self._request("list_keys", prefix, apply)

    async def delete(self, keys: Sequence[str]) -> None:
        """See ``ports.ObjectStore.delete``."""

        def apply() -> None:
            for key in keys:
                if key in self.objects:
                    self.on_delete(key, self.objects.pop(key))

        await self._request("delete", keys[0] if keys else "", apply, late=apply)

    # -- inside -----------------------------------------------------------------------------------

    async def _request(
        self, operation: str, key: str, apply: Callable[[], T], *, late: Callable[[], object] | None = None
    ) -> T:
        """Live through one request: sent, applied or not, answered or not."""
        now = trio.current_time()
        request = Request(operation, key, self._step(), now)
        self.requests.append(request)
        fault = self._choose(operation, key)
        on_its_way = late
        try:
            await trio.lowlevel.checkpoint()
            await _pass(fault.delay_s, fault.gate)
            self._arrive()
            if self.away or fault.outcome in (Outcome.REFUSED, Outcome.LATE):
                if fault.outcome is Outcome.LATE and late is not None:
                    self._postpone(late, fault.late_s)
                raise self._failure(request, "refused")
            on_its_way = None
            answer = _outcome_of(apply)
            await _pass(fault.reply_s, fault.reply_gate)
        except trio.Cancelled:
            # Whoever gives up does not call the bytes back that are on the wire.
            if on_its_way is not None and self._rng is not None and self._rng.random() < 0.5:
                self._postpone(on_its_way, self._rng.uniform(0, self.max_delay_s))
            raise
        if fault.outcome is Outcome.LOST:
            raise self._failure(request, "response lost")
        request.ended = self._step()
        request.answered = True
        if isinstance(answer, _Raised):
            raise answer.error
        return answer

    def _choose(self, operation: str, key: str) -> Fault:
        for name, text, faults in self._plans:
            if name == operation and text in key and faults:
                return faults.pop(0)
        rng = self._rng
        if rng is None:
            return Fault()
        outcome = Outcome.ANSWERED
        if rng.random() < self.fault_share:
            outcome = rng.choice((Outcome.REFUSED, Outcome.LOST, Outcome.LATE))
        delays = [rng.uniform(0, self.max_delay_s) for _ in range(3)]
        return Fault(outcome, delay_s=delays[0], reply_s=delays[1], late_s=delays[2])

    def _arrive(self) -> None:
        """Apply the late puts whose time has come."""
        now = trio.current_time()
        due = [write for write in self._late if write.due_s <= now]
        self._late = [write for write in self._late if write.due_s > now]
        for write in due:
            write.apply()

    def _postpone(self, apply: Callable[[], object], late_s: float) -> None:
        self._late.append(_Late(trio.current_time() + late_s, apply))

    def _failure(self, request: Request, why: str) -> StoreUnavailable:
        request.ended = self._step()
        return StoreUnavailable(f"{self.url}: {request.operation} {request.key}: {why}")

    def _step(self) -> int:
        self._steps += 1
        return self._steps


@dataclass(frozen=True, slots=True)
class _Raised:
    error: Exception


def _outcome_of(apply: Callable[[], T]) -> T | _Raised:
    """Apply now; the answer, also an error, travels back later."""
    try:
        return apply()
    except (ObjectExists, KeyError) as error:
        return _Raised(error)


async def _pass(seconds: float, gate: trio.Event | None) -> None:
    if seconds:
        await trio.sleep(seconds)
    if gate is not None:
        await gate.wait()


__all__ = ["OPERATIONS", "Fault", "Outcome", "Request", "SimStore"]
