"""Runs a grid of training runs over seeds, and keeps what came out of each.

A cell is one `hessianflow train` in a process of its own. One whose row is in results.jsonl is not repeated, an
interrupted one is continued from its checkpoint, one that fails is reported and the others go on. Where there are GPUs,
every process sees one of them. A study (a folder below experiments/) says what the cells are and calls :func:`main`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.devices import least_used, visible_devices
from experiments.results import RESULTS, Row, append_row, draw, read_rows, row_of, write_reports
from hessianflow.config import from_dict, resolve
from hessianflow.interfaces import HessianFlowError
from hessianflow.runs import History
from hessianflow.runs.files import read_object

Scale = Literal["smoke", "cpu", "gpu", "full"]
ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.2
MEASURED = "measured.json"
"""What a cell's own program leaves in the run directory beside the records of training."""
_NEEDS_NO_FILES = ("digits", "fake")


@dataclass(frozen=True)
class Cell:
    """One training run of a grid.

    Attributes:
        problem: what is trained, on which data.
        method: how its batch size is chosen.
        seed: of the run.
        settings: of `hessianflow train`, by their names in a settings file; without seed, data_dir and run_dir.
        program: None: `hessianflow train`. Or a module that is run as `python -m MODULE SETTINGS.json RUN_DIR` and
            trains, or continues what it finds in RUN_DIR; a measured.json that it leaves there goes into the row.
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
class Study:
    """A question and its grid.

    Attributes:
        name: of the study.
        folder: where results.jsonl, tables and figures are kept.
        cells: the grid at a scale, for the given seeds, in the order of usefulness.
        draw: makes the figure, a PNG at the given path, from the rows alone.
    """

    name: str
    folder: Path
    cells: Callable[[Scale, Sequence[int]], list[Cell]]
    draw: Callable[[Sequence[Row], Path], None] = draw


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
        """Start the process of a cell, or of the rest of it; a run of other settings in its place is deleted.

        It gets the device that the fewest of the jobs `beside` it use.
        """
        run_dir, file = self.run_dir(cell), self.run_dir(cell).with_suffix(".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = cell.all_settings
        if settings.get("data", "digits") not in _NEEDS_NO_FILES:
            settings["data_dir"] = self.data_dir
        same = file.is_file() and _without_paths(json.loads(file.read_text("utf-8"))) == _without_paths(settings)
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
            return [self.python, "-m", "hessianflow", "resume", str(run_dir)]
        return [self.python, "-m", "hessianflow", "train", "--config", str(settings), "--run-dir", str(run_dir)]


def _without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "data_dir"}


@dataclass
class Job:
    """A cell whose process runs."""

    cell: Cell
    run_dir: Path
    process: "subprocess.Popen[bytes]"
    device: str | None

    def outcome(self) -> Outcome:
        """What the ended process left."""
        lines = self.run_dir.with_suffix(".log").read_text("utf-8", errors="replace").strip().splitlines()
        if self.process.returncode != 0:
            last = lines[-1] if lines else "no message"
            return Outcome(self.cell, None, f"exit status {self.process.returncode}: {last}")
        try:
            history = History.load(self.run_dir)
            if history.summary.get("status") != "finished":
                return Outcome(self.cell, None, "stopped before the last epoch; run again to continue")
            row = row_of(self.cell.problem, self.cell.method, self.cell.all_settings, history)
            measured = self.run_dir / MEASURED
            if measured.is_file():
                row["measured"] = read_object(measured)
        except (ValueError, KeyError, OSError) as error:  # a run directory that cannot be read stops no other cell
            return Outcome(self.cell, None, f"{self.run_dir}: {type(error).__name__}: {error}")
        return Outcome(self.cell, row)


def unfinished(cells: Sequence[Cell], results: Path) -> list[Cell]:
    """The cells without a row of the same settings."""
    done = {(row["problem"], row["method"], row["seed"]): row["settings"] for row in read_rows(results)}
    return [c for c in cells if done.get((c.problem, c.method, c.seed)) != json.loads(json.dumps(c.all_settings))]


def run_grid(cells: Sequence[Cell], results: Path, place: Workplace, jobs: int = 1) -> Iterator[Outcome]:
    """Run every cell that has no row of the same settings yet; yield each as it ends, its row already written.

    Args:
        cells: in the order they are started.
        results: the results.jsonl.
        place: where and how.
        jobs: processes at once.
    """
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


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """The command line of a study; 0 when every cell has a row, 1 when one has none, 2 on bad input."""
    options = _parser(study).parse_args(arguments)
    scale: Scale = "smoke" if options.smoke else options.scale
    runs = Path(options.runs or ROOT / "runs" / study.name)
    smoke = scale == "smoke"  # made-up data: their figures are kept apart
    folder = Path(options.out or (runs / "smoke" if smoke else study.folder))
    cells = [cell for cell in study.cells(scale, options.seeds) if _wanted(cell, options.only)]
    if not cells:
        sys.stderr.write(f"{study.name}: no cell of the {scale} grid fits --only {' '.join(options.only)}\n")
        return 2
    devices = visible_devices()
    place = Workplace(runs / "smoke" / "runs" if smoke else runs, options.data_dir, devices=devices)
    folder.mkdir(parents=True, exist_ok=True)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        jobs = options.jobs or max(1, len(devices))
        failed = [] if options.report else _run(cells, folder / RESULTS, place, jobs)
        for path in write_reports(read_rows(folder / RESULTS), folder, study.draw):
            print(path)
    except HessianFlowError as error:
        sys.stderr.write(f"{study.name}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{study.name}: stopped; the same command goes on from here\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 1 if failed else 0


def _run(cells: Sequence[Cell], results: Path, place: Workplace, jobs: int) -> list[Outcome]:
    """Run the grid, tell how it goes, and return what failed."""
    failed, began = [], time.monotonic()
    todo = len(unfinished(cells, results))
    print(f"{len(cells)} cells, {len(cells) - todo} of them in {results}")
    for ended, outcome in enumerate(run_grid(cells, results, place, jobs), start=1):
        minutes, row = (time.monotonic() - began) / 60, outcome.row
        if row is None:
            failed.append(outcome)
            text = f"FAILED: {outcome.error}"
        else:
            text = f"{row['accuracy']:.2%}, {row['updates']} updates, {row['seconds']:.0f} s"
        left = f"{minutes:.0f} min, about {minutes / ended * (todo - ended):.0f} left"
        print(f"[{ended}/{todo}, {left}] {outcome.cell.name}: {text}", flush=True)
    for outcome in failed:
        sys.stderr.write(f"failed: {outcome.cell.name}: {outcome.error}\n")
    return failed


def _wanted(cell: Cell, patterns: Sequence[str]) -> bool:
    return any(fnmatch(f"{cell.problem}/{cell.method}", pattern) for pattern in patterns)


def _stop(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _parser(study: Study) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=study.name, description=f"Run the grid of the study {study.name!r}.")
    parser.add_argument("--scale", choices=get_args(Scale), default="cpu", help="size of the grid; default: cpu")
    parser.add_argument("--smoke", action="store_true", help="--scale smoke: seconds, on made-up data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--jobs", type=int, help="processes at once; default: one a GPU, or one without GPUs")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="only cells whose PROBLEM/METHOD fits"
    )
    parser.add_argument("--data-dir", help="folder of the data sets' official files")
    parser.add_argument("--runs", help=f"folder of the run directories; default: runs/{study.name}")
    parser.add_argument("--out", help="folder of results.jsonl, tables and figures; default: the study's own")
    parser.add_argument("--report", action="store_true", help="run nothing; make tables and figures anew")
    return parser
