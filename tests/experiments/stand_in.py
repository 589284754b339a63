"""Stands in for a training run in the tests of the runner: leaves a run directory within
milliseconds.

`python -m tests.experiments.stand_in SETTINGS.json RUN_DIR`. The setting "behaviour" says how it
ends.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(settings_file: str, run_dir: str) -> int:
    settings, folder = json.loads(Path(settings_file).read_text()), Path(run_dir)
    behaviour = settings.get("behaviour", "finish")
    checkpoint = folder / "checkpoints" / "last.pt"
    continued = checkpoint.is_file()
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.touch()
    with open(folder.parent / "starts.txt", "a") as file:
        file.write("continued\n" if continued else "started\n")
    if behaviour == "tell device":
        (folder / "measured.json").write_text(
            json.dumps({"device": os.environ.get("CUDA_VISIBLE_DEVICES")})
        )
        time.sleep(1)
    if behaviour == "fail" or (behaviour == "fail once" and not continued):
        sys.stderr.write("some text\nit broke\n")
        return 3
    if behaviour == "die" and not continued:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "hang":
        time.sleep(600)
    place = {"epoch": 1, "examples": 10, "updates": 4}
    rows = [
        {"kind": "curvature", **place, "eigenvalue": 2.5},
        {
            "kind": "epoch",
            **place,
            "batch_size": 32,
            "lr": 0.1,
            "train_loss": 1.0,
            "eval_accuracy": 0.5,
        },
        {"kind": "batch", **place, "from": 32, "to": 64, "lr_factor": 2.0, "reason": "why"},
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "final_accuracy": 0.5,
        "best_accuracy": 0.6,
        "updates": 4 + settings["seed"],
        "examples": 10,
    }
    summary |= {
        "largest_batch": 64,
        "wall_seconds": 1.5,
        "seconds": {"training": 1.0},
        "peak_memory_mib": 1.0,
    }
    summary |= {"status": "preempted" if behaviour == "preempted" else "finished"}
    (folder / "summary.json").write_text(json.dumps(summary))
    if behaviour == "leave a damaged summary":
        (folder / "summary.json").write_text("{")
    (folder / "config.json").write_text(
        json.dumps({"environment": {"python": "3", "packages": {}}})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
