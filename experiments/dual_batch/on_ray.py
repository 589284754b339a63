"""Do the two kinds of workers finish together, and when predicted? Two Ray workers on one machine.

    python -m experiments.dual_batch.on_ray --data-dir DIR

Each worker is a process with one thread. First both measure, at the same time, what a step takes at
several batch sizes; a line through that gives the plan (one small, one large worker, k = 1.1); then
they train by it. Everything is told on two clocks: the wall's, and the processors' own (seconds
that the workers' processes computed), which other work on the machine disturbs less.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hessianflow.config import RunConfig, TrainConfig
from hessianflow.control import DualBatchPlan, TimeModel, fit_time_model
from hessianflow.distributed.ray_session import connect
from hessianflow.dual_batch import ParameterServer, train_on_ray
from hessianflow.dual_batch.actors import ServerActor
from hessianflow.dual_batch.build import plan_schedule
from hessianflow.dual_batch.local_training import FlatWeights
from hessianflow.dual_batch.simulated_server import Commit
from hessianflow.dual_batch.workers import (
    StagePlan,
    all_stages,
    make_server,
    make_worker,
    worker_of,
)
from hessianflow.interfaces import HessianFlowError
from hessianflow.parts import build_parts, on_this_machine, prepare

FOLDER = Path(__file__).resolve().parent
SHARES, WARM_STEPS, TIMED_STEPS = (0.125, 0.25, 0.5, 0.75, 1.0), 2, 8
CLOCKS = ("wall", "processor")
MEGABYTES, ROUNDS = 10, 30
Points = list[tuple[int, float, float]]


def settings(arguments: argparse.Namespace) -> RunConfig:
    """Of the runs: real pixels where there are some, made-up ones else."""
    common: dict[str, Any] = {
        "controller": {
            "name": "dual-batch",
            "workers": 2,
            "small_workers": 1,
            "extra_time": 1.1,
        },
        "model": "resnet8",
        "schedule": {"name": "multistep", "milestones": ()},
    }
    common |= {
        "epochs": arguments.epochs,
        "threads": 1,
        "device": "cpu",
    }
    if arguments.data_dir is None:
        return prepare(
            TrainConfig(
                data="fake", train_examples=1024, batch_size=64, precision="float32", **common
            )
        )
    sizes: dict[str, Any] = {
        "train_examples": 2000,
        "test_examples": 100,
        "batch_size": 64,
        "augment": False,
    }
    return prepare(
        TrainConfig(
            data="cifar10", data_dir=arguments.data_dir, precision="auto", **sizes, **common
        )
    )


def step_times(config: RunConfig, number: int) -> Points:
    """(batch size, wall seconds, processor seconds) of a step, in this process."""
    parts = build_parts(on_this_machine(config))
    worker = worker_of(config, parts, StagePlan(all_stages(config, parts), {}, {}), number)
    points = []
    for size in sorted({max(1, round(share * config.batch_size)) for share in SHARES}):
        worker.measure(0, size, WARM_STEPS)
        began = time.process_time()
        wall = statistics.median(worker.measure(0, size, TIMED_STEPS))
        points.append((size, wall, (time.process_time() - began) / TIMED_STEPS))
    return points


class TimedWorker:
    """A worker that also tells what its process computed."""

    def __init__(self, config: RunConfig, schedule: StagePlan, number: int) -> None:
        self._worker = make_worker(config, schedule, number)
        self.figures: Mapping[str, float] = {}

    def __call__(self, weights: Any, epoch: int) -> Any:
        """One local epoch."""
        began = time.process_time()
        made = self._worker(weights, epoch)
        self.figures = {
            **self._worker.figures,
            "processor": time.process_time() - began,
        }
        return made


def fitted(points: Points, clock: int) -> TimeModel:
    """A line through the points of all workers; clock: the place of its seconds in a point."""
    return fit_time_model([point[0] for point in points], [point[clock] for point in points])


def compared(
    plan: DualBatchPlan, commits: list[Commit], model: TimeModel, clock: str
) -> dict[str, Any]:
    """Predicted and measured seconds of a local epoch of each kind, the first epoch left out."""
    found: dict[str, Any] = {
        "predicted": plan.target_seconds,
        "line": [model.slope, model.intercept, model.residual],
    }
    for number, worker in enumerate(plan.workers):
        mine = [c for c in commits if c.worker == number][1:]
        seconds = [
            c.figures["processor"] if clock == "processor" else c.finished - c.started for c in mine
        ]
        found["small" if worker.small else "large"] = statistics.median(seconds)
    found["error"] = max(found["small"], found["large"]) / found["predicted"] - 1
    found["apart"] = 1 - min(found["small"], found["large"]) / max(found["small"], found["large"])
    return found


def push_and_pull(ray: Any) -> list[float]:
    """Milliseconds of a push and a pull of 10 MB between two processes."""
    size = MEGABYTES * 10**6 // 4
    server = ray.remote(ServerActor).remote(
        partial(ParameterServer, np.zeros(size, np.float32), {0: 1.0}), None
    )

    def rounds() -> list[float]:
        weights, found = np.ones(size, np.float32), []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            ray.get(server.push.remote(0, weights))
            weights = ray.get(server.pull.remote(0)).copy()
            found.append(1e3 * (time.perf_counter() - began))
        return found

    times: list[float] = ray.get(ray.remote(rounds).remote())
    ray.kill(server)
    return [float(value) for value in np.percentile(times[3:], [25, 50, 75])]


def main() -> int:
    """Measure, print, and write on_ray.json."""
    parser = argparse.ArgumentParser(
        description="Predicted and measured epochs of two Ray workers."
    )
    parser.add_argument("--data-dir", help="folder of CIFAR-10; without it, made-up images")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", default=str(FOLDER / "on_ray.json"))
    arguments = parser.parse_args()
    config = settings(arguments)
    ray = connect(num_cpus=4)
    load = os.getloadavg()[0]
    points = [
        p
        for found in ray.get([ray.remote(step_times).remote(config, n) for n in (0, 1)])
        for p in found
    ]
    result: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load_before": load,
        "push_pull_ms": push_and_pull(ray),
    }
    models = {}
    for index, clock in enumerate(CLOCKS, start=1):
        try:
            models[clock] = fitted(points, index)
        except (
            HessianFlowError
        ) as error:  # other work on the machine can bend the wall's line beyond use
            result[clock] = {"no plan": str(error)}
    parts = build_parts(config)
    stages = all_stages(config, parts)
    side = stages[0].level.resolution
    schedules = {
        clock: plan_schedule(config, stages, parts.train.num_examples, {side: model})
        for clock, model in models.items()
    }
    for clock, schedule in schedules.items():
        plan = schedule.plans[side]
        weights = FlatWeights(parts.model).read()
        run = train_on_ray(
            partial(make_server, weights, plan, "asp"),
            partial(TimedWorker, config, schedule),
            commits=config.epochs * 2,
        )
        result[clock] = compared(plan, run.timeline, models[clock], clock)
        result[clock]["batches"] = [[worker.batch_size, worker.examples] for worker in plan.workers]
    result["load_after"] = os.getloadavg()[0]
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
