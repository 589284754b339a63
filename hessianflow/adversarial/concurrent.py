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

The trainer holds the queue and calls `attack` and `expose` (`interfaces.Adversary`); clean rows and
twins go through the network in microbatches of their own. In a training loop of one's own that
queue is `hf.training.Ahead`.
"""

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from hessianflow.adversarial.budget import check_one_tensor
from hessianflow.adversarial.mixing import check_share, perturbed_rows
from hessianflow.adversarial.runners import AttackRunner, AttackSet, Interleaved, TwinAttack
from hessianflow.checks import check_choice, check_count
from hessianflow.interfaces import Exposure, HessianFlowError, InputAttack, Pending
from hessianflow.normalisation.split import clean_rows, is_split

First = Literal["clean", "synchronous"]
Combine = Literal["sum", "average"]


class ConcurrentAdversary:
    """Trains on each batch and on its adversarial twins, made `staleness` steps before their use.

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
            of the gradient.
        microbatch_size: most rows attacked in one forward pass; None: all, or what the trainer
            says.
        runner: where attacks run; None: :class:`~hessianflow.adversarial.runners.Interleaved`.

    Raises:
        HessianFlowError: a staleness that is no whole number >= 0, or another argument that is not
            what it must be.
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
        if not isinstance(attack, InputAttack):
            raise HessianFlowError(
                f"attack must make the twins, such as FGSM(...), got a {type(attack).__name__}"
            )
        if runner is not None and not isinstance(runner, AttackRunner):
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
        self._latest: Pending | None = None

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
    ) -> Pending:
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

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the adversary that makes the twins; waits for the attack under
        way."""
        self._settle()
        return {"adversary": self._adversary.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._settle()
        self._adversary.load_state_dict(state["adversary"])

    def _settle(self) -> None:
        """Wait for the attack under way, at whose end its runner may move the adversary's random
        starts on."""
        if self._latest is not None:
            with suppress(Exception):  # told to whoever asks for the twins
                self._latest()
        self._latest = None


def _chosen(inputs: Tensor, share: float) -> Tensor | slice:
    """Return the rows that get a twin; all of them without a copy."""
    return slice(None) if share == 1 else perturbed_rows(len(inputs), share, inputs.device)
