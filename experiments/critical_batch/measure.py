"""Which signal tracks the critical batch?

Trains small runs, branches their checkpoints at several batch sizes, and measures the noise scale
with curvature and without at the same weights. One row a checkpoint goes to a file.

    python experiments/critical_batch/measure.py --rows ROWS --data-dir DIR
    python experiments/critical_batch/measure.py --rows ROWS --report
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from hessianflow.cli import main
from hessianflow.control import CriticalBatch
from hessianflow.curvature import noise_scale
from hessianflow.interfaces import Progress
from hessianflow.planning import branch, compared, critical_size, crossing
from hessianflow.planning.branch_start import RunStart, find_start
from hessianflow.runs import History

TOLERANCE = 0.05
REPEATS = 2
FREE = 2**30
"""A cap on the batch of the loss rule that nothing reaches."""
SIGNALS = ("with_curvature", "simple", "loss_rule")

_SMALL = ["--controller", "fixed", "--adversary", "none", "--curvature", "off", "--plots", "false"]
_SMALL += ["--schedule", "constant", "--keep-checkpoints", "1000"]
PROBLEMS: Mapping[str, dict[str, Any]] = {
    "digits-sgd": {
        "train": ["--data", "digits", "--epochs", "4", "--batch-size", "32", "--lr", "0.02"],
        "sizes": [4, 8, 16, 32, 64, 128, 256],
        "rounds": 16,
        "rule": "linear",
        "epochs": [1, 2, 4],
    },
    "digits-adamw": {
        "train": [
            *("--data", "digits", "--epochs", "4", "--batch-size", "32"),
            *("--optimizer", "adamw", "--lr", "0.001"),
        ],
        "sizes": [4, 8, 16, 32, 64, 128, 256],
        "rounds": 16,
        "rule": "sqrt",
        "epochs": [1, 2, 4],
    },
    "cifar-plain": {
        "train": [
            *("--data", "cifar10", "--model", "experiments.controllers.networks:plain"),
            *("--train-examples", "4000", "--test-examples", "500", "--epochs", "8"),
            *("--batch-size", "64", "--lr", "0.01", "--augment", "false"),
        ],
        "sizes": [16, 32, 64, 128, 256, 512],
        "rounds": 8,
        "rule": "linear",
        "epochs": [1, 8, 4],
    },
}


def measure(
    problem: str, seed: int, data_dir: str | None, folder: Path, epochs: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Train one run, and yield a row for each of these checkpoints."""
    settings = PROBLEMS[problem]
    words = ["train", *settings["train"], *_SMALL, "--seed", str(seed), "--run-dir", str(folder)]
    if data_dir is not None:
        words += ["--data-dir", data_dir]
    if main(words) != 0:
        raise SystemExit(f"{problem}: the run failed")
    for epoch in epochs:
        yield _row(problem, seed, folder, epoch, settings)


