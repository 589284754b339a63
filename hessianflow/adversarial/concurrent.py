"""ConAdv: concurrent attack and training, through adversarial examples from older weights.

Liu, Chen, Cheng, Hsieh, You, "Concurrent adversarial learning for large-batch training", arXiv
2106.00221, algorithm 1. With staleness tau, step t trains on batch t and on its twin made with
theta_{t-tau}, while batch t + tau is attacked at theta_t. The loss is the mean over the clean
examples plus the mean over their twins (a sum of two means). Staleness 0 is the synchronous method.

The paper's text leaves some choices open. The first tau batches have no twin: they are trained on
clean examples (`first="clean"`) or attacked when they are used (`first="synchronous"`). With split
batch normalisation the attack goes through the adversarial set by default. A change of the batch
size drains the queue: batches already drawn are used as they are, so each keeps its twin and the
change arrives tau steps later. A share below 1 makes twins of that share of the rows, and the loss
becomes mean over the clean rows + share x mean over the twins, so that every row counts alike.

The trainer holds the queue and calls `attack` and `expose` (`interfaces.Adversary`). Clean rows and
twins go through the network in separate microbatches. For a user's own training loop that queue is
`hf.training.Ahead`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
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
    """Train on each batch and on its adversarial twins, made `staleness` steps before their use.

    Args:
        attack: Attack that makes the twins, such as `FGSM(eps, value_range=(0, 1))`. Its own share
            is ignored.
        share: Share of each batch that gets a twin, in [0, 1], before the factor of the controller
            (1 in the paper).
        staleness: Steps between attack and use. With 0 each batch is attacked when it is used. The
            default is our choice, as the smallest concurrent value.
        first: Use of the first `staleness` batches, which have no twin. clean trains on them as
            they are, and synchronous attacks them when they are used. The default is our choice.
        attack_set: Set of batch normalisation, in a model that splits it, through which the attack
            goes.
        combine: Combination of the two mean losses. sum is that of the paper, and average keeps the
            scale of the gradient.
        microbatch_size: Most rows attacked in one forward pass, unless the trainer sets its own
            microbatch size; null stands for all rows.
        runner: Place where the attacks run; null stands for interleaved, which runs each at once.
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
        self._runner: AttackRunner = runner or Interleaved()
        self._latest: Pending | None = None

    @property
    def staleness(self) -> int:
        """Return the steps between attack and use."""
        return self._staleness

    @property
    def attacks_late(self) -> bool:
        """Return whether a batch without a twin is attacked when it is used."""
        return self._staleness == 0 or self._first == "synchronous"

    def attack(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        share: float,
        microbatch_size: int | None = None,
    ) -> Pending:
        """Start to make twins of `share` of the rows, spread evenly, with the present weights.

        Raises:
            HessianFlowError: The share is outside [0, 1], or the inputs or targets are not one
                tensor.
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
        """Return clean rows and twins, the latter in the adversarial set of a split model."""
        mode: Callable[[], AbstractContextManager[Any]] = nullcontext
        if is_split(model):
            mode = partial(clean_rows, model, 0)
        twins = (adversarial, targets[_chosen(inputs, share)])
        return Exposure((inputs, targets), twins, mode, self._average)

    def state_dict(self) -> dict[str, Any]:
        """Wait for the attack under way, then return the state of the attack."""
        self._settle()
        return {"adversary": self._adversary.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._settle()
        self._adversary.load_state_dict(state["adversary"])

    def _settle(self) -> None:
        """Wait for the attack under way, which may advance the attack's random starts."""
        if self._latest is not None:
            with suppress(Exception):  # the error is raised where the twins are used
                self._latest()
        self._latest = None


def _chosen(inputs: Tensor, share: float) -> Tensor | slice:
    """Return the rows that get a twin, as a slice if all do, so that nothing is copied."""
    if share == 1:
        return slice(None)
    return perturbed_rows(len(inputs), share, inputs.device)
