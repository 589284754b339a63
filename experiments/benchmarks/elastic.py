"""What many ranks cost: synchronisation against DDP, pauses of a resize, a parameter server's push
and pull.

    python experiments/benchmarks/elastic.py sync --rounds 60
    python experiments/benchmarks/elastic.py trainer --rounds 40
    python experiments/benchmarks/elastic.py resize --seconds 300
    python experiments/benchmarks/elastic.py server --rounds 30
    python experiments/benchmarks/elastic.py kill --kills 10 --seconds 120

`sync` pairs, on two gloo ranks, our GradientSynchronizer with torch's DistributedDataParallel in
otherwise the same loop, step by step in turn. `trainer` pairs the whole trainer with a hand-written
loop around DDP on the same batches, a few steps at a time in turn. `resize` trains on Ray with 1,
2, 1, 2 workers. `kill` ends random workers while it trains.
"""

import argparse
import gc
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from paired import ratios, spread
from torch import Tensor, nn

from hessianflow import AdaptiveBatchTrainer, models
from hessianflow.data import DeviceBatches
from hessianflow.distributed import GroupReducer, GroupWorld, run_local
from hessianflow.distributed.ray_session import connect
from hessianflow.distributed.synchronize import GradientSynchronizer
from hessianflow.dual_batch.actors import ServerActor
from hessianflow.dual_batch.server import ParameterServer
from hessianflow.elastic.member import JobReport
from hessianflow.elastic.policy import Sample
from hessianflow.elastic.run import ElasticRun
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.interfaces import Hits, StepResult
from hessianflow.training import Passes, Reporting

BATCH, STEPS = 32, 8
"""Examples a rank and step; steps of the trainer between two looks at the clock."""


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    {"sync": sync, "trainer": trainer, "resize": resize, "server": server, "kill": kill}[
        options.what
    ](options)


def sync(options: argparse.Namespace) -> None:
    for name in options.nets:
        ours, ddp = run_local(compare, 2, name, options.rounds, timeout_seconds=600)[0]
        show(f"{name}, gradients", name, ours, ddp)


def trainer(options: argparse.Namespace) -> None:
    for name in options.nets:
        ours, ddp = run_local(compare_trainer, 2, name, options.rounds, timeout_seconds=600)[0]
        show(f"{name}, trainer", name, ours, ddp)


def show(title: str, name: str, ours: "Times", ddp: "Times") -> None:
    megabytes = sum(p.numel() for p in network(name).parameters()) * 4 / 1e6
    print(f"{title}, {megabytes:.1f} MB of gradients, batch {BATCH} a rank")
    for clock, mine, theirs in zip(
        ("wall", "processor"), zip(*ours, strict=True), zip(*ddp, strict=True), strict=True
    ):
        medians = (
            f"ours {1e3 * statistics.median(mine):6.1f} ms, DDP"
            f" {1e3 * statistics.median(theirs):6.1f} ms"
        )
        print(f"  {clock:9s} {medians}, ours / DDP {spread(ratios(mine, theirs))}")


Times = list[tuple[float, float]]
"""Wall and processor seconds of each step."""


def compare(reducer: GroupReducer, name: str, rounds: int) -> tuple[Times, Times]:
    """The steps of ours and of DDP, in turn."""
    torch.set_num_threads(1)
    inputs, targets = pixels(BATCH, seed=reducer.rank)
    return in_turn(
        reducer, our_loop(reducer, name, inputs, targets), ddp_loop(name, inputs, targets), rounds
    )


def compare_trainer(reducer: GroupReducer, name: str, rounds: int) -> tuple[Times, Times]:
    """Stretches of a few steps of the trainer and of DDP, in turn; the time of one step."""
    torch.set_num_threads(1)
    ours, ddp = in_turn(reducer, trainer_loop(reducer, name), ddp_on_batches(reducer, name), rounds)
    return [(a / STEPS, b / STEPS) for a, b in ours], [(a / STEPS, b / STEPS) for a, b in ddp]


