"""Random crop, horizontal flip and cutout of a whole batch in one vectorised pass, on any device.

All draws of an epoch are made at once (:meth:`Augmentation.draw`), one row an example, so that what happens to an
example never depends on the batch it falls into.

- crop: pad with zero pixels on all sides, then cut out a window of the original size at a uniform offset
  (He et al., 2015, arXiv:1512.03385, section 4.2: padding 4).
- flip: left to right with probability 1/2.
- cutout: a square around a uniform centre is set to zero after normalisation, clipped at the border
  (DeVries and Taylor, 2017, arXiv:1708.04552).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hessianflow.data.streams import generator
from hessianflow.interfaces import HessianFlowError


@dataclass(frozen=True)
class Draws:
    """Random choices, one row an example; None for what is switched off.

    Attributes:
        offsets: row and column of the crop window in the padded image, int64 [n, 2].
        flips: whether to mirror, bool [n].
        centres: row and column of the cutout, int64 [n, 2].
    """

    offsets: Tensor | None
    flips: Tensor | None
    centres: Tensor | None

    def to(self, device: torch.device) -> "Draws":
        """The same draws on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._present().items()})

    def rows(self, start: int, stop: int) -> "Draws":
        """The draws of examples start..stop-1."""
        return replace(self, **{name: value[start:stop] for name, value in self._present().items()})

    def _present(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Augmentation:
    """What is varied at random. The default varies nothing.

    Attributes:
        crop_padding: pixels of padding for the random crop, 0 for none.
        flip: mirror half of the images.
        cutout: side of the square that is blanked, in pixels, 0 for none.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise HessianFlowError(f"{name} must be at least 0 pixels, got {getattr(self, name)}")

    def draw(self, count: int, height: int, width: int, *, seed: int, epoch: int) -> Draws:
        """All draws for `count` images of this size in one epoch; each kind from a generator of its own."""
        offsets = flips = centres = None
        if self.crop_padding:
            shape, source = (count, 2), generator(seed, "crop", epoch)
            offsets = torch.randint(2 * self.crop_padding + 1, shape, generator=source)
        if self.flip:
            flips = torch.rand(count, generator=generator(seed, "flip", epoch)) < 0.5
        if self.cutout:
            source = generator(seed, "cutout", epoch)
            sides = (torch.randint(side, (count,), generator=source) for side in (height, width))
            centres = torch.stack(list(sides), dim=1)
        return Draws(offsets, flips, centres)

    def crop_and_flip(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop and mirror images [n, C, H, W] of any dtype; a new tensor of the same shape and memory format."""
        n, channels, height, width = images.shape
        columns = _columns(draws, n, width, images.device)
        if columns is None:
            return images
        interleaved = channels > 1 and images.is_contiguous(memory_format=torch.channels_last)
        step = channels if interleaved else 1
        planes = images.permute(0, 2, 3, 1).reshape(n, 1, height, -1) if interleaved else images
        if draws.offsets is not None:
            padding = self.crop_padding
            planes = pad(planes, (padding * step, padding * step, padding, padding))
            planes = _take_rows(planes, draws.offsets[:, 0], height)
        sources = (columns[:, :, None] * step + torch.arange(step, device=images.device)).view(n, 1, 1, -1)
        moved = planes.gather(3, sources.expand(n, planes.shape[1], height, width * step))
        return moved.view(n, height, width, channels).permute(0, 3, 1, 2) if interleaved else moved

    def cut_out(self, images: Tensor, draws: Draws) -> Tensor:
        """Set the drawn squares of normalised images [n, C, H, W] to zero, in place."""
        if draws.centres is None:
            return images
        sides = (torch.arange(side, device=images.device) for side in images.shape[2:])
        firsts = (draws.centres - self.cutout // 2).unbind(1)
        in_rows, in_columns = (
            (side >= first[:, None]) & (side < first[:, None] + self.cutout)
            for side, first in zip(sides, firsts, strict=True)
        )
        return images.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


def _take_rows(images: Tensor, tops: Tensor, height: int) -> Tensor:
    """Rows tops[i] .. tops[i]+height-1 of image i; whole rows are copied, which is what makes it fast."""
    n, channels, padded_height, padded_width = images.shape
    planes = torch.arange(n * channels, device=images.device).view(n, channels, 1) * padded_height
    window = tops[:, None] + torch.arange(height, device=images.device)
    rows = images.reshape(-1, padded_width).index_select(0, (planes + window[:, None, :]).view(-1))
    return rows.view(n, channels, height, padded_width)


def _columns(draws: Draws, n: int, width: int, device: torch.device) -> Tensor | None:
    """Source column of every output column, int64 [n, width]; None where nothing moves."""
    if draws.offsets is None and draws.flips is None:
        return None
    columns = torch.arange(width, device=device).expand(n, width)
    if draws.flips is not None:
        columns = torch.where(draws.flips[:, None], width - 1 - columns, columns)
    return columns if draws.offsets is None else columns + draws.offsets[:, 1:]
