"""Class-folder trees and Tiny-ImageNet: indices, colours, sizes, crops, damaged files."""

import io
import os
import socket
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import jpeg, pack_zip, write_tiny_imagenet
from PIL import Image
from torch._utils import ExceptionWrapper

from hessianflow import data
from hessianflow.data.images import MAX_PIXELS, ImageError, ImageFolder, Normalise
from hessianflow.data.tiny_imagenet import TinyLayout, read_tiny_imagenet
from hessianflow.interfaces import HessianFlowError

SMALL = TinyLayout(num_classes=2, train_per_class=3, test_images=2)
RED, BLUE = (250, 0, 0), (0, 0, 250)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of plain colours, b red and a blue; sizes and suffixes differ."""
    for split, count in (("train", 6), ("val", 2)):
        for label, colour in (("b", RED), ("a", BLUE)):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                (folder / f"{k}.{'JPEG' if k % 2 else 'jpg'}").write_bytes(
                    jpeg(colour, side=20 + k)
                )
            (folder / "notes.txt").write_text("no image")
    return tmp_path


def folder_of(root: Path, split: str = "train", size: int = 16) -> ImageFolder:
    loaded = data.load("folder", root, split, image_size=size)  # type: ignore[arg-type]
    assert isinstance(loaded, ImageFolder)
    return loaded


def test_class_index_is_the_rank_of_the_folder_name(tree: Path) -> None:
    train, test = folder_of(tree), folder_of(tree, "test")
    assert (len(train), len(test), train.classes, train.num_classes) == (12, 4, ("a", "b"), 2)
    assert train.targets.tolist() == [0] * 6 + [1] * 6
    for index, channel in ((0, 2), (11, 0)):
        image, target = train[index]
        assert (image.dtype, tuple(image.shape), target) == (
            torch.uint8,
            (3, 16, 16),
            int(index > 5),
        )
        assert image[channel].min() > 240
        assert image[2 - channel].max() < 10
    assert train.input_shape == (3, 16, 16)


def test_central_crop_equals_resizing_then_cutting(tmp_path: Path) -> None:
    """Oracle: a horizontal ramp 0..255 over 256 columns; its central square of 224 keeps columns
    16..239."""
    (tmp_path / "test" / "only").mkdir(parents=True)
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "test" / "only" / "ramp.png")
    image, _ = folder_of(tmp_path, "test", size=224)[0]
    assert image[0, 0].tolist() == list(range(16, 240))


def test_random_crops_vary_by_the_global_generator_and_mirror_half(tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    ramp = np.broadcast_to(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (64, 128, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "train" / "only" / "ramp.png")
    train = folder_of(tmp_path, size=8)

    def crops() -> torch.Tensor:
        torch.manual_seed(0)
        return torch.stack([train[0][0] for _ in range(400)])

    first = crops()
    assert torch.equal(first, crops())
    rows = first[:, 0, 0].float()
    mirrored = (rows[:, 0] > rows[:, -1]).double().mean()
    assert abs(mirrored - 0.5) < 5 * 0.5 / 400**0.5
    # columns of the picture that a crop covers
    widths = (rows[:, -1] - rows[:, 0]).abs() / 2 * 8 / 7
    assert widths.min() < 50 < widths.max() < 128
    assert rows.min() < 20
    assert rows.max() > 235


def test_batches_are_normalised_and_resume(tree: Path) -> None:
    train = folder_of(tree)
    batches = train.batches(5, train=True, seed=1)
    inputs, targets = next(iter(batches))
    low, high = batches.value_range or (torch.zeros(3), torch.zeros(3))
    assert inputs.shape == (5, 3, 16, 16)
    assert (inputs >= low[:, None, None] - 1e-6).all()
    assert (inputs <= high[:, None, None] + 1e-6).all()
    resumed = train.batches(3, train=True, seed=1)
    resumed.load_state_dict(batches.state_dict())
    assert torch.equal(next(iter(resumed))[0], next(iter(batches))[0])
    plain = train.batches(20, train=False)
    assert torch.equal(next(iter(plain))[1], train.targets)
    assert torch.equal(plain.sample(4)[0], plain.sample(4)[0])
    assert len(targets) == 5


def test_normalise_equals_the_formula() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    normalise = Normalise((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), channels_last=True)
    inputs, _ = normalise((images, None))
    mean, std = (
        torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1),
        torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1),
    )
    torch.testing.assert_close(inputs, (images / 255 - mean) / std)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalise.value_range[1], ((1 - mean) / std).flatten())


def test_a_part_of_a_tree_keeps_all_classes(tree: Path) -> None:
    part = folder_of(tree).take(4)
    assert (len(part), part.num_classes, part.targets.tolist()) == (4, 2, [0, 0, 1, 1])
    assert part[3][1] == 1
    assert len(folder_of(tree).take(99)) == 12


def test_trees_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        HessianFlowError,
        match=r"no imagenet under .*: expected class folders such as .*train/CLASS",
    ):
        data.load("imagenet", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(HessianFlowError, match="train: no class folders in it"):
        data.load("imagenet", tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(
        HessianFlowError, match="cat: no image in this class folder; add some or remove it"
    ):
        data.load("imagenet", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", jpeg(RED)[:300]])
def test_a_broken_image_is_named(tree: Path, content: bytes) -> None:
    (tree / "train" / "a" / "0.jpg").write_bytes(content)
    with pytest.raises(
        HessianFlowError, match=r"a/0.jpg: cannot be decoded as an image .*; replace the file"
    ):
        folder_of(tree)[0]


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(hostile)"
    b" print\nshowpage\n%%EOF\n"
)
PICTURE = Image.fromarray(np.arange(3 * 20 * 20, dtype=np.uint8).reshape(20, 20, 3))


@pytest.mark.parametrize("form", ["EPS", "GIF", "TIFF", "ICO", "PDF", "JPEG2000"])
def test_a_format_that_no_suffix_promises_is_refused(
    tree: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostScript above all: Pillow would start Ghostscript on it. No program is started here at
    all."""

    def started(*arguments: object, **_: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr("subprocess.Popen.__init__", started)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    stream = io.BytesIO()
    if form == "EPS":
        stream.write(EPS)
    else:
        PICTURE.save(stream, form)
    (tree / "train" / "a" / "0.jpg").write_bytes(stream.getvalue())
    with pytest.raises(
        HessianFlowError,
        match=r"a/0.jpg: cannot be decoded as an image .it is none of JPEG, PNG, BMP, WEBP, PPM.;",
    ):
        folder_of(tree)[0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "PPM", "MPO"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "CMYK"])
def test_every_promised_format_is_read_under_any_suffix(tree: Path, form: str, mode: str) -> None:
    """ImageNet itself holds a PNG and some CMYK pictures named .JPEG. Oracle: Pillow without our
    limits."""
    stream = io.BytesIO()
    try:
        PICTURE.convert(mode).save(stream, form)
    except OSError:
        pytest.skip(f"Pillow writes no {mode} as {form}")
    (tree / "val" / "a" / "0.jpg").write_bytes(stream.getvalue())
    expected = np.array(Image.open(io.BytesIO(stream.getvalue())).convert("RGB"))
    found, _ = replace(folder_of(tree, "test"), size=20)[0]
    side = 20 / (256 / 224)
    box = ((20 - side) / 2,) * 2 + ((20 + side) / 2,) * 2
    resized = Image.fromarray(expected).resize((20, 20), Image.Resampling.BILINEAR, box=box)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(resized))


def test_classes_of_both_splits_are_those_of_train(tmp_path: Path) -> None:
    """A class without pictures for testing shifts no other: they used to be numbered by their own
    folders."""
    for split, labels in (("train", "abc"), ("val", "bc")):
        for label in labels:
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "0.png").write_bytes(jpeg(RED))
    test = folder_of(tmp_path, "test")
    assert (test.classes, test.num_classes, test.targets.tolist()) == (("a", "b", "c"), 3, [1, 2])
    assert folder_of(tmp_path).classes == test.classes
    (tmp_path / "val" / "B").mkdir()
    (tmp_path / "val" / "B" / "0.png").write_bytes(jpeg(RED))
    with pytest.raises(
        HessianFlowError,
        match=(
            r"val: 1 of 3 class folders are not among the 3 of .*train, the first is 'B': give both"
            r" splits"
        ),
    ):
        folder_of(tmp_path, "test")


def test_a_tree_for_testing_alone_has_its_own_classes(tmp_path: Path) -> None:
    (tmp_path / "test" / "x").mkdir(parents=True)
    (tmp_path / "test" / "x" / "0.png").write_bytes(jpeg(RED))
    assert folder_of(tmp_path, "test").classes == ("x",)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "has the name of an image but is no file"),
        ("pipe", "has the name of an image but is no file"),
        ("socket", "has the name of an image but is no file"),
        ("link to a device", "is a device, not a plain file"),
        ("link to a pipe", "is a named pipe, not a plain file"),
        ("link to a folder", "is a folder, not a plain file"),
        ("dangling link", r"cannot be read \(FileNotFoundError"),
        ("100 GB", r"larger than 268435456 bytes \(it has 107374182400\)"),
    ],
)
def test_what_is_no_plain_file_is_neither_opened_nor_read(
    tree: Path, kind: str, message: str
) -> None:
    path, aside = tree / "train" / "a" / "0.jpg", tree / "aside"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        {
            "folder": path.mkdir,
            "pipe": lambda: os.mkfifo(path),
            "socket": lambda: server.bind(os.path.relpath(path)),
            "link to a device": lambda: path.symlink_to("/dev/zero"),
            "link to a pipe": lambda: (os.mkfifo(aside), path.symlink_to(aside)),
            "link to a folder": lambda: path.symlink_to(tree),
            "dangling link": lambda: path.symlink_to(aside),
            "100 GB": lambda: (path.touch(), os.truncate(path, 100 << 30)),
        }[kind]()
        with pytest.raises(HessianFlowError, match=rf"a/0.jpg: {message}"):
            folder_of(tree)[0]


