"""Readings and decisions during training in a host, in the same way for all hosts."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from hessianflow.control.checks import check_optional_count
from hessianflow.curvature import CurvatureProbe
from hessianflow.data.streams import generator
from hessianflow.distributed import GroupWorld, sharded
from hessianflow.integrations.passes import Passes
from hessianflow.integrations.rate import RateFactor, bare
from hessianflow.interfaces import (
    BatchController,
    CurvatureReading,
    Decision,
    HessianFlowError,
    LossFn,
    Progress,
)
from hessianflow.measuring import generators_kept

BUDGET = 0.01
"""Largest share of the training cost that readings take, apart from the first one. The command has
the same default."""
PROBE_EXAMPLES = 64
"""Examples of the probe batch. The command has the same default."""
KNOWN = frozenset({"eigenvalue", "train_loss", "epoch_loss", "learning_rate"})
"""Signals that every host can give a controller."""


@dataclass(frozen=True)
class Plan:
    """The training that a host has planned.

    Attributes:
        examples_per_pass: Examples of the training set; `sys.maxsize` if unknown.
        examples: Examples of the whole run; `sys.maxsize` if unknown.
        host: Name of the host, for messages.
    """

    examples_per_pass: int
    examples: int
    host: str


@runtime_checkable
class Samples(Protocol):
    """Batches from which a probe batch can be taken."""

    def sample(self, count: int, seed: int = 0) -> Any:
        """Return `count` different examples chosen by `seed` alone."""


class Steering:
    """Measures the curvature and asks a controller, between two steps of a host.

    After every update, the controller is asked whether it is due. Readings are made when it needs
    one, and after every interval, as long as the budget allows. All ranks measure together, and
    rank 0 decides for all.

    Args:
        controller: Any controller of `hf.control`; None only measures.
        every: Examples of an interval, which the controller counts as an epoch. None for one pass
            over the data.

    Attributes:
        decision: The decision in force; None without a controller.
    """

    def __init__(self, controller: BatchController | None, every: int | None) -> None:
        self.controller = controller
        self.every = check_optional_count("every, in examples,", every)
        self.decision: Decision | None = None
        if controller is not None:
            self.decision = controller.decision
        self.rate: RateFactor | None = None
        self.probe: CurvatureProbe | None = None
        self._plan = Plan(sys.maxsize, sys.maxsize, "this host")
        self._intervals = 0
        self._updates = 0
        self._examples = 0
        self._losses = Losses()
        self._probe_state: Mapping[str, Any] | None = None  # until there is a probe

    def start(
        self, plan: Plan, optimizer: Any, probe: CurvatureProbe | None, world: GroupWorld
    ) -> None:
        """Begin, or continue if a state was loaded, with the objects that the host trains.

        Raises:
            HessianFlowError: The controller needs a signal that no host can give, or it needs
                readings and there is no probe.
        """
        self._check_needs(plan.host, probe)
        self._plan = plan
        self._world = world
        self.probe = probe
        self.finish()
        self.rate = RateFactor(bare(optimizer))
        self._take_up()

    def finish(self) -> None:
        """Give the optimizer's rates back to the host."""
        if self.rate is not None:
            self.rate.remove()
            self.rate = None

    def after_update(self, examples: int, loss: Tensor | float | None) -> dict[str, float]:
        """Measure and decide, and return the figures to log, which most updates have none of.

        Args:
            examples: Examples used so far, over all ranks.
            loss: Mean loss of the update on this rank; None if it is not known.
        """
        self._updates += 1
        if loss is not None:
            self._losses.add(loss, examples - self._examples)
        self._examples = examples
        progress = self._progress(examples)
        at_end = progress.epoch > self._intervals
        self._intervals = progress.epoch
        controller = self.controller
        if examples >= self._plan.examples:
            controller = None  # nothing is left that a decision could change
        if controller is not None and not controller.is_due(progress):
            controller = None
        reading = None
        if at_end or (controller is not None and "eigenvalue" in controller.needs):
            reading = self._read(examples)
        figures = _figures(reading)
        if controller is not None:
            figures |= self._decide(controller, progress, reading)
        if at_end:
            self._losses = Losses()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return all state that later readings and decisions depend on."""
        probe = self._probe_state
        if self.probe is not None and probe is None:
            probe = self.probe.state_dict()
        controller = None
        if self.controller is not None:
            controller = self.controller.state_dict()
        return {
            "intervals": self._intervals,
            "updates": self._updates,
            "examples": self._examples,
            "losses": self._losses.state_dict(),
            "controller": controller,
            "probe": probe,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; a probe that :meth:`start` gets later takes its part of it then.

        Raises:
            HessianFlowError: The state was saved without a controller, or with another one.
        """
        if self.controller is not None:
            if state["controller"] is None:
                raise HessianFlowError(
                    "the checkpoint was made without a controller: resume without one, or start a"
                    " new run"
                )
            self.controller.load_state_dict(state["controller"])
            self.decision = self.controller.decision
        self._intervals = state["intervals"]
        self._updates = state["updates"]
        self._examples = state["examples"]
        self._losses = Losses(**state["losses"])
        self._probe_state = state["probe"]
        self._take_up()

    def _take_up(self) -> None:
        """Hand the loaded state to the probe and the rate, once they exist."""
        if self.probe is not None and self._probe_state is not None:
            self.probe.load_state_dict(self._probe_state)
            self._probe_state = None
        if self.rate is not None and self.decision is not None:
            self.rate.factor = self.decision.lr_factor

    def _check_needs(self, host: str, probe: CurvatureProbe | None) -> None:
        if self.controller is None:
            return
        needs = self.controller.needs
        name = type(self.controller).__name__
        missing = sorted(needs - KNOWN)
        if missing:
            raise HessianFlowError(
                f"{name} needs {', '.join(missing)}, which {host} does not give: use"
                " hf.AdaptiveBatchTrainer, or a controller that needs only curvature, loss or"
                " learning rate (ABSA, CriticalBatch, Seesaw, any schedule)"
            )
        if "eigenvalue" in needs and probe is None:
            raise HessianFlowError(f"{name} needs curvature readings: pass a loss_fn to measure")

    def _progress(self, examples: int) -> Progress:
        plan = self._plan
        interval = self.every or plan.examples_per_pass
        return Progress(
            epoch=examples // interval,
            examples=examples,
            updates=self._updates,
            examples_per_epoch=plan.examples_per_pass,
            total_epochs=-(-plan.examples // interval),
        )

    def _read(self, examples: int) -> CurvatureReading | None:
        probe = self.probe
        if probe is None or self.rate is None or not probe.is_affordable(examples):
            return None
        with self.rate.in_force():
            reading: CurvatureReading = self._world.broadcast(probe())
        return reading

    def _decide(
        self, controller: BatchController, progress: Progress, reading: CurvatureReading | None
    ) -> dict[str, float]:
        """Ask the controller, apply its decision, and return it as figures if it has changed."""
        assert self.rate is not None
        rate = self.rate
        available: dict[str, Callable[[], float]] = {"learning_rate": lambda: rate.value}
        if self._losses.examples:
            available["train_loss"] = lambda: float(self._losses.last)
            available["epoch_loss"] = lambda: float(self._losses.total) / self._losses.examples
        signals = {name: available[name]() for name in controller.needs if name in available}
        before = self.decision
        update = controller.update(progress, reading, self._world.broadcast(signals))
        self.decision = after = self._world.broadcast(update)
        rate.factor = after.lr_factor
        if before is not None and after.setting[:2] == before.setting[:2]:
            return {}
        return {"batch/size": float(after.batch_size), "batch/lr_factor": after.lr_factor}


@dataclass
class Losses:
    """The losses of an interval, which stay on the device until a controller asks.

    Attributes:
        last: Mean loss of the last update.
        total: Sum of the losses of all examples.
        examples: Their number.
    """

    last: Tensor | float = 0.0
    total: Tensor | float = 0.0
    examples: int = 0

    def add(self, loss: Tensor | float, examples: int) -> None:
        """Add the mean loss of an update over `examples` examples."""
        if isinstance(loss, Tensor):
            loss = loss.detach()
        self.last = loss
        self.total = self.total + loss * examples
        self.examples += examples

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain numbers, for which the CPU waits for the device."""
        return {"last": float(self.last), "total": float(self.total), "examples": self.examples}


def make_probe(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    optimizer: Optimizer,
    world: GroupWorld,
    controller: BatchController | None,
    options: Mapping[str, Any],
) -> CurvatureProbe:
    """Return the probe of a host's model, with its optimizer unless the controller needs none.

    Several ranks each measure a shard of the batch, which must be the same on all ranks.
    """
    chosen: dict[str, Any] = {"budget": BUDGET, **options}
    if not getattr(controller, "reads_hessian", False):
        chosen.setdefault("optimizer", bare(optimizer))
    if world.world_size > 1:
        chosen.setdefault("operator", sharded(world))
    return CurvatureProbe(model, loss_fn, batch, **chosen)


def check_one_controller(others: list[Any], host: str) -> None:
    """Refuse several parts of a host that each set the batch size.

    Args:
        others: All parts that set the batch size, including the one that checks.
        host: Name of the host, for the message.
    """
    if len(others) > 1:
        names = " and ".join(type(other).__name__ for other in others)
        raise HessianFlowError(f"{names} both set the batch size of this {host}: leave one out")


def _figures(reading: CurvatureReading | None) -> dict[str, float]:
    if reading is None:
        return {}
    figures = {
        "eigenvalue": reading.eigenvalue,
        "converged": float(reading.converged and reading.reliable),
        "products": float(reading.matvecs),
        "seconds": reading.seconds,
        **reading.details,
    }
    return {f"curvature/{name}": value for name, value in figures.items()}


def probe_batch(loader: Any, count: int, seed: int = 0) -> Any:
    """Return `count` examples of a loader's data set, chosen by `seed` alone, as a batch.

    Raises:
        HessianFlowError: The data set has no length or no items by index.
    """
    if isinstance(loader, Passes):
        batches = loader.batches
        if not isinstance(batches, Samples):
            raise HessianFlowError(
                f"no probe batch can be taken from {type(batches).__name__}: pass batch=, with"
                " about 64 examples"
            )
        return batches.sample(min(count, loader.num_examples), seed)
    dataset: Any = getattr(loader, "dataset", None)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise HessianFlowError(
            f"no probe batch can be taken from a {type(dataset).__name__}, which lacks a length or"
            " items by index: pass batch=, with about 64 examples, as the collate function makes it"
        )
    order = torch.randperm(len(dataset), generator=generator(seed, "sample"))
    with generators_kept():
        return loader.collate_fn([dataset[int(index)] for index in order[:count]])
