"""The report is one well-formed page without any outside reference, and it says what the records
say."""

import base64
import json
import os
import re
import shutil
import stat
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest
from run_dirs import RECORDS, growth, in_memory, write_run

from hessianflow.plots import report

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags, links and text, and checks that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.images += [dict(attributes)] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def folder(tmp_path):
    config = {
        "seed": 3,
        "controller": "absa",
        "model": "<script>alert(1)</script>",
        "environment": {"python": "3.12"},
    }
    return write_run(
        tmp_path / "absa", config=config, summary={"status": "finished", "final_accuracy": 0.7}
    )


def test_page_is_whole_and_self_contained(folder, tmp_path):
    text = report(folder, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == text
    page = Page(text)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 2
    assert not re.search(r"url\(|@import|<script", text)
    for link in page.links:
        assert b"<svg" in base64.b64decode(link.split(",", 1)[1])
    assert {
        "eigenvalue fell from 100 to 49",
        "128 → 256",
        "70.00",
        "<script>alert(1)</script>",
    } <= set(page.words)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_two_runs_are_compared_and_differences_marked(folder, tmp_path):
    other = write_run(tmp_path / "fixed", config={"seed": 3, "controller": "fixed"})
    text = report([folder, other], title="A & B")
    assert len(Page(text).images) == 3
    assert "<h1>A &amp; B</h1>" in text
    differing = text.split("Where the runs differ:")[1].split("</table>")[0]
    assert differing.count("<tr>") == 1 + 2
    assert "<td>controller</td><td>absa</td><td>fixed</td>" in differing
    assert "Where the runs differ:" not in report(folder)


@pytest.mark.slow
def test_spectrum_is_shown_where_there_is_one(folder):
    stored = {"eigenvalues": [5.0, -2.5], "residuals": [1e-3, 2e-3], "density": None, "size": 10}
    stored |= {"num_examples": 64, "norm_mode": "batch", "trace": {"value": 2.5, "stderr": 0.125}}
    (folder / "spectrum.json").write_text(json.dumps(stored))
    page = Page(report(folder))
    assert {"Spectrum at the end", "-2.5", "0.001"} <= set(page.words)
    assert "absa: 10 weights, 64 examples, norm mode: batch, trace 2.5 ± 0.1" in page.words
    assert len(page.images) == 2
    stored["density"] = {"nodes": [[0.0, 5.0]], "weights": [[0.9, 0.1]]}
    (folder / "spectrum.json").write_text(json.dumps(stored))
    page = Page(report(folder))  # as earlier versions wrote it
    assert len(page.images) == 3
    assert not any("below 0" in words for words in page.words)
    stored["density"]["shares"] = {
        name: {"value": value, "low": 0.0, "high": 1.0}
        for name, value in (("negative", 0.05), ("zero", 0.83), ("positive", 0.12))
    }
    (folder / "spectrum.json").write_text(json.dumps(stored))
    words = " ".join(Page(report(folder)).words)
    assert "5.0% below 0, 83.0% not told from 0, 12.0% above 0" in words
    stored["density"]["shares"] = {"negative": {}}
    (folder / "spectrum.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"spectrum.json: density.shares.zero is missing"):
        report(folder)


def test_what_was_measured_after_the_run_is_shown(folder):
    stored = {
        "eigenvalues": [5.0, None],
        "residuals": [1e-3, None],
        "trace": {"value": 2.5, "stderr": None},
    }
    layers = [
        {
            "name": "conv<1>",
            "size": 9,
            "eigenvalue": 4.5,
            "trace": 3.25,
            "trace_stderr": 0.125,
            "residual": 0.5,
        }
    ]
    layers.append({"name": "fc", "eigenvalue": 1.5, "converged": False})
    (folder / "spectrum.json").write_text(json.dumps(stored | {"layers": layers}))
    curves = {"clean": [[0.875, 0.8, 0.9]] * 2, "pgd5": [[0.5, 0.4, 0.6], [None, None, None]]}
    (folder / "robustness.json").write_text(json.dumps({"eps": [0.01, 0.03], "accuracy": curves}))
    page = Page(report(folder))
    assert {
        "conv<1>",
        "4.5",
        "3.25 ± 0.1",
        "fc (not converged)",
        "Accuracy under attack: absa",
    } <= set(page.words)
    assert {"pgd5", "87.50%", "50.00%", "0.03", "-"} <= set(page.words)
    assert len(page.images) == 3
    (folder / "robustness.json").write_text(json.dumps({"eps": [0.01], "accuracy": curves}))
    with pytest.raises(
        ValueError, match=r"robustness.json: accuracy.clean must hold 1 values, one an eps, got 2"
    ):
        report(folder)


EARLIER = (
    "<!doctype html>\n<style>\n:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff;"
    " --line: #d5;"
)


@pytest.mark.parametrize(
    "content", ["", '{"kind": "epoch"}', "<!doctype html>\n<html><title>mine</title></html>"]
)
def test_only_a_report_is_replaced(content, folder, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text(content)
    link = tmp_path / "link.html"
    link.symlink_to(mine)
    for path in (mine, link):
        with pytest.raises(
            ValueError, match=r"mine|link.html.* exists already and is not a report of hessianflow"
        ):
            report(folder, path)
    assert mine.read_text() == content


def test_a_report_is_replaced_also_by_a_link_and_one_of_an_earlier_release(folder, tmp_path):
    mine, link = tmp_path / "mine", tmp_path / "link.html"
    link.symlink_to(mine)
    mine.write_text(EARLIER)
    assert report(folder, link) == mine.read_text() == report(folder, mine)
    assert link.is_symlink()


def test_run_files_folders_and_pipes_are_not_replaced(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=rf"{name} is not an ordinary file"):
            report(folder, tmp_path / name)
    with pytest.raises(ValueError, match="/dev/null is not an ordinary file"):
        report(folder, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    for name in ("history.jsonl", "config.json"):
        before = (folder / name).read_bytes()
        with pytest.raises(ValueError, match=rf"{name} exists already and is not a report"):
            report(folder, folder / name)
        assert (folder / name).read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_same_records_same_page(folder):
    assert report(folder) == report(folder)


def test_run_in_memory_without_settings():
    words = Page(report(in_memory([]))).words
    assert "The settings never changed." in words
    assert "No config.json beside the records." in words


DENSITY = '{"eigenvalues": [1], "residuals": [1], "density": '


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object, found a list"),
        (
            '{"eigenvalues": [1, "2"], "residuals": [1, 1]}',
            'eigenvalues.1 must be a number or null, got "2"',
        ),
        (
            '{"eigenvalues": [1, 2], "residuals": [1]}',
            "residuals must hold 2 values, one an eigenvalue, got 1",
        ),
        (DENSITY + "{}}", "density.nodes is missing"),
        (
            DENSITY + '{"nodes": [[0], [1, 2]], "weights": [[1], [1, 1]]}}',
            "density must hold nodes and weights of one",
        ),
        (
            DENSITY + '{"nodes": [[0, "x"]], "weights": [[1, 1]]}}',
            'density.nodes.0.1 must be a number, got "x"',
        ),
        ('{"eigenvalues": [1e999], "residuals": [1]}', "eigenvalues.0 must be a finite number"),
        ("[" * 100_000, "nested deeper than 50"),
    ],
)
def test_damaged_spectrum_is_refused(folder, content, words):
    (folder / "spectrum.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"spectrum\.json.*make it again with `hessianflow spectrum"
    ) as caught:
        report(folder)
    assert words in str(caught.value)


def test_unwritable_path_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot write report .*absent/r.html"):
        report(folder, tmp_path / "absent" / "r.html")


def test_numbers_are_set_to_the_right_and_long_text_may_break(folder):
    text = report(folder)
    assert '<th class="number">updates</th>' in text
    assert "<th>reason</th>" in text
    long = [
        growth(2000, 128, 256, "a reason that is longer than what stands on one line of a phone")
    ]
    assert '<th class="text">reason</th>' in report(in_memory([*RECORDS, *long]))


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
)

# A window has a least width, a frame has none.
FRAME = """<!doctype html><meta charset="utf-8"><title>-</title>
<iframe srcdoc="{page}" width="{width}" height="800" style="border: 0"></iframe>
<script>addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentWindow, page = inside.document;
  const drawn = [...page.images].map((image) => image.naturalWidth > 0);
  const background = inside.getComputedStyle(page.body).backgroundColor;
  const width = page.documentElement.scrollWidth;
  document.title = [inside.innerWidth, width, background, ...drawn].join("; ");
}})</script>"""


@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium installed: the page is not shown in a browser"
)
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(folder, tmp_path, width, scheme):
    """Every picture is drawn, nothing but tables and pictures needs scrolling sideways, and the
    night is dark."""
    stored = {
        "eigenvalues": [5.0],
        "residuals": [1e-3],
        "density": {"nodes": [[0.0, 5.0]], "weights": [[0.9, 0.1]]},
    }
    (folder / "spectrum.json").write_text(json.dumps(stored))
    file = tmp_path / "frame.html"
    file.write_text(FRAME.format(page=escape(report(folder)), width=width), "utf-8")
    scheme_flag = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    flags = [
        *FLAGS.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,900",
        scheme_flag,
    ]
    done = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = re.search(r"<title>(.*?)</title>", done.stdout)
    assert seen is not None, done.stderr
    inner, scroll, background, *drawn = seen[1].split("; ")
    assert (int(inner), int(scroll)) == (width, width)
    assert background == ("rgb(23, 23, 23)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert drawn == ["true"] * 3
