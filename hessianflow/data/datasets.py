"""Data sets by name: text, or frozen records of uint8 pixels with normalisation and augmentation.

Means and standard deviations are those of the training pixels: computed here for digits, the values
in general use for CIFAR, SVHN and ImageNet, and ImageNet's for Tiny-ImageNet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hessianflow.data.augment import Augmentation
from hessianflow.data.cifar import CIFAR10, CIFAR100, CifarLayout, read_cifar
from hessianflow.data.device_batches import DeviceBatches
from hessianflow.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageFolder, read_folder
from hessianflow.data.presets import LARGER_IMAGES, SMALL_IMAGES, TEXT, Preset
from hessianflow.data.sources import root_folder
from hessianflow.data.svhn import read_svhn
from hessianflow.data.text import BLOCK_LENGTH, TextSet, read_python, read_text
from hessianflow.data.tiny_imagenet import read_tiny_imagenet
from hessianflow.interfaces import HessianFlowError

Split = Literal["train", "test", "extra"]

DIGITS_TEST_SHARE = 0.2
_DIGITS_SEED = 0
_DIGITS = tuple("0123456789")
_FAKE_CLASSES = 10
_FAKE_SIDE = 16
_FAKE_EXAMPLES: Mapping[str, int] = {"train": 2048, "test": 512}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a classification set held in memory.

    Attributes:
        name: Name of the set.
        images: Pixels, uint8 [N, C, H, W].
        targets: Class indices, int64 [N], in [0, num_classes).
        classes: Name of every class, by target.
        mean, std: Statistics of every channel of the training split, in units of `value_scale`.
        value_scale: Pixel value that counts as 1.
        augment: Usual augmentation for training.
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
        """Return the number of classes, including those without an example in this split."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def take(self, count: int) -> "ImageSet":
        """Return a set of the first `count` examples, or of all where there are fewer."""
        return replace(self, images=self.images[:count], targets=self.targets[:count])

    def batches(
        self,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        num_workers: int = 0,
    ) -> DeviceBatches:
        """Return batches of the whole set on `device`, shuffled and augmented only if `train`.

        `num_workers` has no effect; :meth:`ImageFolder.batches` can be called alike.
        """
        del num_workers
        augment = self.augment if train else None
        return DeviceBatches(
            self.images,
            self.targets,
            batch_size,
            seed=seed,
            device=device,
            augment=augment,
            mean=self.mean,
            std=self.std,
            value_scale=self.value_scale,
            num_classes=self.num_classes,
            shuffle=train,
            dtype=dtype,
            channels_last=channels_last,
        )


def load(
    name: str,
    root: str | Path | None = None,
    split: Split = "train",
    *,
    image_size: int = 224,
    block_length: int | None = None,
) -> ImageSet | ImageFolder | TextSet:
    """Read one split of a data set into memory; of "imagenet" and "folder", only list the files.

    Args:
        name: One of :func:`names`; "folder" is any tree of class folders below train and val (or
            test).
        root: Folder of the files, the folder above it, or one that holds the official archive.
            None: $HESSIANFLOW_DATA, else ~/.cache/hessianflow/data. "digits", "fake" and "python"
            need none. For "text", it is a folder of any files, a pattern, or one file.
        split: "train" or "test"; "svhn" also has "extra".
        image_size: Side of the images cut from the files of a class-folder tree.
        block_length: Bytes in each example of a text; None for 128.

    Raises:
        HessianFlowError: The name or split is unknown, or a file (it is named) missing or damaged.
    """
    known = data_set(name)
    if split not in known.splits:
        raise HessianFlowError(
            f"split of {name} must be one of {', '.join(known.splits)}, got {split!r}"
        )
    folder = root_folder(root)
    if known.read is None:
        return read_folder(name, folder, split, size=image_size)
    found = known.read(folder, split)
    if isinstance(found, TextSet):
        return found.in_blocks(block_length or BLOCK_LENGTH)
    return found


def names() -> list[str]:
    """Return every name that :func:`load` knows, sorted."""
    return sorted(DATA_SETS)


