"""Image files: decoding with Pillow (extra `images`), and class-folder trees too large to hold in
memory.

A tree has one folder a class below `train` and below `val` (or `test`); a class's index is the rank
of its folder's name in `train`, for both splits. ImageNet is such a tree with 1000 folders.

Files are not trusted: only plain ones of a bounded size are read, only as the formats that their
suffixes promise (Pillow knows others that start programs, as PostScript does), and the size of an
image is checked before its pixels.
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
"""Pillow's names of the formats of :data:`SUFFIXES`; a file may be any of them, whatever its
suffix."""
MAX_PIXELS = 1 << 26
"""Images with more pixels are refused before they are decoded."""
MAX_FILE_BYTES = 4 * MAX_PIXELS
"""Files with more bytes are refused unread: so much has the largest image where nothing is
compressed."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images; in general use."""
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Random crops for training: share of the area and aspect ratio (Szegedy et al., 2014,
arXiv:1409.4842)."""
RESIZE_TO_CROP = 256 / 224
"""For evaluation, the shorter side becomes this multiple of the central square that is used."""


class ImageError(HessianFlowError):
    """An image file that cannot be used.

    A loader hands on an error of its worker process by making another of the same kind, with the
    process's whole traceback in the message: of that, what was said at first is kept.
    """

    def __init__(self, message: str) -> None:
        if message.startswith(f"Caught {ImageError.__name__} in "):
            message = message.rpartition(f"{__name__}.{ImageError.__name__}: ")[2].strip()
        super().__init__(message)


@dataclass(frozen=True, eq=False)
class ImageFolder(Dataset[tuple[Tensor, int]]):
    """One split of a class-folder tree, a map-style data set of (uint8 [3, size, size], class
    index).

    Attributes:
        name: of the set.
        root: folder of this split.
        files: paths below `root`, as bytes (a million of them stay small and shared between
            workers).
        targets: int64 [N].
        classes: folder names, sorted.
        size: side of the square images handed out.
        train: crop (uniform in area and log aspect ratio) and mirror at random, from torch's global
            generator; otherwise take the central square.
        mean: of the channels, after division by 255.
        std: likewise.
        augment: whether training batches are cropped and mirrored at random.
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
        """Number of class folders."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        return 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.root / fsdecode(self.files[index])
        image = _opened(_content(path), str(path))
        image = _random_crop(image, self.size) if self.train else _central_crop(image, self.size)
        return _pixels(image), int(self.targets[index])

    def take(self, count: int) -> "ImageFolder":
        """`count` images spread evenly over the list, hence over the classes; for runs at reduced
        scale."""
        chosen = np.unique(
            np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64)
        )
        return replace(
            self, files=self.files[chosen], targets=self.targets[torch.from_numpy(chosen)]
        )

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
        """Loaded by `num_workers` processes and normalised on `device`; if `train`, shuffled and
        augmented."""
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
    """(pixels / value_scale - mean) / std on a batch of uint8 images [n, C, H, W], wherever it
    is."""

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
        self._scale, self._dtype = value_scale, dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def value_range(self) -> tuple[Tensor, Tensor]:
        """What pixels 0 and `value_scale` become, each [C]."""
        low, high = -self._mean / self._std, (self._scale - self._mean) / self._std
        return low.flatten(), high.flatten()

    def __call__(self, batch: Batch) -> Batch:
        """(uint8 images, targets) -> (normalised images, the same targets)."""
        images, targets = batch
        images = images.to(torch.float32, memory_format=self._format)
        mean, std = (
            values.to(images.device, non_blocking=True) for values in (self._mean, self._std)
        )
        return images.sub_(mean).div_(std).to(self._dtype), targets


def read_folder(name: str, root: Path, split: str, *, size: int = 224) -> ImageFolder:
    """List the images of `root`/`split`; for split "test", `root`/val where there is no
    `root`/test.

    Where `root`/train is there, its folders are the classes of every split; one without images for
    testing may lack.

    Raises:
        HessianFlowError: no such folder, no class folders in it, a class without an image, one that
            is not among those of training, or something that is no file under the name of an image.
    """
    candidates = [root / split] + ([root / "val"] if split == "test" else [])
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
    strange = sorted(set(present) - set(classes))
    if strange:
        raise HessianFlowError(
            f"{folder}: {len(strange)} of {len(present)} class folders are not among the"
            f" {len(classes)} of {root / 'train'}, the first is {strange[0]!r}: give both splits"
            " folders of the same names"
        )
    files: list[bytes] = []
    targets: list[int] = []
    for target, label in enumerate(classes):
        found = _image_names(folder / label) if label in present else []
        files += [fsencode(f"{label}/{file}") for file in found]
        targets += [target] * len(found)
    listed = np.array(files, dtype=np.bytes_)
    return ImageFolder(
        name, folder, listed, torch.tensor(targets), tuple(classes), size, train=split == "train"
    )


def decode_all(paths: Sequence[str], read: Callable[[str], bytes], side: int) -> Tensor:
    """Decode images of `side` x `side` pixels, grey ones included, to uint8 [N, 3, side, side], in
    threads.

    Args:
        paths: of the images.
        read: read(path) gives an encoded image; called in the threads, so that few are in memory at
            a time.
        side: of all images.

    Raises:
        HessianFlowError: an image that cannot be decoded or has another size; the message names it.
    """
    with ThreadPoolExecutor() as pool:
        return torch.stack(
            list(pool.map(lambda path: _pixels(_opened(read(path), path, side)), paths))
        )


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _image_names(folder: Path) -> list[str]:
    """Return names of the images of one class, sorted; where links lead is seen when they are
    read."""
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


def _opened(content: bytes, origin: str, side: int | None = None) -> Any:
    """Return a decoded RGB Pillow image, of `side` x `side` pixels where that is given."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise HessianFlowError(
            "image files need Pillow: pip install 'hessianflow[images]'"
        ) from error
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
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
    except UnidentifiedImageError:
        raise ImageError(
            f"{origin}: cannot be decoded as an image (it is none of {', '.join(FORMATS)}); replace"
            " the file"
        ) from None
    # Pillow answers damaged files with many kinds of error: whichever it is, the file cannot be
    # used.
    except Exception as error:
        raise ImageError(
            f"{origin}: cannot be decoded as an image ({one_line(error)}); replace the file"
        ) from error


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _random_crop(image: Any, size: int) -> Any:
    """Return a window of random area and aspect ratio, resized and perhaps mirrored; the largest
    square if none fits."""
    from PIL import Image

    width, height = image.size
    window = min(width, height), min(width, height)
    for _ in range(10):
        area = width * height * _uniform(*CROP_AREA)
        ratio = float(np.exp(_uniform(*np.log(CROP_RATIO))))
        tried = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < tried[0] <= width and 0 < tried[1] <= height:
            window = tried
            break
    left, top = (
        int(_uniform(0, side - part + 1))
        for side, part in zip((width, height), window, strict=True)
    )
    box = (left, top, left + window[0], top + window[1])
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if _uniform(0, 1) < 0.5 else image


def _central_crop(image: Any, size: int) -> Any:
    """Return the central square of side shorter_side / RESIZE_TO_CROP, resized: the same as
    resizing first."""
    from PIL import Image

    width, height = image.size
    side = min(width, height) / RESIZE_TO_CROP
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
