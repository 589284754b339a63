"""Attacks as training plug-ins: they perturb a share of every optimization batch
(:class:`interfaces.Adversary`).

ABSA (arXiv 1810.01021) trains on FGSM examples in place of the clean ones, labels unchanged. Its
reference implementation attacks with cross-entropy whatever is trained on, and clamps to the
extremes of the attacked slice; here the loss is given, and the range is the valid one.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial.attacks import (
    FAST_RANDOM_STEP,
    ascend,
    attacking,
    check_gradient,
    random_deltas,
    resolve_step,
)
from hessianflow.adversarial.budget import (
    Norm,
    PerChannel,
    ValueRange,
    check_in_range,
    check_one_tensor,
    make_budget,
    place,
)
from hessianflow.adversarial.mixing import ABSA_SHARE, check_share, perturbed_rows
from hessianflow.batches import take_rows
from hessianflow.checks import check_callable, check_choice, check_count
from hessianflow.interfaces import Exposure, HessianFlowError, LossFn, NormMode, Pending, Reducer

ABSA_EPS = 0.005
"""Perturbation of ABSA's reference implementation, for inputs in [0, 1] that are not normalised."""

CHECKED_CALL = 3
"""The call at which the gradient is checked once: by then a last layer that began at zero lets it
through. Ours."""


class PGD:
    """Projected gradient ascent on a share of each batch, as :func:`attacks.pgd` makes it.

    Random starts come from `seed` and the number of calls so far, so a resumed run repeats them on
    any device, and they do not depend on the microbatch size. On several ranks (`join`) each has
    random starts of its own.

    Args:
        eps: radius of the ball around the inputs, one number or one per channel, in the units of
            the inputs (of pixels in [0, 1] on the command). Default: ABSA's.
        share: of each batch that is attacked, in [0, 1], before a controller's factor (0.2 in
            ABSA's published code).
        value_range: (smallest, largest) valid value; None: do not clamp.
        steps: gradient steps.
        relative_step: size of a step in units of eps; None: 2.5 / steps, enough to reach the far
            side of the ball.
        norm: of the ball: l_inf bounds every component, l_2 the length of delta / eps.
        loss_fn: the loss to raise.
        random_start: start at a random point of the ball (Madry et al., arXiv:1706.06083).
        norm_mode: statistics of batch normalisation during the attack: eval: the running ones;
            batch: those of what is attacked. Neither moves the running ones.
        seed: of the random starts.

    Raises:
        HessianFlowError: as :func:`attacks.pgd`.
    """

    staleness: int = 0  # made with the weights that are trained next,
    attacks_late: bool = True  # at the use of the batch

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
        """Draw the random starts of this rank from now on."""
        self._reducer = reducer

    def perturb(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Any,
        share: float,
        microbatch_size: int | None = None,
    ) -> Tensor:
        """Return a copy of `inputs` in which floor(len * share) rows, spread evenly, are attacked;
        the very tensor at 0.

        Args:
            microbatch_size: most rows attacked in one forward pass; None: all at once.

        Raises:
            HessianFlowError: a share outside [0, 1], inputs that are not one tensor of floating
                point numbers, inputs outside the valid range (first call), a loss that does not
                depend on the inputs, a microbatch_size below 1.
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
        """:meth:`perturb`, at once."""
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
        """Return the perturbed inputs in place of the clean ones, labels unchanged."""
        return Exposure((adversarial, targets))

    def state_dict(self) -> dict[str, Any]:
        """Return where the random starts stand."""
        return {"seed": self._seed, "calls": self._calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the random starts of a stored run."""
        self._seed, self._calls = int(state["seed"]), int(state["calls"])

    def _attack(self, model: nn.Module, x: Tensor, y: Any, size: int) -> Tensor:
        budget = place(self._budget, x)
        if self._calls == 0:
            check_in_range(budget, x)
        # Drawn for all rows at once: the same whatever the microbatch size.
        start = random_deltas(budget, x, self._generator(x.device)) if self._random_start else None
        self._calls += 1
        perturbed = torch.empty_like(x)
        with attacking(model, self._norm_mode) as frozen:
            if self._calls == CHECKED_CALL:
                check_gradient(
                    frozen, x[:size], take_rows(y, slice(size), len(x), "targets"), self._loss_fn
                )
            for first in range(0, len(x), size):
                part = slice(first, first + size)
                perturbed[part] = ascend(
                    frozen,
                    x[part],
                    take_rows(y, part, len(x), "targets"),
                    budget,
                    self._loss_fn,
                    steps=self._steps,
                    step=self._step,
                    start=None if start is None else start[part],
                )
        return perturbed

    def _generator(self, device: torch.device) -> torch.Generator:
        # Hashed, so that neighbouring seeds do not share streams one call apart.
        rank = (
            f":{self._reducer.rank}" if self._reducer is not None and self._reducer.rank > 0 else ""
        )
        digest = hashlib.blake2b(
            f"{self._seed}:{self._calls}{rank}".encode(), digest_size=8
        ).digest()
        return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little"))


class FGSM(PGD):
    """One signed step on a share of each batch, as :func:`attacks.fgsm` makes it.

    Args:
        eps: largest change of a component, one number or one per channel, in the units of the
            inputs (of pixels in [0, 1] on the command). Default: ABSA's.
        share: of each batch that is attacked, in [0, 1], before a controller's factor (0.2 in
            ABSA's published code).
        value_range: (smallest, largest) valid value; None: do not clamp.
        loss_fn: the loss to raise.
        random_start: start at a random point of the ball, step 1.25 eps and project back (Wong et
            al., arXiv:2001.03994).
        norm_mode: statistics of batch normalisation during the attack: eval: the running ones;
            batch: those of what is attacked. Neither moves the running ones.
        seed: of the random starts.

    Raises:
        HessianFlowError: as :func:`attacks.fgsm`.
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
            relative_step=FAST_RANDOM_STEP if random_start else 1.0,
            loss_fn=loss_fn,
            random_start=random_start,
            norm_mode=norm_mode,
            seed=seed,
        )
