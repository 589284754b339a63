"""A self-contained HTML page about runs, which needs no network and suits phones and dark mode."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style
from hessianflow.plots.comparison import ComparisonTable, compare, compare_table
from hessianflow.plots.grouping import flatten, seed_of
from hessianflow.plots.page import GENERATOR, image, page, section, table
from hessianflow.plots.records import Run, RunSource, number, read_runs
from hessianflow.plots.robustness import robustness
from hessianflow.plots.spectra import spectral_density
from hessianflow.plots.training_curves import training_curves
from hessianflow.plots.trajectory import curvature_trajectory
from hessianflow.runs.documents import (
    Layer,
    RobustnessFile,
    SpectrumFile,
    read_robustness,
    read_spectrum,
)
from hessianflow.runs.files import refuse_special, write_text
from hessianflow.runs.text import plain

_EARLIER = b":root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff;"
"""The style sheet of reports that were written before the mark GENERATOR."""

_BEGINNING = 4096
"""Bytes of a file in which the mark must be."""


def report(
    runs: RunSource | Iterable[RunSource],
    path: str | Path | None = None,
    *,
    title: str | None = None,
) -> str:
    """Return a page with summary, curvature, training curves, spectra, decisions and settings.

    Args:
        runs: run directories or objects with `.records`.
        path: file for the page; None writes none.
        title: heading; None: the names of the runs.

    Returns:
        The HTML text.

    Raises:
        HessianFlowError: there is no run, a folder is not a run directory, a file is damaged, or
            the path cannot be written or holds something other than an earlier report.
    """
    if path is not None:
        _refuse_other(Path(path))
    read = read_runs(runs)
    if not title:
        title = "Runs "
        if len(read) == 1:
            title = "Run "
        title += ", ".join(run.name for run in read)
    sections = [
        section("Summary", _summary(compare_table(read))),
        section(
            "Curvature and batch size",
            image(curvature_trajectory(read), "top eigenvalue and batch size"),
        ),
        section(
            "Training",
            image(training_curves(read), "loss, accuracy, learning rate and batch size"),
        ),
    ]
    if len(read) > 1:
        sections.append(
            section("Comparison", image(compare(read), "accuracy against updates and against time"))
        )
    sections += _measured(read)
    sections += [section("Decisions", _decisions(read)), section("Settings", _settings(read))]
    text = page(title, "\n".join(sections))
    if path is not None:
        _write(in_home(path), text)
    return text


def _measured(runs: Sequence[Run]) -> list[str]:
    """Return sections on the files of `hessianflow spectrum` and `hessianflow robustness`."""
    spectra: dict[str, SpectrumFile] = {}
    attacked: dict[str, RobustnessFile] = {}
    for run in runs:
        if run.folder is None:
            continue
        spectrum = read_spectrum(run.folder)
        robust = read_robustness(run.folder)
        if spectrum is not None:
            spectra[run.name] = spectrum
        if robust is not None:
            attacked[run.name] = robust
    return [*_spectra(spectra), *(_robustness(name, file) for name, file in attacked.items())]


def _measured_on(stored: SpectrumFile) -> str:
    counts = {"weights": stored.get("size"), "examples": stored.get("num_examples")}
    facts = [f"{value} {name}" for name, value in counts.items() if value is not None]
    if "norm_mode" in stored:
        facts.append(f"norm mode: {stored['norm_mode']}")
    trace = stored.get("trace")
    if trace:
        facts.append(f"trace {_short(trace['value'], '.4g')} ± {_short(trace['stderr'], '.1g')}")
    density = stored.get("density")
    # Files of earlier versions have no shares, and their negative mass may count zeros.
    if density is not None and "shares" in density:
        shares = density["shares"]
        facts += [
            f"{shares['negative']['value']:.1%} below 0",
            f"{shares['zero']['value']:.1%} not told from 0",
            f"{shares['positive']['value']:.1%} above 0",
        ]
    return ", ".join(facts)


def _spectra(spectra: Mapping[str, SpectrumFile]) -> list[str]:
    if not spectra:
        return []
    rows = [
        [name, str(i), _short(value, ".6g"), _short(residual, ".2g")]
        for name, spectrum in spectra.items()
        for i, (value, residual) in enumerate(
            zip(spectrum["eigenvalues"], spectrum["residuals"], strict=True), 1
        )
    ]
    notes = [
        f"<p>{escape(plain(f'{name}: {_measured_on(spectrum)}'))}</p>"
        for name, spectrum in spectra.items()
    ]
    parts = [*notes, table(["run", "rank", "eigenvalue", "residual"], rows)]
    layers = [
        [name, *_layer_cells(layer)]
        for name, spectrum in spectra.items()
        for layer in spectrum.get("layers", [])
    ]
    if layers:
        parts.append(table(["run", "layer", "weights", "eigenvalue", "residual", "trace"], layers))
    densities = {
        name: SimpleNamespace(nodes=density["nodes"], weights=density["weights"])
        for name, spectrum in spectra.items()
        if (density := spectrum.get("density")) is not None
    }
    if densities:
        parts.insert(0, image(spectral_density(densities), "density of eigenvalues"))
    return [section("Spectrum at the end", "\n".join(parts))]


def _layer_cells(layer: Layer) -> list[str]:
    trace = _short(layer.get("trace"), ".4g")
    if layer.get("trace_stderr") is not None:
        trace += f" ± {_short(layer['trace_stderr'], '.1g')}"
    name = layer["name"]
    if not layer.get("converged", True):
        name += " (not converged)"
    return [
        name,
        _short(layer.get("size"), ""),
        _short(layer["eigenvalue"], ".6g"),
        _short(layer.get("residual"), ".2g"),
        trace,
    ]


def _robustness(name: str, stored: RobustnessFile) -> str:
    curves = {
        attack: [_filled(triple) for triple in triples]
        for attack, triples in stored["accuracy"].items()
    }
    head = ["perturbation", *curves]
    rows = [
        [f"{eps:g}", *(_percent(triples[i][0]) for triples in curves.values())]
        for i, eps in enumerate(stored["eps"])
    ]
    picture = image(robustness(stored["eps"], curves), "accuracy under attack")
    return section(f"Accuracy under attack: {name}", "\n".join([picture, table(head, rows)]))


def _filled(triple: tuple[float | None, float | None, float | None]) -> tuple[float, float, float]:
    """Return an accuracy and the ends of its interval, with nan for None."""
    value, low, high = np.array(triple, dtype=float).tolist()
    return value, low, high


def _percent(value: float) -> str:
    return style.cell(value, ".2%")


def _short(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form)


def _summary(compared: ComparisonTable) -> str:
    head, *lines = compared.cells()
    return table(head, lines)


def _decisions(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for row in run.of_kind("batch"):
            change = f"{_number(number(row, 'from'))} → {_number(number(row, 'to'))}"
            where = [_number(number(row, key)) for key in ("epoch", "examples")]
            factors = [_number(number(row, key)) for key in ("lr_factor", "adversarial_share")]
            rows.append([run.name, *where, change, *factors, str(row.get("reason", ""))])
    if not rows:
        return "<p>The settings never changed.</p>"
    head = [
        "run",
        "epoch",
        "examples",
        "batch size",
        "learning-rate factor",
        "adversarial share",
        "reason",
    ]
    return table(head, rows)


def _settings(runs: Sequence[Run]) -> str:
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for setting in flat for key in setting))
    if not keys:
        return "<p>No config.json beside the records.</p>"
    rows = [[key, *(_plain(setting.get(key)) for setting in flat)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    head = ["setting", *(run.name for run in runs)]
    seeds = ", ".join(f"{run.name}: {_plain(seed_of(run.config))}" for run in runs)
    parts = [f"<p>Seeds: {escape(plain(seeds))}</p>"]
    if differing:
        parts.append("<p>Where the runs differ:</p>\n" + table(head, differing, align=False))
    every = table(head, rows, align=False)
    return "\n".join([*parts, f"<details><summary>All settings</summary>\n{every}\n</details>"])


def _number(value: float) -> str:
    return style.cell(value, ".10g")


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str)


def _write(target: Path, text: str) -> None:
    try:
        write_text(target, text)
    except OSError as error:
        raise HessianFlowError(f"cannot write report {target}: {error.strerror or error}") from None


def _refuse_other(target: Path) -> None:
    """Refuse to replace anything but an earlier report.

    Raises:
        HessianFlowError: the path holds something else.
    """
    refuse_special(target)
    if not target.exists():
        return
    try:
        with open(target, "rb") as file:
            begins = file.read(_BEGINNING)
    except OSError as error:
        raise HessianFlowError(f"cannot read {target}: {error.strerror or error}") from None
    if GENERATOR.encode() not in begins and _EARLIER not in begins:
        raise HessianFlowError(
            f"{target} exists already and is not a report of hessianflow: name another file"
        )
