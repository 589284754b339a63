"""Puts the words of a command line into the form that the parser takes."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hessianflow.commands.parser import Parser, did_you_mean
from hessianflow.commands.settings import add_methods, homes, misplaced
from hessianflow.commands.yaml_text import UnfitTextError, check_value, load_value, read_settings
from hessianflow.interfaces import HessianFlowError
from hessianflow.upgrade import is_older, upgrade

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
        notes: what to say of the files, if the command goes well.
    """

    command: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def from_files(self) -> list[str]:
        """The settings from files as options."""
        return [f"{spelled(name)}={text}" for name, (text, _) in self.files.items()]

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
    words = list(given)
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
    found.typed = _without_files(current, words[1:], found)
    if current.chosen:
        current.methods = add_methods(current, _named(found))
    _check_names(parser, current, found)
    found.typed = _joined(current, found.typed)
    _check_values(current, found.typed)
    for name, (text, path) in found.files.items():
        _check_values(current, [f"{spelled(name)}={text}"], f"--config {path}: ")
    return found


def spelled(name: str) -> str:
    """Return the option of a setting, of a method's option too: "controller.edge_share" is
    --controller.edge-share."""
    return f"--{name.replace('_', '-')}"


def _without_files(current: Parser, words: Iterable[str], found: Words) -> list[str]:
    """Return the words without the names of settings files, whose settings are added to those
    found."""
    takes_files = "--config" in current.options
    rest = iter(words)
    typed = []
    for word in rest:
        name, equals, value = word.partition("=")
        if takes_files and name == "--config":
            found.files |= _settings_of(value if equals else next(rest, ""), found.notes)
        elif name.startswith("--") and "." in name:
            typed.append(word.replace(name, name.replace("_", "-"), 1))
        else:
            typed.append(word)
    return typed


def _named(found: Words) -> dict[str, str]:
    """Return the value of every option, as far as it names a method; typed ones come last."""
    named = {name: text for name, (text, _) in found.files.items()}
    for word, following in zip(found.typed, [*found.typed, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            named[name[2:].replace("-", "_")] = value if equals else following
    return {name: text for name, text in named.items() if text != "null"}


def _check_names(parser: Parser, current: Parser, found: Words) -> None:
    """Refuse options of methods that were not chosen, and names in files that are no settings.

    A file may have options of a method that another was chosen for on the command line; they are
    dropped, and said.
    """
    for word in found.typed:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in current.options:
            reason = _unknown(current, name)
            if reason:
                parser.error(reason)
            if "." in name:
                parser.error(f"unrecognized arguments: {name}")
    replaced = {word.partition("=")[0] for word in found.typed}
    dropped = []
    for name, (_, path) in list(found.files.items()):
        is_option = spelled(name) in current.options and "-" not in name
        if is_option and name not in ("config", "help", "print_config"):
            continue
        outer = name.partition(".")[0]
        if "." in name and spelled(outer) in replaced:
            dropped.append(name)
            del found.files[name]
            continue
        reason = _unknown(current, spelled(name))
        if reason:
            raise HessianFlowError(f"--config {path}: {reason}")
        known = [word[2:].replace("-", "_") for word in current.options]
        hint = did_you_mean(name, [word.replace("_", "-") for word in known]).replace("-", "_")
        raise HessianFlowError(f"--config {path}: there is no setting {name!r}{hint}")
    if dropped:
        found.notes.append(f"not used with these settings: {', '.join(dropped)}")


def _unknown(current: Parser, name: str) -> str:
    """Return what is known about an option that is none; empty where nothing is."""
    if not current.chosen:
        return ""
    if "." in name:
        return misplaced(current, name, current.methods)
    places = homes(name.removeprefix("--").replace("-", "_"))
    return f"unknown option {name}: say {' or '.join(places)}" if places else ""


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


def _settings_of(path: str, notes: list[str]) -> dict[str, tuple[str, str]]:
    """Return the settings in a file as text, in the words of today; add to `notes` where they were
    others."""
    if not path:
        raise HessianFlowError("--config needs the name of a file of settings")
    found = read_settings(path)
    if is_older(found):
        values = {name: load_value(text) for name, text in found.items()}
        older = [name for name in values if name not in (upgraded := upgrade(values))]
        found = flattened(upgraded)
        notes.append(
            f"--config {path} is spelled as in an older release ({', '.join(older)}):"
            " hessianflow train --config FILE --print-config writes it in the words of today"
        )
    return {name: (text, path) for name, text in found.items() if text != "null" or "." in name}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings as text by dotted name: {"controller": {"name": "absa", "patience": 5}} gives
    controller and controller.patience."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = prefix.rstrip(".") if prefix and key == "name" else f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flattened(value, f"{name}.")
        elif isinstance(value, str):
            found[name] = value
        else:
            found[name] = json.dumps(value)
    return found


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
