"""The preparation of the words of a command line for the parser."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hessianflow.bounds import option
from hessianflow.commands.parser import Parser, did_you_mean
from hessianflow.commands.settings import add_methods, homes, misplaced
from hessianflow.commands.yaml_text import UnfitTextError, check_value, load_value, read_settings
from hessianflow.interfaces import HessianFlowError
from hessianflow.upgrade import is_older, upgrade

_TRUTHS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "~", "none"})
_ROOT_OPTIONS = ("--help", "-h", "--version")


@dataclass
class Words:
    """The words of a command line by their role.

    Attributes:
        command: Words that name the command.
        typed: Options and arguments that follow.
        files: Text of each setting in a settings file, and the name of the last file that has it.
        notes: Notes about the files, to be printed if the command is possible.
    """

    command: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def from_files(self) -> list[str]:
        """Return the settings from files as options."""
        return [f"{option(name)}={text}" for name, (text, _) in self.files.items()]

    @property
    def all(self) -> list[str]:
        """Return all words; the typed ones come last, and so take precedence over files."""
        return [*self.command, *self.from_files, *self.typed]


def words_of(parser: Parser, line: Iterable[str]) -> Words:
    """Return the words of a command line by role, and set the `current` command of the parser.

    Files named with --config are read. A switch without a value gets `=true`, and a negative number
    is joined to its option.

    Raises:
        HessianFlowError: A file cannot be read, or does not hold settings.
        SystemExit: An option comes before the command.
    """
    words = list(line)
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
    roles = Words(words[:1])
    roles.typed = _without_files(current, words[1:], roles)
    if current.chosen:
        current.methods = add_methods(current, _named(roles))
    _check_names(parser, current, roles)
    roles.typed = _joined(current, roles.typed)
    _check_values(current, roles.typed)
    for name, (text, path) in roles.files.items():
        _check_values(current, [f"{option(name)}={text}"], f"--config {path}: ")
    return roles


def _without_files(current: Parser, words: Iterable[str], roles: Words) -> list[str]:
    """Return the words without the names of settings files, whose settings `roles` receives."""
    takes_files = "--config" in current.options
    rest = iter(words)
    typed = []
    for word in rest:
        name, equals, value = word.partition("=")
        if takes_files and name == "--config":
            if not equals:
                value = next(rest, "")
            roles.files |= _settings_of(value, roles.notes)
        elif name.startswith("--") and "." in name:
            typed.append(word.replace(name, name.replace("_", "-"), 1))
        else:
            typed.append(word)
    return typed


def _named(words: Words) -> dict[str, str]:
    """Return the text of each setting, which may name a method; typed ones replace files' ones."""
    named = {name: text for name, (text, _) in words.files.items()}
    for word, following in zip(words.typed, [*words.typed, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if not equals:
            value = following
        if name.startswith("--"):
            named[name[2:].replace("-", "_")] = value
    return {name: text for name, text in named.items() if text != "null"}


def _check_names(parser: Parser, current: Parser, words: Words) -> None:
    """Refuse options of methods that were not chosen, and names in files that are no settings.

    If the command line replaces a method of a file, the options of that method in the file are
    dropped, with a note.
    """
    for word in words.typed:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in current.options:
            reason = _unknown(current, name)
            if reason:
                parser.error(reason)
            if "." in name:
                parser.error(f"unrecognized arguments: {name}")
    replaced = {word.partition("=")[0] for word in words.typed}
    dropped = []
    for name, (_, path) in list(words.files.items()):
        is_option = option(name) in current.options and "-" not in name
        if is_option and name not in ("config", "help", "print_config"):
            continue
        outer = name.partition(".")[0]
        if "." in name and option(outer) in replaced:
            dropped.append(name)
            del words.files[name]
            continue
        reason = _unknown(current, option(name))
        if reason:
            raise HessianFlowError(f"--config {path}: {reason}")
        known = [word[2:].replace("-", "_") for word in current.options]
        hint = did_you_mean(name, [word.replace("_", "-") for word in known]).replace("-", "_")
        raise HessianFlowError(f"--config {path}: there is no setting {name!r}{hint}")
    if dropped:
        words.notes.append(f"not used with these settings: {', '.join(dropped)}")


def _unknown(current: Parser, name: str) -> str:
    """Return an error text for an unknown option that a method may have; empty if none has it."""
    if not current.chosen:
        return ""
    if "." in name:
        return misplaced(current, name, current.methods)
    typed = homes(name.removeprefix("--").replace("-", "_"))
    if not typed:
        return ""
    return f"unknown option {name}: use {' or '.join(typed)}"


def _check_values(parser: Parser, words: Iterable[str], origin: str = "") -> None:
    """Refuse values that could overload a YAML parser, at options whose values are parsed."""
    name = ""
    for word in words:
        value = word
        if word.startswith("--"):
            name, _, value = word.partition("=")
        if name in parser.values:
            try:
                check_value(value)
            except UnfitTextError as error:
                raise HessianFlowError(f"{origin}{name}: {error}") from None


def _settings_of(path: str, notes: list[str]) -> dict[str, tuple[str, str]]:
    """Return the settings in a file as text, under the names of today.

    If the file has others, `notes` receives a note.
    """
    if not path:
        raise HessianFlowError("--config needs the name of a file of settings")
    settings = read_settings(path)
    if is_older(settings):
        # Only what moves is read as a value: a folder named 007 and the word off stay as they are.
        moves = {name: load_value(text) for name, text in settings.items() if is_older({name: ""})}
        upgraded = upgrade({**settings, **moves})
        older = [name for name in settings if name not in upgraded]
        settings = flattened(upgraded)
        notes.append(
            f"--config {path} has the form of an older release ({', '.join(older)}):"
            " hessianflow train --config FILE --print-config prints the form of today"
        )
    return {name: (text, path) for name, text in settings.items() if text != "null" or "." in name}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings as text by dotted name.

    {"controller": {"name": "absa", "patience": 5}} becomes controller and controller.patience.
    """
    texts: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if prefix and key == "name":
            name = prefix.rstrip(".")
        if isinstance(value, Mapping):
            texts |= flattened(value, f"{name}.")
        elif isinstance(value, str):
            texts[name] = value
        else:
            texts[name] = json.dumps(value)
    return texts


def _joined(parser: Parser, words: list[str]) -> list[str]:
    """Return the words with `=true` at switches without a value, and with negative numbers joined
    to their options."""
    joined: list[str] = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word in parser.switches and following.lower() not in _TRUTHS:
            joined.append(f"{word}=true")
        elif joined and joined[-1] in parser.options and re.fullmatch(r"-(\.?\d.*|inf|nan)", word):
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined
