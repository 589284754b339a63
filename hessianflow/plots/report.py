"""One self-contained HTML page about one run or several: no network, readable on a phone and at night."""

import base64
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError
from hessianflow.plots.comparison import ComparisonTable, compare, compare_table
from hessianflow.plots.records import Run, RunSource, number, read_runs
from hessianflow.plots.settings import flatten, seed_of
from hessianflow.plots.spectra import Quadrature, spectral_density
from hessianflow.plots.training_curves import training_curves
from hessianflow.plots.trajectory import curvature_trajectory

SPECTRUM = "spectrum.json"
"""Where `hessianflow spectrum` keeps what it measured: eigenvalues, residuals, trace, density (nodes and weights)."""

_LONG = 40
"""Characters from which on a cell is text to be broken, not a value."""

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --line: #d5d5d5; --mild: #5c5c5c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #171717; --line: #3d3d3d; --mild: #a8a8a8; }
  img { filter: invert(0.91) hue-rotate(180deg); }
}
body { color: var(--text); background: var(--page); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p { color: var(--mild); } img { width: 100%; min-width: 38rem; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
td.text { white-space: normal; min-width: 18rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; }
"""


def report(runs: RunSource | Iterable[RunSource], path: str | Path | None = None, *, title: str | None = None) -> str:
    """Summary table, curvature and batch trajectory, training curves, spectra, decisions and settings as one page.

    Args:
        runs: run directories or objects with `.records`.
        path: where to write the page; None: nowhere.
        title: heading; None: the names of the runs.

    Returns:
        The HTML text.

    Raises:
        HessianFlowError: no run, a folder that is not a run directory, a damaged file, an unwritable path.
    """
    read = read_runs(runs)
    heading = title or ("Run " if len(read) == 1 else "Runs ") + ", ".join(run.name for run in read)
    sections = [
        _section("Summary", _summary(compare_table(read))),
        _section("Curvature and batch size", _image(curvature_trajectory(read), "top eigenvalue and batch size")),
        _section("Training", _image(training_curves(read), "loss, accuracy, learning rate and batch size")),
    ]
    if len(read) > 1:
        sections.append(_section("Comparison", _image(compare(read), "accuracy against updates and against time")))
    sections += _spectra({run.name: spectrum for run in read if (spectrum := read_spectrum(run)) is not None})
    sections += [_section("Decisions", _decisions(read)), _section("Settings", _settings(read))]
    page = _page(heading, "\n".join(sections))
    if path is not None:
        _write(in_home(path), page)
    return page


@dataclass(frozen=True)
class Spectrum:
    """What is kept of a run's spectrum.

    Attributes:
        eigenvalues: the leading ones.
        residuals: ||H v - eigenvalue v|| of each.
        density: nodes and weights, shape [num_probes, steps] each; None if it was not measured.
        measured_on: weights, examples, batch normalisation, and the trace, as far as the file says.
    """

    eigenvalues: Sequence[float]
    residuals: Sequence[float]
    density: Quadrature | None
    measured_on: str


def read_spectrum(run: Run) -> Spectrum | None:
    """The spectrum kept in the run directory, if there is one.

    Raises:
        HessianFlowError: a spectrum file without eigenvalues, or with a density without nodes and weights.
    """
    file = None if run.folder is None else run.folder / SPECTRUM
    if file is None or not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text("utf-8"))
        kept = stored["density"]
        density = None if kept is None else SimpleNamespace(nodes=kept["nodes"], weights=kept["weights"])
        return Spectrum(list(stored["eigenvalues"]), list(stored["residuals"]), density, _measured_on(stored))
    except (ValueError, KeyError, TypeError):
        raise HessianFlowError(
            f"{file} must hold eigenvalues, residuals and density: make it anew with "
            f"`hessianflow spectrum {run.folder}`"
        ) from None


def _measured_on(stored: Mapping[str, Any]) -> str:
    facts = {"weights": stored.get("size"), "examples": stored.get("num_examples")}
    said = [f"{value} {name}" for name, value in facts.items() if value is not None]
    said += [f"norm mode: {stored['norm_mode']}"] if "norm_mode" in stored else []
    trace = stored.get("trace")
    said += [f"trace {trace['value']:.4g} ± {trace['stderr']:.1g}"] if trace else []
    shares = (stored.get("density") or {}).get("shares")
    # Files of earlier versions have no shares: what they call the negative mass may count zeros.
    signs = {"negative": "below 0", "zero": "not told from 0", "positive": "above 0"}
    if shares:
        said += [f"{shares[name]['value']:.1%} {sign}" for name, sign in signs.items()]
    return ", ".join(said)


def _spectra(spectra: Mapping[str, Spectrum]) -> list[str]:
    if not spectra:
        return []
    rows = [
        [name, str(i), f"{value:.6g}", f"{residual:.2g}"]
        for name, spectrum in spectra.items()
        for i, (value, residual) in enumerate(zip(spectrum.eigenvalues, spectrum.residuals, strict=True), start=1)
    ]
    densities = {name: spectrum.density for name, spectrum in spectra.items() if spectrum.density is not None}
    notes = [f"<p>{escape(f'{name}: {spectrum.measured_on}')}</p>" for name, spectrum in spectra.items()]
    content = "\n".join([*notes, _table(["run", "rank", "eigenvalue", "residual"], rows)])
    if densities:
        content = _image(spectral_density(densities), "density of eigenvalues") + "\n" + content
    return [_section("Spectrum at the end", content)]


def _page(heading: str, body: str) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = escape(heading)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}\n<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"


def _image(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    # A fixed salt and no date: the same records give the same page.
    with mpl.rc_context({"svg.hashsalt": "hessianflow"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    image = f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'
    return f'<div class="scroll">{image}</div>'


def _summary(table: ComparisonTable) -> str:
    lines = [line.strip("| ").split(" | ") for line in table.to_markdown().splitlines()]
    return _table(lines[0], [[cell.replace("\\|", "|") for cell in line] for line in lines[2:]])


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
    head = ["run", "epoch", "examples", "batch size", "learning-rate factor", "adversarial share", "reason"]
    return _table(head, rows)


def _settings(runs: Sequence[Run]) -> str:
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for setting in flat for key in setting))
    if not keys:
        return "<p>No config.json beside the records.</p>"
    rows = [[key, *(_plain(setting.get(key)) for setting in flat)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    head = ["setting", *(run.name for run in runs)]
    seeds = ", ".join(f"{run.name}: {_plain(seed_of(run.config))}" for run in runs)
    parts = [f"<p>Seeds: {escape(seeds)}</p>"]
    if differing:
        parts.append("<p>Where the runs differ:</p>\n" + _table(head, differing, align=False))
    every = _table(head, rows, align=False)
    return "\n".join([*parts, f"<details><summary>All settings</summary>\n{every}\n</details>"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, align: bool = True) -> str:
    """Columns of numbers are set to the right with `align`; columns of long text may break their lines."""
    columns = [_column_class([row[i] for row in rows], align=align) for i in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(columns, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in pairs) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>\n<thead>{line("th", head)}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _column_class(cells: Sequence[str], *, align: bool) -> str:
    if max(map(len, cells), default=0) > _LONG:
        return ' class="text"'
    return ' class="number"' if align and all(map(_is_number, cells)) else ""


def _is_number(text: str) -> bool:
    return text == "-" or (text.lstrip("-")[:1].isdigit() and " " not in text)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.10g}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else json.dumps(value, default=str)


def _write(target: Path, text: str) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise HessianFlowError(f"cannot write report {target}: {error.strerror or error}") from None
