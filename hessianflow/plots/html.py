"""One self-contained HTML page about one run or several: no network, readable on a phone and at
night."""

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style
from hessianflow.plots.comparison import ComparisonTable, compare, compare_table
from hessianflow.plots.grouping import flatten, seed_of
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

_GENERATOR = "hessianflow report"
_EARLIER = b":root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff;"
"""What marks a report, and those of before that mark."""
_BEGINNING = 4096
_LONG = 40
"""Characters from which on a cell is text to be broken, not a value."""

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --line: #d5d5d5;
  --mild: #5c5c5c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #171717; --line: #3d3d3d; --mild: #a8a8a8; }
  img { filter: invert(0.91) hue-rotate(180deg); }
}
body { color: var(--text); background: var(--page); font: 16px/1.5 system-ui, sans-serif;
  max-width: 62rem;
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


def report(
    runs: RunSource | Iterable[RunSource],
    path: str | Path | None = None,
    *,
    title: str | None = None,
) -> str:
    """Summary table, curvature and batch trajectory, training curves, spectra, decisions and
    settings as one page.

    Args:
        runs: run directories or objects with `.records`.
        path: where to write the page; None: nowhere.
        title: heading; None: the names of the runs.

    Returns:
        The HTML text.

    Raises:
        HessianFlowError: no run, a folder that is not a run directory, a damaged file, an
            unwritable path, or one where something other than an earlier report stands.
    """
    if path is not None:
        _refuse_other(Path(path))
    read = read_runs(runs)
    heading = title or ("Run " if len(read) == 1 else "Runs ") + ", ".join(run.name for run in read)
    sections = [
        _section("Summary", _summary(compare_table(read))),
        _section(
            "Curvature and batch size",
            _image(curvature_trajectory(read), "top eigenvalue and batch size"),
        ),
        _section(
            "Training",
            _image(training_curves(read), "loss, accuracy, learning rate and batch size"),
        ),
    ]
    if len(read) > 1:
        sections.append(
            _section(
                "Comparison", _image(compare(read), "accuracy against updates and against time")
            )
        )
    sections += _measured(read)
    sections += [_section("Decisions", _decisions(read)), _section("Settings", _settings(read))]
    page = _page(heading, "\n".join(sections))
    if path is not None:
        _write(in_home(path), page)
    return page


def _measured(runs: Sequence[Run]) -> list[str]:
    """Return what `hessianflow spectrum` and `hessianflow robustness` left in the run
    directories."""
    spectra: dict[str, SpectrumFile] = {}
    attacked: dict[str, RobustnessFile] = {}
    for run in runs:
        spectrum = None if run.folder is None else read_spectrum(run.folder)
        robust = None if run.folder is None else read_robustness(run.folder)
        if spectrum is not None:
            spectra[run.name] = spectrum
        if robust is not None:
            attacked[run.name] = robust
    return [*_spectra(spectra), *(_robustness(name, found) for name, found in attacked.items())]


def _measured_on(stored: SpectrumFile) -> str:
    facts = {"weights": stored.get("size"), "examples": stored.get("num_examples")}
    said = [f"{value} {name}" for name, value in facts.items() if value is not None]
    said += [f"norm mode: {stored['norm_mode']}"] if "norm_mode" in stored else []
    trace = stored.get("trace")
    said += (
        [f"trace {_short(trace['value'], '.4g')} ± {_short(trace['stderr'], '.1g')}"]
        if trace
        else []
    )
    density = stored.get("density")
    if density is not None and "shares" in density:
        # Files of earlier versions have no shares: what they call the negative mass may count
        # zeros.
        shares = density["shares"]
        said += [
            f"{shares['negative']['value']:.1%} below 0",
            f"{shares['zero']['value']:.1%} not told from 0",
            f"{shares['positive']['value']:.1%} above 0",
        ]
    return ", ".join(said)


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
    parts = [*notes, _table(["run", "rank", "eigenvalue", "residual"], rows)]
    layers = [
        [name, *_layer_cells(layer)]
        for name, spectrum in spectra.items()
        for layer in spectrum.get("layers", [])
    ]
    if layers:
        parts.append(_table(["run", "layer", "weights", "eigenvalue", "residual", "trace"], layers))
    densities = {
        name: SimpleNamespace(nodes=found["nodes"], weights=found["weights"])
        for name, spectrum in spectra.items()
        if (found := spectrum.get("density")) is not None
    }
    if densities:
        parts.insert(0, _image(spectral_density(densities), "density of eigenvalues"))
    return [_section("Spectrum at the end", "\n".join(parts))]


def _layer_cells(layer: Layer) -> list[str]:
    trace = _short(layer.get("trace"), ".4g")
    if layer.get("trace_stderr") is not None:
        trace += f" ± {_short(layer['trace_stderr'], '.1g')}"
    name = layer["name"] if layer.get("converged", True) else f"{layer['name']} (not converged)"
    size = layer.get("size")
    weights = "-" if size is None else str(size)
    return [
        name,
        weights,
        _short(layer["eigenvalue"], ".6g"),
        _short(layer.get("residual"), ".2g"),
        trace,
    ]


def _robustness(name: str, found: RobustnessFile) -> str:
    curves = {
        attack: [_filled(triple) for triple in triples]
        for attack, triples in found["accuracy"].items()
    }
    head = ["perturbation", *curves]
    rows = [
        [f"{eps:g}", *(_percent(triples[i][0]) for triples in curves.values())]
        for i, eps in enumerate(found["eps"])
    ]
    picture = _image(robustness(found["eps"], curves), "accuracy under attack")
    return _section(f"Accuracy under attack: {name}", "\n".join([picture, _table(head, rows)]))


def _filled(triple: tuple[float | None, float | None, float | None]) -> tuple[float, float, float]:
    """Return an accuracy and its ends with nan for what is not known."""
    value, low, high = (math.nan if one is None else one for one in triple)
    return value, low, high


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2%}"


