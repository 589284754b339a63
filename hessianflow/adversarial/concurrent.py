"""ConAdv: adversarial examples from weights a few steps old, so that attack and training run at the
same time.

Liu, Chen, Cheng, Hsieh, You, "Concurrent adversarial learning for large-batch training", arXiv
2106.00221, algorithm 1. With staleness tau, step t trains on batch t and its twin made with
theta_{t-tau}, while batch t + tau is attacked at theta_t; the loss is the mean over the clean
examples plus the mean over their twins (a sum of two means). Staleness 0 is the synchronous method.

Where the paper's text leaves a choice: the first tau batches have no twin and are trained clean
(`first="clean"`) or attacked at the moment they are used (`first="synchronous"`); with split batch
normalisation the attack goes through the adversarial set by default. A change of the batch size
drains the queue: batches already drawn are used as they are, so each keeps its twin and the change
arrives tau steps later. A share below 1 makes twins of that share of the rows, and the sum of two
means becomes mean over the clean rows + share x mean over the twins: every row counts alike.

In a training loop of one's own :meth:`ConcurrentAdversary.pairs` holds the queue and
:func:`pair_loss` makes one concatenated forward pass. In `AdaptiveBatchTrainer` the trainer holds
the queue and calls `attack` and `expose` (`interfaces.Adversary`); clean rows and twins then go
through the network in microbatches of their own.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hessianflow.adversarial.budget import check_one_tensor
from hessianflow.adversarial.mixing import check_share, perturbed_rows
from hessianflow.adversarial.runners import AttackRunner, AttackSet, Interleaved, TwinAttack
from hessianflow.checks import check_choice, check_count
from hessianflow.interfaces import Exposure, HessianFlowError, InputAttack, LossFn
from hessianflow.losses import mean_loss
from hessianflow.normalisation.split import clean_rows, is_split

First = Literal["clean", "synchronous"]
Combine = Literal["sum", "average"]


@dataclass(frozen=True)
class Pair:
    """A clean batch and its adversarial twin.

    Attributes:
        inputs: shape [N, ...], exactly the tensor that was fed.
        targets: shape [N, ...].
        adversarial: shape [N, ...]; None where no twin was prepared (the first steps).
        attacked_at: the step whose weights made the twin; None without one.
        step: the step this pair is for.
    """

    inputs: Tensor
    targets: Tensor
    adversarial: Tensor | None
    attacked_at: int | None
    step: int

    def concatenated(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), clean rows first, then their twins: one forward pass for both."""
        if self.adversarial is None:
            return self.inputs, self.targets
        return torch.cat([self.inputs, self.adversarial]), torch.cat([self.targets, self.targets])


@dataclass(frozen=True)
class PairLoss:
    """Losses of a pair, scalars on the device.

    Attributes:
        total: what to differentiate.
        clean: mean over the clean examples, detached.
        gain: mean loss of the twins minus `clean`, detached; positive unless the twins are too
            stale to be harder. nan without a twin.
    """

    total: Tensor
    clean: Tensor
    gain: Tensor


@dataclass
class _Queued:
    inputs: Tensor
    targets: Tensor
    twin: Callable[[], Tensor] | None = None  # waits for the result
    attacked_at: int | None = None


