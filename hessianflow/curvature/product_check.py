"""When a product is checked by a difference of gradients, and the error where the two disagree."""

from collections.abc import Sequence

from hessianflow.curvature.derivatives import Graph
from hessianflow.curvature.differences import Disagreement
from hessianflow.interfaces import HessianFlowError

CHECK_FROM = 100
"""Number of products beside which the check costs about a percent or less. Ours; a check costs
three to ten gradients of a few examples, in float64."""


class ProductCheck:
    """One check for each operator, made when it is due.

    Args:
        wanted: True: with the first product. False: never. None: with product CHECK_FROM, but with
            the first one where the graph gives reason to doubt.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = wanted
        self._products = 0
        self._foreign: tuple[str, ...] = ()
        self._missing: tuple[int, ...] = ()

    def note(self, graph: Graph, missing: tuple[int, ...]) -> None:
        """Note a graph's reasons for doubt: foreign functions, and selected weights without a
        gradient."""
        self._foreign = graph.foreign or self._foreign
        self._missing = missing or self._missing

    def is_due(self) -> bool:
        """Count a product, and return whether it is the one to be checked."""
        self._products += 1
        if self._wanted is None:
            self._wanted = (
                bool(self._foreign or self._missing) or self._products >= CHECK_FROM or None
            )
        is_due = self._wanted is True
        if is_due:
            self._wanted = False
        return is_due

    def conclude(self, found: Disagreement | None, names: Sequence[str]) -> None:
        """Refuse the operator where the check found a contradiction.

        Raises:
            HessianFlowError: with the place, what to look at, and the way out.
        """
        if found is None:
            return
        place = "" if found.place is None else f" at {names[found.place]}"
        raise HessianFlowError(
            f"a product is {found.share:.1%} off from a difference of gradients{place}:"
            f" {self._causes(names)}; correct it, or pass check_product=False if it is intended"
        )

    def _causes(self, names: Sequence[str]) -> str:
        if self._missing:
            first = names[self._missing[0]]
            others = f", one of {len(self._missing)}," if len(self._missing) > 1 else ""
            return (
                f"{first}{others} has no gradient, but the loss depends on it, as where it is"
                " inside a checkpoint with use_reentrant=True or behind a copy"
            )
        looked_at = f" (look at {', '.join(self._foreign)})" if self._foreign else ""
        return (
            f"a backward is not the derivative of its forward{looked_at}, a hook changes gradients,"
            " or a part of the loss is detached"
        )
