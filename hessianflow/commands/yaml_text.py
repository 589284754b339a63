"""Reads untrusted YAML within bounds of size and depth, without aliases, tags or repeated names.

A YAML parser recurses for every level and copies for every alias, so a few bytes can cost a process
its stack or its memory. The parser's events are therefore counted first, which costs neither.
"""

import os
import re
import stat
from typing import Any

import yaml
from jsonargparse import get_loader

from hessianflow.interfaces import HessianFlowError

MOST_BYTES = 1 << 18
"""Largest settings file in bytes: a hundred times one that holds every setting. Ours."""
MOST_CHARACTERS = 1 << 16
"""Longest value on the command line. Ours."""
MOST_DIGITS = 300
"""Most digits of a number: a float reaches about as many. Ours."""
DEEPEST, MOST_EVENTS = 8, 20_000
"""Most levels of nested lists, and most YAML events. Ours; no setting has more than two levels."""
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")
)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML was built with it
_NULL = "tag:yaml.org,2002:null"
_LIST = "tag:yaml.org,2002:seq"
_MAP = "tag:yaml.org,2002:map"


class UnfitTextError(yaml.YAMLError):  # type: ignore[misc]  # without stubs, yaml is Any
    """Text that may be YAML, but not of a kind that is read here."""


def load_value(text: str) -> Any:
    """Return the value that a word of the command line stands for.

    Raises:
        UnfitTextError: as :func:`check_value`.
    """
    if not text.strip():
        return text
    check_value(text)
    try:
        return get_loader("yaml")(text)
    except (
        ValueError
    ) as error:  # from Python: a number it does not convert, or text that is not Unicode
        raise UnfitTextError(str(error)) from None


def check_value(text: str) -> None:
    """Refuse a word that could overload a YAML parser, before jsonargparse parses it.

    Raises:
        UnfitTextError: the word is too long or too deep, or holds an alias or a number of hundreds
            of digits.
    """
    if len(text) > MOST_CHARACTERS:
        raise UnfitTextError(f"{len(text)} characters, more than {MOST_CHARACTERS}")
    digits = max(map(len, re.findall(r"\d+", text)), default=0)
    if digits > MOST_DIGITS:
        raise UnfitTextError(
            f"a number of {digits} digits: none that is used here has more than {MOST_DIGITS}"
        )
    try:
        _check_events(text)
    except UnfitTextError:
        raise
    except (yaml.YAMLError, ValueError):  # not YAML: it will not be read as YAML either
        return


def read_settings(path: str) -> dict[str, str]:
    """Return the settings in a YAML file, each as the text that would stand on the command line.

    Raises:
        HessianFlowError: the file does not exist, is not a regular file, is not UTF-8, is too
            large, or does not map names to numbers, words and lists. The message repeats names from
            the file, and no values.
    """
    text = _text(path)
    try:
        _check_events(text)
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise HessianFlowError(
            f"--config {path}: not the YAML of a settings file: {_reason(error)}"
        ) from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise HessianFlowError(
            f"--config {path}: must hold names of settings and their values, found a {node.id}"
        )
    if {"settings", "environment"} <= {
        key.value for key, _ in node.value if isinstance(key.value, str)
    }:
        raise HessianFlowError(
            f"--config {path} is the record of a run: its settings are in settings.yaml beside it"
        )
    found: dict[str, str] = {}
    for key, value in node.value:
        where = f"--config {path} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise HessianFlowError(
                f"{where}: the name of a setting must be a word, found a {key.id}"
            )
        if key.value in found:
            raise HessianFlowError(f"{where}: {key.value} is set a second time: remove one of them")
        found |= _as_words(key.value, value, where)
    return found


def _as_words(name: str, node: yaml.Node, where: str) -> dict[str, str]:
    """Return a setting as text, of a method that is a mapping its name and its options by dotted
    names."""
    if not isinstance(node, yaml.MappingNode) or node.tag != _MAP:
        return {name: _as_word(node, f"{where}: {name}")}
    if "." in name and not any(key.value == "name" for key, _ in node.value):
        pairs = [(_as_word(key, where), _as_word(value, where)) for key, value in node.value]
        return {name: f"{{{', '.join(f'{key}: {value}' for key, value in pairs)}}}"}
    found: dict[str, str] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise HessianFlowError(f"{where}: {name} must map words to values, found a {key.id}")
        inner = name if key.value == "name" else f"{name}.{key.value.replace('-', '_')}"
        if inner in found:
            raise HessianFlowError(f"{where}: {inner} is set a second time: remove one of them")
        found |= _as_words(inner, value, where)
    if name not in found:
        raise HessianFlowError(f"{where}: {name} needs a name, as in {{name: ...}}")
    return found


def _text(path: str) -> str:
    """Return the text of a regular file of moderate size; pipes and devices are refused without
    waiting."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise HessianFlowError(f"--config {path}: cannot be read: {reason}") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise HessianFlowError(
                f"--config {path}: must be a plain file: write the settings into one"
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise HessianFlowError(f"--config {path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)
    if len(content) > MOST_BYTES:
        raise HessianFlowError(
            f"--config {path}: more than {MOST_BYTES} bytes: no settings file is that large"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise HessianFlowError(
            f"--config {path}: not UTF-8 text: save it in that encoding"
        ) from None


def _check_events(text: str) -> None:
    """Refuse text with too many levels or events, or with aliases.

    Raises:
        UnfitTextError: saying which; yaml's own errors pass through.
    """
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_LOADER), start=1):
        if isinstance(event, yaml.AliasEvent):
            raise UnfitTextError("aliases are not read here: write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST or count > MOST_EVENTS:
            what = (
                f"more than {DEEPEST} levels"
                if depth > DEEPEST
                else f"more than {MOST_EVENTS} parts"
            )
            raise UnfitTextError(f"{what}: no setting has as many")


def _as_word(node: yaml.Node, where: str) -> str:
    """Return a value as it would stand on the command line."""
    if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
        return f"[{', '.join(_as_word(part, where) for part in node.value)}]"
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN_TAGS:
        found = "a mapping" if isinstance(node, yaml.MappingNode) else "a tag"
        raise HessianFlowError(f"{where} must be a number, a word or a list, found {found}")
    return "null" if node.tag == _NULL else str(node.value)


def _reason(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, without the lines around it, which may hold a password."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        return f"{', '.join(filter(None, (error.context, error.problem)))}{line}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"a character that YAML does not allow at position {error.position}"
    return str(error)