def in_turn(
    reducer: GroupReducer, ours: Callable[[], None], ddp: Callable[[], None], rounds: int
) -> tuple[Times, Times]:
    seconds: dict[Callable[[], None], Times] = {ours: [], ddp: []}
    for number in range(rounds + 5):
        for step in (ours, ddp) if number % 2 else (ddp, ours):
            reducer.gather(None)
            began, spent = time.perf_counter(), time.process_time()
            step()
            if number >= 5:
                seconds[step].append((time.perf_counter() - began, time.process_time() - spent))
    result = seconds[ours], seconds[ddp]
    del ours, ddp, step, seconds
    gc.collect()  # a live DDP object at the end of a process makes gloo abort
    return result


def our_loop(
    reducer: GroupReducer, name: str, inputs: Tensor, targets: Tensor
) -> Callable[[], None]:
    model = network(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    synchronizer = GradientSynchronizer(model.parameters(), reducer)

    def step() -> None:
        optimizer.zero_grad()
        synchronizer.begin(len(targets))
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets)
        with synchronizer.last_backward():
            loss.backward()
        rows = len(targets)
        hits = Hits((outputs.argmax(dim=1) == targets).sum(), rows)
        synchronizer.finish(StepResult(loss.detach() * rows, rows, hits, rows))
        optimizer.step()

    return step


