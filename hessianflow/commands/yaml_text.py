"""The reader of untrusted YAML, which bounds size and depth and allows no aliases or tags.

A YAML parser recurses at every level and copies at every alias, so a few bytes can exhaust the
stack or the memory of a process. The events of the parser, which cost neither, are counted first.
"""

import os
import re
import stat
from typing import Any

import yaml
from jsonargparse import get_loader

from hessianflow.config import CHOSEN
from hessianflow.interfaces import HessianFlowError

MOST_BYTES = 1 << 18
"""Largest settings file in bytes, a hundred times one with every setting. This bound, like the next
ones, is our choice."""
MOST_CHARACTERS = 1 << 16
"""Most characters of a value on the command line."""
MOST_DIGITS = 300
"""Most digits of a number, about as many as a float can have."""
DEEPEST = 8
"""Most levels of nested lists; no setting has more than two."""
MOST_EVENTS = 20_000
"""Most events of the YAML parser."""
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")
)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML was built with it
_MUST_BE = "must be a number, a word or a list"
_NULL = "tag:yaml.org,2002:null"
_LIST = "tag:yaml.org,2002:seq"
_MAP = "tag:yaml.org,2002:map"


class UnfitTextError(yaml.YAMLError):  # type: ignore[misc]  # without stubs, yaml is Any
    """Text that is refused, although it may be YAML."""


def load_value(text: str) -> Any:
    """Return the value of a word of the command line.

    Raises:
        UnfitTextError: The word could overload the parser (see :func:`check_value`), or is no
            value.
    """
    if not text.strip():
        return text
    check_value(text)
    try:
        return get_loader("yaml")(text)
    # Python does not convert some numbers, and refuses text that is not Unicode.
    except ValueError as error:
        raise UnfitTextError(str(error)) from None


def check_value(text: str) -> None:
    """Refuse a word that could overload a YAML parser, before jsonargparse parses it.

    It is too long or too deep, or has an alias or a number of hundreds of digits.
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
    except (yaml.YAMLError, ValueError):  # jsonargparse does not read it as YAML either
        return


def read_settings(path: str) -> dict[str, str]:
    """Return the settings in a YAML file, each as the text that a command line would have.

    Raises:
        HessianFlowError: The file does not exist, is not a regular file, is not UTF-8, is too
            large, or does not map names to numbers, words and lists. The message repeats names from
            the file, but no values.
    """
    text = _text(path)
    try:
        _check_events(text)
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise _refusal(path, f"not the YAML of a settings file: {_reason(error)}") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise _refusal(path, f"must hold names of settings and their values, found a {node.id}")
    if {"settings", "environment"} <= {
        key.value for key, _ in node.value if isinstance(key.value, str)
    }:
        raise HessianFlowError(
            f"--config {path} is the record of a run: its settings are in settings.yaml beside it"
        )
    settings: dict[str, str] = {}
    for key, value in node.value:
        where = f"--config {path} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise HessianFlowError(
                f"{where}: the name of a setting must be a word, found a {key.id}"
            )
        if key.value in settings:
            raise HessianFlowError(f"{where}: {key.value} is set a second time: remove one of them")
        settings |= _as_words(key.value, value, where)
    return settings


def _as_words(name: str, node: yaml.Node, where: str) -> dict[str, str]:
    """Return a setting as text by name.

    A method that is a mapping gives its name, and its options by dotted names.
    """
    if not isinstance(node, yaml.MappingNode) or node.tag != _MAP:
        return {name: _as_word(node, f"{where}: {name}")}
    is_method = name in CHOSEN or any(key.value == "name" for key, _ in node.value)
    if not is_method and "." not in name:
        raise HessianFlowError(f"{where}: {name} {_MUST_BE}, found a mapping")
    if not is_method:
        pairs = [(_as_word(key, where), _as_word(value, where)) for key, value in node.value]
        return {name: f"{{{', '.join(f'{key}: {value}' for key, value in pairs)}}}"}
    words: dict[str, str] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise HessianFlowError(f"{where}: {name} must map words to values, found a {key.id}")
        inner = f"{name}.{key.value.replace('-', '_')}"
        if key.value == "name":
            inner = name
        if inner in words:
            raise HessianFlowError(f"{where}: {inner} is set a second time: remove one of them")
        words |= _as_words(inner, value, where)
    if name not in words:
        raise HessianFlowError(f"{where}: {name} needs a name, as in {{name: ...}}")
    return words


def _text(path: str) -> str:
    """Return the text of a regular file of moderate size, and refuse pipes and devices at once."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:  # no path has a NUL character
        raise _refusal(path, f"cannot be read: {error}") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise _refusal(path, "must be a plain file: write the settings into one")
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)
    if len(content) > MOST_BYTES:
        raise _refusal(path, f"more than {MOST_BYTES} bytes: no settings file is that large")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _refusal(path, "not UTF-8 text: save it in that encoding") from None


def _check_events(text: str) -> None:
    """Refuse text with too many levels or events, or with aliases; yaml's errors pass through."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_LOADER), start=1):
        if isinstance(event, yaml.AliasEvent):
            raise UnfitTextError("aliases are not read here: write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise UnfitTextError(f"more than {DEEPEST} levels: no setting has as many")
        if count > MOST_EVENTS:
            raise UnfitTextError(f"more than {MOST_EVENTS} parts: no setting has as many")


def _as_word(node: yaml.Node, where: str) -> str:
    """Return a value in the form of the command line."""
    if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
        return f"[{', '.join(_as_word(part, where) for part in node.value)}]"
    if isinstance(node, yaml.MappingNode):
        raise HessianFlowError(f"{where} {_MUST_BE}, found a mapping")
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN_TAGS:
        raise HessianFlowError(f"{where} {_MUST_BE}, found a tag")
    if node.tag == _NULL:
        return "null"
    return str(node.value)


def _refusal(path: str, what: str) -> HessianFlowError:
    return HessianFlowError(f"--config {path}: {what}")


def _reason(error: yaml.YAMLError) -> str:
    """Return the problem and its line, without the text around it, which may hold a password."""
    if isinstance(error, yaml.MarkedYAMLError):
        reason = ", ".join(filter(None, (error.context, error.problem)))
        if error.problem_mark is not None:
            reason += f" in line {error.problem_mark.line + 1}"
        return reason
    if isinstance(error, yaml.reader.ReaderError):
        return f"a character that YAML does not allow at position {error.position}"
    return str(error)
