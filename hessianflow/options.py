"""The options of a method, read from the signature and the docstring of its constructor."""

import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hessianflow.bounds import LARGEST, MOST, check_size, check_type, tupled

KINDS_BY_TYPE = {"InputAttack": "attack", "AttackRunner": "runner", "Optimizer": "optimizer"}
"""Kinds of methods that may be options of others, by the type of the parameter."""
_PLAIN = (int, float, bool, str)


@dataclass(frozen=True)
class Option:
    """An option of a method.

    Attributes:
        name: Name of the parameter.
        hint: Type in plain types (int, float, bool, str, Literal, tuple, Mapping).
        default: Default value; `inspect.Parameter.empty` without one.
        help: Text of the docstring about the parameter.
        kind: Kind of method that the option chooses; empty for a plain value.
    """

    name: str
    hint: Any
    default: Any
    help: str
    kind: str = ""

    @property
    def is_required(self) -> bool:
        """Return whether the option has no default."""
        return self.default is inspect.Parameter.empty

    def checked(self, value: Any, where: str) -> Any:
        """Return the value in the type of the option: lists as tuples, integers as floats if due.

        Raises:
            HessianFlowError: The value has another type, or is not finite, or is so large that
                products of a few overflow; the error names the option `where`.
        """
        if isinstance(value, Enum):  # a default that a class has under a name of its own
            value = value.value
        check_type(where, value, self.hint)
        check_size(where, value, MOST if not _holds(self.hint, float) else LARGEST)
        if self.hint is float and value is not None:
            return float(value)
        if isinstance(value, Mapping):
            return {_number(key): part for key, part in value.items()}
        return tupled(value)


def _holds(hint: Any, kind: Any) -> bool:
    """Return whether a kind of value is part of a type."""
    return hint is kind or any(_holds(part, kind) for part in get_args(hint))


def _number(key: Any) -> Any:
    """Return the key of a mapping as the number that it was before JSON made it text."""
    if isinstance(key, str) and key.isdecimal() and len(key) < 20:
        return int(key)
    return key


def parameters_of(method: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a constructor or function by name."""
    return inspect.signature(method).parameters


def required_of(method: Any) -> list[str]:
    """Return the parameters without which a constructor or function cannot be called."""
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = parameters_of(method).values()
    return [
        each.name for each in parameters if each.default is each.empty and each.kind not in free
    ]


@cache
def options_of(method: Any, supplied: frozenset[str]) -> dict[str, Option]:
    """Return the options of a class, or function, by name, in the order of its constructor.

    They are the parameters that the run does not supply whose type is plain or a kind of method.
    """
    texts = _documented(method)
    hints = _hints(method)
    options = {}
    for name, parameter in parameters_of(method).items():
        if name in supplied or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = _kind(hints.get(name))
        hint: Any = str | None
        if not kind:
            hint = plain_type(hints.get(name, _guessed(parameter)))
        if hint is not None:
            options[name] = Option(name, hint, parameter.default, texts.get(name, ""), kind)
    return options


def _hints(method: Any) -> Mapping[str, Any]:
    function = method
    if inspect.isclass(method):
        function = method.__init__
    try:
        return get_type_hints(function)
    except (NameError, TypeError):  # a hint has a name that only a type checker sees
        return {}


def _guessed(parameter: inspect.Parameter) -> Any:
    """Return the type of a parameter without annotation, taken from its default."""
    if parameter.default in (None, parameter.empty):
        return Any
    return type(parameter.default)


def _kind(hint: Any) -> str:
    """Return the kind of method that a parameter chooses; empty if it chooses none.

    A parameter that is to be a class of optimizers, not an optimizer, chooses none.
    """
    if get_origin(hint) is type:
        return ""
    named = [getattr(part, "__name__", "") for part in (hint, *get_args(hint))]
    return next((KINDS_BY_TYPE[name] for name in named if name in KINDS_BY_TYPE), "")


def plain_type(hint: Any) -> Any:
    """Return a type without the parts that cannot be written as text; None if nothing is left.

    A sequence becomes a tuple, and a union keeps its plain members.
    """
    origin = get_origin(hint)
    parts = get_args(hint)
    if hint in (*_PLAIN, types.NoneType) or hint is Any or origin is Literal:
        return hint
    if origin in (Union, types.UnionType):
        kept = [plain for part in parts if (plain := plain_type(part)) is not None]
        if not [part for part in kept if part is not types.NoneType]:
            return None
        return Union[tuple(kept)]  # noqa: UP007 - its members are known only at run time
    if origin is tuple:
        inner = [plain_type(part) for part in parts if part is not Ellipsis]
        if None in inner:
            return None
        if Ellipsis in parts:
            return _tuple_of(inner[0], ...)
        return _tuple_of(*inner)
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return hint
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        inner_type = plain_type(parts[0])
        if inner_type is not None:
            return _tuple_of(inner_type, ...)
    return None


def _tuple_of(*parts: Any) -> Any:
    """Return the type of tuples of these types, which are known only at run time."""
    return types.GenericAlias(tuple, parts)


def _documented(method: Any) -> dict[str, str]:
    """Return the text about each parameter in the docstrings of a class and its bases."""
    from docstring_parser import parse

    texts: dict[str, str] = {}
    for documented in reversed(getattr(method, "__mro__", (method,))):
        if documented is object:
            continue
        for parameter in parse(documented.__doc__ or "").params:
            text = " ".join((parameter.description or "").split())
            # The docstrings of torch repeat their defaults, which may differ here.
            text = re.sub(r" ?\(default: [^)]*\)", "", text)
            # Of a reference such as :class:`~package.Name`, the name alone is left.
            texts[parameter.arg_name] = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return texts
