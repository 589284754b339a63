"""Goes back to the newest checkpoint that can be put back, on all ranks alike."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import HessianFlowError, World
from hessianflow.measuring import unwrap
from hessianflow.runs import checkpoints
from hessianflow.runs.names import CHECKPOINTS
from hessianflow.runs.optimizer_states import OtherGroupsError, check_optimizer, in_order, keeping_options
from hessianflow.runs.states import (
    check_finite,
    check_training_state,
    model_fault,
    restoring,
)
from hessianflow.training.model_state import group_names
from hessianflow.training.optimizers import label
from hessianflow.training.world import on_all_ranks, on_first_rank


def restore_newest(
    world: World,
    run_dir: Path,
    history_bytes: Callable[[], int],
    put_back: Callable[[Mapping[str, Any], str], None],
    model: nn.Module,
    optimizer: Optimizer,
) -> tuple[dict[str, Any], str | None]:
    """Put back `last.pt`, or an older checkpoint where that is damaged; then `last.pt` is set aside.

    Rank 0 reads, for the others need not see its disk.

    Args:
        world: the ranks.
        run_dir: the run directory.
        history_bytes: tells the length of the history.
        put_back: given a state and its name for errors.
        model: what the weights are for.
        optimizer: what its state is for.

    Returns:
        The state that was put back, and a warning when it was an older one.

    Raises:
        HessianFlowError: no checkpoint can be put back; what is wrong with the newest.
    """
    folder = run_dir / CHECKPOINTS
    source = f"the checkpoint in {run_dir}"
    refused: dict[str, str] = {}

    def damage_of(state: Mapping[str, Any]) -> str | None:
        try:
            with restoring(source), keeping_options(optimizer):
                put_back(state, source)
        except HessianFlowError as error:  # damage, or another run: then the older ones are refused alike
            return str(error)
        return None

    def check(state: Mapping[str, Any]) -> None:
        _check_fits(state, model, optimizer)

    def attempt() -> tuple[dict[str, Any], str, str | None]:
        return checkpoints.load_newest(folder, history_bytes(), check, refused)

    while True:
        state, name, warning = on_first_rank(world, attempt)
        damages = world.gather(on_all_ranks(world, partial(damage_of, state)))
        damage = next((one for one in damages if one is not None), None)
        if damage is None:
            break
        refused[name] = damage
    if warning is not None:
        on_first_rank(world, lambda: checkpoints.set_aside(folder))
    return state, warning


def _check_fits(state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse the state of a checkpoint that is damaged, or of another model.

    Raises:
        HessianFlowError: which entry.
    """
    check_training_state(state)
    inner = unwrap(model)
    own = inner.state_dict()
    # Names may differ where buffers come with the first pass: whoever puts them back sees to that.
    shared = {name: value for name, value in state["model"].items() if name in own}
    fault = model_fault(inner, {**own, **shared})
    if fault is not None:
        raise HessianFlowError(f"it is of another model: {fault}")
    check_finite(inner, shared)
    if state["optimizer_class"] in (label(optimizer), type(optimizer).__name__):
        try:
            saved = in_order(state["optimizer"], state.get("groups", []), group_names(inner, optimizer))
        except OtherGroupsError:
            return  # of another run, which whoever puts it back says
        check_optimizer(optimizer, saved)
