"""The refusal of settings that contradict each other; errors name the options and the way out."""

from typing import Any

from hessianflow.interfaces import HessianFlowError

_NOT_ELASTIC = {"adversary": "conadv", "controller": "dual-batch", "on_divergence": "rollback"}
"""Settings that do not work in an elastic run: they keep batches ready, have workers of their own,
or go back to a checkpoint file."""


def check_together(config: Any) -> None:
    """Refuse settings that contradict each other, resolved or not; None stands for an open one."""
    _check_sizes(config)
    _check_resolution(config)
    _check_workers(config)


def check_resolved(config: Any) -> None:
    """Refuse resolved settings that contradict each other."""
    if config.max_lr_factor is not None and config.lr_rule is None:
        raise HessianFlowError(f"--max-lr-factor {config.max_lr_factor:g} needs --lr-rule")
    staleness = config.adversary.options.get("staleness", 0)
    if config.dropouts is not None and staleness > 0:
        raise HessianFlowError(
            "--dropouts needs --adversary.staleness 0: dropout is set when a batch is drawn, which"
            f" is too early with staleness {staleness}"
        )
    sizes = [size for _, size in config.controller.options.get("stages") or ()]
    if max(sizes, default=0) > config.max_batch_size:
        raise HessianFlowError(
            f"--controller.stages reach {max(sizes)}, above --max-batch-size"
            f" {config.max_batch_size}: raise it"
        )


def _check_sizes(config: Any) -> None:
    cap = config.max_batch_size
    if config.batch_size is not None and cap is not None and cap < config.batch_size:
        raise HessianFlowError(
            f"--max-batch-size {cap} is below --batch-size {config.batch_size}: raise the cap"
        )
    side = config.image_size
    if side is not None and config.resolutions and config.resolutions[-1] != side:
        raise HessianFlowError(
            f"--resolutions must end with --image-size {side}, got {list(config.resolutions)}"
        )


def _check_resolution(config: Any) -> None:
    sizes = config.resolutions
    for name in ("resolution_batch_sizes", "dropouts"):
        values = getattr(config, name)
        if values is not None and sizes is not None and len(values) != len(sizes):
            raise HessianFlowError(
                f"--{name.replace('_', '-')} must hold one value for each of the"
                f" {len(sizes)} resolutions, got {len(values)}"
            )
    if sizes is not None and (not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes))):
        raise HessianFlowError(
            f"--resolutions must be one or more increasing sizes in pixels, got {list(sizes)}"
        )
    batches = config.resolution_batch_sizes
    if batches is not None and min(batches, default=0) < 1:
        raise HessianFlowError(f"--resolution-batch-sizes must be 1 or more, got {list(batches)}")
    if config.dropouts is not None and not all(0 <= value < 1 for value in config.dropouts):
        raise HessianFlowError(f"--dropouts must lie in [0, 1), got {list(config.dropouts)}")


def _check_workers(config: Any) -> None:
    low = config.min_workers or 1
    high = config.max_workers or 8
    if low > high:
        raise HessianFlowError(f"--max-workers {high} is below --min-workers {low}: raise it")
    if not config.elastic:
        return
    for name, value in _NOT_ELASTIC.items():
        setting = getattr(config, name)
        if getattr(setting, "name", setting) == value:
            option = name.replace("_", "-")
            raise HessianFlowError(f"--elastic does not go with --{option} {value}: leave one out")