class ConcurrentAdversary:
    """A queue of batches between the data and the training step, attacked `staleness` steps before
    their use.

    Args:
        attack: makes the twins, such as `FGSM(eps, value_range=(0, 1))`, whose own share is
            not looked at.
        share: of each batch that gets a twin, in [0, 1], before a controller's factor (all of it in
            the paper).
        staleness: steps between attack and use; 0: none. Default (ours): 1, the smallest concurrent
            value.
        first: what to do with the first `staleness` batches, which nobody attacked ahead of time
            (ours: "clean").
        attack_set: batch-normalisation set of a split model that the attack goes through; ignored
            for other models.
        combine: "sum" of the two means, as in the paper, or their "average", which keeps the scale
            of the gradient; for the trainer (:func:`pair_loss` has its own).
        microbatch_size: most rows attacked in one forward pass; None: all, or what the trainer
            says.
        runner: where attacks run; None: :class:`~hessianflow.adversarial.runners.Interleaved`.

    Raises:
        HessianFlowError: a staleness that is no whole number >= 0, or another argument that is not
            what it must be.

    Example:
        >>> from hessianflow.adversarial import FGSM
        >>> ahead = ConcurrentAdversary(FGSM(0.1, value_range=None), staleness=1)
        >>> batches = [(torch.zeros(2, 3), torch.tensor([0, 1])) for _ in range(3)]
        >>> [(pair.step, pair.attacked_at) for pair in ahead.pairs(nn.Linear(3, 2), batches)]
        [(0, None), (1, 0), (2, 1)]
    """

    def __init__(
        self,
        attack: InputAttack,
        *,
        share: float = 1.0,
        staleness: int = 1,
        first: First = "clean",
        attack_set: AttackSet = "adversarial",
        combine: Combine = "sum",
        microbatch_size: int | None = None,
        runner: AttackRunner | None = None,
    ) -> None:
        check_count("staleness", staleness, 0)
        check_choice("first", first, get_args(First))
        check_choice("attack_set", attack_set, get_args(AttackSet))
        check_choice("combine", combine, get_args(Combine))
        check_count("microbatch_size", microbatch_size, none="all rows at once")
        if not hasattr(attack, "perturb"):
            raise HessianFlowError(
                f"attack must make the twins, such as FGSM(...), got a {type(attack).__name__}"
            )
        if runner is not None and not hasattr(runner, "submit"):
            raise HessianFlowError(
                f"runner must run attacks, such as SecondStream(), got a {type(runner).__name__}"
            )
        self.share = check_share(share)
        self._adversary = attack
        self._staleness = staleness
        self._first = first
        self._attack_set: AttackSet = attack_set
        self._average = combine == "average"
        self._microbatch_size = microbatch_size
        self._runner: AttackRunner = Interleaved() if runner is None else runner
        self._queue: deque[_Queued] = deque()
        self._step = 0
        self._latest: Callable[[], Tensor] | None = None

    @property
    def staleness(self) -> int:
        """Steps between attack and use."""
        return self._staleness

    @property
    def attacks_late(self) -> bool:
        """Whether a batch without a twin is attacked at its use: always without staleness, else as
        `first` says."""
        return self._staleness == 0 or self._first == "synchronous"

    def attack(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        share: float,
        microbatch_size: int | None = None,
    ) -> Callable[[], Tensor]:
        """Start to make the twins of `share` of the rows, spread evenly, with the weights of now.

        Raises:
            HessianFlowError: a share outside [0, 1]; inputs or targets that are not one tensor
                each.
        """
        check_one_tensor(inputs)
        check_one_tensor(targets, "targets", "to have adversarial twins")
        rows = _chosen(inputs, share)
        size = microbatch_size or self._microbatch_size
        self._latest = self._runner.submit(
            model, TwinAttack(self._adversary, inputs[rows], targets[rows], size, self._attack_set)
        )
        return self._latest

    def expose(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, adversarial: Tensor, share: float
    ) -> Exposure:
        """Clean rows and twins; these through the adversarial set where the model is split."""
        mode = partial(clean_rows, model, 0) if is_split(model) else nullcontext
        twins = (adversarial, targets[_chosen(inputs, share)])
        return Exposure((inputs, targets), twins, mode, self._average)

    def pairs(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Pair]:
        """One pair a batch, in order, for a whole run; step the optimizer between two pairs.

        Batches are drawn `staleness` ahead. Chain the epochs into one iterable, so that the queue
        crosses their ends.

        Raises:
            HessianFlowError: the run is not longer than `staleness`, so that no twin made ahead
                would ever be used.
        """
        for batch in batches:
            if len(self._queue) < self._staleness:
                self.prime(*batch)
            else:
                yield self.step(model, *batch)
        if self._step == 0 and self._staleness > 0:
            raise HessianFlowError(
                f"staleness must be smaller than the number of steps, got {self._staleness} for a"
                f" run of {len(self._queue)} steps"
            )
        yield from self.drain(model)

    def prime(self, inputs: Tensor, targets: Tensor) -> None:
        """Queue one of the first `staleness` batches, which is not attacked ahead of time.

        Raises:
            HessianFlowError: the queue is full already.
        """
        if len(self._queue) >= self._staleness:
            raise HessianFlowError(
                f"the queue of {self._staleness} batches is full: use step(model, inputs, targets)"
                " from now on"
            )
        self._queue.append(_Queued(inputs, targets))

    def step(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Pair:
        """Start the attack on the batch of `staleness` steps ahead with the weights of now; hand
        out that of now.

        Call it before the optimizer changes the weights.

        Raises:
            HessianFlowError: fewer than `staleness` batches are queued.
        """
        if len(self._queue) < self._staleness:
            raise HessianFlowError(
                f"staleness {self._staleness} needs as many batches queued, got {len(self._queue)}:"
                " call prime first"
            )
        ahead = _Queued(inputs, targets)
        self._attack(model, ahead)
        self._queue.append(ahead)
        return self._take(model)

    def drain(self, model: nn.Module) -> Iterator[Pair]:
        """The pairs left in the queue at the end of a run; nothing new is attacked ahead."""
        while self._queue:
            yield self._take(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the queued batches with their twins (waits for attacks under way), the step, and
        the adversary's state."""
        self._settle()
        queue = [
            {
                "inputs": entry.inputs,
                "targets": entry.targets,
                "adversarial": None if entry.twin is None else entry.twin(),
                "attacked_at": entry.attacked_at,
            }
            for entry in self._queue
        ]
        return {"step": self._step, "queue": queue, "adversary": self._adversary.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the data must go on with the batch after the last one
        queued."""
        self._settle()
        self._step = int(state["step"])
        self._adversary.load_state_dict(state["adversary"])
        self._queue = deque(
            _Queued(e["inputs"], e["targets"], _ready(e["adversarial"]), e["attacked_at"])
            for e in state["queue"]
        )

    def _settle(self) -> None:
        """Wait for the attack under way, at whose end its runner may move the adversary's random
        starts on."""
        if self._latest is not None:
            with suppress(Exception):  # told to whoever asks for the twins
                self._latest()
        self._latest = None

    def _take(self, model: nn.Module) -> Pair:
        entry = self._queue.popleft()
        if entry.twin is None and self._first == "synchronous":
            self._attack(model, entry)
        twin = None if entry.twin is None else entry.twin()
        pair = Pair(entry.inputs, entry.targets, twin, entry.attacked_at, self._step)
        self._step += 1
        return pair

    def _attack(self, model: nn.Module, entry: _Queued) -> None:
        entry.twin = self.attack(model, entry.inputs, entry.targets, 1.0)
        entry.attacked_at = self._step


def pair_loss(
    model: nn.Module, pair: Pair, loss_fn: LossFn, *, combine: Combine = "sum"
) -> PairLoss:
    """Return the loss of a pair from one concatenated forward pass.

    Args:
        model: called in the mode it is in; split batch normalisation is told which rows are clean.
        pair: from :meth:`ConcurrentAdversary.pairs`. Without a twin the clean loss alone is used,
            whatever `combine`.
        loss_fn: a mean over examples (or a sum or a vector: see `LossFn`).
        combine: "sum" of the two means, as in the paper, or their "average", which keeps the scale
            of the gradient.

    Raises:
        HessianFlowError: another way to combine.
    """
    check_choice("combine", combine, get_args(Combine))
    rows = len(pair.inputs)
    inputs, targets = pair.concatenated()
    with clean_rows(model, rows) if is_split(model) else nullcontext():
        outputs = model(inputs)
    clean = mean_loss(loss_fn, outputs[:rows], targets[:rows])
    if pair.adversarial is None:
        return PairLoss(clean, clean.detach(), torch.full_like(clean.detach(), float("nan")))
    adversarial = mean_loss(loss_fn, outputs[rows:], targets[rows:])
    total = clean + adversarial
    gain = (adversarial - clean).detach()
    return PairLoss(total / 2 if combine == "average" else total, clean.detach(), gain)


def _chosen(inputs: Tensor, share: float) -> Tensor | slice:
    """Return the rows that get a twin; all of them without a copy."""
    return slice(None) if share == 1 else perturbed_rows(len(inputs), share, inputs.device)


def _ready(twin: Tensor | None) -> Callable[[], Tensor] | None:
    return None if twin is None else lambda: twin
