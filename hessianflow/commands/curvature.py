"""The commands `spectrum` and `second-opinion`, which measure the curvature of a trained run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from hessianflow.bounds import Count, Seed, check_range, check_setting
from hessianflow.commands.parser import add_command, path
from hessianflow.commands.runs import add_named_code, load_run, printable, writing_to
from hessianflow.interfaces import NormMode

if TYPE_CHECKING:
    from hessianflow.curvature import SignShares, SpectrumReport


MOST_EIGENVALUES = 1000
"""Most eigenvalues of one spectrum. This bound is our choice: each takes a vector as large as the
model, kept orthogonal to the others."""


def add(commands: Any) -> dict[str, Callable[[Namespace], int]]:
    """Add the parsers, and return the function of each command."""
    about = "measure the Hessian's eigenvalues, trace and density at a run's weights"
    spectrum = add_command(commands, "spectrum", about)
    about = "print our eigenvalues, trace and density beside PyHessian's"
    second = add_command(commands, "second-opinion", about)
    for parser, count in ((spectrum, 5), (second, 2)):
        parser.add("run", type=path, help="run directory, or a checkpoint inside one")
        parser.add_option("--k", int, count, "number of leading eigenvalues")
        parser.add_option(
            "--examples", int, 256, "number of training examples over which the loss is averaged"
        )
        parser.add_option("--seed", int, 0, "seed of the examples and of all random starts")
        add_named_code(parser)
    spectrum.add_option("--density", bool, False, "also measure and draw the spectral density")
    spectrum.add_option("--trace", bool, False, "also measure the trace")
    spectrum.add_open(
        "--layers", str | None, "also measure single layers, by name, e.g. 'layer1.*' or '*'"
    )
    spectrum.add_open(
        "--out", path, "folder for spectrum.json and pictures; default: the run directory"
    )
    about = "examples per pass; default: all in one pass, the fastest; set it if memory runs out"
    spectrum.add_open("--microbatch-size", int | None, about)
    about = "statistics of batch normalisation: the running ones (eval) or those of the batch"
    spectrum.add_option("--norm-mode", NormMode, "eval", about)
    return {"spectrum": _spectrum, "second-opinion": _second_opinion}


def _spectrum(arguments: Namespace) -> int:
    from torch.nn import CrossEntropyLoss
    from tqdm import tqdm

    from hessianflow.curvature import spectrum_report

    instead = "hf.curvature.top_eigenpairs or hf.curvature.spectrum_report"
    run_dir, model, batch = _load(arguments, "spectrum", instead)
    with tqdm(disable=None, unit=" products") as bar:

        def progress(stage: str, _done: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.update()

        report = spectrum_report(
            model,
            CrossEntropyLoss(),
            batch,
            k=arguments.k,
            density=arguments.density,
            trace=arguments.trace,
            layers=arguments.layers,
            microbatch_size=arguments.microbatch_size,
            norm_mode=arguments.norm_mode,
            seed=arguments.seed,
            progress=progress,
        )
    print(_table(report))
    _write(report, Path(arguments.out or run_dir))
    return 0


def _second_opinion(arguments: Namespace) -> int:
    from torch.nn import CrossEntropyLoss

    from hessianflow.curvature import second_opinion

    _, model, batch = _load(arguments, "second-opinion", "hf.curvature.second_opinion")
    opinion = second_opinion(model, CrossEntropyLoss(), batch, k=arguments.k, seed=arguments.seed)
    print(opinion.table())
    return 0


def _load(arguments: Namespace, command: str, instead: str) -> tuple[Path, Any, Any]:
    """Return the directory and the model of a run, and the examples to measure on."""
    check_range("--k", arguments.k, 1, MOST_EIGENVALUES)
    check_setting("examples", arguments.examples, Count)
    check_setting("seed", arguments.seed, Seed)
    run_dir, parts = load_run(arguments, command, instead)
    count = min(arguments.examples, parts.train.num_examples)
    return run_dir, parts.model, parts.train.sample(count, arguments.seed)


def _table(report: "SpectrumReport") -> str:
    head = (
        f"{report.size} weights, {report.num_examples} examples, batch normalisation:"
        f" {report.norm_mode}, loss {report.loss:.4g}, {report.matvecs} products"
    )
    lines = [head, f"{'':<24}{'value':>14}{'+-':>12}{'gradient':>10}"]
    rows = zip(report.eigen.values, report.eigen.residuals, report.gradient_overlap, strict=True)
    for number, (value, residual, overlap) in enumerate(rows, start=1):
        lines.append(f"{f'eigenvalue {number}':<24}{value:>14.6g}{residual:>12.1e}{overlap:>10.1%}")
    if not report.eigen.converged:
        lines.append("not converged: the residuals above bound the errors")
    if report.trace is not None:
        lines.append(f"{'trace':<24}{report.trace.value:>14.6g}{report.trace.stderr:>12.1e}")
    if report.density is not None:
        lines += _shares(report.density.shares())
    for layer in report.layers:
        line = (
            f"{layer.name:<24}{layer.eigenvalue:>14.6g}{layer.residual:>12.1e}   trace"
            f" {layer.trace:.4g} +- {layer.trace_stderr:.1g}, {layer.size} weights"
        )
        if not layer.converged:
            line += "  not converged"
        lines.append(line)
    return "\n".join(lines)


def _shares(shares: "SignShares") -> list[str]:
    """Return a line for the eigenvalues of each sign: their share and its limits."""
    first, last = shares.zone
    rows = {
        "share below 0": shares.negative,
        "share not told from 0": shares.zero,
        "share above 0": shares.positive,
    }
    lines = [
        f"{name:<24}{share.value:>14.4f}   true share {share.low:.4f} to {share.high:.4f}"
        for name, share in rows.items()
    ]
    reason = "because of too few steps or of rounding"
    return [*lines, f"not told from 0: between {first:.2g} and {last:.2g}, {reason}"]


def _write(report: "SpectrumReport", folder: Path) -> None:
    from hessianflow import plots
    from hessianflow.runs.files import finite
    from hessianflow.runs.measured import keep_spectrum

    with writing_to(folder):
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        moved = keep_spectrum(folder, finite(report.to_dict()))
        print(f"  {printable(folder / 'spectrum.json')}")
        if moved is not None:
            reason = "of other weights, examples or norm mode, measured earlier"
            print(f"  {printable(moved)} ({reason})")
        if report.density is not None:
            path = folder / "plots" / "spectral_density.png"
            plots.spectral_density(report.density, path=path)
            print(f"  {printable(path)}")
