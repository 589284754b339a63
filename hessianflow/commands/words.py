"""Puts the words of a command line into the form that the parser takes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from hessianflow.commands.parser import Parser, did_you_mean
from hessianflow.commands.yaml_text import UnfitTextError, check_value, read_settings
from hessianflow.interfaces import HessianFlowError

_TRUTHS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "~", "none"})
_ROOT_OPTIONS = ("--help", "-h", "--version")


@dataclass
class Words:
    """A command line in parts.

    Attributes:
        command: the words that name the command.
        typed: the options and arguments typed after it.
        files: for each setting, its text in a settings file, and the name of that file; the last
            file counts.
    """

    command: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def from_files(self) -> list[str]:
        """The settings from files as options."""
        return [f"--{name.replace('_', '-')}={text}" for name, (text, _) in self.files.items()]

    @property
    def all(self) -> list[str]:
        """All words; those typed come last, and so take precedence over files."""
        return [*self.command, *self.from_files, *self.typed]


def words_of(parser: Parser, given: Iterable[str]) -> Words:
    """Return the words of one command line, and set the parser's `current` command.

    Files named with --config are read. A switch without a value gets `=true`, and a negative number
    is joined to its option.

    Raises:
        HessianFlowError: a file cannot be read, or holds something other than settings.
        SystemExit: an option comes before the command.
    """
    words = ["--print_config" if word == "--print-config" else word for word in given]
    found = Words()
    if words and words[0].startswith("-") and words[0] not in _ROOT_OPTIONS:
        parser.error(
            f"{words[0]} stands before the command: name that first, as in hessianflow train"
            f" {words[0]}"
        )
    current = parser
    for word in words:
        if word in current.children:
            current = current.children[word]
            parser.current = current
    found.command = words[:1]
    rest = iter(words[1:])
    takes_files = "--config" in current.options
    for word in rest:
        name, equals, value = word.partition("=")
        if takes_files and name == "--config":
            path = value if equals else next(rest, "")
            found.files |= _settings_of(current, path)
        elif name.startswith("--") and "." in name and name not in current.options:
            parser.error(f"unrecognized arguments: {name}")
        else:
            found.typed.append(word)
    found.typed = _joined(current, found.typed)
    _check_values(current, found.typed)
    return found


def _check_values(parser: Parser, words: Iterable[str], origin: str = "") -> None:
    """Refuse values that could overload a YAML parser; options that take text are not parsed as
    YAML.

    Raises:
        HessianFlowError: naming `origin` and the option.
    """
    option = ""
    for word in words:
        value = word
        if word.startswith("--"):
            option, _, value = word.partition("=")
        if option in parser.values:
            try:
                check_value(value)
            except UnfitTextError as error:
                raise HessianFlowError(f"{origin}{option}: {error}") from None


def _settings_of(parser: Parser, path: str) -> dict[str, tuple[str, str]]:
    """Return the settings in a file, after checking that each name exists."""
    if not path:
        raise HessianFlowError("--config needs the name of a file of settings")
    found = read_settings(path)
    known = {
        word[2:].replace("-", "_") for word in parser.options if word not in ("--config", "--help")
    }
    for name in found:
        if name not in known:
            hint = did_you_mean(name, [word.replace("_", "-") for word in known]).replace("-", "_")
            raise HessianFlowError(f"--config {path}: there is no setting {name!r}{hint}")
        _check_values(parser, [f"--{name.replace('_', '-')}={found[name]}"], f"--config {path}: ")
    return {name: (text, path) for name, text in found.items() if text != "null"}


def _joined(parser: Parser, words: list[str]) -> list[str]:
    """Return the words with `=true` at switches that stand alone, and negative numbers joined to
    their options."""
    joined: list[str] = []
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if word in parser.switches and following.lower() not in _TRUTHS:
            joined.append(f"{word}=true")
        elif joined and joined[-1] in parser.options and re.fullmatch(r"-(\.?\d.*|inf|nan)", word):
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined
