"""The command `critical-batch`, which measures the critical batch of a run by branching it."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from hessianflow.bounds import Count, Epochs, Rate, check_range, check_setting
from hessianflow.commands.parser import add_command, path
from hessianflow.commands.runs import (
    add_named_code,
    printable,
    require_named_code,
    require_settings,
    writing_to,
)
from hessianflow.interfaces import HessianFlowError

if TYPE_CHECKING:
    from hessianflow.planning.branch_start import RunStart
    from hessianflow.planning.branches import Branch, SizeResult

FOLDER = "critical-batch"
"""Folder of the results inside the run directory."""

FILE = "critical_batch"
"""Name of the results, less the endings."""

DOUBLINGS = 5
"""How often the batch size doubles by default, from that of the run. Our choice."""

ROUNDS = 16
"""Examples of a branch by default, in largest batches. Our choice."""

MOST_EPOCHS = 4
"""Most epochs of a branch by default, so that small data sets are not learnt by heart. Our choice.
"""

MOST_SIZES = 50
"""Most batch sizes. This bound is our choice."""

LINEAR = ("sgd", "lars", "clars")
"""Optimizers whose rate follows the batch linearly by default; that of others follows its root."""

RULES = Literal["linear", "sqrt", "none"]


def add(commands: Any) -> dict[str, Callable[[Namespace], int]]:
    """Add the parser, and return the function of the command."""
    about = "measure the largest batch that trains as well as a small one, from a checkpoint"
    parser = add_command(commands, "critical-batch", about)
    parser.add("run", type=path, help="run directory, or a checkpoint inside one")
    parser.add_open("--epoch", int | None, "epoch of the checkpoint; default: the last")
    parser.add_open(
        "--batch-sizes",
        list[int] | None,
        "batch sizes to continue at, e.g. '[32, 64, 128]', each a divisor of the largest; default:"
        " the batch size of the run, doubled up to five times, as long as none trains for more than"
        " four epochs",
    )
    parser.add_open(
        "--examples",
        int | None,
        "training examples at each batch size, a multiple of the largest one; default: 16 times"
        " the largest",
    )
    parser.add_open(
        "--lr-rule",
        RULES | None,
        "rule by which the rate follows the batch; default: linear for sgd, lars and clars, sqrt"
        " for all others",
    )
    about = "rate at the batch size of the checkpoint; default: that of the checkpoint"
    parser.add_open("--lr", float | None, about)
    parser.add(
        "--tolerance",
        type=float,
        default=0.02,
        help="excess loss tolerated, as a share of the loss at the checkpoint",
    )
    about = "runs at each batch size, on examples in other orders"
    parser.add("--repeats", type=int, default=3, help=about)
    add_named_code(parser)
    parser.add_open(
        "--out",
        path,
        "folder for results and picture; default: one for the epoch below critical-batch in the"
        " run directory. A second call continues the results in the folder",
    )
    return {"critical-batch": _critical_batch}


def _critical_batch(arguments: Namespace) -> int:
    from hessianflow.parts import find_checkpoint
    from hessianflow.planning.branch_start import find_start

    _check(arguments)
    run_dir = find_checkpoint(arguments.run)[0]
    require_settings(run_dir, "critical-batch", "hf.planning.branch")
    require_named_code(run_dir, arguments)
    start = find_start(arguments.run, arguments.epoch, arguments.lr)
    settings = _settings(arguments, start)
    folder = Path(arguments.out or run_dir / FOLDER / _place(start))
    if start.config.adversary.name != "none":
        print(f"branches train on clean examples, without the {start.config.adversary.name} attack")
    branches = _branches(start, settings, folder)
    _report(branches, settings, folder, arguments.tolerance)
    return 0


def _check(arguments: Namespace) -> None:
    for name, hint in (("epoch", Epochs), ("examples", Count), ("lr", Rate)):
        if getattr(arguments, name) is not None:
            check_setting(name, getattr(arguments, name), hint)
    check_range("--repeats", arguments.repeats, 1, 1000)
    check_range("--tolerance", arguments.tolerance, 0, 1000)
    sizes = arguments.batch_sizes
    if sizes is None:
        return
    for size in sizes:
        check_setting("batch_sizes", size, Count)
    if not 2 <= len(set(sizes)) <= MOST_SIZES:
        raise HessianFlowError(
            f"--batch-sizes must hold 2 to {MOST_SIZES} different sizes, got {len(set(sizes))}"
        )
    apart = [size for size in sizes if max(sizes) % size]
    if apart:
        raise HessianFlowError(
            f"--batch-sizes: {apart[0]} does not divide the largest, {max(sizes)}, so the branches"
            " would end after different numbers of examples"
        )


def _settings(arguments: Namespace, start: "RunStart") -> dict[str, Any]:
    """Return what decides the branches, as written beside them."""
    most = start.parts.train.num_examples
    sizes = sorted(set(arguments.batch_sizes or _doubled(start.config.batch_size, most)))
    if sizes[-1] > most:
        raise HessianFlowError(
            f"--batch-sizes: {sizes[-1]} is larger than the {most} training examples of the run"
        )
    examples = arguments.examples or ROUNDS * sizes[-1]
    if examples % sizes[-1]:
        raise HessianFlowError(
            f"--examples must be a multiple of the largest batch, {sizes[-1]}, got {examples}"
        )
    rule = arguments.lr_rule
    if rule is None:
        rule = "sqrt"
        if start.config.optimizer.name in LINEAR:
            rule = "linear"
    return {
        "checkpoint": start.file.name,
        "epoch": start.epoch,
        "trained": int(start.state["examples"]),
        "batch_size": start.batch_size,
        "lr": start.rate,
        "lr_rule": rule,
        "batch_sizes": sizes,
        "examples": examples,
        "repeats": arguments.repeats,
    }


def _doubled(size: int, most: int) -> list[int]:
    largest = min(most, MOST_EPOCHS * most // ROUNDS)
    sizes = [size * 2**power for power in range(DOUBLINGS + 1) if size * 2**power <= largest]
    if len(sizes) < 2:
        raise HessianFlowError(
            f"the batch size of the run, {size}, is large for its {most} training examples: name"
            " batch sizes with --batch-sizes"
        )
    return sizes


def _place(start: "RunStart") -> str:
    """Return the name of the folder for a checkpoint."""
    within = int(start.state["counters"].get("place", 0))
    if within:
        return f"epoch-{start.epoch}-{within}"
    return f"epoch-{start.epoch}"


def _branches(start: "RunStart", settings: Mapping[str, Any], folder: Path) -> "list[Branch]":
    """Return all branches: those measured before under the same settings, and new ones."""
    from tqdm import tqdm

    from hessianflow.planning.branches import branch

    done = _earlier(folder, settings)
    largest = settings["batch_sizes"][-1]
    wanted = [(n, size) for n in range(settings["repeats"]) for size in settings["batch_sizes"]]
    missing = [pair for pair in wanted if pair not in done]
    for repeat, size in tqdm(missing, disable=None, unit=" branches"):
        rounds = settings["examples"] // largest
        done[repeat, size] = branch(start, size, repeat, settings["lr_rule"], rounds, largest)
        _keep(folder, settings, list(done.values()))
    return [done[pair] for pair in wanted]


def _earlier(folder: Path, settings: Mapping[str, Any]) -> "dict[tuple[int, int], Branch]":
    """Return the branches of an earlier call that this one may use, by repeat and size.

    Results under other settings are kept under another name.
    """
    from hessianflow.planning.branches import Branch
    from hessianflow.runs.files import read_object
    from hessianflow.runs.measured import moved_aside

    file = folder / f"{FILE}.json"
    if not file.is_file():
        return {}
    earlier: dict[tuple[int, int], Branch] = {}
    try:
        content = read_object(file)
        before = content.get("settings")
        if isinstance(before, dict) and _decisive(before) == _decisive(settings):
            rows = content.get("branches", [])
            for one in map(Branch.from_dict, rows):
                earlier[one.repeat, one.batch_size] = one
            return earlier
    except (HessianFlowError, TypeError):
        pass  # a damaged file is kept, too
    with writing_to(folder):
        moved = moved_aside(file)
    if moved is not None:
        print(f"  {printable(moved)} (under other settings, measured earlier)")
    return {}


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a single branch: other sizes and repeats may be added."""
    kept = {
        name: value for name, value in settings.items() if name not in ("repeats", "checkpoint")
    }
    kept["batch_sizes"] = max(kept.get("batch_sizes") or [0])
    return kept


