"""Image sets by name, as one frozen record each: uint8 pixels and what is needed to normalise and augment them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hessianflow.data.augment import Augmentation
from hessianflow.interfaces import HessianFlowError

Split = Literal["train", "test", "extra"]

DIGITS_TEST_SHARE = 0.2
_DIGITS_SEED = 0
_FAKE_CLASSES, _FAKE_SIDE = 10, 16
_FAKE_EXAMPLES: Mapping[str, int] = {"train": 2048, "test": 512}


@dataclass(frozen=True)
class ImageSet:
    """One split of a classification set held in memory.

    Attributes:
        name: of the set.
        images: uint8 [N, C, H, W].
        targets: int64 [N], in [0, num_classes).
        classes: name of every class, by target.
        mean: of every channel over the training split, after division by `value_scale`.
        std: likewise.
        value_scale: the pixel value that counts as 1.
        augment: usual augmentation for training.
    """

    name: str
    images: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_scale: float = 255.0
    augment: Augmentation = field(default_factory=Augmentation)

    @property
    def num_classes(self) -> int:
        """Number of classes, those without an example in this split included."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)


def load(name: str, root: str | Path | None = None, split: Split = "train") -> ImageSet:
    """Read one split of a data set.

    Args:
        name: one of :func:`names`.
        root: where the files are: their own folder, the folder above it, or one that holds the official archive.
        split: "train" or "test".

    Raises:
        HessianFlowError: an unknown name or split, or files that are missing or damaged (the message names the file).
    """
    if name not in _LOADERS:
        raise HessianFlowError(f"unknown data set {name!r}; known: {', '.join(names())}")
    if split not in ("train", "test"):
        raise HessianFlowError(f"split must be 'train' or 'test', got {split!r}")
    return _LOADERS[name](Path(root or "."), split)


def names() -> list[str]:
    """Every name that :func:`load` knows, sorted."""
    return sorted(_LOADERS)


def _digits(_: Path, split: Split) -> ImageSet:
    """The 1797 handwritten digits bundled with scikit-learn, 1x8x8, values 0 to 16.

    Split (ours): from every class a fifth, drawn with a fixed seed, is the test set: 1438 and 359 images.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    test = np.zeros(len(bunch.target), dtype=bool)
    rng = np.random.default_rng(_DIGITS_SEED)
    for label in range(10):
        members = np.flatnonzero(bunch.target == label)
        test[rng.permutation(members)[: round(DIGITS_TEST_SHARE * len(members))]] = True
    chosen = test if split == "test" else ~test
    return ImageSet(
        name="digits",
        images=torch.from_numpy(bunch.images[chosen].astype(np.uint8))[:, None],
        targets=torch.from_numpy(bunch.target[chosen].astype(np.int64)),
        classes=tuple(str(label) for label in range(10)),
        mean=(0.3055,),
        std=(0.3761,),
        value_scale=16.0,
    )


def _fake(_: Path, split: Split) -> ImageSet:
    """Deterministic images that a network can learn: one smooth random pattern a class, plus noise; 3x16x16."""
    patterns = np.random.default_rng(0).normal(size=(_FAKE_CLASSES, 3, 4, 4)).repeat(4, axis=2).repeat(4, axis=3)
    count, rng = _FAKE_EXAMPLES[split], np.random.default_rng(1 if split == "train" else 2)
    targets = rng.permutation(np.arange(count) % _FAKE_CLASSES)
    noise = rng.normal(size=(count, 3, _FAKE_SIDE, _FAKE_SIDE))
    pixels = np.clip(128 + 24 * (patterns[targets] + 1.5 * noise), 0, 255).astype(np.uint8)
    return ImageSet(
        name="fake",
        images=torch.from_numpy(pixels),
        targets=torch.from_numpy(targets.astype(np.int64)),
        classes=tuple(f"pattern {label}" for label in range(_FAKE_CLASSES)),
        mean=(0.5, 0.5, 0.5),
        std=(0.17, 0.17, 0.17),
        augment=Augmentation(crop_padding=1),
    )


_LOADERS: Mapping[str, Callable[[Path, Split], ImageSet]] = {"digits": _digits, "fake": _fake}
