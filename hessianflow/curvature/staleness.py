"""A comparison that tells whether a graph still belongs to the current weights, batch and loss.

The addresses and versions of tensors show the changes that autograd knows of. Writes through
`.data` and through NumPy change no version, so sums over all values are compared, too. Each
position has a fixed weight in its sum, so that a permutation or a change of sign shows, which would
leave a norm unchanged. Of a model's Python state, the modules, their forward hooks, and the
numbers, text and tensors among their attributes are compared; the content of lists and other
objects is not.
"""

import math
import zlib
from collections.abc import Iterable
from functools import cache, partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessianflow.structure import tensors_in

CHUNK = 2**20
"""Most values in one sum, which bounds the memory for weights and converted values. Our choice."""

SMALL = 2**13
"""Tensors of at most this many values are summed together: a kernel for each would cost more than
copying them. Our choice."""

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
    """The state that a graph was built from: weights and buffers, options of the loss, the batch.

    The weights and buffers are those of the model and of the loss. None is copied. The comparison
    runs before every product, so the things that it compares are listed beforehand.
    """

    def __init__(self, model: nn.Module, loss_fn: Any, batch: Any) -> None:
        self._sources = model, loss_fn, batch
        self._structure = _Structure(model, loss_fn)
        self._of_batch = tensors_in(batch)
        # A tuple of tensors keeps its tensors; lists and dicts may be given others.
        is_fixed = type(batch) is tuple and all(isinstance(entry, Tensor) for entry in batch)
        self._may_be_refilled = not is_fixed
        self._tensors = [*self._structure.tensors(), *self._of_batch]
        self._addresses = _addresses(self._tensors)
        self._contents = _Contents(self._tensors)
        self._numbers = self._contents.numbers()

    def is_current(self) -> bool:
        """Return whether nothing has changed since the snapshot was made or renewed."""
        if not self._structure.is_unchanged():
            return False
        if self._may_be_refilled and not _are_same(tensors_in(self._sources[2]), self._of_batch):
            return False
        if _addresses(self._tensors) != self._addresses:
            return False
        # The host waits for the device: the alternative is a product at outdated weights.
        return self._contents.numbers() == self._numbers

    def renew(self) -> None:
        """Read addresses, versions and attributes again: a forward pass may have changed them."""
        model, loss_fn, _ = self._sources
        self._structure = _Structure(model, loss_fn)
        self._tensors = [*self._structure.tensors(), *self._of_batch]
        self._addresses = _addresses(self._tensors)

    def has_values_of(self, other: "Snapshot") -> bool:
        """Return whether another snapshot shows the same modules, and equal values in equal
        layouts.
        """
        layouts = [address[-1] for address in self._addresses]  # wherever the tensors lie
        return (
            layouts == [address[-1] for address in other._addresses]
            and self._structure.equals(other._structure)
            and self._numbers == other._numbers
        )


def fingerprint(batch: Any) -> float:
    """Return a number that differs between batches of different content."""
    numbers = _Contents(tensors_in(batch)).numbers()
    return float(zlib.crc32(repr(numbers).encode()))


class _Structure:
    """The content of a model's and a loss's modules: tensors, modules, hooks, plain attributes."""

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        modules = _all_modules(model)
        if isinstance(loss_fn, nn.Module):
            modules += _all_modules(loss_fn)
        named = [vars(module) for module in modules]
        if isinstance(loss_fn, partial):
            named.append(loss_fn.keywords)
        self._tables = [held[key] for held in named for key in _TABLES if held.get(key) is not None]
        self._entries = [entry for table in self._tables for entry in table.values()]
        plain = [
            (held, key, value)
            for held in named
            for key, value in held.items()
            if isinstance(value, _PLAIN) and key not in _FLAGS
        ]
        self._keys = [(held, key) for held, key, _ in plain]
        self._values = [value for _, _, value in plain]
        # A module's plain tensors are compared by identity only; those of a partial are options of
        # the loss, and their values are compared.
        self._further: list[Tensor] = []
        if isinstance(loss_fn, partial):
            self._further = tensors_in(loss_fn.keywords)

    def is_unchanged(self) -> bool:
        """Return whether nothing was replaced, added or removed, whatever values tensors have."""
        entries = [entry for table in self._tables for entry in table.values()]
        if not _are_same(entries, self._entries):
            return False
        now = [held.get(key) for held, key in self._keys]
        return _are_same(now, self._values) or all(map(_is_same, now, self._values))

    def equals(self, other: "_Structure") -> bool:
        """Return whether another structure holds the same objects and equal plain values."""
        if not _are_same(self._entries, other._entries) or len(self._values) != len(other._values):
            return False
        keys = [key for _, key in self._keys] == [key for _, key in other._keys]
        return keys and all(map(_is_same, self._values, other._values))

    def tensors(self) -> list[Tensor]:
        """Return weights and buffers, and the tensors that a partial passes to the loss."""
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
        # NumPy where possible: between two products a call of torch costs several times as much.
        self._arrays: list[tuple[Any, Any]] = []
        self._loose: list[Tensor] = []  # no view in one dimension: copied each time
        for tensor in tensors:
            for strided in _strided_tensors(tensor):
                flat = _flat_view(strided)
                if flat is None:
                    self._loose.append(strided)
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
            numbers: list[float | int] = [row.dot(weights).item() for row, weights in self._arrays]
        for index, number in enumerate(numbers):
            if not math.isfinite(number):  # one such value would hide all others
                array = torch.from_numpy(self._arrays[index][0])
                numbers[index] = int(_sum(*_as_integers([array])))
        if self._summed or self._loose:
            numbers += self._numbers_of_torch()
        return numbers

    def _numbers_of_torch(self) -> list[float | int]:
        with torch.no_grad():
            loose = [c for t in self._loose for c in torch.split(t.reshape(-1), CHUNK)]
            summed = self._summed + [([chunk], _weights_of([chunk])) for chunk in loose]
            numbers = _on_the_host([_sum(group, weights) for group, weights in summed])
            for index, number in enumerate(numbers):
                if not math.isfinite(number):
                    numbers[index] = int(_sum(*_as_integers(summed[index][0])))
        return numbers


