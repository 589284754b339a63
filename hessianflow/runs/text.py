"""Make untrusted text (folder names, reasons, settings) safe for figures, tables and screens."""

import re
import unicodedata

_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"
_HIDDEN = {"Cc", "Cs", "Cn", "Co"}
_FORMULA = ("=", "+", "-", "@")


def plain(text: str) -> str:
    """Return a text on one line, with unprintable characters marked and invisible ones dropped."""
    return "".join(map(_printable, text))


def _printable(sign: str) -> str:
    if sign.isspace():
        return " "
    kind = unicodedata.category(sign)
    if kind == "Cf":
        return ""
    return _UNPRINTABLE if kind in _HIDDEN else sign


def in_figure(text: str) -> str:
    """Return a text that matplotlib draws literally, also with `$` or a leading `_`."""
    shown = plain(text).replace("$", r"\$")
    if shown.startswith("_"):
        return f"\N{NO-BREAK SPACE}{shown}"
    return shown


def in_markdown(text: str) -> str:
    """Return a text as one cell of a Markdown table, without HTML or links."""
    shown = re.sub(r"&(?=#?\w+;)", "&amp;", plain(text))
    return shown.replace("<", "&lt;").replace("](", "]\\(").replace("|", "\\|")


def in_csv(text: str) -> str:
    """Return a text as one table cell that a spreadsheet does not take for a formula."""
    shown = plain(text)
    if shown.lstrip().startswith(_FORMULA):
        return f"'{shown}"
    return shown


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
