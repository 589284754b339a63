"""The trainer on Ray while its workers change: pauses of resizes, and what ten random kills do to a
run.

    python experiments/benchmarks/elastic_training.py resize --seconds 300 --out DIR
    python experiments/benchmarks/elastic_training.py kill --seeds 0 1 2 --kills 10 --out DIR

`resize` trains a ResNet-20 on made-up images with 1, 2, 1, 2 workers. `kill` trains digits with
ABSA on up to two workers, of which a random one is sent SIGKILL at a random moment in each of so
many equal parts of the run.
"""

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hessianflow.config import RunConfig, TrainConfig
from hessianflow.elastic import ElasticSettings, ElasticTrainer, JobReport, Sample
from hessianflow.elastic.build import make_trainer
from hessianflow.interfaces import World
from hessianflow.resolve import resolve
from hessianflow.training import AdaptiveBatchTrainer, History


def main() -> None:
    options = parse()
    {"resize": resize, "kill": kill}[options.what](options)


def resize(options: argparse.Namespace) -> None:
    config = TrainConfig(
        data="fake",
        model="resnet20",
        controller="fixed",
        batch_size=64,
        microbatch_size=32,
        epochs=1000,
        threads=1,
    )
    began: list[float] = []

    def policy(_: JobReport, __: Sequence[Sample]) -> int:
        began.append(time.monotonic())
        part = (time.monotonic() - began[0]) / options.seconds
        if part >= 1:
            trainer.request_stop()
        return (1, 2, 1, 2)[min(3, int(4 * part))]

    folder = Path(options.out, "resize")
    trainer = ElasticTrainer(
        partial(make_trainer, resolve(config)), ElasticSettings(1, 2), run_dir=folder, policy=policy
    )
    history = trainer.fit()
    show(history)
    events = history.of_kind("event")
    trained = events[-1]["elapsed"] - events[0]["elapsed"]
    pauses = [event["pause"] for event in events if event["event"] in ("joined", "left")]
    print(
        f"{trained:.1f} s of training, {len(pauses)} resizes, pauses {sum(pauses):.3f} s ="
        f" {sum(pauses) / trained:.4%}"
    )
    print(f"1 -> 2 -> 1: {sum(pauses[:2]):.3f} s")


def kill(options: argparse.Namespace) -> None:
    """Random SIGKILLs of worker processes, at random times, through the whole run."""
    for seed in options.seeds:
        folder = Path(options.out, f"kill-{seed}")
        folder.mkdir(parents=True)
        history = killed_run(seed, options.kills, folder)
        summary = history.summary
        died = sum(event["event"] == "died" for event in history.of_kind("event"))
        print(
            f"seed {seed}: {died} deaths; {summary['examples']} examples trained, {30 * 1438}"
            f" planned; {summary['updates']} updates; test accuracy"
            f" {summary['final_accuracy']:.2%}",
            flush=True,
        )


def killed_run(seed: int, kills: int, folder: Path) -> History:
    pids, dice, victims = folder / "pids", random.Random(seed), [0]
    pids.mkdir()

    def strike() -> None:
        victim = dice.choice(sorted(pids.iterdir()))
        victim.unlink()
        os.kill(int(victim.name), signal.SIGKILL)

    def policy(report: JobReport, _: Sequence[Sample]) -> int:
        if (
            victims[0] < kills
            and report.examples >= (victims[0] + 0.5) * 30 * 1438 / kills
            and any(pids.iterdir())
        ):
            victims[0] += 1
            threading.Timer(dice.uniform(0, 0.5), strike).start()
        return 2

    make = partial(killable, resolve(TrainConfig(threads=1, seed=seed)), str(pids))
    settings = ElasticSettings(1, 2, stretch_seconds=0.5, timeout_seconds=60)
    return ElasticTrainer(make, settings, run_dir=folder / "run", policy=policy).fit()


def killable(config: RunConfig, pids: str, world: World) -> AdaptiveBatchTrainer:
    Path(pids, str(os.getpid())).touch()
    return make_trainer(config, world)


def show(history: History) -> None:
    for event in history.of_kind("event"):
        if event["event"] != "snapshot":
            print(
                f"{event['elapsed']:7.1f} s  update {event['updates']:6d}  {event['event']:9s}"
                f" {event['message']}  {event['pause']:.3f} s"
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["resize", "kill"])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="elastic-benchmark")
    return parser.parse_args()


if __name__ == "__main__":
    main()
