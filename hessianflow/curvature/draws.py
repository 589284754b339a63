"""Random numbers that depend on the content of each example, not on its position.

Data may come in a different order in every pass, and in batches of any size. The bits of each value
are read as an integer and multiplied by an odd number that depends on its position in the example
and on the seed; the sum, mixed once more, is as good as random. The arithmetic is modulo 2^64,
exact on every device and for every order of summation. Zeros appended as padding change nothing.
"""

from typing import Any

import torch
from torch import Tensor

from hessianflow.structure import tensors_in

_STEPS = (-4658895280553007687, -7723592293110705685)  # of splitmix64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def draws_by_content(batch: Any, examples: int, seed: int) -> Tensor:
    """Return a uniform number in [0, 1) for each example, shape [examples], float64.

    Equal examples get equal numbers.

    Args:
        batch: the batch; only tensors whose first dimension is the number of examples count.
        examples: the number of examples.
        seed: any whole number; each gives another sequence.
    """
    tensors = tensors_in(batch)
    device = tensors[0].device
    seed = seed % 2**63
    total = torch.full((examples,), seed, dtype=torch.int64, device=device)
    for tensor in tensors:
        if tensor.ndim > 0 and len(tensor) == examples:
            total = _mixed(total + _sums(tensor, seed).to(device))
    # The upper 53 bits, as many as a float64 holds.
    return ((total >> 11) & (2**53 - 1)).double() / 2**53


def _sums(tensor: Tensor, seed: int) -> Tensor:
    dense = tensor.detach()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    rows = dense.reshape(len(dense), -1)
    if rows.is_complex():
        rows = torch.view_as_real(rows).reshape(len(rows), -1)
    if rows.is_floating_point():
        rows = rows.contiguous().view(_INTEGERS[rows.element_size()])
    positions = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    odd = _mixed(positions + _mixed(torch.tensor(seed, device=rows.device))) | 1
    sums: Tensor = (rows.to(torch.int64) * odd).sum(dim=1)
    return sums


def _mixed(values: Tensor) -> Tensor:
    """Return integers that look random; each depends on all bits of its value (splitmix64)."""
    for shift, factor in zip((30, 27), _STEPS, strict=True):
        values = (values ^ (_shifted(values, shift))) * factor
    mixed: Tensor = values ^ _shifted(values, 31)
    return mixed


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Return the values shifted right, with zeros coming in from the left."""
    shifted: Tensor = (values >> bits) & (2 ** (64 - bits) - 1)
    return shifted
