"""What each controller would have done with the measurements of a recorded run, and how near the edge the run was.

    python -m experiments.controllers.replays RUN_DIR...

Only the decisions are replayed: the measurements stay those of the run as it was trained.
"""

import sys
from collections.abc import Mapping

import hessianflow as hf
from hessianflow.interfaces import BatchController


def controllers(batch: int, cap: int) -> Mapping[str, BatchController]:
    """The controllers that decide by the eigenvalue or the loss, in the variants of the study."""
    return {
        "ABSA, no patience": hf.control.ABSA(batch, cap, patience=None),
        "ABSA": hf.control.ABSA(batch, cap),
        "critical batch": hf.control.CriticalBatch(batch, cap),
        "edge only": hf.control.CriticalBatch(batch, cap, loss_power=None),
        "critical batch, three quarters": hf.control.CriticalBatch(batch, cap, edge_share=0.75),
        "loss only": hf.control.CriticalBatch(batch, cap, edge_share=None),
    }


def main(run_dirs: list[str]) -> int:
    """Print one table a run."""
    for run_dir in run_dirs:
        history = hf.History.load(run_dir)
        settings = history.config["settings"]
        print(f"\n{run_dir}: epoch:batch")
        for name, controller in controllers(settings["batch_size"], settings["max_batch_size"]).items():
            replay = hf.control.replay(history.records, controller)
            sizes = ", ".join(f"{step.epoch}:{step.decision.batch_size}" for step in replay.changes)
            print(f"{name:30} {replay.updates:5} updates   {sizes}")
        rates = {row["epoch"]: row["lr"] for row in history.epochs}
        momentum = settings["momentum"]
        used = [r["eigenvalue"] * rates[r["epoch"]] / (2 * (1 + momentum)) for r in history.curvature]
        print("share of the edge used, by epoch: " + " ".join(f"{share:.3f}" for share in used))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
