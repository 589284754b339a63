"""Decode image files with Pillow (extra `images`), and list class-folder trees of any size.

A tree has one folder per class below `train` and below `val` (or `test`); a class's index is the
rank of its folder's name in `train`, for both splits. ImageNet is such a tree with 1000 folders.

Files are not trusted. Only plain files of a bounded size are read, only in the formats listed here
(Pillow knows others that start programs, such as PostScript), and the size of an image is checked
before its pixels are decoded.
"""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import fsdecode, fsencode
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hessianflow.data.files import read_plain
from hessianflow.data.sampling import AdaptiveBatches
from hessianflow.data.sources import one_line
from hessianflow.interfaces import Batch, HessianFlowError

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm"})
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM")
"""Pillow's names of the formats of :data:`SUFFIXES`, any of which a file may have."""
MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image; larger ones are refused before they are decoded."""
MAX_FILE_BYTES = 4 * MAX_PIXELS
"""Largest size of a file, that of the largest image without compression."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's training images, the value in general use."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's training images, the value in general use."""
CROP_AREA = (0.08, 1.0)
"""Fraction of the area that a random crop keeps (Szegedy et al., 2014, arXiv:1409.4842)."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Aspect ratio of a random crop (Szegedy et al., 2014, arXiv:1409.4842)."""
RESIZE_TO_CROP = 256 / 224
"""Shorter side of a resized image over the side of its central crop, for evaluation."""


class ImageError(HessianFlowError):
    """Error for an image file that cannot be used.

    A loader passes on an error of its worker process by making another of the same type, with the
    process's whole traceback in the message; only the original message is kept.
    """

    def __init__(self, message: str) -> None:
        if message.startswith(f"Caught {ImageError.__name__} in "):
            message = message.rpartition(f"{__name__}.{ImageError.__name__}: ")[2].strip()
        super().__init__(message)


@dataclass(frozen=True, eq=False)
class ImageFolder(Dataset[tuple[Tensor, int]]):
    """One split of a class-folder tree; its items are (uint8 [3, size, size], class index).

    Attributes:
        name: Name of the set.
        root: Folder of this split.
        files: Paths below `root`, as bytes, so that a million of them stay small and shared
            between workers.
        targets: Class indices, int64 [N].
        classes: Folder names, sorted.
        size: Side of the square images handed out.
        train: Crop (uniform in area and log aspect ratio) and mirror at random, from torch's global
            generator; otherwise take the central square.
        mean, std: Statistics of the channels, after division by 255.
        augment: Whether training batches are cropped and mirrored at random.
    """

    name: str
    root: Path
    files: NDArray[np.bytes_]
    targets: Tensor
    classes: tuple[str, ...]
    size: int = 224
    train: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    augment: bool = True

    @property
    def num_classes(self) -> int:
        """Return the number of class folders."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Return the shape (3, size, size) of an image."""
        return 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.root / fsdecode(self.files[index])
        image = _decoded(_content(path), str(path))
        crop = _random_crop if self.train else _central_crop
        return _pixels(crop(image, self.size)), int(self.targets[index])

    def take(self, count: int) -> "ImageFolder":
        """Return a set of `count` images spread evenly over the files, hence over the classes."""
        chosen = spread_evenly(count, len(self))
        targets = self.targets[torch.from_numpy(chosen)]
        return replace(self, files=self.files[chosen], targets=targets)

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
    ) -> AdaptiveBatches:
        """Return batches loaded by `num_workers` processes; shuffle and augment only if `train`."""
        normalise = Normalise(self.mean, self.std, dtype=dtype, channels_last=channels_last)
        return AdaptiveBatches(
            replace(self, train=train and self.augment),
            batch_size,
            seed=seed,
            num_workers=num_workers,
            pin_memory=torch.device(device).type == "cuda",
            device=device,
            transform=normalise,
            shuffle=train,
            value_range=normalise.value_range,
            persistent_workers=True,  # the list of files never changes
        )


