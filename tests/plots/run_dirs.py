"""Synthetic run directories with values worked by hand, for the tests of this room."""

import json
from types import SimpleNamespace


def epoch(number, *, examples=1000, updates, batch, accuracy=0.5, **more):
    row = {
        "kind": "epoch",
        "epoch": number,
        "examples": number * examples,
        "updates": updates,
        "batch_size": batch,
        "lr": 0.1,
        "train_loss": 2.0 / number,
        "train_accuracy": accuracy + 0.1,
        "eval_loss": 2.5 / number,
        "eval_accuracy": accuracy,
        "seconds": 10.0,
    }
    return row | more


def curvature(number, eigenvalue, *, converged=True, examples=1000):
    return {
        "kind": "curvature",
        "epoch": number,
        "examples": number * examples,
        "updates": 8 * number,
        "eigenvalue": eigenvalue,
        "converged": converged,
    }


def growth(examples, before, after, reason="eigenvalue fell from 100 to 49"):
    row = {
        "kind": "batch",
        "epoch": 1,
        "examples": examples,
        "updates": 8,
        "from": before,
        "to": after,
    }
    return row | {"lr_factor": 1.0, "reason": reason}


RECORDS = [
    curvature(1, 100.0),
    epoch(1, updates=8, batch=128, accuracy=0.4),
    curvature(2, 49.0, converged=False),
    growth(2000, 128, 256),
    epoch(2, updates=16, batch=128, accuracy=0.6),
    curvature(3, -3.0),
    curvature(4, None, converged=False),
    growth(3000, 256, 512, "no growth for 10 estimates"),
    epoch(3, updates=20, batch=256, accuracy=0.7),
]


def in_memory(records=RECORDS):
    return SimpleNamespace(records=records)


def write_run(folder, records=RECORDS, *, config=None, summary=None, tail=""):
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records) + tail)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
