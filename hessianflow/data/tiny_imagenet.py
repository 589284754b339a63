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
from hessianflow.data.sources import damaged, find_archive, one_line, remedy
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
    files = _Files(root)
    with files.to_close:
        classes = sorted(files.text("wnids.txt").split())
        if len(classes) != layout.num_classes:
            what = f"found {len(classes)} classes, expected {layout.num_classes}"
            raise damaged(NAME, "wnids.txt", what)
        if split == "train":
            labelled = [(path, path.split("/")[1]) for path in files.paths("train")]
        else:
            labelled = _test_files(files)
        ranks = {wnid: rank for rank, wnid in enumerate(classes)}
        unknown = sorted({wnid for _, wnid in labelled} - ranks.keys())
        if unknown:
            raise damaged(NAME, split, f"class {unknown[0]!r} is not in wnids.txt")
        if len(labelled) != layout.images(split):
            what = f"found {len(labelled)} images, expected {layout.images(split)}"
            raise damaged(NAME, split, what)
        images = decode_all([path for path, _ in labelled], files.content, side=64)
    return images, torch.tensor([ranks[wnid] for _, wnid in labelled]), tuple(classes)


class _Files:
    """The members of the unpacked folder or of the zip file, by path below `tiny-imagenet-200`."""

    def __init__(self, root: Path) -> None:
        folders = [path for path in (root / FOLDER, root) if (path / "wnids.txt").is_file()]
        self._folder = next(iter(folders), root)
        self._zip: ZipFile | None = None
        self.to_close = ExitStack()
        if folders:
            return
        archive = find_archive(root, ARCHIVE)
        if archive is None:
            raise HessianFlowError(
                f"no {NAME} under {root}: neither {FOLDER} nor {ARCHIVE} is there; {remedy(NAME)}"
            )
        try:
            self._zip = self.to_close.enter_context(open_zip(archive))
        except HessianFlowError:
            raise
        except DAMAGE as error:
            raise damaged(NAME, archive, f"damaged archive ({one_line(error)})") from error

    def paths(self, below: str) -> list[str]:
        """Return every JPEG below a folder, sorted."""
        if self._zip is not None:
            names = [name.removeprefix(f"{FOLDER}/") for name in self._zip.namelist()]
            start = f"{below}/"
            return sorted(n for n in names if n.startswith(start) and n.endswith(".JPEG"))
        try:
            paths = list((self._folder / below).rglob("*.JPEG"))
        except RecursionError:
            raise damaged(NAME, self._folder / below, "folders are nested too deep") from None
        return sorted(path.relative_to(self._folder).as_posix() for path in paths)

    def content(self, path: str) -> bytes:
        try:
            if self._zip is not None:
                member = self._zip.getinfo(f"{FOLDER}/{path}")
                if member.file_size > MAX_IMAGE_BYTES:
                    raise damaged(NAME, path, f"larger than {MAX_IMAGE_BYTES} bytes")
                return b"".join(zip_blocks(self._zip, member))
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
        return self.content(path).decode("utf-8", errors="replace")


def _test_files(files: _Files) -> list[tuple[str, str]]:
    """Return (path, class identifier) of every validation image, in the annotated order."""
    source = "val/val_annotations.txt"
    rows = [line.split("\t") for line in files.text(source).splitlines() if line.strip()]
    for row in rows:
        if len(row) < 2:
            raise damaged(NAME, source, f"line {row!r} has no tab between file and class")
    for name, *_ in rows:
        if not name.strip(".") or set(name) & set("/\\\0"):
            raise damaged(NAME, source, f"{name!r} is not the name of a file")
    return [(f"val/images/{row[0]}", row[1]) for row in rows]
