"""Functions that open nested parts of a batch, name and count their entries, and rebuild them.

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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

TARGET_NAMES = ("labels", "label", "targets", "target", "y")
"""Keys under which a mapping holds its targets, which then decide how many examples it has. Our
choice."""


def entries(part: Any) -> list[Any] | None:
    """Return the entries of a part, in order; None if its kind has none."""
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
    """Return the names of entries, in order, as in code: "['mask']", "[0]" or ".boxes"."""
    if isinstance(part, Mapping):
        return [f"[{key!r}]" for key in part.keys()]  # noqa: SIM118 (a TensorDict iterates rows)
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
    copied = copy.copy(part)
    for field, value in zip(dataclasses.fields(part), values, strict=True):
        # The class may be frozen, but nothing else holds this copy yet.
        object.__setattr__(copied, field.name, value)
    return copied


def mapped(function: Callable[[Any], Any], part: Any) -> Any:
    """Return the same structure with `function` applied to whatever has no entries."""
    values = entries(part)
    if values is None:
        return function(part)
    return rebuilt(part, [mapped(function, value) for value in values])


def tensors_in(part: Any) -> list[Tensor]:
    """Return all tensors of a part, in order."""
    if isinstance(part, Tensor):
        return [part]
    return [tensor for value in entries(part) or () for tensor in tensors_in(value)]


def reading(part: Any, total: int) -> Literal["rows", "shared", "unknown"]:
    """Return whether a cut of this part alone takes its rows, leaves it whole, or is refused."""
    if isinstance(part, (Tensor, np.ndarray)):
        if part.ndim > 0 and part.shape[0] == total:
            return "rows"
        if part.ndim == 0 or part.shape[0] == 1:
            return "shared"
        return "unknown"
    if is_plain(part):
        return "shared"
    if is_list(part) and len(part) == total:
        return "rows"
    values = entries(part)
    if values is None:
        return "unknown"
    readings = {reading(value, total) for value in values}
    if "unknown" in readings:
        return "unknown"
    if "rows" in readings:
        return "rows"
    return "shared"


def row_counts(part: Any, *, lists: bool = False) -> set[int]:
    """Return the first dimensions that occur in a part.

    A list of text or numbers, and one of mappings or dataclasses that are alike, counts by its
    length. With `lists` every other list adds its length: its entries may be one for each example.
    """
    if isinstance(part, (Tensor, np.ndarray)):
        return {int(length) for length in part.shape[:1]}
    if isinstance(part, Mapping):
        for name in TARGET_NAMES:
            if name in part.keys() and row_counts(part[name], lists=lists):  # noqa: SIM118
                return row_counts(part[name], lists=lists)
    counts = set().union(*(row_counts(value, lists=lists) for value in entries(part) or ()))
    if not is_list(part) or not part:
        return counts
    if lists:
        return {len(part)} | counts
    if not counts or are_alike(part):
        return {len(part)}
    return counts


def are_alike(part: Sequence[Any]) -> bool:
    """Return whether a list holds mappings of the same keys, or dataclasses of one type."""
    if all(isinstance(entry, Mapping) for entry in part):
        return all(entry.keys() == part[0].keys() for entry in part)
    return dataclasses.is_dataclass(part[0]) and all(type(entry) is type(part[0]) for entry in part)


def is_named_tuple(part: Any) -> bool:
    """Return whether a part is a tuple whose entries have names."""
    return isinstance(part, tuple) and hasattr(part, "_fields")


def is_list(part: Any) -> bool:
    """Return whether a part is a list or a tuple without names."""
    return isinstance(part, (list, tuple)) and not is_named_tuple(part)


def is_plain(part: Any) -> bool:
    """Return whether a value is text, a number or another value without rows for examples."""
    return part is None or isinstance(
        part, (str, bytes, Number, np.generic, Enum, torch.dtype, torch.device)
    )


def article(value: Any) -> str:
    """Return the type of a value with its article, for messages: "a dict", "an ndarray"."""
    name = type(value).__name__
    begins_with_a_vowel = name[:1].lower() in "aeio" or name == "ndarray"
    if begins_with_a_vowel:
        return f"an {name}"
    return f"a {name}"


def described(value: Any) -> str:
    """Return the type of a value with its article and, if it is a container, its length."""
    if isinstance(value, (list, tuple, Mapping)):
        return f"{article(value)} of {len(value)}"
    return article(value)


def _rebuilt_mapping(part: Mapping[Any, Any], values: Sequence[Any]) -> Any:
    plain = dict(zip(part.keys(), values, strict=True))
    if not isinstance(part, (dict, UserDict)):
        return plain  # a shallow copy of another class may share its entries with the original
    try:
        copied = copy.copy(part)
        for key, value in plain.items():  # classes that forbid update() let their entries be set
            copied[key] = value
    except Exception:  # a foreign class may raise anything, and a dict holds the same
        return plain
    return copied
