"""The command `robustness`, which measures the accuracy of a trained run under attack."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from hessianflow.bounds import Count, Seed, check_setting, shown
from hessianflow.commands.parser import add_command, path
from hessianflow.commands.runs import add_named_code, load_run, printable, writing_to
from hessianflow.interfaces import HessianFlowError

MOST_STEPS = 10_000
"""Most steps of an attack. This bound is our choice: a hundred times what papers take."""


def add(commands: Any) -> dict[str, Callable[[Namespace], int]]:
    """Add the parser, and return the function of the command."""
    parser = add_command(commands, "robustness", "measure a run's test accuracy under attack")
    parser.add("run", type=path, help="run directory, or a checkpoint inside one")
    about = "attacks: fgsm, or pgd and its number of steps"
    parser.add("--attack", type=str, nargs="+", default=["fgsm", "pgd20"], help=about)
    about = "sizes of the perturbation, in pixels scaled to [0, 1]"
    parser.add("--eps", type=float, nargs="+", default=[0.005, 0.02, 0.06], help=about)
    parser.add_option("--examples", int, 1000, "number of test examples, from the first")
    parser.add_option("--seed", int, 0, "seed of the random starts of pgd")
    add_named_code(parser)
    about = "folder for robustness.json and the picture; default: the run directory"
    parser.add_open("--out", path, about)
    return {"robustness": _robustness}


def _robustness(arguments: Namespace) -> int:
    import torch
    from tqdm import tqdm

    from hessianflow.adversarial import robust_accuracy

    check_setting("examples", arguments.examples, Count)
    check_setting("seed", arguments.seed, Seed)
    makers = {name: _maker(name) for name in arguments.attack}
    for size in arguments.eps:
        if not 0 <= size <= 1:
            raise HessianFlowError(
                f"--eps must lie between 0 and 1 (pixels scaled to [0, 1]), got {size}"
            )
    run_dir, parts = load_run(arguments, "robustness", "hf.adversarial.robust_accuracy")
    batch = parts.first_tests(arguments.examples)
    spread = torch.tensor(parts.spread)
    rows = []
    for size in tqdm(arguments.eps, disable=None, desc="eps"):
        generator = torch.Generator(device=batch[0].device).manual_seed(arguments.seed)
        attacks = {
            n: make(size / spread, parts.train.value_range, generator) for n, make in makers.items()
        }
        rows.append(robust_accuracy(parts.model, batch, attacks))
    _show(arguments.eps, rows)
    _write(arguments, rows, Path(arguments.out or run_dir))
    return 0


def _maker(name: str) -> Callable[..., Callable[..., Any]]:
    """Return a function that makes the attack `name` from eps, valid range and a generator."""
    from hessianflow.adversarial import fgsm, pgd

    steps = re.fullmatch(r"pgd(\d+)", name)
    if name == "fgsm":
        return lambda eps, limits, _generator: partial(fgsm, eps=eps, value_range=limits)
    if steps and len(steps[1]) <= len(str(MOST_STEPS)) and 0 < int(steps[1]) <= MOST_STEPS:
        return lambda eps, limits, generator: partial(
            pgd, eps=eps, value_range=limits, steps=int(steps[1]), generator=generator
        )
    raise HessianFlowError(
        f"--attack must be fgsm or pgd and a number of steps up to {MOST_STEPS}, such as pgd20, got"
        f" {shown(name)}"
    )


def _show(sizes: list[float], rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    print(f"{'eps':>8}" + "".join(f"{name:>24}" for name in names))
    for size, row in zip(sizes, rows, strict=True):
        cells = (f"{r.value:7.2%} ({r.low:.1%}-{r.high:.1%})" for r in row.values())
        print(f"{size:>8g}" + "".join(f"{cell:>24}" for cell in cells))


def _write(arguments: Namespace, rows: list[dict[str, Any]], folder: Path) -> None:
    from hessianflow import plots
    from hessianflow.runs.measured import keep_robustness

    curves = {
        name: [(row[name].value, row[name].low, row[name].high) for row in rows] for name in rows[0]
    }
    values = {"eps": arguments.eps, "examples": rows[0]["clean"].total, "seed": arguments.seed}
    path = folder / "plots" / "robustness.png"
    with writing_to(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        moved = keep_robustness(folder, {**values, "accuracy": curves})
        plots.robustness(arguments.eps, curves, path=path)
    print(f"  {printable(folder / 'robustness.json')}\n  {printable(path)}")
    if moved is not None:
        print(f"  {printable(moved)} (other attacks, sizes or examples, measured earlier)")