class Normalise:
    """Map a batch of uint8 images [n, C, H, W] to (pixels / value_scale - mean) / std."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        value_scale: float = 255.0,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        self._mean, self._std = (
            torch.tensor(values).view(-1, 1, 1) * value_scale for values in (mean, std)
        )
        self._scale = value_scale
        self._dtype = dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def value_range(self) -> tuple[Tensor, Tensor]:
        """Return the normalised values of pixels 0 and `value_scale`, each [C]."""
        low = -self._mean / self._std
        high = (self._scale - self._mean) / self._std
        return low.flatten(), high.flatten()

    def __call__(self, batch: Batch) -> Batch:
        """Return (normalised images, the same targets), on the device of the batch."""
        images, targets = batch
        images = images.to(torch.float32, memory_format=self._format)
        mean, std = (
            values.to(images.device, non_blocking=True) for values in (self._mean, self._std)
        )
        return images.sub_(mean).div_(std).to(self._dtype), targets


def read_folder(name: str, root: Path, split: str, *, size: int = 224) -> ImageFolder:
    """List the images of `root`/`split`; "test" may also be `root`/val.

    The folders of `root`/train, if it exists, are the classes of every split; a split for testing
    may lack some of them.

    Raises:
        HessianFlowError: There is no folder, class folder or image in one, a class is not among
            those of training, or something with the name of an image is no file.
    """
    candidates = [root / split]
    if split == "test":
        candidates.append(root / "val")
    folder = next((path for path in candidates if path.is_dir()), None)
    if folder is None:
        raise HessianFlowError(
            f"no {name} under {root}: expected class folders such as"
            f" {candidates[-1] / 'CLASS' / 'image.JPEG'}"
        )
    present = _class_folders(folder)
    if not present:
        raise HessianFlowError(
            f"{folder}: no class folders in it; expected {folder / 'CLASS' / 'image.JPEG'}"
        )
    classes = _class_folders(root / "train") if (root / "train").is_dir() else present
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise HessianFlowError(
            f"{folder}: {len(unknown)} of {len(present)} class folders are not among the"
            f" {len(classes)} of {root / 'train'}, the first is {unknown[0]!r}: give both splits"
            " folders of the same names"
        )
    files: list[bytes] = []
    targets: list[int] = []
    for target, label in enumerate(classes):
        if label in present:
            names = _image_names(folder / label)
            files += [fsencode(f"{label}/{file}") for file in names]
            targets += [target] * len(names)
    listed = np.array(files, dtype=np.bytes_)
    return ImageFolder(
        name, folder, listed, torch.tensor(targets), tuple(classes), size, train=split == "train"
    )


def spread_evenly(count: int, total: int) -> NDArray[np.int64]:
    """Return at most `count` numbers below `total`, ascending and evenly spread."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def pillow() -> Any:
    """Return the module `PIL.Image`.

    Raises:
        HessianFlowError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise HessianFlowError(
            "image files need Pillow: pip install 'hessianflow[images]'"
        ) from error
    return Image


def decode_all(paths: Sequence[str], read: Callable[[str], bytes], side: int) -> Tensor:
    """Decode images of `side` x `side` pixels, also grey ones, to uint8 [N, 3, side, side].

    `read` returns an encoded image by its path. It is called in threads, so that few encoded images
    are in memory at a time.

    Raises:
        HessianFlowError: An image cannot be decoded or has another size; the message names it.
    """
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda path: _pixels(_decoded(read(path), path, side)), paths)
        return torch.stack(list(decoded))


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _image_names(folder: Path) -> list[str]:
    """Return the sorted names of the images of one class; links are resolved when they are read."""
    with os.scandir(folder) as entries:
        images = [entry for entry in entries if Path(entry.name).suffix.lower() in SUFFIXES]
    for entry in images:
        if not (entry.is_symlink() or entry.is_file(follow_symlinks=False)):
            raise HessianFlowError(
                f"{entry.path}: has the name of an image but is no file; remove or replace it"
            )
    if not images:
        raise HessianFlowError(f"{folder}: no image in this class folder; add some or remove it")
    return sorted(entry.name for entry in images)


def _content(path: Path) -> bytes:
    try:
        return read_plain(path, MAX_FILE_BYTES)
    except HessianFlowError as error:
        raise ImageError(str(error)) from None
    except (OSError, MemoryError) as error:
        raise ImageError(f"{path}: cannot be read ({one_line(error)}); replace the file") from error


def _decoded(content: bytes, origin: str, side: int | None = None) -> Any:
    """Return a decoded RGB Pillow image, which must have `side` x `side` pixels unless None."""
    reader = pillow()
    try:
        image = reader.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"{origin}: {width}x{height} pixels, more than the {MAX_PIXELS} allowed"
            )
        if side is not None and (width, height) != (side, side):
            raise ImageError(f"{origin}: image is {width}x{height}, expected {side}x{side}")
        return image.convert("RGB")
    except ImageError:
        raise
    except reader.UnidentifiedImageError:
        raise ImageError(
            f"{origin}: cannot be decoded as an image (it is none of {', '.join(FORMATS)}); replace"
            " the file"
        ) from None
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise ImageError(
            f"{origin}: cannot be decoded as an image ({one_line(error)}); replace the file"
        ) from error


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _random_crop(image: Any, size: int) -> Any:
    """Return a window of random area and aspect ratio, resized and mirrored half of the time.

    If none of ten windows fits into the image, the window is the largest square.
    """
    width, height = image.size
    window = min(width, height), min(width, height)
    for _ in range(10):
        area = width * height * _uniform(*CROP_AREA)
        ratio = float(np.exp(_uniform(*np.log(CROP_RATIO))))
        candidate = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < candidate[0] <= width and 0 < candidate[1] <= height:
            window = candidate
            break
    left = int(_uniform(0, width - window[0] + 1))
    top = int(_uniform(0, height - window[1] + 1))
    box = (left, top, left + window[0], top + window[1])
    image = image.resize((size, size), pillow().Resampling.BILINEAR, box=box)
    if _uniform(0, 1) < 0.5:
        image = image.transpose(pillow().Transpose.FLIP_LEFT_RIGHT)
    return image


def _central_crop(image: Any, size: int) -> Any:
    """Return the central square of side shorter_side / RESIZE_TO_CROP, resized in one step."""
    width, height = image.size
    side = min(width, height) / RESIZE_TO_CROP
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    return image.resize((size, size), pillow().Resampling.BILINEAR, box=box)
