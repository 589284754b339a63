"""Adversaries that attack a share of every optimization batch (:class:`interfaces.Adversary`).

ABSA (arXiv 1810.01021) trains on FGSM examples in place of the clean ones, with unchanged labels.
Its reference implementation always attacks cross-entropy, whatever loss is trained, and clamps to
the extremes of the attacked slice. Here the loss is given, and the range is the valid one.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial.attacks import (
    ascend,
    attacking,
    check_gradient,
    fgsm_step,
    random_point,
    resolve_step,
)
from hessianflow.adversarial.budget import (
    Norm,
    PerChannel,
    ValueRange,
    broadcast_to,
    check_in_range,
    check_one_tensor,
    make_budget,
)
from hessianflow.adversarial.mixing import ABSA_SHARE, check_share, perturbed_rows
from hessianflow.batches import take_rows
from hessianflow.checks import check_callable, check_choice, check_count
from hessianflow.interfaces import Exposure, HessianFlowError, LossFn, NormMode, Pending, Reducer

ABSA_EPS = 0.005
"""Perturbation of ABSA's reference implementation, for inputs in [0, 1] that are not normalised."""
CHECKED_CALL = 3
"""Number of the call at which the gradient is checked. By then a last layer that began at zero lets
it through. This default is our choice."""


