"""Restores the newest checkpoint that can be restored, the same one on all ranks."""

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
from hessianflow.runs.optimizer_states import (
    OtherGroupsError,
    check_optimizer,
    in_order,
    keeping_options,
)
from hessianflow.runs.states import check_finite, check_training_state, model_fault, restoring
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
    """Restore `last.pt`, or set it aside where it is damaged and restore an older checkpoint.

    Rank 0 reads the files, because the other ranks need not see its disk.

    Args:
        world: the ranks.
        run_dir: the run directory.
        history_bytes: returns the length of the history in bytes.
        put_back: restores a state; called with the state and the name that errors give it.
        model: the model that the saved weights must fit.
        optimizer: the optimizer that the saved state must fit.

    Returns:
        The state that was restored, and a warning when it was not the newest.

    Raises:
        HessianFlowError: no checkpoint can be restored; the message says what is wrong with the
            newest.
    """
    folder = run_dir / CHECKPOINTS
    source = f"the checkpoint in {run_dir}"
    refused: dict[str, str] = {}

    def damage_of(state: Mapping[str, Any]) -> str | None:
        try:
            with restoring(source), keeping_options(optimizer):
                put_back(state, source)
        except HessianFlowError as error:  # Older states of another run will be refused alike.
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
        HessianFlowError: the state does not fit; the message names the entry.
    """
    check_training_state(state)
    inner = unwrap(model)
    own = inner.state_dict()
    # The first forward pass may make buffers; restoring the model handles names that differ.
    shared = {name: value for name, value in state["model"].items() if name in own}
    fault = model_fault(inner, {**own, **shared})
    if fault is not None:
        raise HessianFlowError(f"it is of another model: {fault}")
    check_finite(inner, shared)
    if state["optimizer_class"] == label(optimizer):
        try:
            saved = in_order(state["optimizer"], state["groups"], group_names(inner, optimizer))
        except OtherGroupsError:
            return  # This is the state of another run: restoring it reports that.
        check_optimizer(optimizer, saved)
