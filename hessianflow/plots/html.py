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
from hessianflow.plots.comparison import compare, compare_table
from hessianflow.plots.grouping import flatten, seed_of
from hessianflow.plots.page import GENERATOR, image, page, section, table
from hessianflow.plots.records import Run, RunSource, number, read_runs
from hessianflow.plots.robustness import robustness
from hessianflow.plots.spectra import spectral_density
from hessianflow.plots.style import cell
from hessianflow.plots.training_curves import training_curves
from hessianflow.plots.trajectory import curvature_trajectory
from hessianflow.runs.documents import (
    Layer,
    RobustnessFile,
    SpectrumFile,
    read_robustness,
    read_spectrum,
)
from hessianflow.runs.files import refuse_special, telling, write_text
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
        HessianFlowError: the path holds something other than an earlier report.
    """
    if path is not None:
        _refuse_other(Path(path))
    read = read_runs(runs)
    if not title:
        title = "Runs "
        if len(read) == 1:
            title = "Run "
        title += ", ".join(run.name for run in read)
    head, *lines = compare_table(read).cells()
    curvature = image(curvature_trajectory(read), "top eigenvalue and batch size")
    curves = image(training_curves(read), "loss, accuracy, learning rate and batch size")
    sections = [
        section("Summary", table(head, lines)),
        section("Curvature and batch size", curvature),
        section("Training", curves),
    ]
    if len(read) > 1:
        picture = image(compare(read), "accuracy against updates and against time")
        sections.append(section("Comparison", picture))
    sections += _measured(read)
    sections += [section("Decisions", _decisions(read)), section("Settings", _settings(read))]
    text = page(title, "\n".join(sections))
    if path is not None:
        target = in_home(path)
        with telling("write report", target):
            write_text(target, text)
    return text


def _measured(runs: Sequence[Run]) -> list[str]:
    """Return sections on the files of `hessianflow spectrum` and `hessianflow robustness`."""
    spectra: dict[str, SpectrumFile] = {}
    attacked: dict[str, RobustnessFile] = {}
    for run in runs:
        if run.run_dir is not None:
            if (spectrum := read_spectrum(run.run_dir)) is not None:
                spectra[run.name] = spectrum
            if (robust := read_robustness(run.run_dir)) is not None:
                attacked[run.name] = robust
    return [*_spectra(spectra), *(_robustness(name, file) for name, file in attacked.items())]


def _measured_on(stored: SpectrumFile) -> str:
    counts = {"weights": stored.get("size"), "examples": stored.get("num_examples")}
    facts = [f"{value} {name}" for name, value in counts.items() if value is not None]
    if "norm_mode" in stored:
        facts.append(f"norm mode: {stored['norm_mode']}")
    trace = stored.get("trace")
    if trace:
        facts.append(f"trace {cell(trace['value'], '.4g')} ± {cell(trace['stderr'], '.1g')}")
    density = stored.get("density")
    # Files of earlier versions have no shares, and their negative mass may count zeros.
    if density is not None and "shares" in density:
        words = {"negative": "below 0", "zero": "not told from 0", "positive": "above 0"}
        shares: Mapping[str, Any] = density["shares"]
        facts += [f"{shares[sign]['value']:.1%} {where}" for sign, where in words.items()]
    return ", ".join(facts)


def _spectra(spectra: Mapping[str, SpectrumFile]) -> list[str]:
    if not spectra:
        return []
    rows = [
        [name, str(i), cell(value, ".6g"), cell(residual, ".2g")]
        for name, spectrum in spectra.items()
        for i, (value, residual) in enumerate(
            zip(spectrum["eigenvalues"], spectrum["residuals"], strict=True), 1
        )
    ]
    notes = [f"{name}: {_measured_on(spectrum)}" for name, spectrum in spectra.items()]
    parts = [f"<p>{escape(plain(note))}</p>" for note in notes]
    parts.append(table(["run", "rank", "eigenvalue", "residual"], rows))
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
    trace = cell(layer.get("trace"), ".4g")
    if layer.get("trace_stderr") is not None:
        trace += f" ± {cell(layer['trace_stderr'], '.1g')}"
    name = layer["name"]
    if not layer.get("converged", True):
        name += " (not converged)"
    value = cell(layer["eigenvalue"], ".6g")
    residual = cell(layer.get("residual"), ".2g")
    return [name, cell(layer.get("size"), ""), value, residual, trace]


def _robustness(name: str, stored: RobustnessFile) -> str:
    curves = {
        attack: [_filled(triple) for triple in triples]
        for attack, triples in stored["accuracy"].items()
    }
    head = ["perturbation", *curves]
    rows = [
        [f"{eps:g}", *(cell(triples[i][0], ".2%") for triples in curves.values())]
        for i, eps in enumerate(stored["eps"])
    ]
    picture = image(robustness(stored["eps"], curves), "accuracy under attack")
    return section(f"Accuracy under attack: {name}", "\n".join([picture, table(head, rows)]))


def _filled(triple: tuple[float | None, float | None, float | None]) -> tuple[float, float, float]:
    """Return an accuracy and the ends of its interval, with nan for None."""
    value, low, high = np.array(triple, dtype=float).tolist()
    return value, low, high


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
    head = ["run", "epoch", "examples", "batch size", "learning-rate factor", "adversarial share"]
    return table([*head, "reason"], rows)


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
    return cell(value, ".10g")


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str)


def _refuse_other(target: Path) -> None:
    """Refuse to replace anything but an earlier report."""
    refuse_special(target)
    if not target.exists():
        return
    with telling("read", target), open(target, "rb") as file:
        begins = file.read(_BEGINNING)
    if GENERATOR.encode() not in begins and _EARLIER not in begins:
        raise HessianFlowError(
            f"{target} exists already and is not a report of hessianflow: name another file"
        )
