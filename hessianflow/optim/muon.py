"""Muon: momentum whose every matrix is orthogonalised before it is stepped along.

Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, "Muon: an optimizer for hidden layers in
neural networks", 2024 (kellerjordan.github.io/posts/muon). With G the gradient of a weight matrix
W, m the momentum, lr the rate and wd the decay,

    M = m M + (1 - m) G,     U = (1 - m) G + m M  (Nesterov)  or  M,
    W = (1 - lr wd) W - lr s O(U),     O of :mod:`hessianflow.optim.orthogonalise`.

A convolution [out, in, height, width] is the matrix [out, in * height * width]. The forms are

    form               before the step                  s
    "original"         nothing                          sqrt(max(1, rows / columns))
    "match_rms_adamw"  nothing                          0.2 sqrt(max(rows, columns))
    "renormalised"     W = W sqrt(rows) / |W|_F         1

"original" is the authors' and the default of `torch.optim.Muon`; "match_rms_adamw" that of Liu et
al., arXiv:2502.16982, so that rate and decay of AdamW carry over; "renormalised" that of airbench
(github.com/KellerJordan/cifar10-airbench), for weights that a normalisation follows, whose scale
means nothing and would otherwise decide how far a step turns them. "auto" is "renormalised" for
such weights and "original" for all others.

The groups that :func:`~hessianflow.optim.muon_groups` makes of a model have a "part" each, from
which the rule and the rate of the group follow:

    part            rule                                    rate
    "normalised"    Muon, in the form                       lr
    "unnormalised"  Muon, in the form                       lr * unnormalised_rate (form "auto"), lr
    "rest"          SGD with momentum, or AdamW (`rest`)    lr * rest_rate

A group without a part is of matrices, at `lr` as it stands; "auto" is "original" there. Every group
holds the same `lr`, and the factor beside it as `rate_factor`: whoever sets the rate of all groups,
a schedule or a loop by hand, keeps their ratios.

The defaults, tried on 10,000 images of CIFAR-10 for 24 epochs of 5 updates (batch 2048), one seed,
the rate falling linearly to 0 without a warm-up: ResNet-8 66.7 %, a plain network without
normalisation 63.4 % (63.3 % with the momentum 0.9, and a fifth of the training loss). SGD at batch
128 has 64.0 and 61.5 % in 1896 updates.

Deviations: weight decay is 0 by default (0.1 in torch), and the momentum is 0.6 (0.95 in torch),
which airbench found for large batches of few updates. Outside bfloat16 the iteration runs on small
squares where that is faster.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from hessianflow.checks import check_choice, check_number
from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.checks import (
    CheckedOptimizer,
    check_betas,
    check_flags,
    check_parameters,
)
from hessianflow.optim.foreach import (
    Tensors,
    buckets,
    gradients_of,
    loss_of,
    norms,
    scale_,
    spread,
    state_tensors,
)
from hessianflow.optim.muon_groups import muon_groups
from hessianflow.optim.orthogonalise import orthogonalised
from hessianflow.optim.rest import adamw_step, sgd_step

Form = Literal["auto", "original", "match_rms_adamw", "renormalised"]
Rest = Literal["sgd", "adamw"]
Precision = Literal["auto", "bfloat16", "own"]

Loss = TypeVar("Loss")

REST_RATE: Mapping[str, float] = {"sgd": 0.4, "adamw": 0.0125}
"""Rates of the rest in units of Muon's: 0.1 and 0.003 at the rate 0.24 of renormalised weights."""
_OPTIONS = {
    "sgd": {"momentum"},
    "adamw": {"betas", "eps"},
    "original": {"momentum", "nesterov", "precision"},  # of every form
}


_MATRICES = ("matrices", "normalised", "unnormalised")
"""Parts that are for Muon; "matrices" are those of groups without a part."""


