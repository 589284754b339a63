"""Progressive resolution as a batch transform: images resized on the device, dropout in step.

Lu, Hong, Liu, Wu, "Hybrid dual-batch and cyclic progressive learning for efficient distributed
training", arXiv:2509.26092, part 2. Which resolution when is for the caller to say
(`hessianflow.control.resolution_stages`). The network is the same at every resolution, so it must
pool over whatever size is left at its end; the published code rebuilds it, with the same weights.

Deviation: images are resized with an antialiased bilinear filter after augmentation at full
resolution.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from hessianflow.interfaces import Batch, HessianFlowError, Progress
from hessianflow.interfaces.errors import first_line
from hessianflow.measuring import measuring, unwrap


class Level(Protocol):
    """The settings of one resolution."""

    @property
    def resolution(self) -> int:
        """Height and width in pixels."""

    @property
    def dropout(self) -> float:
        """Probability of dropping a unit."""


class ProgressiveResize:
    """Resizes every batch to the resolution of its epoch, and sets the dropout of that resolution.

    Both happen when a batch is drawn. An adversary with a staleness above 0 draws batches that many
    steps before they are trained on: dropout would change too early, so give levels without dropout
    there.

    Args:
        model: its `torch.nn.Dropout` layers follow the levels; None: no dropout is set.
        level_at: level_at(epochs completed) -> level, a function without a state.

    Attributes:
        level: the level of the last batch.

    Raises:
        HessianFlowError: a dropout above 0 for a model without such a layer; at a batch: images
            that are not square or smaller than the resolution.
    """

    def __init__(self, model: nn.Module | None, level_at: Callable[[int], Level]) -> None:
        self._level_at = level_at
        self._dropouts: list[nn.Dropout] = []
        if model is not None:
            self._dropouts = [m for m in unwrap(model).modules() if isinstance(m, nn.Dropout)]
        self.level = level_at(0)
        if self.level.dropout > 0 and not self._dropouts:
            raise HessianFlowError(
                f"a dropout of {self.level.dropout:g} needs a model with a torch.nn.Dropout layer"
            )

    def __call__(self, inputs: Tensor, targets: Tensor, progress: Progress) -> Batch:
        """Return the batch at the resolution of its epoch."""
        self.level = self._level_at(progress.epoch)
        for layer in self._dropouts:
            layer.p = self.level.dropout
        return resized(inputs, self.level.resolution), targets

    def at_hand(self, batch: Batch) -> Batch:
        """Return another batch, such as a probe's, at the resolution of the last batch."""
        inputs, targets = batch
        return resized(inputs, self.level.resolution), targets


def resized(images: Tensor, resolution: int) -> Tensor:
    """Return square images [N, C, S, S] as [N, C, resolution, resolution]; at S unchanged.

    Images that are not square, or smaller than `resolution`, are refused.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise HessianFlowError(
            f"progressive resolution needs square images, got {height} x {width} pixels"
        )
    if resolution > height:
        raise HessianFlowError(
            f"resolution {resolution} is more than the data can give: they have {height} pixels"
        )
    if resolution == height:
        return images
    size = (resolution, resolution)
    return functional.interpolate(
        images, size, mode="bilinear", antialias=True, align_corners=False
    )


def check_resolutions(model: nn.Module, image: Tensor, resolutions: Iterable[int]) -> None:
    """Refuse a model whose head fixes the resolution, by running one image [1, C, S, S] at each."""
    for resolution in resolutions:
        entered: list[str] = []
        with measuring(model) as inner, torch.no_grad():
            named = [(name, module) for name, module in inner.named_modules() if name]
            hooks = [hook for name, module in named for hook in _watch(name, module, entered)]
            try:
                inner(resized(image, resolution))
            except RuntimeError as error:
                layer = "the model"
                if entered:
                    layer = f"layer {entered[-1]!r} ({inner.get_submodule(entered[-1])})"
                raise HessianFlowError(
                    f"{layer} takes no images of {resolution} pixels: {first_line(error)}; use a"
                    " network that ends in global average pooling, such as resnet20"
                ) from None
            finally:
                for hook in hooks:
                    hook.remove()


def _watch(name: str, module: nn.Module, entered: list[str]) -> Sequence[Any]:
    """Return hooks that keep, in `entered`, the modules whose forward pass has begun, not ended."""

    def enter(*_: object) -> None:
        entered.append(name)

    def leave(*_: object) -> None:
        entered.pop()

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
