"""Refuses settings that contradict each other; each error names the options and the way out."""

import math
from typing import Any

from hessianflow.interfaces import HessianFlowError
from hessianflow.presets import ADAPTIVE


def check_together(config: Any) -> None:
    """Refuse settings that contradict each other, resolved or not.

    Args:
        config: an object with all settings; None stands for one that is open.

    Raises:
        HessianFlowError: naming the options.
    """
    _check_sizes(config)
    _check_controller(config)


def check_resolved(config: Any) -> None:
    """Refuse resolved settings that contradict each other.

    Raises:
        HessianFlowError: naming the options.
    """
    if config.controller == "critical" and config.edge_share and config.norm_mode == "eval":
        raise HessianFlowError(
            "--norm-mode eval measures another function than the one trained, whose edge critical"
            " seeks: leave it out, or switch that bound off with --edge-share 0"
        )
    if config.controller == "critical" and config.edge_share and config.lr_rule is not None:
        raise HessianFlowError(
            f"--lr-rule {config.lr_rule} would replace the rate that critical finds stable: leave"
            " it out, or switch that bound off with --edge-share 0"
        )
    if config.max_lr_factor is not None and config.lr_rule is None:
        raise HessianFlowError(f"--max-lr-factor {config.max_lr_factor:g} needs --lr-rule")


def _check_sizes(config: Any) -> None:
    if (
        config.batch_size is not None
        and config.max_batch_size is not None
        and config.max_batch_size < config.batch_size
    ):
        raise HessianFlowError(
            f"--max-batch-size {config.max_batch_size} is below --batch-size {config.batch_size}:"
            " raise the cap"
        )
    largest = max((size for _, size in config.stages or ()), default=0)
    if config.max_batch_size is not None and largest > config.max_batch_size:
        raise HessianFlowError(
            f"--stages reach {largest}, above --max-batch-size {config.max_batch_size}: raise it"
        )
    if config.milestones is not None and list(config.milestones) != sorted(set(config.milestones)):
        raise HessianFlowError(
            f"--milestones must be increasing epochs, got {list(config.milestones)}"
        )
    if (
        config.image_size is not None
        and config.resolutions
        and config.resolutions[-1] != config.image_size
    ):
        raise HessianFlowError(
            f"--resolutions must end with --image-size {config.image_size}, got"
            f" {list(config.resolutions)}"
        )


def _check_controller(config: Any) -> None:
    if config.controller in ("absa", "abs", "critical") and config.curvature == "off":
        raise HessianFlowError(
            f"--controller {config.controller} needs curvature: use --curvature epoch or needed"
        )
    if config.controller == "critical" and config.edge_share == config.loss_power == 0:
        raise HessianFlowError(
            "--edge-share and --loss-power must not both be 0: nothing would bound the growth"
        )
    if config.controller == "timed" and config.schedule == "cooldown":
        raise HessianFlowError(
            "--controller timed decays by itself: use --decay-from without --schedule cooldown"
        )
    if config.schedule == "cooldown" and (config.decay_from or 0) >= (config.epochs or math.inf):
        raise HessianFlowError(
            f"--decay-from {config.decay_from:g} must lie below --epochs {config.epochs}"
        )
    if config.controller == "grow-instead-of-decay":
        if config.schedule not in (None, "constant"):
            raise HessianFlowError(
                f"--controller {config.controller} replaces --schedule {config.schedule}: leave"
                " it out"
            )
        if not 0 < config.lr_decay < 1:
            raise HessianFlowError(
                f"--lr-decay must lie between 0 and 1 here, got {config.lr_decay}"
            )
    if (
        config.max_lr_factor is not None
        and config.lr_rule is None
        and config.optimizer not in ADAPTIVE
    ):
        raise HessianFlowError(f"--max-lr-factor {config.max_lr_factor:g} needs --lr-rule")
