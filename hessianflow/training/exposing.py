"""From a batch to what is trained on: attacked some steps ahead, exposed at its step.

The trainer's step uses :func:`expose`. A hand-written loop uses :class:`Ahead`, which is the
trainer's queue, and :func:`exposed_loss`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hessianflow.batches import is_pair, num_examples
from hessianflow.interfaces import (
    UNKNOWN,
    Adversary,
    Batch,
    Decision,
    Exposure,
    HessianFlowError,
    LossFn,
)
from hessianflow.losses import mean_loss
from hessianflow.structure import article
from hessianflow.training.extent import Extent, Position
from hessianflow.training.lookahead import Lookahead, Planned, check_staleness
from hessianflow.training.timing import Stopwatch


def share_in_force(adversary: Adversary | None, decision: Decision) -> float:
    """Return the share of each batch that is attacked under `decision`."""
    if adversary is None:
        return 0.0
    return adversary.share * decision.attack_factor


def expose(
    adversary: Adversary,
    model: nn.Module,
    now: Planned,
    ahead: Planned | None,
    microbatch_size: int | None = None,
) -> Exposure:
    """Return what to train on in place of the batch of `now`.

    The attack on `ahead` is started; one on `now` that was started before is waited for.

    Args:
        adversary: attacks and exposes.
        model: the model with the weights before the step.
        now: the batch of this step.
        ahead: the batch of `staleness` steps later, without staleness `now` itself; None where the
            data have ended.
        microbatch_size: most rows attacked in one forward pass; None: the adversary's own setting.
    """
    if ahead is not None:
        _attack(adversary, model, ahead, microbatch_size)
    if adversary.attacks_late:
        _attack(adversary, model, now, microbatch_size)
    if now.attacked is None:
        return Exposure(now.batch)
    share = share_in_force(adversary, now.decision)
    return adversary.expose(model, *now.batch, now.attacked(), share)


def _attack(
    adversary: Adversary, model: nn.Module, entry: Planned, microbatch_size: int | None
) -> None:
    share = share_in_force(adversary, entry.decision)
    if entry.attacked is None and share > 0 and num_examples(entry.batch) > 0:
        if not is_pair(entry.batch):
            raise HessianFlowError(
                f"{type(adversary).__name__} attacks the inputs of pairs (inputs, targets), got"
                f" {article(entry.batch)}: train on pairs, or without an adversary"
            )
        entry.attacked = adversary.attack(model, *entry.batch, share, microbatch_size)


class Ahead:
    """The trainer's queue between data and step, for a hand-written training loop.

    Iterating gives one :class:`~hessianflow.interfaces.Exposure` a batch, in order; step the
    optimizer between two of them. Batches are drawn `adversary.staleness` steps ahead and attacked
    then. Chain the epochs into one iterable, so that the queue crosses their ends.

    Args:
        batches: pairs (inputs, targets) on the device of the model.
        adversary: attacks its share of each batch.
        model: attacked with the weights that it has when the next exposure is asked for.
        microbatch_size: most rows attacked in one forward pass; None: the adversary's own setting.

    Raises:
        HessianFlowError: (from iterating) the run is not longer than the staleness, so that no
            batch attacked ahead would ever be used; or there is no batch at all.

    Example:
        >>> import torch
        >>> from hessianflow.adversarial import FGSM, ConcurrentAdversary
        >>> adversary = ConcurrentAdversary(FGSM(0.1, value_range=None), staleness=1)
        >>> batches = [(torch.zeros(2, 3), torch.tensor([0, 1])) for _ in range(3)]
        >>> [exposure.twins is not None for exposure in Ahead(batches, adversary, nn.Linear(3, 2))]
        [False, True, True]
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        adversary: Adversary,
        model: nn.Module,
        *,
        microbatch_size: int | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self._adversary = adversary
        self._model = model
        self._microbatch_size = microbatch_size
        data = _OneEpoch(batches)
        depth = adversary.staleness
        self._extent = Extent(UNKNOWN, passes=1)
        watch = Stopwatch(device)
        self._queue = Lookahead(data, self._extent, depth, lambda batch, _: batch, device, watch)
        self._position = Position()

    def __iter__(self) -> Iterator[Exposure]:
        for planned in self._queue.plan(self._now):
            if planned is None:  # The data have ended with the previous batch.
                self._position = self._extent.after_pass(self._position)
                continue
            now, ahead = planned
            if ahead is None and self._position.updates == 0:
                batches = len(self._queue)
                check_staleness(self._queue.depth, 1, Extent(batches, passes=1))
            exposure = expose(self._adversary, self._model, now, ahead, self._microbatch_size)
            self._queue.trained()
            ended = now.data_ended
            self._position = self._extent.after(self._position, now.examples, data_ended=ended)
            yield exposure

    def state_dict(self) -> dict[str, Any]:
        """Return the queued batches with their adversarial inputs, and the adversary's state.

        Waits for attacks under way. Call it between two steps.
        """
        queue = self._queue.state_dict()  # This ends attacks, which change the adversary's state.
        return {
            "queue": queue,
            "position": self._position._asdict(),
            "adversary": self._adversary.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back :meth:`state_dict`; `batches` must continue after the last batch queued."""
        self._queue.load_state_dict(state["queue"])
        self._position = Position(**state["position"])
        self._adversary.load_state_dict(state["adversary"])

    def _now(self) -> tuple[Position, Decision]:
        return self._position, Decision(1)


def exposed_loss(model: nn.Module, exposure: Exposure, loss_fn: LossFn) -> Tensor:
    """Return the loss to differentiate, a scalar on the device.

    With N rows drawn from the data and M twins it is the mean over the former plus M / N times the
    mean over the twins, so that every row has equal weight. With `exposure.average` that is divided
    by 1 + M / N. Clean rows and twins take a forward pass each.

    Args:
        model: called in its current mode.
        exposure: from :class:`Ahead`. If it wants the gradient by its inputs, differentiating the
            loss supplies that.
        loss_fn: a mean over examples (or a sum or a vector: see `LossFn`).
    """
    inputs, targets = exposure.batch
    if exposure.on_input_gradient is not None:
        inputs = inputs.detach().requires_grad_()
        inputs.register_hook(exposure.on_input_gradient)
    clean = mean_loss(loss_fn, model(inputs), targets)
    if exposure.twins is None:
        return clean
    twins, labels = exposure.twins
    with exposure.twin_mode():
        adversarial = mean_loss(loss_fn, model(twins), labels)
    ratio = num_examples(labels) / num_examples(targets)
    total = clean + ratio * adversarial
    if exposure.average:
        total = total / (1 + ratio)
    return total


class _OneEpoch:
    """Presents any batches as a stream of one epoch, whose length is known at its end."""

    num_examples = UNKNOWN
    batch_size = 1

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def set_batch_size(self, batch_size: int) -> None:
        raise NotImplementedError("the batches of a hand-written loop have a fixed size")

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing, because there is no state."""
