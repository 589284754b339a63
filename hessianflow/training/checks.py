"""What must hold before a run can start."""

from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from hessianflow.interfaces import (
    Adversary,
    BatchController,
    GradientObserver,
    HessianFlowError,
    ResizableBatches,
    World,
)
from hessianflow.training.optimizers import check_optimizer


def check_data(train_data: object) -> None:
    """Refuse training data that cannot change their batch size.

    Raises:
        HessianFlowError: with what to wrap them in.
    """
    if not isinstance(train_data, ResizableBatches):
        raise HessianFlowError(
            f"train_data must be batches whose size can change, got a {type(train_data).__name__}: use "
            "hf.data.DeviceBatches(inputs, targets, batch_size) or hf.data.AdaptiveBatches(dataset, batch_size)"
        )


LOOP_SIGNALS = frozenset({"train_loss", "epoch_loss", "learning_rate"})
"""What the training loop itself can tell a controller; all else is a probe's or an observer's."""


def check_signals(controller: BatchController | None, has_probe: bool, has_observers: bool, num_examples: int) -> None:
    """Refuse a controller that cannot work here.

    Raises:
        HessianFlowError: it needs eigenvalues and there is no probe, or other signals and there is no observer; its
            largest batch exceeds the data.
    """
    if controller is None:
        return
    observed = sorted(controller.needs - LOOP_SIGNALS - {"eigenvalue"})
    if observed and not has_observers:
        raise HessianFlowError(
            f"{type(controller).__name__} decides by {', '.join(observed)}: pass observers=[...] that measure them, "
            "such as hf.optim.GradientMoments() (with accumulate=True for gradient_sum_sq)"
        )
    if "eigenvalue" in controller.needs and not has_probe:
        raise HessianFlowError(
            f"{type(controller).__name__} decides by the top eigenvalue: pass "
            "probe=hf.curvature.CurvatureProbe(model, loss_fn, train_data.sample(128))"
        )
    cap = getattr(controller, "max_batch_size", None)
    if cap is not None and cap > num_examples:
        raise HessianFlowError(f"max_batch_size {cap} is larger than the {num_examples} training examples")


def check_run(model: nn.Module, optimizer: Optimizer, batch_size: int, num_examples: int, epochs: int) -> None:
    """Refuse a run that cannot train.

    Raises:
        HessianFlowError: no trainable parameter, an optimizer of another model, no epochs, or a batch size outside
            1 to `num_examples`.
    """
    check_optimizer(optimizer)
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise HessianFlowError("the model has lazy layers: run it once on a batch before training it")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained:
        raise HessianFlowError("the model has no trainable parameter: nothing to train")
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise HessianFlowError("the optimizer holds no trainable parameter of the model: build it from this model")
    if epochs < 1:
        raise HessianFlowError(f"epochs must be at least 1, got {epochs}")
    if not 1 <= batch_size <= num_examples:
        raise HessianFlowError(f"batch size {batch_size} must lie between 1 and the {num_examples} training examples")


def must_pair(model: nn.Module, world: World, microbatch_size: object) -> bool:
    """Whether layers exchange statistics in every forward pass (SyncBatchNorm), so that all ranks must make the same.

    Raises:
        HessianFlowError: they cannot run on this device, or microbatches that ranks may cut differently.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    if not layers or world.world_size == 1:
        return False
    if isinstance(microbatch_size, int):
        raise HessianFlowError(
            f"microbatch_size {microbatch_size} may cut the parts of ranks differently, and SyncBatchNorm would wait: "
            "leave it out, each part is one pass then"
        )
    if next(model.parameters()).device.type == "cpu":
        raise HessianFlowError("torch's SyncBatchNorm runs on GPUs only, this model is on the cpu: use norm_batch_size")
    return True


def join_parts(world: World, observers: Sequence[GradientObserver], adversary: Adversary | None) -> None:
    """Tell the parts that work on one rank's examples which of how many ranks this is, if they have a `join(reducer)`.

    Raises:
        HessianFlowError: on several ranks, an observer that has none: its figures would be those of one; or twins made
            ahead of time, which are held for later steps as one rank's share.
    """
    if world.world_size > 1 and adversary is not None and adversary.staleness > 0:
        raise HessianFlowError(
            f"staleness {adversary.staleness} holds batches of one process: use staleness 0 on {world.world_size} ranks"
        )
    for part in (*observers, adversary):
        join = getattr(part, "join", None)
        if join is not None:
            join(world)
        elif part is not adversary and world.world_size > 1:
            raise HessianFlowError(
                f"{type(part).__name__} sees the gradients of one rank only: give it a join(reducer) and let it add up "
                f"over ranks in on_step, or train with one process instead of {world.world_size}"
            )


def tell_parameters(observers: Sequence[GradientObserver], parameters: Sequence[nn.Parameter]) -> None:
    """Tell the observers that have a `watch(parameters)` whose gradients they will be shown, and in which order."""
    for observer in observers:
        watch = getattr(observer, "watch", None)
        if watch is not None:
            watch(parameters)