def _weights_of(group: list[Tensor]) -> Tensor:
    """Return a weight for each value of some tensors of one type, the same in every process."""
    kind = group[0].dtype
    dtype = torch.int64
    if kind in (torch.float64, torch.complex128):
        dtype = torch.float64
    elif kind in _FLOATS:
        dtype = torch.float32
    length = sum(tensor.numel() for tensor in group)
    if kind.is_complex:
        length *= 2
    return _table(dtype, group[0].device, length.bit_length())[:length]


@cache
def _table(dtype: torch.dtype, device: torch.device, bits: int) -> Tensor:
    # Lengths are powers of two, so that a few tables serve all models.
    positions = torch.arange(1, 2**bits + 1, device="cpu")
    if dtype == torch.int64:
        return (positions * _ODD).to(device)
    return ((positions.double() * _GOLDEN).frac() + 0.5).to(device, dtype)


def _sum(group: list[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum of the values of some tensors of one type, joined in one row."""
    values = group[0]
    if len(group) > 1:
        values = torch.cat(group)
    if values.dtype != weights.dtype:
        if values.is_complex():
            values = torch.view_as_real(values).reshape(-1)
        elif values.is_floating_point() and not weights.is_floating_point():
            values = values.view(torch.uint8)  # 8-bit floats, which are summed by their bits
        values = values.to(weights.dtype)
    if values.device.type == "cpu" or weights.is_floating_point():
        return torch.dot(values, weights)
    return (values * weights).sum()


def _as_integers(group: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the bits of floating-point values as integers, and the weights of these."""
    row = torch.cat(group)
    if row.is_complex():
        row = torch.view_as_real(row).reshape(-1)
    bits = [row.contiguous().view(torch.uint8)]
    return bits, _weights_of(bits)


def _on_the_host(numbers: list[Tensor]) -> list[float | int]:
    """Return the numbers on the host, moved in one transfer for each type and device."""
    if all(number.device.type == "cpu" for number in numbers):
        return [number.item() for number in numbers]
    kinds: dict[Any, list[int]] = {}
    for index, number in enumerate(numbers):
        kinds.setdefault((number.dtype, number.device), []).append(index)
    on_host: dict[int, float | int] = {}
    for indices in kinds.values():
        values = torch.stack([numbers[index] for index in indices]).tolist()
        on_host.update(zip(indices, values, strict=True))
    return [on_host[index] for index in range(len(numbers))]


def _all_modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules, shared ones repeatedly: `modules()` would cost more than all checks."""
    modules = [model]
    for module in modules:  # the list grows while it is read
        if module._modules:
            modules += [child for child in module._modules.values() if child is not None]
    return modules


def _addresses(tensors: list[Tensor]) -> list[Any]:
    """Return for each tensor where it lies, its version, whether it has a gradient, its layout."""
    try:
        return [(t.data_ptr(), t._version, t.requires_grad, t.stride()) for t in tensors]
    # Sparse tensors have no such address, and those made in inference mode no version.
    except RuntimeError:
        return [_address(t) for t in tensors]


def _address(tensor: Tensor) -> Any:
    version = -1
    if not tensor.is_inference():
        version = tensor._version
    if tensor.layout != torch.strided:
        return id(tensor), version, tensor.requires_grad, tensor.layout
    return tensor.data_ptr(), version, tensor.requires_grad, tensor.stride()


def _strided_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the ordinary tensors that hold a tensor's values; none if they cannot be reached."""
    if type(tensor) not in (Tensor, nn.Parameter):
        if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of tensors made of others
            inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            return [strided for held in inner for strided in _strided_tensors(held)]
        tensor = tensor.as_subclass(Tensor)
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested:
        return [tensor]
    return []


def _flat_view(tensor: Tensor) -> Tensor | None:
    """Return a view of all values in memory order, shape [numel]; None if there are gaps."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    in_order = tensor.detach().permute(order)
    if not in_order.is_contiguous():
        return None
    return in_order.view(-1)
