"""The measurements of a run: the probe of the curvature, and what is measured after every epoch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from hessianflow.adversarial import InputCurvature, RobustnessWatch
from hessianflow.choices import scaled_eps
from hessianflow.config import RunConfig
from hessianflow.curvature import CurvatureProbe, HessianOperator, top_eigenpairs
from hessianflow.curvature.edge import ProbeOperator
from hessianflow.curvature.probe import GRADIENTS_PER_PRODUCT
from hessianflow.interfaces import Batch, EpochMeasurement, LinearOperator
from hessianflow.methods import KINDS, find
from hessianflow.parts import Parts, resolved_precision
from hessianflow.training.progressive import ProgressiveResize

FLOAT32_PER_16_BIT = 1.7
"""Cost of a gradient in float32, in gradients under 16-bit autocast; measured with ResNet-20 on an
AMD EPYC with bf16 units."""
FIRST_SHARE = 0.25
"""Share of the cost of the whole training that the first reading may take. This default is our
choice: a first reading has no known price, and could take most of a short run on few images."""
FEWEST_PRODUCTS = 5
"""Fewest products that the first reading is made with. This default is our choice."""
WATCHED_EPS = 0.005
"""Size of the attacks of the overfitting alarm if the adversary has none: the default of FGSM."""
WATCHED_EXAMPLES = 256
"""Test examples that the overfitting alarm attacks. This default is our choice."""
INPUT_CURVATURE_EXAMPLES = 16
"""Test examples that the curvature by the inputs is measured on. This default is our choice."""
MOST_PRODUCTS = 60
"""Most products that one eigenvalue by the inputs may take. This default is our choice."""


def build_probe(
    config: RunConfig,
    parts: Parts,
    transform: ProgressiveResize | None = None,
    operator: Callable[..., ProbeOperator] = HessianOperator,
    optimizer: Optimizer | None = None,
) -> CurvatureProbe | None:
    """Return a probe on a fixed, un-augmented sample of the training set, or None if it is off.

    The sample has the resolution that training is at. With an optimizer the probe measures the
    sharpness that its steps meet, unless the controller decides by the Hessian itself.
    """
    if config.curvature == "off":
        return None
    kind = KINDS["controller"]
    if getattr(find(kind, config.controller.name, kind.name), "reads_hessian", False):
        optimizer = None
    count = min(config.probe_examples, parts.train.num_examples)
    batch: Batch = parts.train.sample(count, config.seed)
    sample: Batch | Callable[[], Batch] = batch
    if transform is not None:
        sample = partial(transform.at_hand, batch)
    return CurvatureProbe(
        parts.model,
        nn.CrossEntropyLoss(),
        sample,
        tol=config.probe_tolerance,
        budget=_budget(config),
        first_matvecs=first_products(config, count, parts.train.num_examples),
        norm_mode=config.norm_mode,
        check_statistics=config.norm_statistics == "settled",
        seed=config.seed,
        operator=operator,
        optimizer=optimizer,
    )


def first_products(config: RunConfig, probe_examples: int, train_examples: int) -> int | None:
    """Return the most products that the first reading may take, whose price is not known yet.

    They cost at most FIRST_SHARE of the whole training. It is 0 if that leaves too few for a
    reading, and None without a budget.
    """
    budget = _budget(config)
    if budget is None:
        return None
    examples = config.epochs * train_examples * max(budget, FIRST_SHARE)
    products = int((examples / probe_examples - 1) / GRADIENTS_PER_PRODUCT)
    if products < FEWEST_PRODUCTS:
        return 0
    return products


def _budget(config: RunConfig) -> float | None:
    """Return the budget in the units of the probe: gradients in the precision of the products."""
    if config.curvature_budget is None or resolved_precision(config) == "float32":
        return config.curvature_budget
    return config.curvature_budget / FLOAT32_PER_16_BIT


def _alarm_eps(config: RunConfig) -> Any:
    """Return the size of the attacks of the overfitting alarm: by default the adversary's."""
    if config.alarm_eps is not None:
        return config.alarm_eps
    attack = config.adversary.options.get("attack", config.adversary)
    return attack.options.get("eps", WATCHED_EPS)


def build_measurements(config: RunConfig, parts: Parts) -> list[EpochMeasurement]:
    """Return the measurements that follow every epoch, on the first test examples."""
    measurements: list[EpochMeasurement] = []
    if config.overfitting_alarm:
        eps = scaled_eps(_alarm_eps(config), torch.tensor(parts.spread))
        limits = parts.train.value_range
        batch = parts.first_tests(WATCHED_EXAMPLES)
        measurements.append(
            RobustnessWatch(parts.model, batch, eps, value_range=limits, seed=config.seed)
        )
    if config.input_curvature:
        batch = parts.first_tests(INPUT_CURVATURE_EXAMPLES)

        def solve(operator: LinearOperator) -> dict[str, float]:
            result = top_eigenpairs(
                operator, tol=config.probe_tolerance, max_matvecs=MOST_PRODUCTS, seed=config.seed
            )
            return {
                "eigenvalue": float(result.values[0]),
                "residual": float(result.residuals[0]),
                "matvecs": result.matvecs,
            }

        measurements.append(InputCurvature(parts.model, batch, solve))
    return measurements
