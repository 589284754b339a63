"""Tiny files in the official layouts, made on the spot."""

import io
import pickle
import tarfile
import zipfile
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from hessianflow.data.cifar import CIFAR10, CIFAR100, CifarLayout

RECORDS = 10
SMALL = {
    layout.name: replace(layout, records={"train": RECORDS, "test": RECORDS})
    for layout in (CIFAR10, CIFAR100)
}


def pixels(count: int = RECORDS, seed: int = 0) -> NDArray[np.uint8]:
    """Random images [count, 3, 32, 32]."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def write_cifar_binary(layout: CifarLayout, root: Path) -> Path:
    """Every file of the binary version; the label of record k is k (fine), the coarse one 3."""
    folder = root / layout.binary_folder
    folder.mkdir(parents=True)
    labels = np.arange(RECORDS, dtype=np.uint8)
    coarse = np.full((RECORDS, layout.label_bytes - 1), 3, dtype=np.uint8)
    for split, names in layout.binary_files.items():
        for number, name in enumerate(names):
            images = pixels(seed=number + (100 if split == "test" else 0)).reshape(RECORDS, -1)
            (folder / name).write_bytes(
                np.concatenate([coarse, labels[:, None], images], axis=1).tobytes()
            )
    (folder / layout.class_file).write_text(
        "".join(f"class{label}\n" for label in range(layout.num_classes))
    )
    return folder


def python2_array(array: NDArray[np.uint8]) -> bytes:
    """How Python 2 and an old NumPy pickled an array in protocol 2, opcode by opcode (no protocol
    header, no memo)."""
    shape = b"".join(
        b"K" + bytes([side]) if side < 256 else b"M" + side.to_bytes(2, "little")
        for side in array.shape
    )
    raw = array.tobytes()
    # dtype('u1', 0, 1) and its state
    dtype = (
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ"
        b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    state = (
        b"(K\x01(" + shape + b"t" + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    )
    return b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR" + state


def python2_cifar(images: NDArray[np.uint8], labels: list[int], label_key: str) -> bytes:
    """A batch file of the Python version: {"data": uint8 [n, 3072], label_key: list}."""
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    key = b"U" + bytes([len(label_key)]) + label_key.encode()
    body = (
        b"U\x04data" + python2_array(images.reshape(len(images), -1)) + key + b"](" + numbers + b"e"
    )
    return b"\x80\x02}(" + body + b"u."


def write_cifar_python(layout: CifarLayout, root: Path) -> CifarLayout:
    """Every file of the Python version; returns the layout with the MD5 sums of what was
    written."""
    folder = root / layout.python_folder
    folder.mkdir(parents=True)
    sums: dict[str, dict[str, str]] = {}
    for split, files in layout.python_files.items():
        sums[split] = {}
        for number, name in enumerate(files):
            images = pixels(seed=number + (100 if split == "test" else 0))
            content = python2_cifar(images, list(range(RECORDS)), layout.label_key)
            (folder / name).write_bytes(content)
            sums[split][name] = md5(content, usedforsecurity=False).hexdigest()
    return replace(layout, python_files=sums)


def pack_tar(folder: Path, archive: Path) -> Path:
    """A folder as a tar.gz with the folder's name in front."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


def pack_zip(folder: Path, archive: Path) -> Path:
    """A folder as a zip with the folder's name in front."""
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(folder.rglob("*")):
            packed.write(path, path.relative_to(folder.parent))
    return archive


def write_svhn(path: Path, count: int = RECORDS) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A .mat file with labels 1 to 10; returns images [count, 3, 32, 32] and labels as stored."""
    images, labels = pixels(count), (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]
    savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels}, do_compression=True)
    return images, labels


def jpeg(colour: tuple[int, int, int], side: int = 64, grey: bool = False) -> bytes:
    """A plain image of one colour as JPEG."""
    stream = io.BytesIO()
    image = Image.new("RGB", (side, side), colour)
    (image.convert("L") if grey else image).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_tiny_imagenet(root: Path, per_class: int = 3) -> Path:
    """Two classes, red n02 and blue n01, with one grey image in training."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n02\nn01\n")
    colours = {"n02": (250, 0, 0), "n01": (0, 0, 250)}
    rows = []
    for number, (wnid, colour) in enumerate(colours.items()):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for k in range(per_class):
            (images / f"{wnid}_{k}.JPEG").write_bytes(jpeg(colour, grey=k == 2))
        (folder / "val" / "images" / f"val_{number}.JPEG").write_bytes(jpeg(colour))
        rows.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    return folder


class Payload:
    """An object whose pickle runs a command when loaded carelessly."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("echo hostile",)


def hostile_pickle() -> bytes:
    """What an attacker would put in the place of a batch file."""
    return pickle.dumps({"data": Payload()}, protocol=2)
