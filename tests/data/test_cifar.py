"""CIFAR files in every layout, and damaged ones. The files are written byte by byte from the
published layout."""

import importlib.util
import os
import pickle
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import (
    RECORDS,
    SMALL,
    hostile_pickle,
    pack_tar,
    pixels,
    python2_cifar,
    write_cifar_binary,
    write_cifar_python,
)

from hessianflow import data
from hessianflow.data.cifar import read_cifar
from hessianflow.data.unpickle import load_arrays
from hessianflow.interfaces import HessianFlowError

BOTH = pytest.mark.parametrize("name", ["cifar10", "cifar100"])
PACK = Path(__file__).parents[3] / "shared" / "data" / "cifar10.py"


def expected_train(name: str) -> torch.Tensor:
    files = len(SMALL[name].binary_files["train"])
    return torch.from_numpy(np.concatenate([pixels(seed=number) for number in range(files)]))


@BOTH
@pytest.mark.parametrize("where", ["folder", "parent", "archive beside", "archive itself"])
def test_binary_version(name: str, where: str, tmp_path: Path) -> None:
    layout = SMALL[name]
    folder = write_cifar_binary(layout, tmp_path / "made")
    archive = pack_tar(folder, tmp_path / layout.binary_archive)
    root = {
        "folder": folder,
        "parent": folder.parent,
        "archive beside": tmp_path,
        "archive itself": archive,
    }[where]
    images, targets, classes = read_cifar(layout, root, "train")
    assert torch.equal(images, expected_train(name))
    assert images.dtype == torch.uint8
    assert targets.tolist() == list(range(RECORDS)) * (len(images) // RECORDS)
    assert classes == tuple(f"class{label}" for label in range(layout.num_classes))
    assert torch.equal(read_cifar(layout, root, "test")[0], torch.from_numpy(pixels(seed=100)))


@BOTH
@pytest.mark.parametrize("packed", [False, True])
def test_python_version_written_by_python_2(name: str, packed: bool, tmp_path: Path) -> None:
    layout = write_cifar_python(SMALL[name], tmp_path / "made")
    root = tmp_path / "made"
    if packed:
        pack_tar(root / layout.python_folder, tmp_path / layout.python_archive)
        root = tmp_path
    images, targets, classes = read_cifar(layout, root, "train")
    assert torch.equal(images, expected_train(name))
    assert targets.tolist() == list(range(RECORDS)) * (len(images) // RECORDS)
    assert classes[:2] == ("0", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            -1,
            (
                r"cifar-10-batches-bin/data_batch_3.bin: found 30729 bytes, expected 30730 bytes"
                r" \(10 records of 3073\)"
            ),
        ),
        (+5, r"data_batch_3.bin: found at least 30731 bytes, expected 30730 bytes"),
        (None, r"data_batch_3.bin: missing"),
    ],
)
def test_truncated_oversized_and_missing_files_are_named(
    change: int | None, message: str, tmp_path: Path
) -> None:
    file = write_cifar_binary(SMALL["cifar10"], tmp_path) / "data_batch_3.bin"
    content = file.read_bytes()
    if change is None:
        file.unlink()
    else:
        file.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(HessianFlowError, match=message) as caught:
        read_cifar(SMALL["cifar10"], tmp_path, "train")
    assert "get it with `hessianflow data fetch cifar10` or from https://www.cs.toronto.edu" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@BOTH
def test_a_label_out_of_range_is_located(name: str, tmp_path: Path) -> None:
    layout = SMALL[name]
    file = write_cifar_binary(layout, tmp_path) / layout.binary_files["test"][0]
    content = bytearray(file.read_bytes())
    content[4 * (layout.label_bytes + 3072) + layout.label_bytes - 1] = 200
    file.write_bytes(content)
    with pytest.raises(
        HessianFlowError, match=f"label 200 in record 4, expected 0 to {layout.num_classes - 1}"
    ):
        read_cifar(layout, tmp_path, "test")