def _keep(
    folder: Path,
    settings: Mapping[str, Any],
    branches: "Sequence[Branch]",
    result: Mapping[str, Any] | None = None,
) -> None:
    from hessianflow.runs.files import write_json

    content = {"settings": settings, "branches": [one.to_dict() for one in branches]}
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{FILE}.json", {**content, **(result or {})})


def _report(
    branches: "Sequence[Branch]", settings: Mapping[str, Any], folder: Path, tolerance: float
) -> None:
    """Print the table; write results, table and picture."""
    from hessianflow import plots
    from hessianflow.planning.branches import compared, critical_size, crossing
    from hessianflow.runs.files import finite, write_text

    results = compared(branches)
    critical = critical_size(results, tolerance)
    print(_table(results, settings))
    if not math.isfinite(results[0].excess):
        raise HessianFlowError(
            f"branches of the smallest batch, {results[0].batch_size}, diverged, so there is"
            f" nothing to compare with: name a lower rate than {settings['lr']:.4g} with --lr"
        )
    print(_verdict(results, critical, tolerance))
    rows = [finite(vars(result)) for result in results]
    summary = {
        "tolerance": tolerance,
        "critical": critical,
        "is_largest": critical == results[-1].batch_size,
        "crossing": finite(crossing(results, tolerance)),
        "sizes": rows,
    }
    _keep(folder, settings, branches, summary)
    picture = folder / f"{FILE}.png"
    with writing_to(folder):
        write_text(folder / f"{FILE}.csv", _csv(rows))
        plots.critical_batch(
            rows, tolerance, critical, picture, f"Branches after epoch {settings['epoch']}"
        )
    for file in (folder / f"{FILE}.json", folder / f"{FILE}.csv", picture):
        print(f"  {printable(file)}")


