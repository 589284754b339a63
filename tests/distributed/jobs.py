"""An elastic job as a plain loop, for tests: its numbers do not depend on the world, so any run has one answer."""

import os
import time

import torch
import torch.nn.functional as F
from ranks import EXAMPLES, data, network, share

from hessianflow.distributed.elastic_member import JobReport
from hessianflow.distributed.synchronize import GradientSynchronizer


class PlainJob:
    """SGD over `total` updates; the batch doubles half-way. Leaves its process id in a folder."""

    def __init__(self, folder: str, total: int, seconds: float = 0.0) -> None:
        with open(os.path.join(folder, str(os.getpid())), "w"):
            pass
        self.folder, self.total, self.seconds = folder, total, seconds
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
        return JobReport(self.updates, self.examples, self.batch_size, 8, self.updates >= self.total)

    @property
    def batch_size(self) -> int:
        return 8 if self.updates < self.total // 2 else 16

    def run_until(self, updates: int) -> JobReport:
        while self.updates < min(updates, self.total):
            start = self.examples % EXAMPLES
            self.step(start, min(start + self.batch_size, EXAMPLES))
        return self.report()

    def step(self, start: int, stop: int) -> None:
        time.sleep(self.seconds)
        first, last = share(start, stop, self.reducer)
        self.optimizer.zero_grad()
        self.sync.begin(last - first)
        loss = None
        if last > first:
            loss = F.cross_entropy(self.model(self.inputs[first:last]), self.targets[first:last])
            with self.sync.last_backward():
                loss.backward()
        totals = self.sync.finish(loss, None)
        self.optimizer.step()
        self.updates, self.examples = self.updates + 1, self.examples + totals.examples

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


class PatientJob(WritingJob):
    """Takes its time while it is alone with a batch for two, so that a newcomer has time to start."""

    def step(self, start: int, stop: int) -> None:
        alone = self.reducer.world_size == 1 and self.batch_size == 16 and self.updates < 50
        time.sleep(0.8 if alone else 0.0)
        super().step(start, stop)


class HangingJob(WritingJob):
    """Rank 1 sleeps at update 8, once."""

    def step(self, start: int, stop: int) -> None:
        flag = os.path.join(self.folder, "hung")
        if self.updates == 8 and self.reducer.rank == 1 and not os.path.exists(flag):
            open(flag, "w").close()
            time.sleep(600)
        super().step(start, stop)


class SlowJob(WritingJob):
    """Rank 1 takes its time."""

    def step(self, start: int, stop: int) -> None:
        time.sleep(0.05 if self.reducer.rank == 1 else 0.0)
        super().step(start, stop)


class DyingNewcomer(WritingJob):
    """The second process ends while it builds its job."""

    def __init__(self, folder: str, total: int, seconds: float = 0.0) -> None:
        if len(os.listdir(folder)) == 1:
            open(os.path.join(folder, "refused"), "w").close()
            os._exit(1)
        super().__init__(folder, total, seconds)


class BrokenJob(PlainJob):
    def step(self, start: int, stop: int) -> None:
        raise KeyError("a bug of the user's")


class FailingJob(PlainJob):
    def step(self, start: int, stop: int) -> None:
        raise RuntimeError("device-side assert")
