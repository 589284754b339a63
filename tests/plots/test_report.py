"""The report is one well-formed page without any outside reference, and it says what the records say."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from run_dirs import in_memory, write_run

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
    config = {"seed": 3, "controller": "absa", "model": "<script>alert(1)</script>", "environment": {"python": "3.12"}}
    return write_run(tmp_path / "absa", config=config, summary={"status": "finished", "final_accuracy": 0.7})


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
    assert {"eigenvalue fell from 100 to 49", "128 → 256", "70.00", "<script>alert(1)</script>"} <= set(page.words)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_two_runs_are_compared_and_differences_marked(folder, tmp_path):
    other = write_run(tmp_path / "fixed", config={"seed": 3, "controller": "fixed"})
    text = report([folder, other], title="A & B")
    assert len(Page(text).images) == 3
    assert "<h1>A &amp; B</h1>" in text
    assert text.count('<tr class="differs">') == 2


def test_spectrum_is_shown_where_there_is_one(folder):
    stored = {"eigenvalues": [5.0, -2.5], "residuals": [1e-3, 2e-3], "density": None, "size": 10}
    (folder / "spectrum.json").write_text(json.dumps(stored))
    page = Page(report(folder))
    assert {"Spectrum at the end", "-2.5", "0.001"} <= set(page.words)
    assert len(page.images) == 2
    stored["density"] = {"nodes": [[0.0, 5.0]], "weights": [[0.9, 0.1]]}
    (folder / "spectrum.json").write_text(json.dumps(stored))
    assert len(Page(report(folder)).images) == 3


def test_same_records_same_page(folder):
    assert report(folder) == report(folder)


def test_run_in_memory_without_settings():
    words = Page(report(in_memory([]))).words
    assert "The settings never changed." in words
    assert "No config.json beside the records." in words


@pytest.mark.parametrize("content", ["{", "[]", '{"eigenvalues": [1], "residuals": [1], "density": {}}'])
def test_damaged_spectrum_is_refused(folder, content):
    (folder / "spectrum.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"spectrum.json must hold eigenvalues, residuals and density: make it anew with"
    ):
        report(folder)


def test_unwritable_path_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot write report .*absent/r.html"):
        report(folder, tmp_path / "absent" / "r.html")
