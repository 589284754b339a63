"""Plain values as bytes, to send between ranks: data that can only become data again.

With pickles, anyone who can reach a rank's port could run a program there. Here a value is JSON, in
which a list that begins with a kind stands for everything that JSON lacks: tuples, dicts with other
keys than strings, bytes, paths, tensors and arrays of numbers, and the frozen dataclasses of this
package.
"""

import json
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessianflow.interfaces import HessianFlowError

_PACKAGE = __name__.partition(".")[0]
_NATIVE = frozenset({bool, int, float, str, type(None)})


def dumps(value: Any) -> bytes:
    """Return the bytes of a plain value; tensors return on the CPU, NumPy's numbers as Python's.

    Raises:
        HessianFlowError: Something in it is no plain value; the message names its type.
    """
    try:
        return json.dumps(_encoded(value), separators=(",", ":")).encode("ascii")
    except RecursionError as error:
        raise HessianFlowError(
            "a value that is nested too deep cannot be sent to other ranks"
        ) from error


def loads(content: bytes) -> Any:
    """Return the value from its bytes.

    Raises:
        HessianFlowError: The bytes are not from :func:`dumps`.
    """
    try:
        return _decoded(json.loads(content))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise HessianFlowError(
            f"what another rank sent cannot be read ({what}); do all run the same code?"
        ) from error


def _encoded(value: Any) -> Any:
    if type(value) in _NATIVE:
        return value
    # The most frequent kind has the shortest form.
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _encoded(item) for key, item in value.items()}
    for kind, encode in _ENCODERS.items():
        if isinstance(value, kind):
            return encode(value)
    if is_dataclass(value) and _is_record(type(value)):
        kept = {field.name: _encoded(getattr(value, field.name)) for field in fields(value)}
        return ["record", type(value).__module__, type(value).__qualname__, kept]
    raise HessianFlowError(
        f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent to other ranks:"
        " states and settings are numbers, strings, bytes, paths, tensors, and dicts, lists and"
        " tuples of them"
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        kind, *rest = value
        return _DECODERS[kind](*rest)
    return value


def _items(value: Any) -> list[Any]:
    return [_encoded(item) for item in value]


def _pairs(value: Mapping[Any, Any]) -> list[Any]:
    return ["dict", *([_encoded(key), _encoded(item)] for key, item in value.items())]


def _tensor(value: Tensor) -> list[Any]:
    dtype = str(value.dtype).removeprefix("torch.")
    content = b64encode(as_bytes(value).numpy().tobytes()).decode()
    return ["tensor", dtype, list(value.shape), content]


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor as a flat tensor on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _array(value: NDArray[Any]) -> list[Any]:
    if value.dtype.kind not in "biufc":
        raise HessianFlowError(
            f"an array of type {value.dtype} cannot be sent to other ranks: only numbers can"
        )
    return ["array", value.dtype.str, list(value.shape), b64encode(value.tobytes()).decode()]


_ENCODERS: Mapping[type, Callable[[Any], Any]] = {
    list: lambda value: ["list", *_items(value)],
    tuple: lambda value: ["tuple", *_items(value)],
    set: lambda value: ["set", *_items(value)],
    frozenset: lambda value: ["frozenset", *_items(value)],
    Mapping: _pairs,
    bytes: lambda value: ["bytes", b64encode(value).decode()],
    Path: lambda value: ["path", str(value)],
    Tensor: _tensor,
    torch.dtype: lambda value: ["dtype", str(value).removeprefix("torch.")],
    torch.device: lambda value: ["device", str(value)],
    np.ndarray: _array,
    np.generic: lambda value: _encoded(value.item()),
    # Types that are derived from these: NumPy's numbers, enumerations.
    **{kind: kind for kind in (int, float, str)},
    complex: lambda value: ["complex", value.real, value.imag],
}


def _new_tensor(dtype: str, shape: list[int], content: str) -> Tensor:
    if not content:
        return torch.empty(0, dtype=_dtype(dtype)).reshape(shape)
    raw = np.frombuffer(b64decode(content), dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(_dtype(dtype)).reshape(shape)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype


def _new_array(name: str, shape: list[int], content: str) -> NDArray[Any]:
    dtype = np.dtype(name)
    if dtype.kind not in "biufc":
        raise TypeError(f"{name} is no type of numbers")
    return np.array(np.frombuffer(b64decode(content), dtype=dtype)).reshape(shape)


def _record(module: str, name: str, kept: dict[str, Any]) -> Any:
    kind = getattr(sys.modules[module], name)
    if not _is_record(kind):
        raise TypeError(f"{module}.{name} is no record")
    return kind(**{key: _decoded(item) for key, item in kept.items()})


def _is_record(kind: Any) -> bool:
    """Return whether this is a frozen dataclass of this package, made from its fields alone."""
    if not isinstance(kind, type) or kind.__module__.partition(".")[0] != _PACKAGE:
        return False
    is_frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return is_frozen and all(field.init for field in fields(kind))


_DECODERS: Mapping[str, Callable[..., Any]] = {
    "list": lambda *items: [_decoded(item) for item in items],
    "tuple": lambda *items: tuple(_decoded(item) for item in items),
    "set": lambda *items: {_decoded(item) for item in items},
    "frozenset": lambda *items: frozenset(_decoded(item) for item in items),
    "dict": lambda *pairs: {_decoded(key): _decoded(item) for key, item in pairs},
    "bytes": b64decode,
    "path": Path,
    "tensor": _new_tensor,
    "dtype": _dtype,
    "device": torch.device,
    "array": _new_array,
    "record": _record,
    "complex": complex,
}
