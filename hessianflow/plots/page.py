"""The parts of a self-contained HTML page: page, section, image, table."""

import base64
import io
from collections.abc import Sequence
from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure

from hessianflow.plots import style
from hessianflow.runs.text import plain

GENERATOR = "hessianflow report"
"""The mark by which a report is recognised."""
_LONG = 40
"""Longest cell, in characters, that is a value and not text that may be broken."""
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


def page(heading: str, body: str) -> str:
    """Return a whole page with a heading and the HTML text of its body."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,'
    head += f' initial-scale=1"><meta name="generator" content="{GENERATOR}">'
    title = escape(plain(heading))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def section(heading: str, content: str) -> str:
    """Return a section with a heading and some HTML text."""
    return f"<section>\n<h2>{escape(plain(heading))}</h2>\n{content}\n</section>"


def image(figure: Figure, description: str) -> str:
    """Return a figure as an embedded image."""
    buffer = io.BytesIO()
    # With a fixed salt and without a date, the same records make the same page.
    with mpl.rc_context({"svg.hashsalt": "hessianflow"}), style.without_glyph_warnings():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    image = f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'
    return f'<div class="scroll">{image}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, align: bool = True) -> str:
    """Return a table whose columns of long text may break lines.

    With `align`, columns of numbers are set to the right.
    """
    columns = [_column_class([row[i] for row in rows], align=align) for i in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(columns, cells, strict=True)
        line = "".join(f"<{tag}{kind}>{escape(plain(cell))}</{tag}>" for kind, cell in pairs)
        return f"<tr>{line}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    top = f'<div class="scroll"><table>\n<thead>{line("th", head)}</thead>\n'
    return f"{top}<tbody>\n{body}\n</tbody></table></div>"


def _column_class(cells: Sequence[str], *, align: bool) -> str:
    if max(map(len, cells), default=0) > _LONG:
        return ' class="text"'
    if align and all(map(_is_number, cells)):
        return ' class="number"'
    return ""


def _is_number(text: str) -> bool:
    return text == "-" or (text.lstrip("-")[:1].isdigit() and " " not in text)
