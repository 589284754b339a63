"""The options of a method: the parameters of its constructor, with their types, defaults and
help."""

import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hessianflow.bounds import LARGEST, MOST, check_size, check_type

KINDS_BY_TYPE = {"InputAttack": "attack", "AttackRunner": "runner", "Optimizer": "optimizer"}
"""Kinds of methods that are options of others, by the type of the parameter."""
_PLAIN = (int, float, bool, str)


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name: name of the parameter.
        hint: its type, in plain types (int, float, bool, str, Literal, tuple, Mapping).
        default: its default; `inspect.Parameter.empty` where it has none.
        help: what its docstring says.
        kind: the kind of method that it takes; empty for a plain value.
    """

    name: str
    hint: Any
    default: Any
    help: str
    kind: str = ""

    @property
    def is_required(self) -> bool:
        """Whether the option has no default."""
        return self.default is inspect.Parameter.empty

    def checked(self, value: Any, where: str) -> Any:
        """Return a value for the option, with lists as tuples and whole numbers
        as floats where they may have fractions.

        Raises:
            HessianFlowError: a value of another type, or a number that is not finite or so large
                that products of a few of them overflow; `where` names the option.
        """
        check_type(where, value, self.hint)
        check_size(where, value, MOST if not _holds(self.hint, float) else LARGEST)
        if self.hint is float and value is not None:
            return float(value)
        if isinstance(value, Mapping):
            return {_number(key): part for key, part in value.items()}
        return _tupled(value)


def _holds(hint: Any, kind: Any) -> bool:
    """Return whether a kind of value is part of a type."""
    return hint is kind or any(_holds(part, kind) for part in get_args(hint))


def _number(key: Any) -> Any:
    """Return a key as the number that it was before JSON made it text."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key


def _tupled(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_tupled(part) for part in value)
    return value


def parameters_of(method: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a constructor (or function) by name."""
    return inspect.signature(method).parameters


@cache
def options_of(method: Any, supplied: frozenset[str]) -> dict[str, Option]:
    """Return the options of a class by name, in the order of its constructor.

    Args:
        method: a class, or a function that returns an object.
        supplied: parameters that the run supplies.

    Returns:
        The parameters that are not supplied and whose type is plain, or a kind of method.
    """
    texts = _documented(method)
    hints = _hints(method)
    found = {}
    for name, parameter in parameters_of(method).items():
        if name in supplied or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = _kind(hints.get(name))
        hint = str | None if kind else plain_type(hints.get(name, _guessed(parameter)))
        if hint is not None:
            found[name] = Option(name, hint, parameter.default, texts.get(name, ""), kind)
    return found


def _hints(method: Any) -> Mapping[str, Any]:
    function = method.__init__ if inspect.isclass(method) else method
    try:
        return get_type_hints(function)
    except (NameError, TypeError):  # names that only a type checker sees
        return {}


def _guessed(parameter: inspect.Parameter) -> Any:
    """Return the type of a parameter without annotation: that of its default."""
    if parameter.default in (None, parameter.empty):
        return Any
    return type(parameter.default)


def _kind(hint: Any) -> str:
    """Return the kind of method that a parameter takes; empty for another."""
    named = [getattr(part, "__name__", "") for part in (hint, *get_args(hint))]
    return next((KINDS_BY_TYPE[name] for name in named if name in KINDS_BY_TYPE), "")


def plain_type(hint: Any) -> Any:
    """Return a type without the parts that no text can stand for; None where nothing is left.

    A sequence becomes a tuple, and of a union those members stay that are plain.
    """
    origin = get_origin(hint)
    parts = get_args(hint)
    if hint in (*_PLAIN, types.NoneType) or hint is Any or origin is Literal:
        return hint
    if origin in (Union, types.UnionType):
        kept = [plain for part in parts if (plain := plain_type(part)) is not None]
        if not [part for part in kept if part is not types.NoneType]:
            return None
        return Union[tuple(kept)]  # noqa: UP007 - made of parts known only here
    if origin is tuple:
        inner = [plain_type(part) for part in parts if part is not Ellipsis]
        if None in inner:
            return None
        return _tuple_of(inner[0], ...) if Ellipsis in parts else _tuple_of(*inner)
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return hint
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        inner_type = plain_type(parts[0])
        return None if inner_type is None else _tuple_of(inner_type, ...)
    return None


def _tuple_of(*parts: Any) -> Any:
    """Return the type of tuples of these parts, which are known only at run time."""
    return types.GenericAlias(tuple, parts)


def _documented(method: Any) -> dict[str, str]:
    """Return what docstrings say of each parameter, those of base classes included."""
    from docstring_parser import parse

    texts: dict[str, str] = {}
    for documented in reversed(getattr(method, "__mro__", (method,))):
        if documented is object:
            continue
        for parameter in parse(documented.__doc__ or "").params:
            text = " ".join((parameter.description or "").split())
            # Torch's docstrings repeat the default, which here may be another.
            texts[parameter.arg_name] = re.sub(r" ?\(default: [^)]*\)", "", text)
    return texts
