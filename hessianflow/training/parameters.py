"""Which parameters are trained, read from the model and the optimizer before every step.

Between two steps, layers may be frozen or unfrozen and parameter groups added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not

from torch import nn
from torch.optim import Optimizer

from hessianflow.measuring import unwrap

SHOWN = 3
"""Most names in a message. This default is our choice."""


@dataclass(frozen=True)
class Change:
    """The parameters that are trained from now on and no longer, and a message for the record."""

    added: Sequence[nn.Parameter]
    removed: Sequence[nn.Parameter]
    message: str


class TrainedParameters:
    """The model's trainable parameters, then those that only the optimizer holds, such as a loss's.

    `current` are those as of the last :meth:`ask`. The optimizer's groups are read again each time;
    a module added to the model later is noticed when they change.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = unwrap(model)
        self._optimizer = optimizer
        self._held_by_optimizer = self._of_optimizer()
        self._all = self._known()
        self.current = [p for p in self._all if p.requires_grad]

    def ask(self) -> Change | None:
        """Return the change since the last call; None: there is none. Never wait for the device."""
        held = self._of_optimizer()
        if len(held) != len(self._held_by_optimizer) or any(
            map(is_not, held, self._held_by_optimizer)
        ):
            self._held_by_optimizer = held
            self._all = self._known()
        trained = [p for p in self._all if p.requires_grad]
        if len(trained) == len(self.current) and not any(map(is_not, trained, self.current)):
            return None
        before = self.current
        self.current = trained
        return self._change(before, trained)

    def _of_optimizer(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _known(self) -> list[nn.Parameter]:
        return list(dict.fromkeys([*self._model.parameters(), *self._held_by_optimizer]))

    def _change(self, before: Sequence[nn.Parameter], after: Sequence[nn.Parameter]) -> Change:
        added = _without(after, before)
        removed = _without(before, after)
        strangers = _without(added, self._held_by_optimizer)
        kinds = {
            "trained from now on": added,
            "no longer trained": removed,
            "in no group of the optimizer, which does not move it": strangers,
        }
        parts = [f"{kind}: {self._names(members)}" for kind, members in kinds.items() if members]
        return Change(added, removed, "; ".join(parts))

    def _names(self, parameters: Sequence[nn.Parameter]) -> str:
        names = ", ".join(name_of(self._model, p) for p in parameters[:SHOWN])
        left = len(parameters) - SHOWN
        if left > 0:
            names = f"{names} and {left} more"
        return names


def _without(
    parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    known = set(others)
    return [p for p in parameters if p not in known]


def name_of(model: nn.Module, parameter: nn.Parameter) -> str:
    """Return the name of a parameter in the model, or its shape where it is outside the model."""
    for name, own in unwrap(model).named_parameters():
        if own is parameter:
            return name
    return f"a parameter of shape {[*parameter.shape]} outside the model"
