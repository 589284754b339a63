"""An elastic job as a plain loop, for tests: its numbers do not depend on the world, so any run has
one answer."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from ranks import EXAMPLES, data, network, share

from hessianflow.distributed.synchronize import GradientSynchronizer
from hessianflow.elastic.member import JobReport
from hessianflow.interfaces import HessianFlowError


class PlainJob:
    """SGD over `total` updates; the batch doubles half-way. `faults`: at which update which rank
    has which, once."""

    def __init__(
        self, folder: str, total: int, faults: dict[int, tuple[int, str]] | None = None
    ) -> None:
        self.folder, self.total, self.faults = folder, total, faults or {}
        self.model, (self.inputs, self.targets) = network(), data()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.updates = self.examples = 0
        self.sync = None

    @property
    def waited_seconds(self) -> float:
        return self.sync.waited_seconds

    def join(self, reducer) -> None:
        self.reducer = reducer
        if self.sync is None:
            self.sync = GradientSynchronizer(self.model.parameters(), reducer)
        self.sync.rejoin(reducer)

    def report(self) -> JobReport:
        done = self.updates >= self.total
        return JobReport(
            self.updates, self.examples, self.batch_size, 8, done, self.updates, self.updates == 18
        )

    @property
    def batch_size(self) -> int:
        return 8 if self.updates < self.total // 2 else 16

    def run_until(self, updates: int) -> JobReport:
        while self.updates < min(updates, self.total):
            start = self.examples % EXAMPLES
            self.step(start, min(start + self.batch_size, EXAMPLES))
        return self.report()

    def step(self, start: int, stop: int) -> None:
        rank, fault = self.faults.get(self.updates, (-1, ""))
        if self.reducer.rank == rank and self.is_first(fault):
            FAULTS[fault]()
        first, last = share(start, stop, self.reducer)
        self.optimizer.zero_grad()
        self.sync.begin(last - first)
        loss = None
        if last > first:
            loss = F.cross_entropy(self.model(self.inputs[first:last]), self.targets[first:last])
            with self.sync.last_backward():
                loss.backward()
        totals, _ = self.sync.finish()
        self.optimizer.step()
        self.updates, self.examples = self.updates + 1, self.examples + totals.examples

    def rows(self, start: int) -> list[dict]:
        return [{"kind": "update", "number": number} for number in range(start, self.updates)]

    def describe(self) -> dict:
        return {"updates": self.updates}

    def is_first(self, mark: str) -> bool:
        """Whether no process of this run has left this mark before."""
        try:
            Path(self.folder, mark).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": [self.updates, self.examples],
        }

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates, self.examples = state["done"]


class WritingJob(PlainJob):
    """Leaves its weights behind when it is done."""

    def run_until(self, updates: int) -> JobReport:
        report = super().run_until(updates)
        if report.done and self.reducer.rank == 0:
            torch.save(self.model.state_dict(), os.path.join(self.folder, "weights.pt"))
        return report


class UnevenJob(WritingJob):
    """Rank 0 says that it does nothing but wait, rank 1 that it never waits."""

    @property
    def waited_seconds(self) -> float:
        return time.perf_counter() if self.reducer.rank == 0 else 0.0


class DyingNewcomer(WritingJob):
    """The second process ends while it builds its job."""

    def __init__(self, folder: str, total: int, faults: dict[int, tuple[int, str]]) -> None:
        super().__init__(folder, total, faults)
        if not self.is_first("built") and self.is_first("refused"):
            os._exit(1)


class DyingStarter(WritingJob):
    """The first process ends while it builds its job, the second while it joins the world, the
    third soon after."""

    def __init__(self, folder: str, total: int) -> None:
        super().__init__(folder, total)
        self.dies_once("building")

    def join(self, reducer) -> None:
        super().join(reducer)
        self.dies_once("joining")

    def describe(self) -> dict:
        self.dies_once("describing")
        return super().describe()

    def dies_once(self, mark: str) -> None:
        if self.is_first(mark):
            die()


class DoomedJob(PlainJob):
    def __init__(self, folder: str, total: int) -> None:
        super().__init__(folder, total)
        die()


class RefusingJob(PlainJob):
    def __init__(self, folder: str, total: int) -> None:
        raise HessianFlowError("no data under x: get it")


class BrokenJob(PlainJob):
    def step(self, start: int, stop: int) -> None:
        raise KeyError("a bug of the user's")


class FailingJob(PlainJob):
    def step(self, start: int, stop: int) -> None:
        raise RuntimeError("device-side assert")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(3600)


FAULTS = {"dies": die, "hangs": hang}
