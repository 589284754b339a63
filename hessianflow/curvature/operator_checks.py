"""The two checks that an operator makes once: its loss repeats, and a product is right.

A random operator is no matrix, but its products would look so. How a product is compared with a
difference of gradients stands in differences.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hessianflow.curvature.derivatives import Graph
from hessianflow.curvature.differences import Disagreement
from hessianflow.curvature.staleness import Snapshot
from hessianflow.interfaces import HessianFlowError

CHECK_FROM = 100
"""Number of products beside which the check costs about a percent or less. Our choice: a check
costs three to ten gradients of a few examples, in float64."""


class RepeatCheck:
    """Compares each loss with the last one at the same weights and the same batch.

    All products draw the same random numbers, because measuring restores the generators and a kept
    graph keeps its own numbers. Only a second pass within one product shows that a loss is random:
    `wanted` says whether the first one makes it. Losses may differ by the square root of the
    resolution of `dtype`, the type of the vectors.
    """

    def __init__(self, wanted: bool, dtype: torch.dtype) -> None:
        self._wanted = wanted
        self._tolerance = torch.finfo(dtype).eps ** 0.5
        self._last: tuple[Snapshot, float] | None = None

    def is_due(self) -> bool:
        """Return whether to make the second pass now; True at most once."""
        is_due = self._wanted
        self._wanted = False
        return is_due

    def compare(self, snapshot: Snapshot, loss: Tensor) -> None:
        """Raise HessianFlowError if a loss differs from the last one of the same values."""
        value = float(loss)  # one number from the device for each graph that is built
        if self._last is not None and self._last[0].has_values_of(snapshot):
            before = self._last[1]
            if abs(value - before) > self._tolerance * max(abs(value), abs(before)):
                raise HessianFlowError(
                    f"the loss changed from {before:.6g} to {value:.6g} between two products at the"
                    " same weights; switch off dropout and random augmentation in the data or in"
                    " the model's forward"
                )
        self._last = (snapshot, value)

    def forget(self) -> None:
        """Forget the last loss, so that the next one is compared with nothing."""
        self._last = None


class ProductCheck:
    """Decides when the one check of an operator is made.

    With `wanted` True that is the first product, with False none, with None product CHECK_FROM, or
    the first one where the graph gives reason to doubt.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = wanted
        self._products = 0
        self._foreign: tuple[str, ...] = ()
        self._missing: tuple[int, ...] = ()

    def note(self, graph: Graph, missing: tuple[int, ...]) -> None:
        """Note reasons for doubt: foreign functions, and selected weights without a gradient."""
        self._foreign = graph.foreign or self._foreign
        self._missing = missing or self._missing

    def is_due(self) -> bool:
        """Count a product, and return whether it is the one to be checked."""
        self._products += 1
        is_due = self._wanted is True
        if self._wanted is None:
            is_due = bool(self._foreign or self._missing) or self._products >= CHECK_FROM
        if is_due:
            self._wanted = False
        return is_due

    def conclude(self, disagreement: Disagreement | None, names: Sequence[str]) -> None:
        """Raise HessianFlowError for a disagreement, with the parameter, causes and the way out."""
        if disagreement is None:
            return
        where = ""
        if disagreement.position is not None:
            where = f" at {names[disagreement.position]}"
        raise HessianFlowError(
            f"a product is {disagreement.error:.1%} off from a difference of gradients{where}:"
            f" {self._causes(names)}; correct it, or pass check_product=False if it is intended"
        )

    def _causes(self, names: Sequence[str]) -> str:
        if self._missing:
            parameter = names[self._missing[0]]
            if len(self._missing) > 1:
                parameter += f", one of {len(self._missing)},"
            return (
                f"{parameter} has no gradient, but the loss depends on it, as where it is inside a"
                " checkpoint with use_reentrant=True or behind a copy"
            )
        suspects = ""
        if self._foreign:
            suspects = f" (look at {', '.join(self._foreign)})"
        return (
            f"a backward is not the derivative of its forward{suspects}, a hook changes gradients,"
            " or a part of the loss is detached"
        )
