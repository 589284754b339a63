"""Whether a graph still belongs to the current weights, batch and loss.

The addresses and versions of tensors show the changes that autograd knows of. Writes through
`.data` and through NumPy change no version, so sums over all values are compared too. Each place
has a fixed weight in its sum, so that a permutation or a change of sign shows, which would leave a
norm as it was. Of a model's Python state, the modules, their forward hooks, and the numbers, text
and tensors among their attributes are watched; the content of lists and other objects is not.
"""

import math
from collections.abc import Iterable
from functools import cache, partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessianflow.batches import map_tensors

CHUNK = 2**20
"""Most values in one sum: bounds the memory for weights and for converted values. Ours."""

SMALL = 2**13
"""Tensors of at most this many values are summed together: a kernel for each would cost more than
copying them. Ours."""

_GOLDEN = 0.6180339887498949
_ODD = -7046029254386353131  # the golden ratio in 64 bits
_NUMBERS = (bool, int, float, str)
_PLAIN = (*_NUMBERS, Tensor)
_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_FLAGS = ("training", "track_running_stats")  # measuring sets them for its duration
_FLOATS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
)

_OF_NUMPY = (
    *(torch.float32, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)


class Snapshot:
    """What a graph was built from: weights and buffers of the model and of the loss, options of the
    loss, the batch.

    It holds no copy of any of them. The comparison runs before every product, so what it compares
    is listed beforehand.
    """

    def __init__(self, model: nn.Module, loss_fn: Any, batch: Any) -> None:
        self._sources = model, loss_fn, batch
        self._structure = _Structure(model, loss_fn)
        self._of_batch = _tensors_of(batch)
        self._may_be_refilled = not (
            type(batch) is tuple and all(isinstance(part, Tensor) for part in batch)
        )
        self._tensors = [*self._structure.tensors(), *self._of_batch]
        self._places = _places(self._tensors)
        self._contents = _Contents(self._tensors)
        self._numbers = self._contents.numbers()

    def is_current(self) -> bool:
        """Return whether everything is still as it was."""
        if not self._structure.is_as_found():
            return False
        if self._may_be_refilled and not _are_same(_tensors_of(self._sources[2]), self._of_batch):
            return False
        if _places(self._tensors) != self._places:
            return False
        # Comparing on the host is worth a synchronisation: the alternative is a product at outdated
        # weights.
        return self._contents.numbers() == self._numbers

    def renew(self) -> None:
        """Read addresses, versions and attributes anew, after a forward pass that may have changed
        them."""
        model, loss_fn, _ = self._sources
        self._structure = _Structure(model, loss_fn)
        self._tensors = [*self._structure.tensors(), *self._of_batch]
        self._places = _places(self._tensors)

    def has_values_of(self, other: "Snapshot") -> bool:
        """Return whether another snapshot was taken of equal values in equal layouts, in the same
        modules.

        Where the tensors lie in memory does not matter.
        """
        layouts = [place[-1] for place in self._places] == [place[-1] for place in other._places]
        return (
            layouts
            and self._structure.is_that_of(other._structure)
            and self._numbers == other._numbers
        )


class _Structure:
    """What the modules of a model and of a loss hold: weights, buffers, modules, forward hooks and
    plain attributes."""

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        modules = _all_modules(model)
        if isinstance(loss_fn, nn.Module):
            modules += _all_modules(loss_fn)
        named = [vars(module) for module in modules]
        if isinstance(loss_fn, partial):
            named.append(loss_fn.keywords)
        self._tables = [
            held[name] for held in named for name in _TABLES if held.get(name) is not None
        ]
        self._entries = [entry for table in self._tables for entry in table.values()]
        plain = [
            (held, key, value)
            for held in named
            for key, value in held.items()
            if isinstance(value, _PLAIN) and key not in _FLAGS
        ]
        self._keys = [(held, key) for held, key, _ in plain]
        self._values = [value for _, _, value in plain]
        # A module's plain tensors are compared by identity only; those of a partial are options,
        # and are read.
        self._further = _tensors_of(loss_fn.keywords) if isinstance(loss_fn, partial) else []

    def is_as_found(self) -> bool:
        """Return whether nothing was replaced, added or removed; the values of tensors are not
        compared."""
        if not _are_same(
            [entry for table in self._tables for entry in table.values()], self._entries
        ):
            return False
        now = [held.get(key) for held, key in self._keys]
        return _are_same(now, self._values) or all(map(_is_same, now, self._values))

    def is_that_of(self, other: "_Structure") -> bool:
        """Return whether another structure holds the same."""
        if not _are_same(self._entries, other._entries) or len(self._values) != len(other._values):
            return False
        keys = [key for _, key in self._keys] == [key for _, key in other._keys]
        return keys and all(map(_is_same, self._values, other._values))

    def tensors(self) -> list[Tensor]:
        """Return weights and buffers, and what a partial gives the loss."""
        return [entry for entry in self._entries if isinstance(entry, Tensor)] + self._further


def _are_same(entries: list[Any], others: list[Any]) -> bool:
    return len(entries) == len(others) and all(map(is_, entries, others))


def _is_same(now: Any, before: Any) -> bool:
    return now is before or (
        isinstance(before, _NUMBERS) and isinstance(now, _NUMBERS) and now == before
    )


class _Contents:
    """Views of all values, in the order of memory, and their weighted sums."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        chunks: list[list[Tensor]] = []
        small: dict[Any, list[Tensor]] = {}
        # NumPy, where it can: between two products each call of torch costs several times as much.
        self._arrays: list[tuple[Any, Any]] = []
        self._loose: list[Tensor] = []  # no view in one dimension: read anew each time
        for tensor in tensors:
            for part in _strided_parts(tensor):
                flat = _flat_view(part)
                if flat is None:
                    self._loose.append(part)
                elif flat.numel() > SMALL:
                    chunks += ([chunk] for chunk in torch.split(flat, CHUNK))
                elif flat.dtype in _OF_NUMPY and flat.device.type == "cpu":
                    self._arrays.append((flat.numpy(), _weights_of([flat]).numpy()))
                else:
                    small.setdefault((flat.dtype, flat.device), []).append(flat)
        self._summed = [(group, _weights_of(group)) for group in (*small.values(), *chunks)]

    def numbers(self) -> list[float | int]:
        """Return a few numbers that differ whenever the values do."""
        with np.errstate(over="ignore", invalid="ignore"):
            numbers: list[float | int] = [
                array.dot(weights).item() for array, weights in self._arrays
            ]
        for place, number in enumerate(numbers):
            if not math.isfinite(number):  # one such value would hide all others
                array = torch.from_numpy(self._arrays[place][0])
                numbers[place] = int(_sum(*_as_integers([array])))
        return numbers + self._numbers_of_torch() if self._summed or self._loose else numbers

    def _numbers_of_torch(self) -> list[float | int]:
        with torch.no_grad():
            loose = [
                [chunk]
                for tensor in self._loose
                for chunk in torch.split(tensor.reshape(-1), CHUNK)
            ]
            summed = (
                self._summed + [(group, _weights_of(group)) for group in loose]
                if loose
                else self._summed
            )
            numbers = _on_the_host([_sum(group, weights) for group, weights in summed])
            for place, number in enumerate(numbers):
                if not math.isfinite(number):
                    numbers[place] = int(_sum(*_as_integers(summed[place][0])))
        return numbers


def _weights_of(group: list[Tensor]) -> Tensor:
    """Return a weight for each place in a row of tensors of one type, the same in every process."""
    dtype = torch.int64
    if group[0].dtype in _FLOATS:
        dtype = (
            torch.float64 if group[0].dtype in (torch.float64, torch.complex128) else torch.float32
        )
    length = sum(tensor.numel() for tensor in group) * (2 if group[0].is_complex() else 1)
    return _table(dtype, group[0].device, length.bit_length())[:length]


@cache
def _table(dtype: torch.dtype, device: torch.device, bits: int) -> Tensor:
    # By powers of two: a few tables serve all models.
    places = torch.arange(1, 2**bits + 1, device="cpu")
    weights = places * _ODD if dtype == torch.int64 else (places.double() * _GOLDEN).frac() + 0.5
    return weights.to(device, dtype)


def _sum(group: list[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum of the values of some tensors of one type, joined in one row."""
    values = group[0] if len(group) == 1 else torch.cat(group)
    if values.dtype != weights.dtype:
        if values.is_complex():
            values = torch.view_as_real(values).reshape(-1)
        elif values.is_floating_point() and not weights.is_floating_point():
            values = values.view(torch.uint8)  # the smallest floats: by their bits
        values = values.to(weights.dtype)
    if values.device.type == "cpu" or weights.is_floating_point():
        return torch.dot(values, weights)
    return (values * weights).sum()


def _as_integers(group: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the bits of floating-point values as integers, and the weights of their places."""
    row = torch.cat(group)
    bits = [
        (torch.view_as_real(row).reshape(-1) if row.is_complex() else row)
        .contiguous()
        .view(torch.uint8)
    ]
    return bits, _weights_of(bits)


def _on_the_host(numbers: list[Tensor]) -> list[float | int]:
    """Return the numbers on the host, moved in one transfer for each type and device."""
    if all(number.device.type == "cpu" for number in numbers):
        return [number.item() for number in numbers]
    kinds: dict[Any, list[int]] = {}
    for place, number in enumerate(numbers):
        kinds.setdefault((number.dtype, number.device), []).append(place)
    found: dict[int, float | int] = {}
    for places in kinds.values():
        found |= dict(
            zip(places, torch.stack([numbers[place] for place in places]).tolist(), strict=True)
        )
    return [found[place] for place in range(len(numbers))]


def _tensors_of(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda t: found.append(t) or t, batch)  # type: ignore[func-returns-value]
    return found


def _all_modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules, shared ones as often as they occur: `modules()` would cost more than all
    other checks."""
    found = [model]
    for module in found:
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


def _places(tensors: list[Tensor]) -> list[Any]:
    try:
        return [(t.data_ptr(), t._version, t.requires_grad, t.stride()) for t in tensors]
    except (
        RuntimeError
    ):  # sparse ones have no such place, and those made in inference mode no version
        return [_place(t) for t in tensors]


def _place(tensor: Tensor) -> Any:
    version = -1 if tensor.is_inference() else tensor._version
    if tensor.layout != torch.strided:
        return id(tensor), version, tensor.requires_grad, tensor.layout
    return tensor.data_ptr(), version, tensor.requires_grad, tensor.stride()


def _strided_parts(tensor: Tensor) -> list[Tensor]:
    """Return the ordinary tensors that hold the values of a tensor of any kind; none where they
    cannot be reached."""
    if type(tensor) not in (Tensor, nn.Parameter):
        if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of tensors made of others
            inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            return [part for held in inner for part in _strided_parts(held)]
        tensor = tensor.as_subclass(Tensor)
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    return [tensor] if is_plain else []


def _flat_view(tensor: Tensor) -> Tensor | None:
    """Return a view of all values in one dimension, in memory order; None where there are gaps
    between them."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    along = tensor.detach().permute(order)
    return along.view(-1) if along.is_contiguous() else None
