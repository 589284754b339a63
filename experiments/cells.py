"""The cells of a grid and their processes: each is one training run, started, continued, and read
when it has ended."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.devices import least_used
from experiments.results import Row, append_row, read_rows, row_of
from hessianflow.config import from_dict
from hessianflow.data.datasets import DATA_SETS
from hessianflow.interfaces import HessianFlowError
from hessianflow.resolve import resolve
from hessianflow.runs import History
from hessianflow.runs.files import read_object
from hessianflow.upgrade import upgrade

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.2
MEASURED = "measured.json"
"""What a cell's own program leaves in the run directory beside the records of training."""
NEEDS_NO_FILES = tuple(name for name, one in DATA_SETS.items() if not one.needs_files)


@dataclass(frozen=True)
class Cell:
    """One training run of a grid.

    Attributes:
        problem: what is trained, on which data.
        method: how its batch size is chosen.
        seed: of the run.
        settings: of `hessianflow train`, by their names in a settings file; without seed, data_dir
            and run_dir.
        program: None: `hessianflow train`. Or a module that is run as `python -m MODULE
            SETTINGS.json RUN_DIR` and trains, or continues what it finds in RUN_DIR; a
            measured.json that it leaves there goes into the row.
        extra: further settings of that module.
    """

    problem: str
    method: str
    seed: int
    settings: Mapping[str, Any]
    program: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.problem} {self.method} seed {self.seed}"

    @property
    def all_settings(self) -> dict[str, Any]:
        """What makes the run what it is."""
        return {**self.settings, **self.extra, "seed": self.seed}

    def check(self) -> None:
        """Refuse settings that cannot be.

        Raises:
            HessianFlowError: what is wrong with them.
        """
        resolve(from_dict({**self.settings, "seed": self.seed}, self.name))


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: with a row, or with an error in one line."""

    cell: Cell
    row: Row | None
    error: str = ""


@dataclass(frozen=True)
class Workplace:
    """Where and how cells run.

    Attributes:
        runs: folder of the run directories.
        data_dir: of the data sets; None: only data that need no files.
        python: the interpreter.
        devices: GPUs by the names of CUDA_VISIBLE_DEVICES; none: the processor.
    """

    runs: Path
    data_dir: str | None = None
    python: str = sys.executable
    devices: Sequence[str] = ()

    def run_dir(self, cell: Cell) -> Path:
        """Of one cell."""
        return self.runs / cell.problem / cell.method / f"seed{cell.seed}"

    def start(self, cell: Cell, beside: Sequence["Job"] = ()) -> "Job":
        """Start the process of a cell, or of the rest of it; a run of other settings in its place
        is deleted.

        It gets the device that the fewest of the jobs `beside` it use.
        """
        run_dir, file = self.run_dir(cell), self.run_dir(cell).with_suffix(".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = cell.all_settings
        if settings.get("data", "digits") not in NEEDS_NO_FILES:
            settings["data_dir"] = (
                None if self.data_dir is None else str(Path(self.data_dir).expanduser().absolute())
            )
        same = file.is_file() and _without_paths(
            json.loads(file.read_text("utf-8"))
        ) == _without_paths(settings)
        if not (same and (run_dir / "checkpoints" / "last.pt").is_file()):
            shutil.rmtree(run_dir, ignore_errors=True)
        file.write_text(json.dumps(settings, indent=1), "utf-8")
        device = least_used(self.devices, [job.device for job in beside])
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.get("threads") or 1)}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with open(run_dir.with_suffix(".log"), "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                self._command(cell, file, run_dir),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
            )
        return Job(cell, run_dir, process, device)

    def _command(self, cell: Cell, settings: Path, run_dir: Path) -> list[str]:
        if cell.program is not None:
            return [self.python, "-m", cell.program, str(settings), str(run_dir)]
        if run_dir.is_dir():
            model = cell.settings.get("model") or ""
            trusted = ["--model", model] if ":" in model else []
            return [self.python, "-m", "hessianflow", "resume", str(run_dir), *trusted]
        return [
            self.python,
            "-m",
            "hessianflow",
            "train",
            "--config",
            str(settings),
            "--run-dir",
            str(run_dir),
        ]


def _without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in same_words(settings).items() if name != "data_dir"}


def same_words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in the words of today and in one spelling, so that those of runs made before
    options belonged to their methods compare equal to those of the same cells.

    A method without options stands as its name, and settings left open are left out.
    """
    plain = json.loads(json.dumps(upgrade(settings)))
    return {name: _by_name(value) for name, value in plain.items() if value is not None}


def _by_name(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"name"}:
        return value["name"]
    return {name: _by_name(part) for name, part in value.items()}


@dataclass
class Job:
    """A cell whose process runs."""

    cell: Cell
    run_dir: Path
    process: "subprocess.Popen[bytes]"
    device: str | None

    def outcome(self) -> Outcome:
        """What the ended process left."""
        lines = (
            self.run_dir.with_suffix(".log")
            .read_text("utf-8", errors="replace")
            .strip()
            .splitlines()
        )
        if self.process.returncode != 0:
            last = lines[-1] if lines else "no message"
            return Outcome(self.cell, None, f"exit status {self.process.returncode}: {last}")
        try:
            history = History.load(self.run_dir)
            if history.summary.get("status") != "finished":
                return Outcome(
                    self.cell, None, "stopped before the last epoch; run again to continue"
                )
            row = row_of(self.cell.problem, self.cell.method, self.cell.all_settings, history)
            measured = self.run_dir / MEASURED
            if measured.is_file():
                row["measured"] = read_object(measured)
        except (
            ValueError,
            KeyError,
            OSError,
        ) as error:  # a run directory that cannot be read stops no other cell
            return Outcome(self.cell, None, f"{self.run_dir}: {type(error).__name__}: {error}")
        return Outcome(self.cell, row)


def unfinished(cells: Sequence[Cell], results: Path) -> list[Cell]:
    """The cells without a row of the same settings."""
    done = {
        (row["problem"], row["method"], row["seed"]): same_words(row.get("settings", {}))
        for row in read_rows(results)
    }
    return [
        c for c in cells if done.get((c.problem, c.method, c.seed)) != same_words(c.all_settings)
    ]


def run_grid(
    cells: Sequence[Cell], results: Path, place: Workplace, jobs: int = 1
) -> Iterator[Outcome]:
    """Run every cell that has no row of the same settings yet; yield each as it ends, its row
    already written.

    Args:
        cells: in the order they are started.
        results: the results.jsonl.
        place: where and how.
        jobs: processes at once.

    Raises:
        HessianFlowError: no process at once.
    """
    if jobs < 1:
        raise HessianFlowError(f"jobs must be at least 1, got {jobs}")
    waiting = []
    for cell in unfinished(cells, results):
        try:
            cell.check()
            waiting.append(cell)
        except HessianFlowError as error:
            yield Outcome(cell, None, str(error))
    running: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(place.start(waiting.pop(0), running))
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                outcome = job.outcome()
                if outcome.row is not None:
                    append_row(results, outcome.row)
                yield outcome
    finally:
        for job in running:  # they save a checkpoint and can be continued
            job.process.terminate()
        for job in running:
            job.process.wait()
