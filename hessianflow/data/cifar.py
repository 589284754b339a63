"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from their official archives, unpacked or not.

The binary version consists of records of one or two label bytes and 3072 pixel bytes (planes R, G,
B of 32 x 32, row by row); sizes and labels are checked. The Python version is a pickle: it is read
only if its MD5 is the official one, and then by :mod:`hessianflow.data.unpickle`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessianflow.data.archives import read_members
from hessianflow.data.files import open_plain
from hessianflow.data.sources import damaged, find_archive, remedy
from hessianflow.data.unpickle import load_arrays
from hessianflow.interfaces import HessianFlowError

PIXELS = 3 * 32 * 32
Part = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Pixels [n, 3072] and labels [n] of one file."""


@dataclass(frozen=True)
class CifarLayout:
    """Names, sizes and checksums of the files of one data set; smaller ones serve for tests.

    Attributes:
        name: Name of the data set.
        num_classes: Number of classes; labels lie below it.
        label_bytes: Label bytes of a binary record; the last one is the label used.
        records: Records in one binary file of each split.
        binary_folder, binary_archive: Top folder and file name of the binary archive.
        binary_files: Record files of each split.
        class_file: File of the class names, one per line, beside the record files.
        python_folder, python_archive: The same of the Python archive.
        python_files: Pickles of each split, with their MD5.
        label_key: Key of the labels in a pickle.
    """

    name: str
    num_classes: int
    label_bytes: int
    records: Mapping[str, int]
    binary_folder: str
    binary_archive: str
    binary_files: Mapping[str, tuple[str, ...]]
    class_file: str
    python_folder: str
    python_archive: str
    python_files: Mapping[str, Mapping[str, str]]
    label_key: str

    @property
    def record_bytes(self) -> int:
        """Return the size of a binary record."""
        return self.label_bytes + PIXELS


CIFAR10 = CifarLayout(
    name="cifar10",
    num_classes=10,
    label_bytes=1,
    records={"train": 10_000, "test": 10_000},
    binary_folder="cifar-10-batches-bin",
    binary_archive="cifar-10-binary.tar.gz",
    binary_files={
        "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test": ("test_batch.bin",),
    },
    class_file="batches.meta.txt",
    python_folder="cifar-10-batches-py",
    python_archive="cifar-10-python.tar.gz",
    python_files={
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    },
    label_key="labels",
)
CIFAR100 = CifarLayout(
    name="cifar100",
    num_classes=100,
    label_bytes=2,
    records={"train": 50_000, "test": 10_000},
    binary_folder="cifar-100-binary",
    binary_archive="cifar-100-binary.tar.gz",
    binary_files={"train": ("train.bin",), "test": ("test.bin",)},
    class_file="fine_label_names.txt",
    python_folder="cifar-100-python",
    python_archive="cifar-100-python.tar.gz",
    python_files={
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    },
    label_key="fine_labels",
)


def read_cifar(
    layout: CifarLayout, root: Path, split: str
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return images uint8 [N, 3, 32, 32], targets int64 [N] and class names of one split.

    `root` is the folder of the files, the folder above it, or holds the archive; the binary version
    is preferred. Class names are numbers where their file is missing.

    Raises:
        HessianFlowError: A file is missing, is damaged, or has a label out of range.
    """
    records = layout.records[split]
    names = layout.binary_files[split]
    wanted = [*names, layout.class_file]
    limit = records * layout.record_bytes
    all_records = sum(layout.records[s] * len(files) for s, files in layout.binary_files.items())
    total = 2 * all_records * layout.record_bytes
    binary = _read_files(root, layout.binary_folder, layout.binary_archive, wanted, limit, total)
    if binary:
        parts = [_binary_part(layout, name, binary, records) for name in names]
        return (*_stacked(parts), _class_names(binary.get(layout.class_file), layout.num_classes))
    checksums = layout.python_files[split]
    place = (layout.python_folder, layout.python_archive)
    pickled = _read_files(root, *place, list(checksums), 2 * limit, total)
    if not pickled:
        _refuse_empty(layout, root)
        raise HessianFlowError(
            f"no {layout.name} under {root}: neither {layout.binary_folder} nor"
            f" {layout.binary_archive} is there (nor the Python version, {layout.python_folder});"
            f" {remedy(layout.name)}"
        )
    parts = [_python_part(layout, name, pickled, checksums[name]) for name in checksums]
    return (*_stacked(parts), _class_names(None, layout.num_classes))


