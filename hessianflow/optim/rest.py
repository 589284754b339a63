"""Steps of SGD and AdamW by torch's own functions, for what Muon leaves to another optimizer."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hessianflow.optim.foreach import gradients_of, state_tensors

State = dict[Tensor, dict[str, Any]]


def sgd_step(state: State, group: dict[str, Any], params: list[Tensor]) -> None:
    """Step parameters of one type and device by SGD with the options of their group."""
    velocities: list[Tensor | None] = [None] * len(params)
    if group["momentum"]:
        velocities = [*state_tensors(state, params, "momentum_buffer")]
    sgd(
        params,
        gradients_of(params),
        velocities,
        foreach=True,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"] * group["rate_factor"],
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def adamw_step(state: State, group: dict[str, Any], params: list[Tensor]) -> None:
    """Step parameters of one type and device by AdamW with the options of their group."""
    for parameter in params:
        if "step" not in state[parameter]:
            state[parameter]["step"] = torch.zeros((), dtype=torch.float32)
    beta1, beta2 = group["betas"]
    adamw(
        params,
        gradients_of(params),
        state_tensors(state, params, "exp_avg"),
        state_tensors(state, params, "exp_avg_sq"),
        [],
        [state[parameter]["step"] for parameter in params],
        foreach=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"] * group["rate_factor"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
