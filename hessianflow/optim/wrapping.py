"""The base of optimizers that compute gradients at other weights, then step another optimizer."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.copying import CopyableOptimizer


class WrappingOptimizer(CopyableOptimizer):
    """An optimizer around another, with the same groups and state; schedulers work on either.

    Raises:
        HessianFlowError: `base` is no optimizer.
    """

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise HessianFlowError(
                f"{type(self).__name__} steps another optimizer, such as torch.optim.SGD(...), got"
                f" {base!r}"
            )
        self.base = base
        super().__init__(base.param_groups, {})
        self._share()

    def with_gradient(self) -> list[Tensor]:
        """Return the parameters that have a gradient."""
        params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        return [parameter for parameter in params if parameter.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimizer."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the base optimizer."""
        self.base.load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state