def _short(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _page(heading: str, body: str) -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    head += f'<meta name="generator" content="{_GENERATOR}">'
    title = escape(plain(heading))
    return (
        "<!doctype html>\n<html"
        f' lang="en">\n<head>{head}\n<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(plain(heading))}</h2>\n{content}\n</section>"


def _image(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    # A fixed salt and no date: the same records give the same page.
    with mpl.rc_context({"svg.hashsalt": "hessianflow"}), style.without_glyph_warnings():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    image = f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'
    return f'<div class="scroll">{image}</div>'


def _summary(table: ComparisonTable) -> str:
    head, *lines = table.cells()
    return _table(head, lines)


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
    parts = [f"<p>Seeds: {escape(plain(seeds))}</p>"]
    if differing:
        parts.append("<p>Where the runs differ:</p>\n" + _table(head, differing, align=False))
    every = _table(head, rows, align=False)
    return "\n".join([*parts, f"<details><summary>All settings</summary>\n{every}\n</details>"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, align: bool = True) -> str:
    """Columns of numbers are set to the right with `align`; columns of long text may break their
    lines."""
    columns = [_column_class([row[i] for row in rows], align=align) for i in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(columns, cells, strict=True)
        return (
            "<tr>"
            + "".join(f"<{tag}{kind}>{escape(plain(cell))}</{tag}>" for kind, cell in pairs)
            + "</tr>"
        )

    body = "\n".join(line("td", row) for row in rows)
    return (
        "<div"
        f' class="scroll"><table>\n<thead>{line("th", head)}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _column_class(cells: Sequence[str], *, align: bool) -> str:
    if max(map(len, cells), default=0) > _LONG:
        return ' class="text"'
    return ' class="number"' if align and all(map(_is_number, cells)) else ""


def _is_number(text: str) -> bool:
    return text == "-" or (text.lstrip("-")[:1].isdigit() and " " not in text)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.10g}"


def _plain(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else "-"
        if value is None
        else json.dumps(value, default=str)
    )


def _write(target: Path, text: str) -> None:
    try:
        write_text(target, text)
    except OSError as error:
        raise HessianFlowError(f"cannot write report {target}: {error.strerror or error}") from None


def _refuse_other(target: Path) -> None:
    """Refuse to replace anything but an earlier report.

    Raises:
        HessianFlowError: something else stands there.
    """
    refuse_special(target)
    if not target.exists():
        return
    try:
        with open(target, "rb") as file:
            begins = file.read(_BEGINNING)
    except OSError as error:
        raise HessianFlowError(f"cannot read {target}: {error.strerror or error}") from None
    if _GENERATOR.encode() not in begins and _EARLIER not in begins:
        raise HessianFlowError(
            f"{target} is there already and is no report of ours: name another file"
        )
