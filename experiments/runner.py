"""Runs a grid of training runs over seeds, and keeps what came out of each.

A cell is one `hessianflow train` in a process of its own. One whose row is in results.jsonl is not
repeated, an interrupted one is continued from its checkpoint, one that fails is reported and the
others go on. Where there are GPUs, every process sees one of them. A study (a folder below
experiments/) says what the cells are and calls :func:`main`.
"""

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from experiments.cells import NEEDS_NO_FILES, ROOT, Cell, Outcome, Workplace, run_grid, unfinished
from experiments.devices import visible_devices
from experiments.results import RESULTS, Row, draw, read_rows, write_reports
from hessianflow.data import load
from hessianflow.interfaces import HessianFlowError

__all__ = ["Cell", "Outcome", "Scale", "Study", "Workplace", "main", "run_grid"]

Scale = Literal["smoke", "cpu", "gpu", "full"]
RUNS = ROOT / "runs"
"""Where studies leave what they do; not under version control."""
MOST_JOBS = 1024
"""Processes at once. Ours."""


@dataclass(frozen=True)
class Study:
    """A question and its grid.

    Attributes:
        name: of the study.
        folder: where results.jsonl, tables and figures are kept.
        cells: the grid at a scale, for the given seeds, in the order of usefulness.
        draw: makes the figure, a PNG at the given path, from the rows alone.
        recorded: folder of results that come with the study, to which nothing is added unless
            somebody names it; they tell how long the cells took.
    """

    name: str
    folder: Path
    cells: Callable[[Scale, Sequence[int]], list[Cell]]
    draw: Callable[[Sequence[Row], Path], None] = draw
    recorded: Path | None = None


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """The command line of a study; 0 when every cell has a row, 1 when one has none, 2 on bad
    input."""
    options = _parser(study).parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        return _main(study, options)
    except HessianFlowError as error:
        sys.stderr.write(f"{study.name}: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{study.name}: {error.strerror or error} ({error.filename})\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{study.name}: stopped; the same command goes on from here\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _main(study: Study, options: argparse.Namespace) -> int:
    scale: Scale = "smoke" if options.smoke else options.scale
    runs = Path(options.runs or RUNS / study.name).expanduser()
    smoke = scale == "smoke"  # made-up data: their figures are kept apart
    folder = Path(options.out or (runs / "smoke" if smoke else study.folder)).expanduser()
    if smoke and study.recorded is not None and folder.resolve() == study.recorded.resolve():
        raise HessianFlowError(
            f"--out {folder}: rows of made-up data do not belong there, name another folder"
        )
    cells = [cell for cell in study.cells(scale, options.seeds) if _wanted(cell, options.only)]
    if not cells:
        raise HessianFlowError(f"no cell of the {scale} grid fits --only {' '.join(options.only)}")
    results = folder / RESULTS
    if options.report:
        _write_reports(study, results, must_have_rows=True)
        return 0
    devices = visible_devices()
    place = Workplace(runs / "smoke" / "runs" if smoke else runs, options.data_dir, devices=devices)
    todo = unfinished(cells, results)
    check_data(todo, place.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(cells)} cells, {len(cells) - len(todo)} of them in"
        f" {results}{_estimate(todo, study)}",
        flush=True,
    )
    failed = _run(todo, results, place, options.jobs or max(1, len(devices)))
    if len(failed) < len(todo) or not todo:
        _write_reports(study, results)
    return 1 if failed else 0


def _write_reports(study: Study, results: Path, *, must_have_rows: bool = False) -> None:
    """Tables and figure from the rows of a file; nothing where it has none."""
    rows = read_rows(results)
    if must_have_rows and not rows:
        stand = (
            f", or name those that come with it: --out {study.recorded}" if study.recorded else ""
        )
        raise HessianFlowError(f"{results} holds no rows: run the study first{stand}")
    try:
        paths = write_reports(rows, results.parent, study.draw)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise HessianFlowError(
            f"{results} holds a row that is not of this study ({type(error).__name__} {error}):"
            " delete it, its cell runs again"
        ) from error
    for path in paths:
        print(path)


def check_data(cells: Sequence[Cell], data_dir: str | None) -> None:
    """Refuse cells whose data are not there, before the first of them begins.

    Raises:
        HessianFlowError: no folder for data that need one, or the files are missing there.
    """
    names = dict.fromkeys(cell.settings.get("data", "digits") for cell in cells)
    for name in [name for name in names if name not in NEEDS_NO_FILES]:
        if data_dir is None:
            raise HessianFlowError(
                f"{name} is needed: name the folder of its official files with --data-dir"
                f" (`hessianflow data fetch {name} --data-dir DIR` gets them), or try --smoke,"
                " which needs none"
            )
        load(name, data_dir, "test")


def _estimate(cells: Sequence[Cell], study: Study) -> str:
    """How long the cells took where the rows that come with the study were made."""
    rows = [] if study.recorded is None else read_rows(study.recorded / RESULTS)
    took: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        took.setdefault((row["problem"], row["method"]), []).append(row["seconds"])
    known = [
        statistics.mean(took[cell.problem, cell.method])
        for cell in cells
        if (cell.problem, cell.method) in took
    ]
    if not known:
        return ""
    rest = f"; nobody timed the other {len(cells) - len(known)}" if len(known) < len(cells) else ""
    return (
        f"; {len(known)} of the rest took {sum(known) / 60:.0f} min, one by one, on"
        f" {rows[-1]['hardware']}{rest}"
    )


def _run(cells: Sequence[Cell], results: Path, place: Workplace, jobs: int) -> list[Outcome]:
    """Run cells without a row, tell how it goes, and return what failed."""
    failed = []
    todo = len(cells)
    began = time.monotonic()
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


class _Parser(argparse.ArgumentParser):
    """Reports a mistake on one line."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and end with status 2."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _count(text: str) -> int:
    """A number of processes.

    Raises:
        argparse.ArgumentTypeError: there cannot be so many.
    """
    if not text.isdecimal() or len(text) > len(str(MOST_JOBS)) or not 1 <= int(text) <= MOST_JOBS:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 1 to {MOST_JOBS}, got {text[:20]}"
        )
    return int(text)


def _parser(study: Study) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=study.name,
        description=f"Run the grid of the study {study.name!r}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--scale", choices=get_args(Scale), default="cpu", help="size of the grid; default: cpu"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="--scale smoke: seconds, on made-up data"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--jobs", type=_count, help="processes at once; default: one a GPU, or one without GPUs"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="only cells whose PROBLEM/METHOD fits",
    )
    parser.add_argument("--data-dir", help="folder of the data sets' official files")
    parser.add_argument("--runs", help=f"folder of the run directories; default: runs/{study.name}")
    parser.add_argument(
        "--out", help=f"folder of results.jsonl, tables and figures; default: {study.folder}"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing; make tables and figures anew"
    )
    return parser