def test_a_link_to_an_image_is_read(tree: Path) -> None:
    path = tree / "train" / "a" / "0.jpg"
    path.rename(tree / "aside")
    path.symlink_to(tree / "aside")
    assert folder_of(tree)[0][0].shape == (3, 16, 16)


def test_an_error_from_a_loaders_process_is_one_line(tree: Path) -> None:
    """(Five seconds: so long torch's loader takes to end after an error.)"""
    train = folder_of(tree)
    path = tree / "train" / "a" / "0.jpg"
    path.unlink()
    with pytest.raises(HessianFlowError) as here:
        train[0]
    batches = train.batches(12, train=False, num_workers=1)
    with pytest.raises(HessianFlowError) as there:
        next(iter(batches))
    assert str(there.value) == str(here.value)
    assert str(here.value).startswith(f"{path}: cannot be ")
    assert "\n" not in str(here.value)


def test_of_what_a_loader_hands_on_the_first_words_are_kept() -> None:
    """Oracle: torch's own form of it."""
    try:
        try:
            raise OSError("the cause")
        except OSError as cause:
            raise ImageError("a/0.jpg: 9000x9000 pixels, ImageError: or not") from cause
    except ImageError:
        handed_on = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ImageError) as caught:
        handed_on.reraise()
    assert str(caught.value) == "a/0.jpg: 9000x9000 pixels, ImageError: or not"


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (9_000, f"9000x9000 pixels, more than the {MAX_PIXELS} allowed"),
        (20_000, "DecompressionBombError"),
    ],
)
def test_an_enormous_image_is_refused_before_decoding(tree: Path, side: int, message: str) -> None:
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    start = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big")
    (tree / "train" / "a" / "0.jpg").write_bytes(
        start + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    )
    with pytest.raises(HessianFlowError, match=message):
        folder_of(tree)[0]


def test_without_pillow_the_extra_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        HessianFlowError, match=r"image files need Pillow: pip install 'hessianflow\[images\]'"
    ):
        folder_of(tree)[0]


@pytest.mark.parametrize("where", ["folder", "parent", "archive beside", "archive itself"])
def test_tiny_imagenet(where: str, tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path / "made")
    archive = pack_zip(folder, tmp_path / "tiny-imagenet-200.zip")
    root = {
        "folder": folder,
        "parent": folder.parent,
        "archive beside": tmp_path,
        "archive itself": archive,
    }[where]
    images, targets, classes = read_tiny_imagenet(root, "train", layout=SMALL)
    assert (tuple(images.shape), images.dtype, classes) == (
        (6, 3, 64, 64),
        torch.uint8,
        ("n01", "n02"),
    )
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[0, 2].min() > 240
    assert images[0, 0].max() < 10
    assert torch.equal(images[2, 0], images[2, 2])  # grey, converted to three equal channels
    images, targets, _ = read_tiny_imagenet(root, "test", layout=SMALL)
    assert targets.tolist() == [1, 0]
    assert images[0, 0].min() > 240


def damage_tiny(folder: Path, what: str) -> None:
    if what == "classes":
        (folder / "wnids.txt").write_text("n01\n")
    elif what == "stranger":
        (folder / "wnids.txt").write_text("n01\nn03\n")
    elif what == "image":
        (folder / "train/n01/images/n01_1.JPEG").unlink()
    elif what == "size":
        (folder / "train/n01/images/n01_1.JPEG").write_bytes(jpeg(RED, side=32))
    elif what == "val":
        (folder / "val/images/val_0.JPEG").unlink()
    elif what == "tabs":
        (folder / "val/val_annotations.txt").write_text("val_0.JPEG n02\n")
    elif what == "outside":
        (folder / "val/val_annotations.txt").write_text("../../../secret.JPEG\tn02\t0\t0\t1\t1\n")


