"""SVHN files in MATLAB's format, written by SciPy with a known content."""

import io
import math
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import RECORDS, write_svhn
from scipy.io import loadmat, savemat

from hessianflow import data
from hessianflow.data.matlab import mat_arrays
from hessianflow.data.svhn import read_svhn
from hessianflow.interfaces import HessianFlowError

SMALL = {"train": RECORDS, "test": RECORDS, "extra": RECORDS}


@pytest.mark.parametrize("split", ["train", "test", "extra"])
@pytest.mark.parametrize("below", ["", "svhn"])
def test_pictures_and_digits(split: str, below: str, tmp_path: Path) -> None:
    """Label 10 stands for the digit 0."""
    (tmp_path / below).mkdir(exist_ok=True)
    images, _ = write_svhn(tmp_path / below / f"{split}_32x32.mat")
    found, digits = read_svhn(tmp_path, split, records=SMALL)
    assert torch.equal(found, torch.from_numpy(images))
    assert digits.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert digits.dtype == torch.int64


def test_missing_file_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        HessianFlowError,
        match=r"no test_32x32.mat under .*; get it with `hessianflow data fetch svhn`",
    ):
        data.load("svhn", tmp_path, "test")
    with pytest.raises(
        HessianFlowError, match=r"no extra_32x32.mat under .*hessianflow data fetch svhn-extra"
    ):
        data.load("svhn", tmp_path, "extra")


def test_another_number_of_pictures_is_named(tmp_path: Path) -> None:
    write_svhn(tmp_path / "train_32x32.mat", count=7)
    expected = r"X is uint8 \(32, 32, 3, 7\), expected uint8 \(32, 32, 3, 73257\); get it with"
    with pytest.raises(HessianFlowError, match=expected):
        data.load("svhn", tmp_path)


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    savemat(
        path,
        {"X": np.zeros((32, 32, 3, RECORDS), np.uint8), "y": np.full((RECORDS, 1), 11, np.uint8)},
    )
    with pytest.raises(
        HessianFlowError, match="y holds 10 labels from 11 to 11, expected 10 from 1 to 10"
    ):
        read_svhn(tmp_path, "train", records=SMALL)


@pytest.mark.parametrize("label", [1.5, float("nan"), 0.0])
def test_labels_that_are_no_digits_are_refused(label: float, tmp_path: Path) -> None:
    labels = np.ones((RECORDS, 1))
    labels[3] = label
    savemat(
        tmp_path / "train_32x32.mat", {"X": np.zeros((32, 32, 3, RECORDS), np.uint8), "y": labels}
    )
    with pytest.raises(HessianFlowError, match="y holds 10 labels from"):
        read_svhn(tmp_path, "train", records=SMALL)


def test_labels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    pictures = np.zeros((32, 32, 3, RECORDS), np.uint8)
    savemat(tmp_path / "train_32x32.mat", {"X": pictures, "y": np.array(["a"] * RECORDS)})
    with pytest.raises(HessianFlowError, match=r"y holds .* labels of type"):
        read_svhn(tmp_path, "train", records=SMALL)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    write_svhn(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        HessianFlowError, match=r"train_32x32.mat: cannot be read \(.*\); get it with"
    ) as caught:
        read_svhn(tmp_path, "train", records=SMALL)
    assert "\n" not in str(caught.value)