def trainer_loop(reducer: GroupReducer, name: str) -> Callable[[], None]:
    model = network(name)
    made = AdaptiveBatchTrainer(
        model,
        batches(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        loss_fn=F.cross_entropy,
        epochs=10_000,
        passes=Passes(norm_batch_size=0),  # as DDP: the whole share of a rank
        reporting=Reporting(show_progress=False),
        world=GroupWorld(reducer),
    )
    return lambda: made.run_until(made.progress.updates + STEPS)


def ddp_on_batches(reducer: GroupReducer, name: str) -> Callable[[], None]:
    model = nn.parallel.DistributedDataParallel(network(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = batches()
    data.set_shard(reducer.rank, reducer.world_size)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from data

    stream = endless()

    def steps() -> None:
        for inputs, targets in islice(stream, STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    return steps


def batches() -> DeviceBatches:
    return DeviceBatches(*pixels(100 * BATCH, seed=0), 2 * BATCH)


def ddp_loop(name: str, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    model = nn.parallel.DistributedDataParallel(network(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


class PixelsJob:
    """An elastic job on made-up pixels until a number of examples, or of seconds, is reached."""

    def __init__(self, updates: int, folder: str | None = None) -> None:
        torch.set_num_threads(1)
        if folder is not None:
            Path(folder, str(os.getpid())).touch()  # so that somebody can end this process
        self.model = network("resnet20")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.total, self.updates, self.examples = updates, 0, 0
        self.inputs, self.targets = pixels(2 * BATCH, seed=0)
        self.synchronizer: GradientSynchronizer | None = None

    @property
    def waited_seconds(self) -> float:
        """Time spent in sums."""
        return 0.0 if self.synchronizer is None else self.synchronizer.waited_seconds

    def join(self, reducer: GroupReducer) -> None:
        """Take this rank's rows."""
        if self.synchronizer is None:
            self.synchronizer = GradientSynchronizer(self.model.parameters(), reducer)
        self.synchronizer.rejoin(reducer)
        rows = 2 * BATCH // reducer.world_size
        self.share = slice(reducer.rank * rows, (reducer.rank + 1) * rows)

    def report(self) -> JobReport:
        """How far it has come."""
        return JobReport(self.updates, self.examples, 2 * BATCH, BATCH, self.updates >= self.total)

    def run_until(self, updates: int) -> JobReport:
        """Train."""
        assert self.synchronizer is not None
        inputs, targets = self.inputs[self.share], self.targets[self.share]
        while self.updates < min(updates, self.total):
            self.optimizer.zero_grad()
            self.synchronizer.begin(len(targets))
            loss = F.cross_entropy(self.model(inputs), targets)
            with self.synchronizer.last_backward():
                loss.backward()
            result, _ = self.synchronizer.finish()
            self.examples += result.examples
            self.optimizer.step()
            self.updates += 1
        return self.report()

    def rows(self, start: int) -> list[dict[str, Any]]:  # noqa: ARG002
        """Nothing is recorded."""
        return []

    def describe(self) -> dict[str, Any]:
        """Nothing to say."""
        return {}

    def state(self) -> dict[str, Any]:
        """Weights, momentum and counts."""
        done = [self.updates, self.examples]
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": done,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from them."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates, self.examples = state["done"]


def resize(options: argparse.Namespace) -> None:
    """World sizes 1, 2, 1, 2 over equal parts of the run."""
    settings = ElasticSettings(max_workers=2)
    updates = updates_within(options.seconds)

    def policy(report: JobReport, _: Sequence[Sample]) -> int:
        return (1, 2, 1, 2)[min(3, 4 * report.updates // updates)]

    run = ElasticRun(lambda: PixelsJob(updates), policy, settings)
    began = time.perf_counter()
    run.run()
    total = time.perf_counter() - began
    for event in run.events:
        print(
            f"{event.seconds:7.1f} s  update {event.updates:6d}  {event.kind:9s} {event.message} "
            f" {event.pause:.3f} s"
        )
    pauses = sum(event.pause for event in run.events)
    trained = total - run.events[0].seconds
    print(f"{trained:.1f} s of training, pauses {pauses:.3f} s = {100 * pauses / trained:.3f} %")
    for workers in (1, 2):
        rates = [s.examples_per_second for s in run.samples if s.workers == workers]
        print(
            f"{workers} workers: {statistics.median(rates):.1f} examples/s (median of {len(rates)}"
            " stretches)"
        )


def kill(options: argparse.Namespace) -> None:
    """Random SIGKILLs of worker processes, at random times, through the whole run."""
    updates = updates_within(options.seconds)
    dice, killed, folder = random.Random(0), 0, Path(tempfile.mkdtemp())

    def policy(report: JobReport, _: Sequence[Sample]) -> int:
        nonlocal killed
        if killed < options.kills and report.updates > (killed + 1) * updates / (options.kills + 2):
            victim = dice.choice(sorted(folder.iterdir()))
            os.kill(int(victim.name), signal.SIGKILL)
            victim.unlink()
            killed += 1
        return 2

    settings = ElasticSettings(min_workers=1, max_workers=2, timeout_seconds=20, snapshot_seconds=5)
    run = ElasticRun(lambda: PixelsJob(updates, str(folder)), policy, settings)
    report = run.run()
    for event in run.events:
        print(
            f"{event.seconds:7.1f} s  update {event.updates:6d}  {event.kind:9s} {event.message} "
            f" {event.pause:.3f} s"
        )
    print(f"{killed} kills; {report.examples} examples trained, {updates * 2 * BATCH} planned")


def server(options: argparse.Namespace) -> None:
    """Push 10 MB from a worker process to the server's, and pull 10 MB back into the worker's."""
    ray = connect()
    actor = ray.remote(num_cpus=0)(ServerActor).remote(
        lambda: ParameterServer(weights(), {0: 1.0}), None
    )

    class Worker:
        def measure(self, rounds: int) -> list[float]:
            seconds = []
            made = weights()
            for _ in range(rounds):
                began = time.perf_counter()
                ray.get(actor.push.remote(0, made))
                made = ray.get(actor.pull.remote(0)).copy()
                seconds.append(time.perf_counter() - began)
            return seconds[3:]

    seconds = ray.get(ray.remote(num_cpus=0)(Worker).remote().measure.remote(options.rounds + 3))
    print(f"push + pull of 10 MB, ms: {spread([1e3 * each for each in seconds], '{:.1f}')}")


def weights() -> np.ndarray:
    return np.ones(2_500_000, dtype=np.float32)


def updates_within(seconds: float) -> int:
    """As many updates of one worker as take about so many seconds."""
    job = PixelsJob(4)
    from hessianflow.distributed import LocalReducer

    job.join(LocalReducer())
    job.run_until(1)
    began = time.perf_counter()
    job.run_until(4)
    return max(20, int(seconds * 3 / (time.perf_counter() - began)))


def pixels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=source), torch.randint(
        0, 10, (count,), generator=source
    )


def network(name: str) -> nn.Module:
    """ResNet-20, or a net with as many bytes of gradients for as little work: hard on the
    exchange."""
    if name == "resnet20":
        return models.create("resnet20")
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["sync", "trainer", "resize", "server", "kill"])
    parser.add_argument(
        "--nets", nargs="+", choices=["resnet20", "wide"], default=["resnet20", "wide"]
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