@pytest.mark.parametrize(
    ("what", "split", "message"),
    [
        ("classes", "train", "wnids.txt: found 1 classes, expected 2"),
        ("stranger", "train", "train: class 'n02' is not in wnids.txt"),
        ("image", "train", "train: found 5 images, expected 6"),
        ("size", "train", "n01_1.JPEG: image is 32x32, expected 64x64"),
        ("val", "test", "val/images/val_0.JPEG: missing"),
        ("tabs", "test", "val_annotations.txt: line .* has no tab between file and class"),
        ("outside", "test", "'../../../secret.JPEG' is not the name of a file"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_tiny_imagenet_is_named(
    what: str, split: str, message: str, zipped: bool, tmp_path: Path
) -> None:
    folder = write_tiny_imagenet(tmp_path / "made")
    damage_tiny(folder, what)
    root = pack_zip(folder, tmp_path / "tiny-imagenet-200.zip") if zipped else folder
    with pytest.raises(HessianFlowError, match=message):
        read_tiny_imagenet(root, split, layout=SMALL)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_large_picture_is_refused_before_it_is_decoded(zipped: bool, tmp_path: Path) -> None:
    """A hundred of 60 million pixels, one a thread, would need many gigabytes."""
    folder = write_tiny_imagenet(tmp_path / "made")
    stream = io.BytesIO()
    Image.new("L", (8000, 7500)).save(stream, "PNG")
    (folder / "train/n01/images/n01_1.JPEG").write_bytes(stream.getvalue())
    root = pack_zip(folder, tmp_path / "tiny-imagenet-200.zip") if zipped else folder
    tracemalloc.start()
    with pytest.raises(HessianFlowError, match=r"n01_1.JPEG: image is 8000x7500, expected 64x64"):
        read_tiny_imagenet(root, "train", layout=SMALL)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pipe", "n01_0.JPEG: is a named pipe, not a plain file"),
        ("device", "n01_0.JPEG: is a device, not a plain file"),
        ("folder", "n01_0.JPEG: is a folder, not a plain file"),
        ("large", r"n01_0.JPEG: larger than 1048576 bytes \(it has 107374182400\)"),
    ],
)
def test_what_is_no_plain_file_is_not_read_in_tiny_imagenet(
    what: str, message: str, tmp_path: Path
) -> None:
    folder = write_tiny_imagenet(tmp_path)
    path = folder / "train/n01/images/n01_0.JPEG"
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "large": lambda: (path.touch(), os.truncate(path, 100 << 30)),
    }[what]()
    with pytest.raises(HessianFlowError, match=message):
        read_tiny_imagenet(folder, "train", layout=SMALL)


def test_a_zip_of_a_hundred_gigabytes_is_refused(tmp_path: Path) -> None:
    """Sparse, with a last record that tells of a table of contents of 4 GB."""
    archive = tmp_path / "tiny-imagenet-200.zip"
    record = (
        b"PK\x05\x06"
        + bytes(4)
        + b"\x01\0\x01\0"
        + (0xFFFFFFF0).to_bytes(4, "little")
        + bytes(4)
        + bytes(2)
    )
    with archive.open("wb") as file:
        file.seek(100 << 30)
        file.write(record)
    with pytest.raises(
        HessianFlowError,
        match=r"damaged archive \(BadZipFile: a table of contents of 4294967280 bytes",
    ):
        read_tiny_imagenet(archive, "train", layout=SMALL)


def test_a_damaged_zip_is_named(tmp_path: Path) -> None:
    archive = pack_zip(write_tiny_imagenet(tmp_path / "made"), tmp_path / "tiny-imagenet-200.zip")
    content = bytearray(archive.read_bytes())
    position = content.index(b"n01_0.JPEG") + 40
    content[position : position + 50] = b"\0" * 50
    archive.write_bytes(content)
    with pytest.raises(HessianFlowError, match=r"n01_0.JPEG: damaged in the archive \(BadZipFile"):
        read_tiny_imagenet(tmp_path, "train", layout=SMALL)
    archive.write_bytes(b"nothing")
    with pytest.raises(
        HessianFlowError, match=r"tiny-imagenet-200.zip: damaged archive \(BadZipFile"
    ):
        read_tiny_imagenet(tmp_path, "train", layout=SMALL)
    archive.unlink()
    with pytest.raises(
        HessianFlowError, match=r"no tiny-imagenet under .*hessianflow data fetch tiny-imagenet"
    ):
        data.load("tiny-imagenet", tmp_path)


def test_a_member_that_is_too_large_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path / "made")
    (folder / "train/n01/images/n01_0.JPEG").write_bytes(b"\0" * ((1 << 20) + 1))
    archive = pack_zip(folder, tmp_path / "tiny-imagenet-200.zip")
    with pytest.raises(HessianFlowError, match=r"n01_0.JPEG: larger than 1048576 bytes"):
        read_tiny_imagenet(archive, "train", layout=SMALL)
