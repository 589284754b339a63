"""Makes untrusted text (folder names, reasons, settings) safe for figures, tables, pages and
screens."""

import re
import unicodedata

_DROPPED = "\N{REPLACEMENT CHARACTER}"
_HIDDEN = {"Cc", "Cs", "Cn", "Co"}
_FORMULA = ("=", "+", "-", "@")


def plain(text: str) -> str:
    """Return a text on one line, with characters that cannot be shown marked and invisible ones
    dropped."""
    spaced = "".join(" " if sign.isspace() else sign for sign in text)
    kinds = ((sign, unicodedata.category(sign)) for sign in spaced)
    return "".join(_DROPPED if kind in _HIDDEN else sign for sign, kind in kinds if kind != "Cf")


def in_figure(text: str) -> str:
    """Return a text that matplotlib draws literally: `$` starts no formula, a leading `_` hides no
    label."""
    shown = plain(text).replace("$", r"\$")
    return f"\N{NO-BREAK SPACE}{shown}" if shown.startswith("_") else shown


def in_markdown(text: str) -> str:
    """Return a text as one cell of a Markdown table, without HTML or links."""
    shown = re.sub(r"&(?=#?\w+;)", "&amp;", plain(text))
    return shown.replace("<", "&lt;").replace("](", "]\\(").replace("|", "\\|")


def in_csv(text: str) -> str:
    """Return a text as one table cell that a spreadsheet does not take for a formula."""
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
