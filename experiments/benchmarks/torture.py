"""Kill a run again and again at random moments, resume it each time, and compare it with one that
was left alone.

    python experiments/benchmarks/torture.py --kills 10

The run trains ResNet-8 on the first CIFAR-10 images with ABSA (growing batches), PGD from random
starts, augmentation, a warm-started curvature probe, momentum and checkpoints in the middle of
epochs. Each kill is a SIGKILL (with `--term`: every other one is a SIGTERM, on which the job must
save and stop) at a moment drawn at random. In the end weights, optimizer and controller must be
equal bit for bit, and the records equal but for wall-clock figures; else the exit status is 1.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from pixels import cifar10
from torch import nn

import hessianflow as hf
from hessianflow.training import Checkpoints, Passes, Reporting, Schedule

FORK = multiprocessing.get_context("fork")
PREEMPTED = 3
"""Exit status of a job that saved and stopped on SIGTERM."""
PARTS = ("model", "optimizer", "counters", "decision")
STATEFUL = ("controller", "adversary", "probe", "train_data", "learning rate")


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    seed = int(time.time()) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        finish(start(whole, options))
        seconds = float(hf.History.load(whole).summary["wall_seconds"])
        done = interrupt(broken, options, random.Random(seed), seconds)
        differences = compare(whole, broken)
    print(f"uninterrupted: {seconds:.1f} s; {done}; seed of the moments {seed}")
    print(
        "\n".join(differences)
        or "equal: weights, optimizer, controller, adversary, probe, data stream and records"
    )
    return 1 if differences else 0


def interrupt(
    run_dir: Path, options: argparse.Namespace, moments: random.Random, seconds: float
) -> str:
    """Start, kill and resume until the run ends by itself; returns what was done, in words."""
    signals = [signal.SIGKILL, signal.SIGTERM if options.term else signal.SIGKILL]
    places = []
    for number in range(options.kills):
        process, sent = start(run_dir, options), signals[number % 2]
        if number % 3 > 0:  # else it may be killed before it has got anywhere
            wait_for_progress(process, run_dir)
        time.sleep(moments.uniform(0, seconds / options.kills / 2))
        assert process.pid is not None
        os.kill(process.pid, sent)
        process.join()
        if process.exitcode == 0:  # it was faster than the signal
            break
        if process.exitcode != (-sent if sent == signal.SIGKILL else PREEMPTED):
            raise SystemExit(f"a job ended with status {process.exitcode} on {sent.name}")
        places.append(examples_saved(run_dir))
    else:
        finish(start(run_dir, options))
    return f"{len(places)} interruptions, resumed from {places} examples"


def start(run_dir: Path, options: argparse.Namespace) -> BaseProcess:
    """A process that trains in `run_dir`, once it is ready to. Forked: it need not load torch
    again."""
    ready, told = FORK.Pipe(duplex=False)
    process = FORK.Process(target=job, args=(run_dir, options, told))
    process.start()
    told.close()
    ready.recv()
    return process


def finish(process: BaseProcess) -> None:
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"a job ended with status {process.exitcode}")


def wait_for_progress(process: BaseProcess, run_dir: Path) -> None:
    """Until the run has written another checkpoint."""
    last = run_dir / "checkpoints" / "last.pt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    while process.is_alive() and not (last.exists() and last.stat().st_mtime_ns > before):
        time.sleep(0.01)


def examples_saved(run_dir: Path) -> int:
    last = run_dir / "checkpoints" / "last.pt"
    return int(torch.load(last, weights_only=True)["examples"]) if last.exists() else 0


def compare(whole: Path, broken: Path) -> list[str]:
    """What differs, in words."""
    first, second = (
        torch.load(p / "checkpoints" / "last.pt", weights_only=True) for p in (whole, broken)
    )
    different = [f"{part} differs" for part in PARTS if not equal(first[part], second[part])]
    different += [
        f"{p} differs" for p in STATEFUL if not equal(first["parts"][p], second["parts"][p])
    ]
    if rows(whole) != rows(broken):
        different.append("records differ")
    return different


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            equal(first[key], second[key]) for key in first
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The records without clocks and without the interruptions themselves."""
    records = [row for row in hf.History.load(run_dir).records if row["kind"] != "event"]
    return [{k: v for k, v in row.items() if "second" not in k} for row in records]


def job(run_dir: Path, options: argparse.Namespace, told: Connection) -> None:
    """Train in `run_dir` from its newest checkpoint, or from the start if it was killed before the
    first one."""
    trainer = build(run_dir, options)
    signal.signal(signal.SIGTERM, lambda *_: trainer.request_stop())
    told.send("ready")
    resumable = (run_dir / "checkpoints" / "last.pt").exists()
    if not resumable:
        shutil.rmtree(run_dir, ignore_errors=True)
    history = trainer.resume(run_dir) if resumable else trainer.fit()
    sys.exit(0 if history.summary["status"] == "finished" else PREEMPTED)


def build(run_dir: Path, options: argparse.Namespace) -> hf.AdaptiveBatchTrainer:
    images, targets, _ = cifar10(options.images, options.data_dir)
    test_images, test_targets, _ = cifar10(100, options.data_dir, "test")
    pixels: dict[str, Any] = {
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "num_classes": 10,
        "channels_last": True,
    }
    augment = hf.data.Augmentation(crop_padding=4, flip=True, cutout=8)
    batches = hf.data.DeviceBatches(images, targets, 16, augment=augment, **pixels)
    torch.manual_seed(0)
    model = hf.models.create("resnet8").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return hf.AdaptiveBatchTrainer(
        model,
        batches,
        hf.data.DeviceBatches(test_images, test_targets, 100, shuffle=False, **pixels),
        optimizer=optimizer,
        schedule=Schedule(
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)
        ),
        loss_fn=loss_fn,
        controller=hf.control.ABSA(16, 64, patience=2, total_epochs=options.epochs),
        adversary=hf.adversarial.PGD(0.02, value_range=batches.value_range, steps=2),
        probe=hf.curvature.CurvatureProbe(model, loss_fn, batches.sample(16), tol=0.1),
        epochs=options.epochs,
        passes=Passes(microbatch_size=16),
        run_dir=run_dir,
        checkpoints=Checkpoints(every_examples=48),
        reporting=Reporting(show_progress=False),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--term", action="store_true", help="every other signal is a SIGTERM")
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: the clock")
    parser.add_argument("--data-dir", default=None, help="folder with the CIFAR-10 binary archive")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