class Muon(CheckedOptimizer):
    """Muon for matrices and convolutions, with SGD or AdamW for everything else in one object.

    Args:
        params: Groups of :func:`~hessianflow.optim.muon_groups`; or parameters, or groups of them,
            that are all matrices or convolutions. `momentum`, `weight_decay`, `nesterov` and
            `precision` may differ by group.
        lr: Learning rate. With groups of a model and the form "auto" it is that of renormalised
            weights, and 0.24 is a good one.
        momentum: Momentum m of matrices (0.6, as in airbench).
        weight_decay: Decay wd of matrices, decoupled from the gradient.
        nesterov: Step along gradient and momentum together, as `torch.optim.Muon` does.
        form: Scale s of a step: "original" sqrt(max(1, rows / columns)), "match_rms_adamw" 0.2
            sqrt(max(rows, columns)), "renormalised" 1 after the matrix is given the norm
            sqrt(rows). "auto": the last if a normalisation follows the weights, else the first.
        unnormalised_rate: Rate of matrices that no normalisation follows, in units of `lr`, with
            the form "auto" (1/8: 0.03 at 0.24).
        rest: Optimizer of parameters that are not for Muon.
        rest_rate: Rate of the rest in units of `lr`. None stands for 0.4 for SGD (0.1 at 0.24) and
            0.0125 for AdamW, but for 1 for AdamW in the form "match_rms_adamw".
        rest_momentum: Momentum of SGD for the rest.
        rest_decay: Weight decay of the rest, coupled (SGD) or decoupled (AdamW).
        betas: Decay rates of the moments of AdamW for the rest.
        eps: Number added to the root of its second moment.
        precision: Type in which matrices are orthogonalised. "auto" is bfloat16 on a GPU, as in
            `torch.optim.Muon`, and "own" on other devices, where that is faster. "own" is the type
            of the parameter, but float32 for parameters of half precision.

    Raises:
        HessianFlowError: An option is out of its bounds, a group is empty, or a parameter is
            complex, sparse, or, outside the rest, a vector.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = Muon(muon_groups(model), lr=0.24)
        >>> [(group["part"], group["rate_factor"]) for group in optimizer.param_groups]
        [('unnormalised', 0.125), ('rest', 0.4)]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.6,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        form: Form = "auto",
        unnormalised_rate: float = 0.125,
        rest: Rest = "sgd",
        rest_rate: float | None = None,
        rest_momentum: float = 0.9,
        rest_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        precision: Precision = "auto",
    ) -> None:
        check_choice("form", form, get_args(Form))
        check_choice("rest", rest, get_args(Rest))
        if rest_rate is None:
            rest_rate = _rest_rate(form, rest)
        check_number("unnormalised_rate", unnormalised_rate)
        _check_rest(rest_rate, rest_momentum, rest_decay, betas, eps)
        matrices = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "precision": precision,
        }
        others: dict[str, Any] = {"rule": rest, "rate_factor": rest_rate}
        if rest == "sgd":
            others |= {"momentum": rest_momentum, "weight_decay": rest_decay}
        else:
            others |= {"betas": betas, "eps": eps, "weight_decay": rest_decay}
        self._of_part = {**_of_matrices(form, unnormalised_rate, matrices), "rest": others}
        super().__init__(params, {"lr": lr, "rate_factor": 1.0, "part": "matrices"})
        for group in self.param_groups:
            if group["part"] != "rest":
                _check_matrices(group["params"])

    @staticmethod
    def groups_of(model: nn.Module) -> list[dict[str, Any]]:
        """Return the parameters of a model as the groups that a run gives this optimizer."""
        return muon_groups(model)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own options, checked like the constructor's.

        A "part" of "normalised", "unnormalised" or "rest" decides the options that are not given.
        """
        part = param_group.get("part", "matrices")
        check_choice("part", part, tuple(self._of_part))
        super().add_param_group({**self._of_part[part], **param_group})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_of_part": self._of_part}

    def _check(self, group: dict[str, Any]) -> None:
        check_parameters(group["params"], "Muon")
        check_choice("rule", group["rule"], (*get_args(Form)[1:], *get_args(Rest)))
        missing = _OPTIONS.get(group["rule"], _OPTIONS["original"]) - group.keys()
        if missing:
            raise HessianFlowError(
                f"a group with the rule {group['rule']!r} needs {', '.join(sorted(missing))}, too"
            )
        for name in ("lr", "rate_factor", "weight_decay"):
            check_number(name, group[name])
        if group["rule"] == "adamw":
            check_betas(group["betas"])
            check_number("eps", group["eps"])
            return
        check_number("momentum", group["momentum"], below=1)
        if group["rule"] != "sgd":
            check_flags(group, "nesterov")
            check_choice("precision", group["precision"], get_args(Precision))

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Loss] | None = None
    ) -> Loss | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Function that computes the gradients and returns the loss.

        Raises:
            HessianFlowError: The closure returned None, a gradient is sparse, a parameter changed
                its shape, or one that was added as a matrix is none.
        """
        loss: Loss | None = loss_of(closure)
        for group in self.param_groups:
            for params in buckets(group["params"], "Muon").values():
                if group["rule"] == "sgd":
                    sgd_step(self.state, group, params)
                elif group["rule"] == "adamw":
                    adamw_step(self.state, group, params)
                else:
                    self._step_matrices(group, params)
        return loss

    def _step_matrices(self, group: dict[str, Any], params: Tensors) -> None:
        """Take the step of Muon on matrices of one type and device."""
        _check_matrices(params)
        rate = group["lr"] * group["rate_factor"]
        grads = gradients_of(params)
        direction: Tensors = state_tensors(self.state, params, "momentum_buffer")
        torch._foreach_lerp_(direction, grads, 1 - group["momentum"])
        if group["nesterov"]:
            direction = torch._foreach_lerp(grads, direction, group["momentum"])
        if group["rule"] == "renormalised" and rate:
            _renormalise_(params)
        if group["weight_decay"]:
            scale_(params, 1 - rate * group["weight_decay"])
        found = orthogonalised(
            [each.flatten(1) for each in direction], _dtype(params[0], group["precision"])
        )
        alike: dict[float, list[int]] = {}
        for index, each in enumerate(found):
            alike.setdefault(_scale(group["rule"], *each.shape), []).append(index)
        for scale, members in alike.items():
            own = [params[index] for index in members]
            steps = [found[index].reshape(params[index].shape) for index in members]
            torch._foreach_add_(own, steps, alpha=-rate * scale)


def _of_matrices(
    form: Form, unnormalised_rate: float, options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return what groups of matrices have, by part, unless they say otherwise themselves."""
    if form != "auto":
        return {part: {"rule": form, **options} for part in _MATRICES}
    original = {"rule": "original", **options}
    return {
        "matrices": original,
        "normalised": {**original, "rule": "renormalised"},
        "unnormalised": {**original, "rate_factor": unnormalised_rate},
    }


