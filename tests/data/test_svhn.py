"""SVHN files in MATLAB's format, written by SciPy with a known content."""

from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import RECORDS, write_svhn
from scipy.io import savemat

from hessianflow import data
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
        HessianFlowError, match=r"no test_32x32.mat under .*; get it with `hessianflow data fetch svhn`"
    ):
        data.load("svhn", tmp_path, "test")
    with pytest.raises(HessianFlowError, match=r"no extra_32x32.mat under .*hessianflow data fetch svhn-extra"):
        data.load("svhn", tmp_path, "extra")


def test_another_number_of_pictures_is_named(tmp_path: Path) -> None:
    write_svhn(tmp_path / "train_32x32.mat", count=7)
    expected = r"X is uint8 \(32, 32, 3, 7\), expected uint8 \(32, 32, 3, 73257\); get it with"
    with pytest.raises(HessianFlowError, match=expected):
        data.load("svhn", tmp_path)


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    savemat(path, {"X": np.zeros((32, 32, 3, RECORDS), np.uint8), "y": np.full((RECORDS, 1), 11, np.uint8)})
    with pytest.raises(HessianFlowError, match="y holds 10 labels from 11 to 11, expected 10 from 1 to 10"):
        read_svhn(tmp_path, "train", records=SMALL)


@pytest.mark.parametrize("label", [1.5, float("nan"), 0.0])
def test_labels_that_are_no_digits_are_refused(label: float, tmp_path: Path) -> None:
    labels = np.ones((RECORDS, 1))
    labels[3] = label
    savemat(tmp_path / "train_32x32.mat", {"X": np.zeros((32, 32, 3, RECORDS), np.uint8), "y": labels})
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
    with pytest.raises(HessianFlowError, match=r"train_32x32.mat: cannot be read \(.*\); get it with") as caught:
        read_svhn(tmp_path, "train", records=SMALL)
    assert "\n" not in str(caught.value)


def test_a_file_without_the_arrays_is_named(tmp_path: Path) -> None:
    savemat(tmp_path / "train_32x32.mat", {"Z": np.zeros(3)})
    with pytest.raises(HessianFlowError, match=r"train_32x32.mat: cannot be read \(KeyError: 'X'\)"):
        read_svhn(tmp_path, "train", records=SMALL)
