"""Nested parts of a batch: how they are opened, named and put together again.

A part with entries is a mapping (a dict, a `UserDict`, the output of a tokenizer), a dataclass, a
named tuple, a list or a tuple. Everything else has none: tensors, text, numbers, and objects of
unknown classes.
"""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def entries(part: Any) -> list[Any] | None:
    """Return the entries of a part, in order; None where its kind has none."""
    if type(part) in (list, tuple):
        return list(part)
    # A packed sequence is a named tuple, but its entries make sense only together.
    if isinstance(part, (Tensor, str, bytes, PackedSequence)):
        return None
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, (list, tuple)):
        return list(part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return [getattr(part, field.name) for field in dataclasses.fields(part)]
    return None


def entry_names(part: Any) -> list[str]:
    """Return the entries' names as code would write them, such as "['mask']", "[0]" or ".boxes", in
    order."""
    if isinstance(part, Mapping):
        return [f"[{key!r}]" for key in part]
    if is_named_tuple(part):
        return [f".{field}" for field in part._fields]
    if isinstance(part, (list, tuple)):
        return [f"[{number}]" for number in range(len(part))]
    return [f".{field.name}" for field in dataclasses.fields(part)]


def rebuilt(part: Any, values: Sequence[Any]) -> Any:
    """Return a copy of `part` with other entries, in the order of :func:`entries`.

    The type is kept, except that a mapping becomes a dict if it is neither a dict nor a `UserDict`,
    or does not let its entries be set.
    """
    if type(part) is dict:
        return dict(zip(part, values, strict=True))
    if type(part) in (list, tuple):
        return type(part)(values)
    if isinstance(part, Mapping):
        return _rebuilt_mapping(part, values)
    if is_named_tuple(part):
        return type(part)(*values)
    if isinstance(part, (list, tuple)):
        return type(part)(values)
    made = copy.copy(part)
    for field, value in zip(dataclasses.fields(part), values, strict=True):
        # frozen or not: nobody else holds this copy yet
        object.__setattr__(made, field.name, value)
    return made


def mapped(function: Callable[[Any], Any], part: Any) -> Any:
    """Return the same structure with `function` applied to whatever has no entries."""
    values = entries(part)
    return (
        function(part)
        if values is None
        else rebuilt(part, [mapped(function, value) for value in values])
    )


def is_named_tuple(part: Any) -> bool:
    """Return whether a part is a tuple whose entries have names."""
    return isinstance(part, tuple) and hasattr(part, "_fields")


def is_list(part: Any) -> bool:
    """Return whether a part is a list or a tuple without names, which may have any number of
    entries."""
    return isinstance(part, (list, tuple)) and not is_named_tuple(part)


def is_plain(part: Any) -> bool:
    """Return whether a value is text, a number or another value that has no row for each
    example."""
    return part is None or isinstance(
        part, (str, bytes, Number, np.generic, Enum, torch.dtype, torch.device)
    )


def article(value: Any) -> str:
    """Return the type of a value with its article, for messages: "a dict", "an ndarray"."""
    name = type(value).__name__
    sounds_like_a_vowel = name[:1].lower() in "aeio" or name == "ndarray"
    return f"{'an' if sounds_like_a_vowel else 'a'} {name}"


def _rebuilt_mapping(part: Mapping[Any, Any], values: Sequence[Any]) -> Any:
    found = dict(zip(part, values, strict=True))
    if not isinstance(part, (dict, UserDict)):
        return found  # a shallow copy of another class may share its entries with the original
    try:
        made = copy.copy(part)
        for key, value in found.items():  # classes that forbid update() let their entries be set
            made[key] = value
    except Exception:  # whatever a foreign class raises: a dict holds the same
        return found
    return made