def _rest_rate(form: Form, rest: Rest) -> float:
    """Return the default rate of the rest in units of Muon's."""
    if rest == "adamw" and form == "match_rms_adamw":
        return 1.0
    return REST_RATE[rest]


def _check_rest(
    rest_rate: float, rest_momentum: float, rest_decay: float, betas: Any, eps: float
) -> None:
    """Refuse an option of the rest that is out of its bounds, by its own name."""
    check_number("rest_rate", rest_rate)
    check_number("rest_momentum", rest_momentum, below=1)
    check_number("rest_decay", rest_decay)
    check_number("eps", eps)
    check_betas(betas)


def _check_matrices(params: Tensors) -> None:
    for number, parameter in enumerate(params):
        if parameter.ndim < 2 or parameter.numel() == 0:
            raise HessianFlowError(
                f"Muon updates matrices and convolutions, but number {number} has the shape"
                f" {[*parameter.shape]}: build it as Muon(hf.optim.muon_groups(model), lr=...),"
                " which leaves vectors to SGD or AdamW"
            )


def _renormalise_(params: Tensors) -> None:
    """Give every matrix the norm sqrt(rows), but leave zeros as they are."""
    roots = [math.sqrt(len(p)) for p in params]
    lengths = torch.stack(torch._foreach_div(norms(params).unbind(), roots))
    factors = torch.where(lengths > 0, lengths.reciprocal(), 1.0)
    torch._foreach_mul_(params, spread(factors, params))


def _dtype(parameter: Tensor, precision: Precision) -> torch.dtype:
    """Return the type in which to orthogonalise."""
    if precision == "bfloat16" or (precision == "auto" and parameter.is_cuda):
        return torch.bfloat16
    if parameter.dtype == torch.float64:
        return torch.float64
    return torch.float32


def _scale(rule: str, rows: int, columns: int) -> float:
    """Return the factor s of the step of a matrix."""
    if rule == "original":
        return math.sqrt(max(1, rows / columns))
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return 1.0