def _row(
    problem: str, seed: int, folder: Path, epoch: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    start = find_start(folder, epoch)
    largest = settings["sizes"][-1]
    branches = [
        branch(start, size, repeat, settings["rule"], settings["rounds"], largest)
        for repeat in range(REPEATS)
        for size in settings["sizes"]
    ]
    results = compared(branches)
    start(0)  # the weights of the checkpoint again
    return {
        "problem": problem,
        "seed": seed,
        "epoch": epoch,
        "sizes": [vars(result) for result in results],
        "critical": critical_size(results, TOLERANCE),
        "crossing": crossing(results, TOLERANCE),
        "crossing_half": crossing(results, TOLERANCE / 2),
        "crossing_twice": crossing(results, TOLERANCE * 2),
        **_noise(start),
        "loss_rule": _loss_rule(History.load(folder), epoch, start.config.batch_size),
        "threads": torch.get_num_threads(),
    }


def _noise(start: RunStart) -> dict[str, Any]:
    """Return both noise scales at the checkpoint, in the geometry of its optimizer."""
    begun = start(0)
    count = min(2048, begun.data.num_examples)
    batch = begun.data.sample(count, 1)
    figures: dict[str, Any] = {}
    geometries: dict[str, Sequence[Tensor] | None] = {"": None}
    factors = _adam_factors(begun.optimizer)
    if factors:
        geometries["_update"] = factors
    for name, update in geometries.items():
        found = noise_scale(begun.model, begun.loss_fn, batch, update=update)
        for form in ("with_curvature", "simple"):
            figures[form + name] = getattr(found, form).to_dict()
    return figures


def _adam_factors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return 1 / (sqrt(v) + eps) of each parameter; nothing for another optimizer."""
    factors = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = optimizer.state[parameter]
            if "exp_avg_sq" not in kept:
                return []
            bias = 1 - group["betas"][1] ** float(kept["step"])
            factors.append(1 / ((kept["exp_avg_sq"] / bias).sqrt() + group["eps"]))
    return factors


def _loss_rule(history: History, epoch: int, batch_size: int) -> float:
    """Return the useful batch of `critical` at the end of an epoch, by its own code."""
    controller = CriticalBatch(
        batch_size, FREE, edge_share=None, max_growth=float(FREE), hysteresis=1.0001
    )
    for row in history.epochs[:epoch]:
        progress = Progress(
            row["epoch"], row["examples"], row["updates"], FREE, len(history.epochs)
        )
        controller.update(progress, None, {"epoch_loss": row["train_loss"]})
    return float(controller.decision.batch_size)


def value(row: Mapping[str, Any], signal: str) -> float:
    """Return the batch size that a signal gives; infinite where it is not known."""
    found = row.get(signal, math.inf)
    if isinstance(found, Mapping):
        return float(found["value"])
    return float(found)


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the rows, and how closely each signal follows the measured batch."""
    lines = [
        "| problem | seed | epoch | measured | noise with H | 95 % | simple | loss rule |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = _forms(row)
        curved = row[names["with_curvature"]]
        lines.append(
            f"| {row['problem']} | {row['seed']} | {row['epoch']} | {_size(row['crossing'])} |"
            f" {_size(curved['value'])} | {_size(curved['low'])} to {_size(curved['high'])} |"
            f" {_size(value(row, names['simple']))} | {_size(row['loss_rule'])} |"
        )
    lines += [
        "",
        "| signal | rows | measured / signal, geometric mean | spread, a factor of | rank |",
    ]
    lines.append("|---|---|---|---|---|")
    for signal in SIGNALS:
        lines.append(_tracking(rows, signal))
    return "\n".join(lines)


def _forms(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the forms in the geometry of the row's optimizer."""
    ending = "_update" if "simple_update" in row else ""
    return {"with_curvature": f"with_curvature{ending}", "simple": f"simple{ending}"}


def _tracking(rows: Sequence[Mapping[str, Any]], signal: str) -> str:
    pairs = []
    for row in rows:
        pair = (row["crossing"], value(row, _forms(row).get(signal, signal)))
        if all(0 < size < math.inf for size in pair):
            pairs.append(pair)
    logs = [math.log(measured / found) for measured, found in pairs]
    if len(logs) < 3:
        return f"| {signal} | {len(logs)} | | | |"
    rank = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return (
        f"| {signal} | {len(logs)} of {len(rows)} | {math.exp(statistics.fmean(logs)):.2g} |"
        f" {math.exp(statistics.stdev(logs)):.2f} | {rank:.2f} |"
    )


def _size(number: float) -> str:
    if math.isinf(number):
        return "inf"
    return f"{number:.3g}"


def run() -> int:
    """Measure what is not in the file of rows yet, or report what is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    rows = []
    if arguments.rows.exists():
        rows = [json.loads(line) for line in arguments.rows.read_text("utf-8").splitlines()]
    if arguments.report:
        print(report([row for row in rows if row["problem"] in arguments.problems]))
        return 0
    done = {(row["problem"], row["seed"], row["epoch"]) for row in rows}
    for seed in arguments.seeds:
        for problem in arguments.problems:
            wanted = PROBLEMS[problem]["epochs"]
            missing = [epoch for epoch in wanted if (problem, seed, epoch) not in done]
            if not missing:
                continue
            data_dir = arguments.data_dir if problem.startswith("cifar") else None
            with tempfile.TemporaryDirectory() as folder:
                run_dir = Path(folder) / "run"
                for row in measure(problem, seed, data_dir, run_dir, missing):
                    with arguments.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run())
