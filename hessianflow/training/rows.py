"""The rows of history.jsonl and the summary: plain dicts made from what was measured and decided."""

from collections.abc import Mapping
from typing import Any

import torch

from hessianflow.interfaces import CurvatureReading, Decision, Progress
from hessianflow.training.record import History
from hessianflow.training.timing import PARTS


def reading_row(progress: Progress, reading: CurvatureReading, note: str) -> dict[str, Any]:
    """The row of one curvature reading; `note`: what the controller made of it when it changed nothing."""
    row: dict[str, Any] = {
        **place("curvature", progress),
        "eigenvalue": reading.eigenvalue,
        "residual": reading.residual,
        "matvecs": reading.matvecs,
        "converged": reading.converged,
        "norm_mode": reading.norm_mode,
        "num_examples": reading.num_examples,
        "seconds": reading.seconds,
        **reading.details,
    }
    if len(reading.eigenvalues) > 1:
        row["eigenvalues"] = list(reading.eigenvalues)
    if note:
        row["note"] = note
    return row


def signals_row(progress: Progress, signals: Mapping[str, float]) -> dict[str, Any]:
    """The row of what gradient observers measured for the controller."""
    return {**place("signals", progress), **signals}


def decision_row(progress: Progress, before: Decision, after: Decision) -> dict[str, Any]:
    """The row of a decision that changed a setting."""
    return {
        **place("batch", progress),
        "from": before.batch_size,
        "to": after.batch_size,
        "lr_factor": after.lr_factor,
        "adversarial_share": after.adversarial_share,
        "reason": after.reason,
    }


def measurement_row(progress: Progress, kind: str, figures: Mapping[str, float]) -> dict[str, Any]:
    """The row of what was measured after an epoch."""
    return {**place(kind, progress), **figures}


def event_row(progress: Progress, event: str, message: str) -> dict[str, Any]:
    """The row of anything else worth knowing later: a divergence, a fallback, a preemption."""
    return {**place("event", progress), "event": event, "message": message}


def summary(
    history: History,
    progress: Progress,
    decision: Decision,
    seconds: dict[str, float],
    device: torch.device,
    world_size: int = 1,
) -> dict[str, Any]:
    """What summary.json holds."""
    last = history.epochs[-1] if history.epochs else {}
    accuracies = [row["eval_accuracy"] for row in history.epochs if row["eval_accuracy"] is not None]
    final_loss = last.get("eval_loss")
    return {
        "status": "finished" if progress.epoch >= progress.total_epochs else "preempted",
        "final_accuracy": last.get("eval_accuracy"),
        "best_accuracy": max(accuracies, default=None),
        "final_loss": last.get("train_loss") if final_loss is None else final_loss,
        "epochs": progress.epoch,
        "updates": progress.updates,
        "examples": progress.examples,
        "largest_batch": _largest_batch(history, progress, decision),
        "growths": len(history.growths),
        "wall_seconds": seconds["wall"],
        # The attack runs inside the step, so the step's own time is what is left.
        "seconds": {p: seconds[p] - (seconds["adversary"] if p == "training" else 0.0) for p in PARTS},
        "peak_memory_mib": _peak_memory_mib(device),
        "world_size": world_size,
    }


def _largest_batch(history: History, progress: Progress, decision: Decision) -> int:
    """The largest size that steps were taken with, those that changed again before their epoch ended included.

    A size decided on at the very end, or taken back by a rollback, had no step.
    """
    sizes, began = [row["batch_size"] for row in history.epochs], 0
    for row in history.of_kind("batch"):
        if row["examples"] > began:
            sizes.append(row["from"])
        began = row["examples"]
    if progress.examples > began or not sizes:
        sizes.append(decision.batch_size)
    return int(max(sizes))


def place(kind: str, progress: Progress) -> dict[str, Any]:
    """What every row begins with."""
    return {"kind": kind, "epoch": progress.epoch, "examples": progress.examples, "updates": progress.updates}


def _peak_memory_mib(device: torch.device) -> float:
    """Peak of this process: allocated on a CUDA device, resident in memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Unix only, and only needed here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
