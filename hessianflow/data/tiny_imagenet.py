"""Tiny-ImageNet: 200 classes of 64x64 JPEGs, 500 each for training and 50 each for validation.

The images are read from the official zip file, or from the folder it unpacks to. The validation
images serve as the test split (the official test images have no labels). The index of a class is
the rank of its identifier in sorted order.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor

from hessianflow.data.archives import DAMAGE, open_zip, zip_blocks
from hessianflow.data.files import read_plain
from hessianflow.data.images import decode_all
from hessianflow.data.sources import damaged, one_line, remedy
from hessianflow.interfaces import HessianFlowError

NAME = "tiny-imagenet"
FOLDER = "tiny-imagenet-200"
ARCHIVE = "tiny-imagenet-200.zip"
MAX_IMAGE_BYTES = 1 << 20


@dataclass(frozen=True)
class TinyLayout:
    """Expected numbers of classes and images; smaller in tests."""

    num_classes: int = 200
    train_per_class: int = 500
    test_images: int = 10_000

    def images(self, split: str) -> int:
        """Return the number of images of a split."""
        if split == "train":
            return self.train_per_class * self.num_classes
        return self.test_images


def read_tiny_imagenet(
    root: Path, split: str, *, layout: TinyLayout = TinyLayout()
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return images uint8 [N, 3, 64, 64], targets int64 [N] and class identifiers of one split.

    Raises:
        HessianFlowError: Files are missing or damaged, a number of classes or images is not as
            published, or Pillow is not installed.
    """
    with _Files(root) as files:
        classes = sorted(files.text("wnids.txt").split())
        if len(classes) != layout.num_classes:
            raise damaged(
                NAME, "wnids.txt", f"found {len(classes)} classes, expected {layout.num_classes}"
            )
        labelled = _train_files(files) if split == "train" else _test_files(files)
        ranks = {wnid: rank for rank, wnid in enumerate(classes)}
        unknown = sorted({wnid for _, wnid in labelled} - ranks.keys())
        if unknown:
            raise damaged(NAME, split, f"class {unknown[0]!r} is not in wnids.txt")
        if len(labelled) != layout.images(split):
            raise damaged(
                NAME, split, f"found {len(labelled)} images, expected {layout.images(split)}"
            )
        images = decode_all([path for path, _ in labelled], files.content, side=64)
    return images, torch.tensor([ranks[wnid] for _, wnid in labelled]), tuple(classes)


class _Files:
    """The members of the unpacked folder or of the zip file, by path below `tiny-imagenet-200`."""

    def __init__(self, root: Path) -> None:
        folders = [path for path in (root / FOLDER, root) if (path / "wnids.txt").is_file()]
        archives = [
            path for path in (root / ARCHIVE, root) if path.name == ARCHIVE and path.is_file()
        ]
        if not folders and not archives:
            raise HessianFlowError(
                f"no {NAME} under {root}: neither {FOLDER} nor {ARCHIVE} is there; {remedy(NAME)}"
            )
        self._folder = next(iter(folders), None)
        self._zip: ZipFile | None = None
        self._to_close = ExitStack()
        try:
            if self._folder is None:
                self._zip = self._to_close.enter_context(open_zip(archives[0]))
        except HessianFlowError:
            raise
        except DAMAGE as error:
            raise damaged(NAME, archives[0], f"damaged archive ({one_line(error)})") from error

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._to_close.close()

    def paths(self, below: str) -> list[str]:
        """Return every JPEG below a folder, sorted."""
        if self._zip is not None:
            names = (name.removeprefix(f"{FOLDER}/") for name in self._zip.namelist())
            return sorted(
                name for name in names if name.startswith(f"{below}/") and name.endswith(".JPEG")
            )
        assert self._folder is not None
        try:
            return sorted(
                path.relative_to(self._folder).as_posix()
                for path in (self._folder / below).rglob("*.JPEG")
            )
        except RecursionError:
            raise damaged(NAME, self._folder / below, "folders are nested too deep") from None

    def content(self, path: str) -> bytes:
        """Return the bytes of one member."""
        try:
            if self._zip is not None:
                member = self._zip.getinfo(f"{FOLDER}/{path}")
                if member.file_size > MAX_IMAGE_BYTES:
                    raise damaged(NAME, path, f"larger than {MAX_IMAGE_BYTES} bytes")
                return b"".join(zip_blocks(self._zip, member))
            assert self._folder is not None
            return read_plain(self._folder / path, MAX_IMAGE_BYTES)
        except HessianFlowError:
            raise
        except (FileNotFoundError, KeyError) as error:
            raise damaged(NAME, path, "missing") from error
        except OSError as error:
            raise damaged(NAME, path, f"cannot be read ({one_line(error)})") from error
        except DAMAGE as error:
            raise damaged(NAME, path, f"damaged in the archive ({one_line(error)})") from error

    def text(self, path: str) -> str:
        """Return the text of one member."""
        return self.content(path).decode("utf-8", errors="replace")


def _train_files(files: _Files) -> list[tuple[str, str]]:
    """Return (path, class identifier) of every training image."""
    return [(path, path.split("/")[1]) for path in files.paths("train")]


def _test_files(files: _Files) -> list[tuple[str, str]]:
    """Return (path, class identifier) of every validation image, in the annotated order."""
    rows = [
        line.split("\t")
        for line in files.text("val/val_annotations.txt").splitlines()
        if line.strip()
    ]
    short = [row for row in rows if len(row) < 2]
    if short:
        raise damaged(
            NAME, "val/val_annotations.txt", f"line {short[0]!r} has no tab between file and class"
        )
    outside = [row[0] for row in rows if not row[0].strip(".") or set(row[0]) & set("/\\\0")]
    if outside:
        raise damaged(NAME, "val/val_annotations.txt", f"{outside[0]!r} is not the name of a file")
    return [(f"val/images/{row[0]}", row[1]) for row in rows]
