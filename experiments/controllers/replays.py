"""What each controller would have done with the measurements of a recorded run, and how near the
edge the run was.

    # batch 128 on every problem, from results.jsonl
    python -m experiments.controllers.replays
    python -m experiments.controllers.replays 'digits/critical*'    # other rows, by PROBLEM/METHOD

Only the decisions are replayed: the measurements stay those of the run as it was trained.
"""

import fnmatch
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hessianflow as hf
from hessianflow.config import from_dict
from hessianflow.interfaces import BatchController
from hessianflow.resolve import resolve, schedule_of
from hessianflow.upgrade import upgrade

RESULTS = Path(__file__).with_name("results.jsonl")
SCHEDULE = ("data", "controller", "epochs", "lr", "schedule")
"""What the rate of the schedule is made of."""


def controllers(batch: int, cap: int) -> Mapping[str, BatchController]:
    """The controllers that decide by the eigenvalue or the loss, in the variants of the study."""
    return {
        "ABSA, no patience": hf.control.ABSA(batch, cap, patience=None),
        "ABSA": hf.control.ABSA(batch, cap),
        "critical batch": hf.control.CriticalBatch(batch, cap),
        "critical batch, rate alike": hf.control.CriticalBatch(batch, cap, excess_power=0),
        "edge only": hf.control.CriticalBatch(batch, cap, loss_power=None),
        "critical batch, half": hf.control.CriticalBatch(batch, cap, edge_share=0.5),
        "loss only": hf.control.CriticalBatch(batch, cap, edge_share=None),
    }


def history(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a run, as far as a row of results.jsonl holds them; readings count as
    converged."""
    size = row["examples"] // len(row["epochs"])
    # Of earlier releases some settings are unknown; those that make the schedule are not.
    settings = upgrade(row["settings"])
    known = {name: value for name, value in settings.items() if name in SCHEDULE}
    config = resolve(from_dict(known, row["method"]))
    scheduled = schedule_of(config)
    for number, epoch in enumerate(row["epochs"], 1):
        place = {"epoch": number, "examples": number * size}
        if epoch["eigenvalue"] is not None:
            yield {"kind": "curvature", **place, "eigenvalue": epoch["eigenvalue"]}
        # What the controller made of the schedule's rate.
        factor = epoch["lr"] / (config.lr * scheduled(number - 1))
        yield {"kind": "epoch", **place, **epoch, "lr_factor": factor}


def show(row: Mapping[str, Any]) -> None:
    """Print what each controller makes of one run."""
    settings = upgrade(row["settings"])
    print(
        f"\n{row['problem']}/{row['method']} seed {row['seed']}: {row['updates']} updates;"
        " epoch:batch"
    )
    for name, controller in controllers(settings["batch_size"], settings["max_batch_size"]).items():
        replay = hf.control.replay(history(row), controller)
        sizes = ", ".join(f"{step.epoch}:{step.decision.batch_size}" for step in replay.changes)
        print(f"{name:30} {replay.updates:5} updates   {sizes}")
    optimizer = settings.get("optimizer", "sgd")
    if not isinstance(optimizer, dict):
        optimizer = {"name": optimizer}
    if optimizer["name"] != "sgd":
        return  # the edge below is that of SGD
    momentum = optimizer.get("momentum", 0.9)
    edge = 2 * (1 + momentum)
    used = [e["eigenvalue"] * e["lr"] / edge for e in row["epochs"] if e["eigenvalue"] is not None]
    print("share of the edge used, by epoch: " + " ".join(f"{share:.3f}" for share in used))


def main(patterns: list[str]) -> int:
    """Print one table a row that fits."""
    with RESULTS.open() as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        name = f"{row['problem']}/{row['method']}"
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns or ["*/fixed"]):
            show(row)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