def test_a_file_without_the_arrays_is_named(tmp_path: Path) -> None:
    savemat(tmp_path / "train_32x32.mat", {"Z": np.zeros(3)})
    with pytest.raises(HessianFlowError, match=r"train_32x32.mat: holds no array X; get it with"):
        read_svhn(tmp_path, "train", records=SMALL)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_numbers_are_read_as_scipy_reads_them(dtype: str, compressed: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = {
        f"x{number}": rng.integers(0, 100, shape).astype(dtype)
        for number, shape in enumerate([(1, 1), (3, 1), (1, 4), (2, 3, 4), (0, 3), (32, 32, 3, 5)])
    }
    others = {
        "text": "words",
        "cell": np.array([1, "a"], dtype=object),
        "struct": {"a": 1},
        "complex": np.ones(2) * 1j,
    }
    savemat(
        tmp_path / "a.mat", {**others, **made, "last": np.ones((2, 2))}, do_compression=compressed
    )
    expected = loadmat(tmp_path / "a.mat")
    kinds = {}
    with (tmp_path / "a.mat").open("rb") as file:
        for array in mat_arrays(file):
            kinds[array.name] = array.kind
            if array.name in made:
                found = array.read()
                assert (found.dtype, found.shape) == (
                    expected[array.name].dtype,
                    expected[array.name].shape,
                )
                assert np.array_equal(found, expected[array.name])
    assert kinds == {
        **{"text": "char", "cell": "cell", "struct": "struct", "complex": "complex"},
        **dict.fromkeys(made, np.dtype(dtype).name),
        "last": "float64",
    }


def element(kind: int, content: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(
    name: bytes, shape: tuple[int, ...], numbers: bytes, *, stored: int = 2, order: str = "<"
) -> bytes:
    flags = struct.pack(f"{order}II", 9, 0)
    sides = struct.pack(f"{order}{len(shape)}i", *shape)
    parts = [element(6, flags, order), element(5, sides, order), element(1, name, order)]
    return element(14, b"".join(parts) + element(stored, numbers, order), order)


def mat_file(*elements: bytes, order: str = "<") -> bytes:
    mark = {"<": b"IM", ">": b"MI"}[order]
    return (
        b"MATLAB 5.0 MAT-file".ljust(124)
        + struct.pack(f"{order}H", 0x0100)
        + mark
        + b"".join(elements)
    )


def packed(content: bytes, level: int = 9) -> bytes:
    data = zlib.compress(content, level)
    return struct.pack("<II", 15, len(data)) + data


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_orders_of_bytes(order: str) -> None:
    numbers = np.arange(6, dtype=f"{order}u2").tobytes()
    content = mat_file(matrix(b"X", (2, 3), numbers, stored=4, order=order), order=order)
    (array,) = list(mat_arrays(io.BytesIO(content)))
    with pytest.raises(EOFError):
        array.read()  # too late: the file has moved on
    first = next(mat_arrays(io.BytesIO(content)))
    assert first.read().tolist() == [[0, 2, 4], [1, 3, 5]]


BOMB = packed(
    matrix(b"X", (32, 32, 3, RECORDS), b"", stored=2)[:-8]
    + struct.pack("<II", 2, 1 << 30)
    + bytes(200 << 20)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "EOFError"),
        (b"x" * 128, "no MATLAB file of version 5"),
        (mat_file().replace(b"\x00\x01IM", b"\x00\x02IM"), "no MATLAB file of version 5"),
        (mat_file(), "holds no array X"),
        (mat_file(b"abc"), "EOFError"),
        (mat_file(element(99, b"x" * 8)), "an element of kind 99 where a matrix is expected"),
        (mat_file(BOMB), "the variable 'X' has 1073741824 bytes for 30720 numbers"),
        (
            mat_file(
                packed(matrix(b"X", (32, 32, 3, RECORDS), bytes(3072 * RECORDS)) + bytes(1 << 20))
            ),
            "more content",
        ),
        (
            mat_file(packed(matrix(b"X", (32, 32, 3, RECORDS), bytes(3072 * RECORDS)))[:-1]),
            "EOFError",
        ),
        (
            mat_file(matrix(b"X", (32, 32, 3, 1 << 30), b"")),
            "has 0 bytes for 3298534883328 numbers",
        ),
        (mat_file(matrix(b"X", (32, 32, 3, -RECORDS), b"")), "no proper flags or dimensions"),
        (
            mat_file(matrix(b"X", (1,) * 40, b"1")),
            "an element of 160 bytes where at most 128 are expected",
        ),
        (
            mat_file(matrix(b"X" * 1000, (1, 1), b"1")),
            "an element of 1000 bytes where at most 256 are expected",
        ),
        (mat_file(matrix(b"X", (8, 1), b"12345678", stored=17)), "stores its numbers as kind 17"),
        (mat_file(matrix(b"Z", (1, 1), b"1") * 1001), "more than 1000 variables"),
        (mat_file(packed(b"")), "EOFError"),
        (mat_file(struct.pack("<II", 15, 20) + b"?" * 20), "Error -3 while decompressing"),
    ],
)
def test_hostile_files_end_in_one_line_and_little_memory(
    content: bytes, words: str, tmp_path: Path
) -> None:
    """SciPy makes 3.5 GB of the bomb's 3 MB."""
    (tmp_path / "train_32x32.mat").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(HessianFlowError, match=words) as caught:
        read_svhn(tmp_path, "train", records=SMALL)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_a_header_that_lies_is_refused_before_the_numbers_are_read(tmp_path: Path) -> None:
    """Another number of labels, of pictures, or another type: nothing of them is unpacked."""
    for name, shape, what in (
        (b"X", (32, 32, 3, 1 << 20), r"X is uint8 \(32, 32, 3, 1048576\), expected uint8"),
        (
            b"y",
            (1 << 30, 1),
            "y holds 1073741824 labels of type uint8, expected 10 numbers from 1 to 10",
        ),
    ):
        content = matrix(name, shape, b"")[:-8] + struct.pack("<II", 2, math.prod(shape))
        (tmp_path / "train_32x32.mat").write_bytes(mat_file(content))
        with pytest.raises(HessianFlowError, match=what):
            read_svhn(tmp_path, "train", records=SMALL)


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_no_plain_file_is_not_opened(what: str, tmp_path: Path) -> None:
    file = tmp_path / "train_32x32.mat"
    {"pipe": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/zero")}[what]()
    with pytest.raises(HessianFlowError, match=r"no train_32x32.mat under"):
        read_svhn(tmp_path, "train", records=SMALL)