def _table(results: "Sequence[SizeResult]", settings: Mapping[str, Any]) -> str:
    lines = [
        (
            f"epoch {settings['epoch']}, rate {settings['lr']:.4g} at batch"
            f" {settings['batch_size']}, rule {settings['lr_rule']}, {settings['examples']}"
            f" examples a branch, {settings['repeats']} repeats"
        ),
        f"{'batch':>8}{'updates':>9}{'rate':>11}{'loss':>10}{'excess':>9}{'+-':>8}",
    ]
    for row in results:
        rate = settings["lr"] * row.lr_factor
        lines.append(
            f"{row.batch_size:>8}{row.updates:>9}{rate:>11.4g}{row.loss:>10.4f}"
            f"{row.excess:>9.1%}{row.stderr:>8.1%}"
        )
    return "\n".join(lines)


def _verdict(results: "Sequence[SizeResult]", critical: int, tolerance: float) -> str:
    """Return the critical batch in words, and whether the spread leaves it open."""
    words = f"critical batch: {critical}"
    if critical == results[-1].batch_size:
        words += " or more, the largest that was tried"
    smallest = results[0].batch_size
    words += f" (excess over batch {smallest} at most {tolerance:.1%} of the first loss)"
    unsure = [row.batch_size for row in results if 2 * row.stderr > tolerance]
    if unsure:
        words += (
            f"\nthe excess of {', '.join(map(str, unsure))} is not known as closely as the"
            " tolerance: raise --repeats"
        )
    return words


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
