"""The summary of a run, which summary.json holds."""

from typing import Any

import torch

from hessianflow.interfaces import Decision, Progress
from hessianflow.runs.history import History
from hessianflow.runs.rows import PARTS


def summary_of(
    history: History,
    progress: Progress,
    decision: Decision,
    seconds: dict[str, float],
    device: torch.device,
    world_size: int = 1,
) -> dict[str, Any]:
    """Return the content of summary.json from the records and the progress of the run."""
    last = history.epochs[-1] if history.epochs else {}
    accuracies = [
        row["eval_accuracy"] for row in history.epochs if row["eval_accuracy"] is not None
    ]
    status = "finished" if progress.is_over else "preempted"
    final_loss = last.get("eval_loss")
    if final_loss is None:
        final_loss = last.get("train_loss")
    spent = {name: seconds[name] for name in PARTS}
    # The attack runs inside the step, so its time is subtracted.
    spent["training"] -= seconds["adversary"]
    return {
        "status": status,
        "final_accuracy": last.get("eval_accuracy"),
        "best_accuracy": max(accuracies, default=None),
        "final_loss": final_loss,
        "epochs": progress.epoch,
        "updates": progress.updates,
        "examples": progress.examples,
        "largest_batch": _largest_batch(history, progress, decision),
        "growths": len(history.growths),
        "wall_seconds": seconds["wall"],
        "seconds": spent,
        "peak_memory_mib": _peak_memory_mib(device),
        "world_size": world_size,
    }


def _largest_batch(history: History, progress: Progress, decision: Decision) -> int:
    """Return the largest batch size of any step, including sizes that lasted less than an epoch.

    A size that was decided at the very end, or taken back by a rollback, had no step.
    """
    sizes = [row["batch_size"] for row in history.epochs]
    began = 0
    for row in history.of_kind("batch"):
        if row["examples"] > began:
            sizes.append(row["from"])
        began = row["examples"]
    if progress.examples > began or not sizes:
        sizes.append(decision.batch_size)
    return int(max(sizes))


def _peak_memory_mib(device: torch.device) -> float:
    """Return this process's peak memory in MiB: allocated on a CUDA device, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Unix only, and only needed here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
