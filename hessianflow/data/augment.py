"""Random crop, horizontal flip and cutout of a whole batch in one vectorised pass, on any device.

All draws of an epoch are made at once (:meth:`Augmentation.draw`), one row per example, so that
what happens to an example never depends on the batch it falls into.

- crop: pad with zero pixels on all sides, then cut out a window of the original size at a uniform
  offset (He et al., 2015, arXiv:1512.03385, section 4.2: padding 4).
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
    """Random choices, one row per example; None for what is switched off.

    Attributes:
        offsets: Row and column of the crop window in the padded image, int64 [n, 2].
        flips: Which images are mirrored, bool [n].
        centres: Row and column of the centre of the cutout, int64 [n, 2].
    """

    offsets: Tensor | None = None
    flips: Tensor | None = None
    centres: Tensor | None = None

    def to(self, device: torch.device) -> "Draws":
        """Return the same draws on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._present().items()})

    def rows(self, start: int, stop: int) -> "Draws":
        """Return the draws of examples start..stop-1."""
        return replace(self, **{name: value[start:stop] for name, value in self._present().items()})

    def inverse(self, padding: int) -> "Draws":
        """Return draws without cutout whose crop and flip undo those of these draws."""
        if self.offsets is None:
            return Draws(flips=self.flips)
        back = 2 * padding - self.offsets
        if self.flips is not None:  # the mirror comes after the crop, so its own offset undoes it
            columns = torch.where(self.flips, self.offsets[:, 1], back[:, 1])
            back = torch.stack([back[:, 0], columns], dim=1)
        return Draws(back, self.flips)

    def _present(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Augmentation:
    """The random variations of a training image. The default varies nothing.

    Attributes:
        crop_padding: Pixels of padding for the random crop, 0 for none.
        flip: Whether half of the images are mirrored.
        cutout: Side of the square that is blanked, in pixels, 0 for none.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            side = getattr(self, name)
            if side < 0:
                raise HessianFlowError(f"{name} must be at least 0 pixels, got {side}")

    @property
    def is_active(self) -> bool:
        """Return whether anything is varied."""
        return bool(self.crop_padding or self.flip or self.cutout)

    def draw(self, count: int, height: int, width: int, *, seed: int, epoch: int) -> Draws:
        """Return all draws for `count` images in one epoch, each kind from its own generator."""
        offsets = flips = centres = None
        if self.crop_padding:
            source = generator(seed, "crop", epoch)
            offsets = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=source)
        if self.flip:
            flips = torch.rand(count, generator=generator(seed, "flip", epoch)) < 0.5
        if self.cutout:
            source = generator(seed, "cutout", epoch)
            sides = (torch.randint(side, (count,), generator=source) for side in (height, width))
            centres = torch.stack(list(sides), dim=1)
        return Draws(offsets, flips, centres)

    def crop_and_flip(self, rows: Tensor, draws: Draws, step: int = 1) -> Tensor:
        """Return images [n, P, H, W * step] of any dtype cropped and mirrored, in the same shape.

        `step` neighbours in a row make up one pixel: 1 for separate colour planes (P = channels),
        the number of channels for interleaved ones (P = 1).
        """
        if draws.offsets is None and draws.flips is None:
            return rows
        n, planes, height, length = rows.shape
        columns = _columns(draws, n, length // step, rows.device)
        if draws.offsets is not None:
            padding = self.crop_padding
            rows = pad(rows, (padding * step, padding * step, padding, padding))
            rows = _take_rows(rows, draws.offsets[:, 0], height)
        sources = columns[:, :, None] * step + torch.arange(step, device=rows.device)
        return rows.gather(3, sources.view(n, 1, 1, length).expand(n, planes, height, length))

    def cut_out(self, rows: Tensor, draws: Draws, step: int = 1) -> Tensor:
        """Zero the drawn squares in place; the layout is that of :meth:`crop_and_flip`."""
        if draws.centres is None:
            return rows
        vertical, horizontal = (
            self._covered(draws.centres[:, axis], rows, axis, step) for axis in (0, 1)
        )
        # On a CPU, float arithmetic in place takes a fraction of the time of boolean masks or of
        # fresh memory.
        kept = torch.mul(vertical[:, :, None], horizontal[:, None, :]).neg_().add_(1)
        return rows.mul_(kept[:, None])

    def _covered(self, centres: Tensor, rows: Tensor, axis: int, step: int) -> Tensor:
        """Return 1 where the square covers an entry along `axis`, else 0; [n, rows.shape[axis]]."""
        positions = torch.arange(rows.shape[2 + axis], device=rows.device)
        if axis == 1:
            positions = positions // step
        first = (centres - self.cutout // 2)[:, None]
        return ((positions >= first) & (positions < first + self.cutout)).to(rows.dtype)


def _take_rows(rows: Tensor, tops: Tensor, height: int) -> Tensor:
    """Return rows tops[i] .. tops[i]+height-1 of image i; copying whole rows makes it fast."""
    n, planes, padded_height, length = rows.shape
    firsts = torch.arange(n * planes, device=rows.device).view(n, planes, 1) * padded_height
    window = tops[:, None] + torch.arange(height, device=rows.device)
    taken = rows.reshape(-1, length).index_select(0, (firsts + window[:, None, :]).view(-1))
    return taken.view(n, planes, height, length)


def _columns(draws: Draws, n: int, width: int, device: torch.device) -> Tensor:
    """Return the source column of every output column, int64 [n, width]."""
    columns = torch.arange(width, device=device).expand(n, width)
    if draws.flips is not None:
        columns = torch.where(draws.flips[:, None], width - 1 - columns, columns)
    return columns if draws.offsets is None else columns + draws.offsets[:, 1:]