def test_nothing_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        HessianFlowError,
        match=r"no cifar100 under .*; get it with `hessianflow data fetch cifar100`",
    ):
        data.load("cifar100", tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    layout = SMALL["cifar10"]
    archive = pack_tar(
        write_cifar_binary(layout, tmp_path / "made"), tmp_path / layout.binary_archive
    )
    archive.write_bytes(archive.read_bytes()[:40_000])
    with pytest.raises(
        HessianFlowError, match=r"cifar-10-binary.tar.gz: damaged archive \(EOFError"
    ):
        read_cifar(layout, tmp_path, "train")


def test_a_member_larger_than_it_may_be_is_not_read(tmp_path: Path) -> None:
    layout = SMALL["cifar10"]
    folder = write_cifar_binary(layout, tmp_path / "made")
    (folder / "test_batch.bin").write_bytes(b"\0" * 40_000)
    pack_tar(folder, tmp_path / layout.binary_archive)
    with pytest.raises(
        HessianFlowError, match=r"test_batch.bin has 40000 bytes, expected at most 30730"
    ):
        read_cifar(layout, tmp_path, "test")


def test_an_archive_without_the_files_is_named(tmp_path: Path) -> None:
    layout = SMALL["cifar10"]
    for name, folder in (
        (layout.binary_archive, layout.binary_folder),
        (layout.python_archive, layout.python_folder),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text("nothing of ours")
        root = tmp_path / name.removesuffix(".tar.gz")
        root.mkdir()
        pack_tar(tmp_path / folder, root / name)
        with pytest.raises(
            HessianFlowError,
            match=f"{name}: holds none of the files expected in its folder {folder}",
        ):
            read_cifar(layout, root, "test")


def test_an_archive_that_unpacks_without_end_is_cut_off(tmp_path: Path) -> None:
    """Real: 20 MB that become 20 GB of zeros. Here 60 MB, where twice the records and 16 MB are
    allowed."""
    layout = SMALL["cifar10"]
    folder = write_cifar_binary(layout, tmp_path / "made")
    (folder / "padding").write_bytes(bytes(60 << 20))
    pack_tar(folder, tmp_path / layout.binary_archive)
    with pytest.raises(
        HessianFlowError,
        match=r"cifar-10-binary.tar.gz: damaged archive \(.*more bytes than allowed",
    ):
        read_cifar(layout, tmp_path, "train")


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_what_is_no_plain_file_is_missing(what: str, tmp_path: Path) -> None:
    layout = SMALL["cifar10"]
    file = write_cifar_binary(layout, tmp_path) / "test_batch.bin"
    file.unlink()
    {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "folder": file.mkdir,
    }[what]()
    with pytest.raises(HessianFlowError, match=r"test_batch.bin: missing"):
        read_cifar(layout, tmp_path, "test")


def test_labels_of_a_pickle_that_are_none_are_refused(tmp_path: Path) -> None:
    layout = write_cifar_python(SMALL["cifar10"], tmp_path)
    for record, message in (
        ({"data": pixels(1).reshape(1, -1)}, "holds no list of labels named 'labels'"),
        (
            {"data": pixels(1).reshape(1, -1), "labels": [1 << 40]},
            "holds no list of labels named 'labels'",
        ),
        (
            {"data": pixels(1).reshape(1, -1), "labels": ["1"]},
            "holds no list of labels named 'labels'",
        ),
        (
            {"data": pixels(1).reshape(1, -1), "labels": [-1]},
            "label -1 in record 0, expected 0 to 9",
        ),
        ({"data": [1], "labels": [1]}, r"pixels are list, expected uint8 \(1, 3072\)"),
        ({"labels": [1]}, r"pixels are NoneType, expected uint8 \(1, 3072\)"),
    ):
        content = pickle.dumps(record, protocol=2)
        (tmp_path / layout.python_folder / "test_batch").write_bytes(content)
        sums = {
            **layout.python_files,
            "test": {"test_batch": md5(content, usedforsecurity=False).hexdigest()},
        }
        with pytest.raises(HessianFlowError, match=message):
            read_cifar(replace(layout, python_files=sums), tmp_path, "test")


def test_a_pickle_with_another_checksum_is_not_opened(tmp_path: Path) -> None:
    layout = write_cifar_python(SMALL["cifar10"], tmp_path)
    (tmp_path / layout.python_folder / "test_batch").write_bytes(hostile_pickle())
    with pytest.raises(HessianFlowError, match=r"test_batch: MD5 is \w+, expected \w+; not opened"):
        read_cifar(layout, tmp_path, "test")


def test_a_missing_pickle_is_named(tmp_path: Path) -> None:
    layout = write_cifar_python(SMALL["cifar10"], tmp_path)
    (tmp_path / layout.python_folder / "data_batch_2").unlink()
    with pytest.raises(HessianFlowError, match=r"cifar-10-batches-py/data_batch_2: missing"):
        read_cifar(layout, tmp_path, "train")


def test_a_pickle_of_other_arrays_is_refused(tmp_path: Path) -> None:
    layout = write_cifar_python(SMALL["cifar10"], tmp_path)
    content = python2_cifar(pixels(3), [0, 1], "labels")
    (tmp_path / layout.python_folder / "test_batch").write_bytes(content)
    sums = {
        **layout.python_files,
        "test": {"test_batch": md5(content, usedforsecurity=False).hexdigest()},
    }
    with pytest.raises(
        HessianFlowError, match=r"pixels are uint8 \(3, 3072\), expected uint8 \(2, 3072\)"
    ):
        read_cifar(replace(layout, python_files=sums), tmp_path, "test")


def test_a_hostile_pickle_runs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        HessianFlowError, match=r"a file: refused, the pickle would run (posix|nt)\.system"
    ):
        load_arrays(hostile_pickle(), "a file")
    assert "hostile" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}", b"garbage", b"\x80\x02cnumpy\ndtype\n(U\x02??tR."]
)
def test_a_damaged_pickle_is_named(content: bytes) -> None:
    with pytest.raises(HessianFlowError, match="a file: damaged pickle"):
        load_arrays(content, "a file")


def test_bytes_pickled_by_python_3_are_read_and_no_other_codec() -> None:
    assert load_arrays(pickle.dumps({"raw": b"\x00\xff"}, protocol=2), "a file") == {
        "raw": b"\x00\xff"
    }
    rot13 = b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR."
    with pytest.raises(HessianFlowError, match="unexpected encoding 'rot13'"):
        load_arrays(rot13, "a file")


@pytest.mark.skipif(
    not PACK.exists(), reason="the CIFAR-10 picture pack is not beside the repository"
)
def test_real_pictures_survive_the_binary_layout(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("cifar_pack", PACK)
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    pictures, labels = pack.load("train", 5 * RECORDS)
    layout = SMALL["cifar10"]
    folder = tmp_path / layout.binary_folder
    folder.mkdir()
    records = np.concatenate(
        [labels[:, None], pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)], axis=1
    )
    for name, part in zip(layout.binary_files["train"], np.split(records, 5), strict=True):
        part.tofile(folder / name)
    images, targets, _ = read_cifar(layout, tmp_path, "train")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pictures)
    assert targets.tolist() == labels.tolist()
