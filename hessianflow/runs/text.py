"""Text that somebody else chose (names of folders, reasons, settings) in figures, tables, pages and on a screen."""

import re
import unicodedata

_DROPPED, _HIDDEN = "\N{REPLACEMENT CHARACTER}", {"Cc", "Cs", "Cn", "Co"}
_FORMULA = ("=", "+", "-", "@")


def plain(text: str) -> str:
    """Return a text on one line: what cannot be shown is marked, and what steers a display is left out."""
    spaced = "".join(" " if sign.isspace() else sign for sign in text)
    kinds = ((sign, unicodedata.category(sign)) for sign in spaced)
    return "".join(_DROPPED if kind in _HIDDEN else sign for sign, kind in kinds if kind != "Cf")


def in_figure(text: str) -> str:
    """Return a text as matplotlib draws it literally: `$` is no mathematics, a first `_` no private label."""
    shown = plain(text).replace("$", r"\$")
    return f"\N{NO-BREAK SPACE}{shown}" if shown.startswith("_") else shown


def in_markdown(text: str) -> str:
    """Return a text as one cell of a Markdown table, without HTML and links."""
    shown = re.sub(r"&(?=#?\w+;)", "&amp;", plain(text))
    return shown.replace("<", "&lt;").replace("](", "]\\(").replace("|", "\\|")


def in_csv(text: str) -> str:
    """Return a text as one cell of a table that a spreadsheet does not take for a formula."""
    shown = plain(text)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) else shown


def in_latex(text: str) -> str:
    """Return a text as LaTeX sets it literally."""
    return "".join(_LATEX.get(sign, sign) for sign in plain(text))


_LATEX = {
    **{sign: "\\" + sign for sign in "_%&#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