def _digits(_: Path, split: Split) -> ImageSet:
    """Return the 1797 handwritten digits bundled with scikit-learn, 1x8x8, values 0 to 16.

    The split is our choice: a fifth of every class, drawn with a fixed seed, is for testing (359).
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
        classes=_DIGITS,
        mean=(0.3055,),
        std=(0.3761,),
        value_scale=16.0,
    )


def _fake(_: Path, split: Split) -> ImageSet:
    """Return made-up 3x16x16 images to learn from: a smooth pattern per class, plus noise."""
    coarse = np.random.default_rng(0).normal(size=(_FAKE_CLASSES, 3, 4, 4))
    patterns = coarse.repeat(4, axis=2).repeat(4, axis=3)
    count = _FAKE_EXAMPLES[split]
    seed = 1 if split == "train" else 2
    rng = np.random.default_rng(seed)
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


def _cifar(
    layout: CifarLayout, mean: tuple[float, ...], std: tuple[float, ...], root: Path, split: Split
) -> ImageSet:
    read = read_cifar(layout, root, split)
    return ImageSet(layout.name, *read, mean, std, augment=CIFAR_AUGMENTATION)


def _svhn(root: Path, split: Split) -> ImageSet:
    statistics = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
    # Nothing is flipped: a mirrored digit is no digit.
    augment = Augmentation(crop_padding=4)
    return ImageSet("svhn", *read_svhn(root, split), _DIGITS, *statistics, augment=augment)


def _tiny_imagenet(root: Path, split: Split) -> ImageSet:
    read = read_tiny_imagenet(root, split)
    augment = Augmentation(crop_padding=8, flip=True)
    return ImageSet("tiny-imagenet", *read, IMAGENET_MEAN, IMAGENET_STD, augment=augment)


CIFAR_AUGMENTATION = Augmentation(crop_padding=4, flip=True)
"""Augmentation of He et al., 2015, arXiv:1512.03385, section 4.2."""

FILE_SIDE = 224
"""Side that image files are cut to, unless resolutions say otherwise."""


@dataclass(frozen=True)
class DataSet:
    """A data set by name.

    Attributes:
        preset: what a run takes for it.
        read: reads one split from a folder; None for a tree of class folders with image files.
        is_text: whether its examples are blocks of bytes instead of images.
        side: pixels a side of its images; None where they are cut to any size.
        needs_files: whether it is read from files of the user.
        splits: names of its splits.
    """

    preset: Preset
    read: Callable[[Path, Split], ImageSet | TextSet] | None = None
    is_text: bool = False
    side: int | None = None
    needs_files: bool = True
    splits: tuple[str, ...] = ("train", "test")


DATA_SETS: Mapping[str, DataSet] = {
    "digits": DataSet(
        Preset(
            {
                "model": "digits-cnn",
                "batch_size": 32,
                "max_batch_size": 512,
                "epochs": 30,
                "lr": 0.05,
                "probe_examples": 128,
                "precision": "float32",
                "channels_last": False,
                "threads": 1,  # the network is too small to share
            },
            milestones=(20, 26),
            methods={"absa": {"patience": 5}, "abs": {"patience": 5}},
        ),
        _digits,
        side=8,
        needs_files=False,
    ),
    "fake": DataSet(
        Preset(
            {
                **SMALL_IMAGES,
                "model": "c1",
                "curvature_budget": None,
                "precision": "float32",
                "max_batch_size": 512,
                "epochs": 4,
                "lr": 0.02,
            },
            milestones=(3,),
        ),
        _fake,
        side=_FAKE_SIDE,
        needs_files=False,
    ),
    "cifar10": DataSet(
        Preset(SMALL_IMAGES),
        partial(_cifar, CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        side=32,
    ),
    "cifar100": DataSet(
        Preset(SMALL_IMAGES),
        partial(_cifar, CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        side=32,
    ),
    "svhn": DataSet(Preset(SMALL_IMAGES), _svhn, side=32, splits=("train", "test", "extra")),
    "tiny-imagenet": DataSet(Preset(LARGER_IMAGES), _tiny_imagenet, side=64),
    "imagenet": DataSet(Preset({**LARGER_IMAGES, "batch_size": 256})),
    "folder": DataSet(Preset(LARGER_IMAGES)),
    "text": DataSet(TEXT, read_text, is_text=True),
    "python": DataSet(TEXT, read_python, is_text=True, needs_files=False),
}
"""Every data set by name: how it is read, and what a run takes for it."""


def data_set(name: str, where: str = "") -> DataSet:
    """Return a data set by name.

    Raises:
        HessianFlowError: An unknown name; the error begins with `where`, and has the nearest one.
    """
    if name not in DATA_SETS:
        near = get_close_matches(name.lower(), DATA_SETS, n=1)
        hint = "".join(f" (did you mean {other}?)" for other in near)
        raise HessianFlowError(
            f"{where}unknown data set {name!r}{hint}; known: {', '.join(names())}"
        )
    return DATA_SETS[name]
