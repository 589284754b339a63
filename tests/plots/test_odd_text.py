"""Names, reasons and settings that nobody expected: drawn, tabled and printed without breaking
anything."""

import csv
import io
import json
import warnings

import pytest
from run_dirs import RECORDS, curvature, growth, write_run

from hessianflow import plots
from hessianflow.plots.records import read_runs
from hessianflow.runs.text import in_csv, in_figure, in_latex, in_markdown, plain

NASTY = {
    "mathematics": r"$x^$ and $\frac{a}$",
    "one dollar": "costs $5",
    "escaped dollars": r"\$x^\$",
    "newlines": "a\nb\r\n\u2028\u0085c",
    "control signs": "\x1b[31mred\x07\x00",
    "a surrogate": "a\udcffb\ud800",
    "private label": "_hidden",
    "right to left": "\u202eevil\u202c",
    "not in the font": "日本 \U0001f600",
    "markup": "<script>alert(1)</script> & <b> | `x` [a](javascript:b) &lt;",
    "formula": '=HYPERLINK("http://x")',
    "long": "very " * 400,
    "LaTeX": r"\input{/etc/passwd} ~^_%&#{}",
    "nothing": " ",
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_every_text_is_one_line_that_can_be_encoded(text):
    for made in (plain, in_figure, in_markdown, in_csv, in_latex):
        shown = made(text)
        shown.encode("utf-8")
        assert len(shown.splitlines()) <= 1
        assert "\x1b" not in shown


def test_each_form_says_what_it_should():
    assert in_figure("_a $x$") == "\N{NO-BREAK SPACE}_a \\$x\\$"
    assert in_markdown("a|b <i> &lt; [x](y)") == r"a\|b &lt;i> &amp;lt; [x]\(y)"
    assert [in_csv(text) for text in ("=1+1", "+1", "-1", "@x", " =1", "lr=0.1")] == [
        "'=1+1",
        "'+1",
        "'-1",
        "'@x",
        "' =1",
        "lr=0.1",
    ]
    assert (
        in_latex(r"\a{b}~^_<")
        == r"\textbackslash{}a\{b\}\textasciitilde{}\textasciicircum{}\_\textless{}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1], ids=["first half", "second half"])
def test_as_reasons_settings_and_norm_modes_they_are_drawn_and_tabled(part, tmp_path):
    """As many at once as the key of a picture has lines."""
    texts = list(NASTY.values())[part::2]
    changes = [growth(3000 + 10 * i, 512, 1024 + i, text) for i, text in enumerate(texts)]
    readings = [curvature(3, 5.0) | {"norm_mode": text} for text in texts]
    settings = {f"a{i}": text for i, text in enumerate(texts)} | dict.fromkeys(texts, "x")
    config = {"seed": 0, "settings": settings, "trainer": {"model": texts[0]}}
    one = write_run(
        tmp_path / "one",
        [*RECORDS, *changes, *readings],
        config=config,
        summary={"status": texts[1]},
    )
    two = write_run(tmp_path / "two", config={"settings": dict.fromkeys(settings, "plain")})
    layers = [{"name": text, "eigenvalue": 1} for text in texts]
    spectrum = {"eigenvalues": [1], "residuals": [1], "norm_mode": texts[0], "layers": layers}
    (one / "spectrum.json").write_text(json.dumps(spectrum))
    curves = {text: [[0.5, 0.4, 0.6]] for text in texts}
    (one / "robustness.json").write_text(json.dumps({"eps": [0.1], "accuracy": curves}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.curvature_trajectory(one, tmp_path / "trajectory.png")
        page = plots.report([one, two], tmp_path / "report.html")
    assert "<script>" not in page
    assert "<b>" not in page
    table = plots.compare_table([one, two])
    lines = table.to_markdown().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    labels = [row["settings"] for row in csv.DictReader(io.StringIO(table.to_csv()))]
    assert len(labels) == len(table.rows)


@pytest.mark.slow
def test_as_names_of_run_directories(tmp_path):
    names = ["$x^$", "a\nb", "a\udcffb", "_hidden", " ", "日本", "=1", "<b>", "\x1b[31m"]
    runs = [write_run(tmp_path / name) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.curvature_trajectory(runs, runs[0] / "trajectory.png")
        plots.training_curves(runs[1], runs[1] / "curves.png")
        plots.report(runs[2], runs[2] / "report.html").encode("utf-8")
        plots.report(runs, tmp_path / "report.html").encode("utf-8")
    table = plots.compare_table(runs)
    assert len(table.rows) == len(names)
    assert len(table.to_markdown().splitlines()) == 2 + len(names)
    assert "\n=" not in table.to_csv()
    assert len({run.name for run in read_runs(runs)}) == len(names)
    assert not list(tmp_path.rglob("*.tmp"))