def _read_files(
    root: Path, folder: str, archive: str, names: Sequence[str], limit: int, total: int
) -> dict[str, bytes]:
    """Return the contents of the `names` that one folder or archive holds.

    A content has at most one byte more than `limit`; an archive may unpack to `total` bytes.
    """
    for parent in (root / folder, root):
        paths = {name: parent / name for name in names if (parent / name).is_file()}
        if paths:
            return {name: _head(path, limit + 1) for name, path in paths.items()}
    packed = find_archive(root, archive)
    if packed is None:
        return {}
    wanted = {f"{folder}/{name}" for name in names}
    members = read_members(packed, wanted, max_bytes=limit, max_total=total)
    return {name.removeprefix(f"{folder}/"): content for name, content in members.items()}


def _refuse_empty(layout: CifarLayout, root: Path) -> None:
    """Refuse an archive that holds none of the expected files."""
    for name, folder in (
        (layout.binary_archive, layout.binary_folder),
        (layout.python_archive, layout.python_folder),
    ):
        packed = find_archive(root, name)
        if packed is not None:
            what = f"holds none of the files expected in its folder {folder}"
            raise damaged(layout.name, packed, what)


def _head(path: Path, size: int) -> bytes:
    with open_plain(path) as file:
        return file.read(size)


def _present(layout: CifarLayout, file: str, contents: Mapping[str, bytes]) -> bytes:
    content = contents.get(file.rpartition("/")[2])
    if content is None:
        raise damaged(layout.name, file, "missing")
    return content


def _binary_part(
    layout: CifarLayout, name: str, contents: Mapping[str, bytes], records: int
) -> Part:
    file = f"{layout.binary_folder}/{name}"
    content = _present(layout, file, contents)
    total = records * layout.record_bytes
    if len(content) != total:
        size = f"{len(content)} bytes"
        if len(content) > total:  # no more than one byte too many was read
            size = f"at least {size}"
        expected = f"{total} bytes ({records} records of {layout.record_bytes})"
        raise damaged(layout.name, file, f"found {size}, expected {expected}")
    table = np.frombuffer(content, dtype=np.uint8).reshape(records, -1)
    labels = table[:, layout.label_bytes - 1].astype(np.int64)
    _check_labels(layout, file, labels)
    return table[:, layout.label_bytes :], labels


def _python_part(
    layout: CifarLayout, name: str, contents: Mapping[str, bytes], checksum: str
) -> Part:
    file = f"{layout.python_folder}/{name}"
    content = _present(layout, file, contents)
    actual = md5(content, usedforsecurity=False).hexdigest()
    if actual != checksum:
        what = f"MD5 is {actual}, expected {checksum}; not opened, since a pickle can run code"
        raise damaged(layout.name, file, what)
    record = load_arrays(content, file)
    pixels = record.get("data")
    numbers = record.get(layout.label_key)
    if not (
        isinstance(numbers, list) and all(isinstance(n, int) and abs(n) < 1 << 31 for n in numbers)
    ):
        raise damaged(layout.name, file, f"holds no list of labels named {layout.label_key!r}")
    if not (isinstance(pixels, np.ndarray) and pixels.shape == (len(numbers), PIXELS)):
        form = f"uint8 {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        what = f"pixels are {form}, expected uint8 ({len(numbers)}, {PIXELS})"
        raise damaged(layout.name, file, what)
    labels = np.asarray(numbers, dtype=np.int64)
    _check_labels(layout, file, labels)
    return pixels, labels


def _check_labels(layout: CifarLayout, file: str, labels: NDArray[np.int64]) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= layout.num_classes))
    if len(wrong):
        found = f"label {labels[wrong[0]]} in record {wrong[0]}"
        raise damaged(layout.name, file, f"{found}, expected 0 to {layout.num_classes - 1}")


def _stacked(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    pixels, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.from_numpy(labels)


def _class_names(content: bytes | None, num_classes: int) -> tuple[str, ...]:
    names = (content or b"").decode("latin-1").split()
    if len(names) != num_classes:
        return tuple(str(label) for label in range(num_classes))
    return tuple(names)