class PGD:
    """Attack a share of each batch by projected gradient ascent.

    The attack is :func:`attacks.pgd`. Random starts follow from `seed` and the number of calls so
    far, so a resumed run repeats them on any device, and they do not depend on the microbatch size.
    On several ranks (`join`) each rank has random starts of its own.

    Args:
        eps: Radius of the ball around the inputs, one number or one per channel, in the units of
            the inputs, which for the command are pixels in [0, 1] (0.005 in ABSA's published code).
        share: Share of each batch that is attacked, in [0, 1], before the factor of the controller
            (0.2 in ABSA's published code).
        value_range: Smallest and largest valid value of the inputs; null stands for no clamping.
        steps: Gradient steps. This default is our choice.
        relative_step: Size of a step in units of eps; null stands for 2.5 / steps, which suffices
            to reach the far side of the ball. This default is our choice.
        norm: Norm of the ball. l_inf bounds every component, and l_2 the length of delta / eps.
        loss_fn: Loss that the attack raises.
        random_start: Start at a random point of the ball (Madry et al., arXiv:1706.06083).
        norm_mode: Statistics of batch normalisation during the attack. eval uses the running ones,
            batch those of the attacked examples; neither updates the running ones.
        seed: Seed of the random starts.

    Raises:
        HessianFlowError: As :func:`attacks.pgd`.
    """

    staleness: int = 0  # the attack uses the weights that are trained next
    attacks_late: bool = True  # and runs when the batch is used

    def __init__(
        self,
        eps: PerChannel = ABSA_EPS,
        *,
        share: float = ABSA_SHARE,
        value_range: ValueRange | None,
        steps: int = 10,
        relative_step: float | None = None,
        norm: Norm = "l_inf",
        loss_fn: LossFn = cross_entropy,
        random_start: bool = True,
        norm_mode: NormMode = "eval",
        seed: int = 0,
    ) -> None:
        check_choice("norm_mode", norm_mode, get_args(NormMode))
        check_callable("loss_fn", loss_fn)
        check_count("seed", seed, 0)
        self.share = check_share(share)
        self._budget = make_budget(eps, value_range, norm)
        self._steps = steps
        self._step = resolve_step(steps, relative_step)
        self._loss_fn = loss_fn
        self._random_start = random_start
        self._norm_mode: NormMode = norm_mode
        self._seed = seed
        self._calls = 0
        self._reducer: Reducer | None = None

    def join(self, reducer: Reducer) -> None:
        """Draw random starts that belong to this rank from now on."""
        self._reducer = reducer

    def perturb(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Any,
        share: float,
        microbatch_size: int | None = None,
    ) -> Tensor:
        """Return a copy of `inputs` in which floor(len * share) rows, spread evenly, are attacked.

        If there is no such row, it returns `inputs` itself. Inputs have the shape [N, ...]; at most
        `microbatch_size` rows are attacked in one forward pass, or all if it is None.

        Raises:
            HessianFlowError: The share is outside [0, 1], the inputs are not one tensor of floating
                point numbers or (first call) outside the valid range, the loss does not depend on
                the inputs, or the microbatch_size is below 1.
        """
        check_one_tensor(inputs)
        if microbatch_size is not None and microbatch_size < 1:
            raise HessianFlowError(f"microbatch_size must be at least 1, got {microbatch_size}")
        rows = perturbed_rows(len(inputs), share, inputs.device)
        if len(rows) == 0:
            return inputs
        result = inputs.detach().clone()
        chosen = take_rows(targets, rows, len(inputs), "targets")
        result[rows] = self._attack(model, result[rows], chosen, microbatch_size or len(rows))
        return result

    def attack(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        share: float,
        microbatch_size: int | None = None,
    ) -> Pending:
        """Run :meth:`perturb` at once and return a callable that gives its result."""
        perturbed = self.perturb(model, inputs, targets, share, microbatch_size)
        return lambda: perturbed

    def expose(
        self,
        model: nn.Module,  # noqa: ARG002
        inputs: Tensor,  # noqa: ARG002
        targets: Tensor,
        adversarial: Tensor,
        share: float,  # noqa: ARG002
    ) -> Exposure:
        """Return the perturbed inputs in place of the clean ones, with unchanged labels."""
        return Exposure((adversarial, targets))

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and the number of calls, which fix the next random start."""
        return {"seed": self._seed, "calls": self._calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the random starts of a stored run."""
        self._seed = int(state["seed"])
        self._calls = int(state["calls"])

    def _attack(self, model: nn.Module, x: Tensor, y: Any, size: int) -> Tensor:
        budget = broadcast_to(self._budget, x)
        if self._calls == 0:
            check_in_range(budget, x)
        start = x
        if self._random_start:
            # Drawn for all rows at once, so that it does not depend on the microbatch size.
            start = random_point(budget, x, self._generator(x.device))
        self._calls += 1
        perturbed = torch.empty_like(x)
        with attacking(model, self._norm_mode) as frozen:
            for first in range(0, len(x), size):
                part = slice(first, first + size)
                targets = take_rows(y, part, len(x), "targets")
                if first == 0 and self._calls == CHECKED_CALL:
                    check_gradient(frozen, x[part], targets, self._loss_fn)
                run = partial(ascend, frozen, x[part], targets, budget, self._loss_fn)
                perturbed[part] = run(steps=self._steps, step=self._step, start=start[part])
        return perturbed

    def _generator(self, device: torch.device) -> torch.Generator:
        name = f"{self._seed}:{self._calls}"
        if self._reducer is not None and self._reducer.rank > 0:
            name += f":{self._reducer.rank}"
        # A hash, so that neighbouring seeds do not share streams one call apart.
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little"))


class FGSM(PGD):
    """Attack a share of each batch by one signed step.

    The attack is :func:`attacks.fgsm`. The arguments that are not described here, and the errors,
    are those of :class:`PGD`.

    Args:
        eps: Largest change of a component, one number or one per channel, in the units of the
            inputs, which for the command are pixels in [0, 1] (0.005 in ABSA's published code).
        random_start: Start at a random point of the ball, step by 1.25 eps and project back (Wong
            et al., arXiv:2001.03994).
    """

    def __init__(
        self,
        eps: PerChannel = ABSA_EPS,
        *,
        share: float = ABSA_SHARE,
        value_range: ValueRange | None,
        loss_fn: LossFn = cross_entropy,
        random_start: bool = False,
        norm_mode: NormMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps,
            share=share,
            value_range=value_range,
            steps=1,
            relative_step=fgsm_step(random_start),
            loss_fn=loss_fn,
            random_start=random_start,
            norm_mode=norm_mode,
            seed=seed,
        )
