"""The log against a model: appends, faults, crashes and recoveries in any order."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable
from typing import Any

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arka.testing.simdisk import PowerCut, SimDisk
from arka.wal.segment import AppendedRange
from arka.wal.writer import WalPoisoned, WalWriter

from .logs import DIRECTORY, Recovered, batch_frame, open_log, recover_log

SEGMENT_BYTES = 8 * 1024

rows = st.lists(st.integers(0, 60), min_size=1, max_size=6)


class CrashMachine(RuleBasedStateMachine):
    """Everything acked survives, nothing is doubled, the order is kept, and what is found stays found.

    The model: ``durable`` are LSNs that were acked or handed out by a recovery; ``unsure`` were in an
    append that failed: any prefix of them may be found, and whatever is not found is gone for good.
    """

    disk: SimDisk
    writer: WalWriter | None

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.disk = SimDisk(random.Random(seed))
        self.writer = None
        self.durable: list[int] = []
        self.unsure: list[int] = []
        self.ranges: list[AppendedRange] = []
        self.retired_through = 0
        self.next_lsn = 1
        self.epoch = 0
        self.recover()

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        async def main() -> Any:
            return await call(*args)

        return trio.run(main)

    def recover(self) -> None:
        """Recover under a new epoch, check what is found, and open the log again."""
        self.epoch += 1

        async def main() -> Recovered:
            return await recover_log(self.disk, epoch=self.epoch)

        found: Recovered = trio.run(main)
        count = len(found.lsns)
        possible = self.durable + self.unsure
        assert found.lsns == possible[:count]
        assert count >= len(self.durable)
        assert found.log.last_lsn == max([self.retired_through, *found.lsns])
        names = [name for name in self.disk.list_names(DIRECTORY) if name.endswith(".wal")]
        assert names == [segment.ref.path.name for segment in found.log.segments], "nothing else comes back"
        self.closed = found.log.closed
        self.durable, self.unsure = possible[:count], []
        self.ranges = [part for segment in found.log.segments for part in segment.ranges]

        async def reopen() -> WalWriter:
            return await open_log(
                self.disk,
                epoch=self.epoch,
                first_segment=found.log.next_segment,
                segment_bytes=SEGMENT_BYTES,
            )

        self.writer = trio.run(reopen)

    def append(self, sizes: list[int], gap: int) -> None:
        assert self.writer is not None
        self.next_lsn += gap
        lsns = list(range(self.next_lsn, self.next_lsn + len(sizes)))
        self.next_lsn += len(sizes)
        try:
            ranges = self.run(self.writer.append, [batch_frame(*pair) for pair in zip(lsns, sizes, strict=True)])
        except WalPoisoned:
            if not self.unsure:
                self.unsure = lsns
        else:
            assert not self.unsure, "nothing is acked behind a failure"
            assert ranges[0].first_lsn == lsns[0]
            self.durable += lsns
            self.ranges += ranges

    @rule(sizes=rows, gap=st.integers(0, 3))
    def append_group(self, sizes: list[int], gap: int) -> None:
        self.append(sizes, gap)

    @rule(
        sizes=rows,
        operation=st.sampled_from(["write", "sync", "create", "rename", "sync_directory"]),
        error=st.sampled_from([errno.EIO, errno.ENOSPC]),
        after=st.integers(0, 3),
    )
    def append_with_fault(self, sizes: list[int], operation: str, error: int, after: int) -> None:
        self.disk.fail_next(operation, error, after=after)
        self.append(sizes, 0)

    @rule(sizes=rows, steps=st.integers(0, 12))
    def lose_power_while_appending(self, sizes: list[int], steps: int) -> None:
        self.disk.cut_power_after(steps)
        self.append(sizes, 0)
        self.disk.crash()
        self.recover()

    @rule()
    def crash(self) -> None:
        self.disk.crash()
        self.recover()

    @rule()
    def kill(self) -> None:
        self.disk.kill()
        self.recover()

    @rule(steps=st.integers(0, 14), crash=st.booleans(), times=st.integers(1, 3))
    def die_while_recovering(self, steps: int, crash: bool, times: int) -> None:
        self.disk.kill()
        for _ in range(times):
            self.disk.cut_power_after(steps)
            with contextlib.suppress(PowerCut):
                self.run(recover_killed, self.disk, self.epoch)
            if crash:
                self.disk.crash()
            else:
                self.disk.kill()
        self.recover()

    @precondition(lambda self: self.writer is not None and not self.writer.poisoned)
    @rule()
    def close_and_restart(self) -> None:
        assert self.writer is not None
        closed = False
        with contextlib.suppress(WalPoisoned):
            self.run(self.writer.close)
            closed = True
        self.disk.crash()
        self.recover()
        assert self.closed or not closed

    @precondition(lambda self: self.writer is not None and not self.writer.poisoned and len(self.ranges) > 2)
    @rule()
    def retire_oldest(self) -> None:
        assert self.writer is not None
        oldest, newest = self.ranges[0].segment, self.ranges[-1].segment
        if oldest == newest:
            return
        self.disk.clear_faults()
        self.run(self.writer.retire, [oldest])
        gone = [part for part in self.ranges if part.segment == oldest]
        self.retired_through = gone[-1].last_lsn
        self.ranges = self.ranges[len(gone) :]
        self.durable = [lsn for lsn in self.durable if lsn > self.retired_through]

    @invariant()
    def no_growth(self) -> None:
        """No file of another kind is left behind, but torn bytes kept for people."""
        for name in self.disk.list_names(DIRECTORY):
            assert name.startswith("segment-") or name in ("sealed", "sealed.new"), name


async def recover_killed(disk: SimDisk, epoch: int) -> None:
    await recover_log(disk, epoch=epoch + 1)


TestCrashMachine = CrashMachine.TestCase
TestCrashMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCrashMachine.__doc__ = CrashMachine.__doc__
