"""The base of all optimizers here, which makes copies and pickles whole."""

from typing import Any

from torch.optim.optimizer import Optimizer


class CopyableOptimizer(Optimizer):
    """An optimizer that keeps its own attributes when it is copied or pickled.

    torch keeps only defaults, state and groups, so that a copy would fail at its next step.
    """

    def __getstate__(self) -> dict[str, Any]:
        own = {
            name: value
            for name, value in vars(self).items()
            # A schedule replaces the step by a function bound to the original.
            if name != "step" and not name.endswith("_hooks")
        }
        return {**own, **super().__getstate__()}
