"""Trains a cell, then attacks what it trained: `python -m experiments.conadv.attacked SETTINGS.json
RUN_DIR`.

Beside the settings of `hessianflow train` the file holds attack_eps, attack_steps and
attack_examples. The accuracy under attack, and the processor seconds of training (those of every
piece of an interrupted run), go to measured.json.
"""

import json
import sys
import time
from pathlib import Path

from experiments.cells import MEASURED
from hessianflow.cli import main as command
from hessianflow.runs import History
from hessianflow.runs.files import read_object
from hessianflow.runs.names import ROBUSTNESS

CPU = "cpu_seconds.json"


def main(file: Path, run_dir: Path) -> int:
    """Train or continue; attack a run that is finished. Returns the exit status."""
    settings = json.loads(file.read_text("utf-8"))
    eps, steps, examples = (settings.pop(f"attack_{name}") for name in ("eps", "steps", "examples"))
    began = time.process_time()
    if (run_dir / "checkpoints" / "last.pt").is_file():
        status = command(["resume", str(run_dir)])
    else:
        plain = file.with_suffix(".train.json")
        plain.write_text(json.dumps(settings), "utf-8")
        status = command(["train", "--config", str(plain), "--run-dir", str(run_dir)])
    seconds = _spent(run_dir / CPU, time.process_time() - began)
    if status != 0 or History.load(run_dir).summary.get("status") != "finished":
        return status
    sizes = [str(size) for size in eps]
    attack = ["--attack", "fgsm", f"pgd{steps}", "--eps", *sizes, "--examples", str(examples)]
    status = command(["robustness", str(run_dir), *attack])
    if status == 0:
        found = read_object(run_dir / ROBUSTNESS)
        (run_dir / MEASURED).write_text(
            json.dumps({"cpu_seconds": seconds, "robustness": found}), "utf-8"
        )
    return status


def _spent(file: Path, seconds: float) -> float:
    """Add to what earlier pieces of the run took."""
    total = seconds + (json.loads(file.read_text("utf-8")) if file.is_file() else 0.0)
    file.write_text(json.dumps(total), "utf-8")
    return total


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
