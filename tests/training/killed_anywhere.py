"""Kills a run before each of its operations on files, lets it go on, and compares it with one that
was left alone.

    python tests/training/killed_anywhere.py KIND FOLDER [STRIDE]

Every kill is a SIGKILL of a process of its own, before an operation (open, rename, remove, make,
link, cut, sync) on a path in the run directory. Afterwards the same directory is resumed, where it
holds a checkpoint, or started again. In the end weights, records and the names of all files must be
those of the run that was left alone.
"""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, History
from hessianflow.config import TrainConfig
from hessianflow.control import AdaBatch
from hessianflow.data import DeviceBatches
from hessianflow.dual_batch import build_dual_batch
from hessianflow.parts import load_config, on_this_machine, prepare
from hessianflow.runs.names import LOCK
from hessianflow.training import Checkpoints, Divergence, Reporting

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.truncate", "os.rmdir")
Go = Callable[[Path], object]


def data() -> DeviceBatches:
    images = torch.randint(
        256, (64, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    return DeviceBatches(images, images.float().mean((1, 2, 3)).gt(127).long(), 8)


def trainer(run_dir: Path | None, **options: Any) -> AdaptiveBatchTrainer:
    """Batches that grow, momentum, evaluation, checkpoints within epochs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    batches = data()
    return AdaptiveBatchTrainer(
        model,
        batches,
        batches.examples(torch.arange(32)),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        loss_fn=F.cross_entropy,
        controller=AdaBatch(8, 64, every_epochs=1),
        run_dir=run_dir,
        reporting=Reporting(config={"settings": {"made": "by a test"}}, show_progress=False),
        **({"epochs": 3, "checkpoints": Checkpoints(every_examples=40, keep=3)} | options),
    )


def rolling_back(run_dir: Path | None) -> AdaptiveBatchTrainer:
    """The largest batch makes the loss explode: the run goes back to a checkpoint, and stays below
    it."""

    def poison(inputs: Any, targets: Any, progress: Any) -> Any:
        return (inputs * 1e9 if len(inputs) > 16 else inputs), targets

    return trainer(run_dir, transform=poison, divergence=Divergence("rollback"), epochs=4)


def dual_batch(run_dir: Path) -> Any:
    """Four workers on a parameter server, simulated."""
    settings: dict[str, Any] = {
        "data": "fake",
        "controller": {"name": "dual-batch", "slope": 0.1, "intercept": 1.0},
        "epochs": 2,
        "batch_size": 16,
    }
    settings |= {
        "train_examples": 64,
        "test_examples": 16,
        "model": "c1",
    }
    return build_dual_batch(prepare(TrainConfig(**settings, run_dir=str(run_dir))))


KINDS: dict[str, tuple[Go, Go]] = {
    "growing": (lambda folder: trainer(folder).fit(), lambda folder: trainer(None).resume(folder)),
    "rollback": (
        lambda folder: rolling_back(folder).fit(),
        lambda folder: rolling_back(None).resume(folder),
    ),
    "dual-batch": (
        lambda folder: dual_batch(folder).fit(),
        lambda folder: build_dual_batch(on_this_machine(load_config(folder))).resume(folder),
    ),
}


def in_a_process(action: Callable[[], object]) -> int:
    """The status with which a process ends that acts; below 0 where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watched(folder: Path, act: Callable[[], None]) -> None:
    """From here on, this process acts before each operation on a file in `folder`."""
    inside, sync = str(folder), os.fsync

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and arguments and str(arguments[0]).startswith(inside):
            act()

    def watched_sync(descriptor: int) -> None:
        act()
        sync(descriptor)

    sys.addaudithook(hook)
    os.fsync = watched_sync


def count_of(begin: Go, folder: Path) -> int:
    """Run to the end; returns how many operations that took."""
    counter = folder.with_suffix(".count")

    def run() -> None:
        made = [0]

        def count() -> None:
            made[0] += 1

        watched(folder, count)
        begin(folder)
        counter.write_text(str(made[0]))

    if in_a_process(run) != 0:
        raise SystemExit("the run failed without any kill")
    return int(counter.read_text())


def killed(begin: Go, folder: Path, number: int) -> None:
    """Run up to the operation of this number, and no further."""

    def run() -> None:
        left = [number]

        def count_down() -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        watched(folder, count_down)
        begin(folder)

    status = in_a_process(run)
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"before operation {number} the run ended with status {status}")


def left_behind(folder: Path) -> tuple[Any, ...]:
    """What must be alike: weights, records without clocks and interruptions, names of files."""
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    rows = [row for row in History.load(folder).records if row["kind"] != "event"]
    plain = [{name: value for name, value in row.items() if "second" not in name} for row in rows]
    # Only a run that goes on removes the file of a lock; one killed when it had finished does not.
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != LOCK)
    return {name: value.tolist() for name, value in state["model"].items()}, plain, names


def main(kind: str, place: str, stride: int) -> int:
    begin, go_on = KINDS[kind]
    whole, broken = Path(place) / "whole", Path(place) / "broken"
    count = count_of(begin, whole)
    expected, bad = left_behind(whole), 0
    for number in range(0, count, stride):
        shutil.rmtree(broken, ignore_errors=True)
        killed(begin, broken, number)
        kept = sorted(str(path.relative_to(broken)) for path in broken.rglob("*"))
        resumable = (broken / "checkpoints" / "last.pt").exists() or (
            broken / "checkpoints" / "previous.pt"
        ).exists()
        status = 0
        if not (broken / "summary.json").exists():
            status = in_a_process(lambda go=go_on if resumable else begin: go(broken))
            assert not (broken / LOCK).exists()
        if status != 0 or left_behind(broken) != expected:
            bad += 1
            print(f"operation {number}: status {status}; killed with {kept}")
            if status == 0:
                different = [a == b for a, b in zip(left_behind(broken), expected, strict=True)]
                print(f"  alike (weights, records, names): {different}; {left_behind(broken)[2]}")
    print(f"{kind}: {count} operations, killed before every {stride}., {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1))
