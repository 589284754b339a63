"""A whole set of images or features on the device, cut into augmented, normalised batches there.

Images may be stored as uint8. Nothing is copied from host to device while an epoch runs, and a
change of batch size costs nothing: a batch is a range of positions in an order that was drawn for
the whole epoch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hessianflow.data.augment import Augmentation, Draws
from hessianflow.data.streams import ExampleStream
from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article

_VALUE_SCALES = {torch.uint8: 255.0}


class DeviceBatches(ExampleStream):
    """Resumable batches of a set on the device, whose size may change at any time.

    Iterating yields (inputs float [n, C, H, W], targets [n]), where inputs = (pixels / value_scale
    - mean) / std after crop and flip, then cutout. For the order, `batch_size`, `seed` and
    `shuffle` see :class:`~hessianflow.data.streams.ExampleStream`.

    Args:
        images: Images [N, C, H, W], uint8 or floating point. Features [N, C], series [N, C, T] and
            the like can be neither augmented nor laid out in another way.
        targets: N targets, usually int64 class indices [N].
        device: Device that holds the set and the batches.
        augment: Random crop, flip and cutout; None for none of them.
        mean, std: Statistics of every channel (dimension 1), after division by `value_scale`; None
            for 0 and 1.
        value_scale: Pixel value that counts as 1; None for 255 (uint8) or 1 (floating point).
        num_classes: Number of classes; None for one more than the largest target.
        dtype: Type of the inputs.
        channels_last: Memory layout of the inputs; the values are the same.

    Attributes:
        num_classes: Number of classes of integer targets; 0 for floating point ones.
        input_shape: Shape of one example, (C, H, W) for images.

    Raises:
        HessianFlowError: Shapes do not fit together, or an argument is out of range.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        augment: Augmentation | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        value_scale: float | None = None,
        num_classes: int | None = None,
        shuffle: bool = True,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        augment = augment or Augmentation()
        _check_shapes(images, targets, augment, channels_last)
        super().__init__(len(images), batch_size, seed=seed, shuffle=shuffle)
        self.input_shape = tuple(images.shape[1:])
        self._channels_last = channels_last
        self._rows = self._to_rows(images).to(device).contiguous()
        self._targets = targets.to(device)
        self._augment = augment
        self._value_scale = value_scale or _VALUE_SCALES.get(images.dtype, 1.0)
        self._gain, self._shift = _affine(self.input_shape, mean, std, self._value_scale)
        self._row_gain = self._per_entry(self._gain, dtype)
        self._row_shift = self._per_entry(self._shift, dtype)
        self.num_classes = num_classes or 0
        if not num_classes and not targets.is_floating_point():
            self.num_classes = int(targets.max()) + 1
        self._dtype = dtype
        self._plan: tuple[int, Tensor, Draws] | None = None
        self._latest = (torch.zeros(0, dtype=torch.int64, device=self.device), Draws())

    @property
    def device(self) -> torch.device:
        """Return the device that holds the set and its batches."""
        return self._rows.device

    @property
    def value_range(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest valid normalised input of every channel, each [C]."""
        ends = (self._shift, self._value_scale * self._gain + self._shift)
        low, high = (end.flatten().to(self.device, self._dtype) for end in ends)
        return low, high

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._handed_out(self._planned_batch)

    @property
    def latest(self) -> Tensor:
        """Return the indices of the examples of the batch handed out last, int64 [n]."""
        return self._latest[0]

    def as_in_latest(self, maps: Tensor) -> Tensor:
        """Return maps in the frame of the stored images, cropped and flipped like the last batch.

        The maps are [n, C, H, W] of any type; padding of the crop is zero.
        """
        return self._augment.crop_and_flip(maps, self._latest[1])

    def as_stored(self, maps: Tensor) -> Tensor:
        """Undo :meth:`as_in_latest`; pixels that the crop had cut off are zero."""
        undoing = self._latest[1].inverse(self._augment.crop_padding)
        return self._augment.crop_and_flip(maps, undoing)

    def examples(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the examples at `indices` (int64 [n]), not augmented; the stream does not move."""
        return self._batch(indices.to(self.device), Draws())

    def _planned_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        order, draws = self._epoch_plan()
        self._latest = order[start:stop], draws.rows(start, stop)
        return self._batch(*self._latest)

    def _epoch_plan(self) -> tuple[Tensor, Draws]:
        if self._plan is None or self._plan[0] != self._epoch:
            size = self.input_shape[-2:] if self._augment.is_active else (0, 0)
            source = {"seed": self._seed, "epoch": self._epoch}
            draws = self._augment.draw(self._num_examples, *size, **source)
            self._plan = self._epoch, self._order().to(self.device), draws.to(self.device)
        return self._plan[1:]

    def _batch(self, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        step = self.input_shape[0] if self._channels_last else 1
        rows = self._augment.crop_and_flip(self._rows.index_select(0, indices), draws, step)
        rows = rows.to(self._row_gain.dtype).mul_(self._row_gain).add_(self._row_shift)
        rows = self._augment.cut_out(rows, draws, step).to(self._dtype)
        if self._channels_last:
            channels, height, width = self.input_shape
            rows = rows.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return rows, self._targets.index_select(0, indices)

    def _to_rows(self, images: Tensor) -> Tensor:
        """Return images as rows: one plane per channel, or one plane of pixels if channels-last."""
        if not self._channels_last:
            return images
        channels, height, width = self.input_shape
        return images.permute(0, 2, 3, 1).reshape(len(images), 1, height, width * channels)

    def _per_entry(self, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a factor per channel, or per entry of a row if channels-last, on the device."""
        if self._channels_last:
            factors = factors.view(-1).repeat(self.input_shape[2])
        return factors.to(self.device, torch.promote_types(torch.float32, dtype))


def _check_shapes(
    images: Tensor, targets: Tensor, augment: Augmentation, channels_last: bool
) -> None:
    for name, value in (("images", images), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise HessianFlowError(
                f"{name} must be one tensor, got {article(value)}: use torch.as_tensor, or"
                " hf.data.AdaptiveBatches for items of any kind"
            )
    required = ""
    if images.ndim == 0:
        required = "[N, ...]"
    elif images.ndim != 4 and augment.is_active:
        required = "[N, C, H, W] for augment"
    elif images.ndim != 4 and channels_last:
        required = "[N, C, H, W] for channels_last"
    if required:
        raise HessianFlowError(f"images must have shape {required}, got {list(images.shape)}")
    if not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise HessianFlowError(
            f"images must be uint8 or floating point, got {images.dtype}: convert them by .float(),"
            " or use hf.data.AdaptiveBatches for tokens"
        )
    if targets.ndim == 0 or len(targets) != len(images):
        raise HessianFlowError(
            f"targets must be one for each of the {len(images)} images, got {list(targets.shape)}"
        )


def _affine(
    shape: Sequence[int], mean: Sequence[float] | None, std: Sequence[float] | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return gain and shift such that gain * pixel + shift = (pixel / scale - mean) / std.

    Each is float64 and broadcasts over one example: [C, 1, 1] for images.
    """
    channels = shape[0] if shape else 1
    means = mean or [0.0] * channels
    stds = std or [1.0] * channels
    for name, values in (("mean", means), ("std", stds)):
        if len(values) != channels:
            raise HessianFlowError(
                f"{name} must hold one value for each of the {channels} channels, got {len(values)}"
            )
    if min(stds) <= 0 or scale <= 0:
        raise HessianFlowError(f"std and value_scale must be positive, got {[*stds]} and {scale}")
    exact = [(1 / (scale * s), -m / s) for m, s in zip(means, stds, strict=True)]
    gain, shift = torch.tensor(exact, dtype=torch.float64).T
    ones = [1] * (len(shape) - 1)
    return gain.view(-1, *ones), shift.view(-1, *ones)
