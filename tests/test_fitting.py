"""Image files of one's own: how many there are and how large they are decides what a preset cannot
know."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hessianflow import History
from hessianflow.cli import main
from hessianflow.config import TrainConfig
from hessianflow.data.image_files import training_images, usual_side
from hessianflow.measurements import first_products
from hessianflow.parts import build_parts, load_config
from hessianflow.resolve import fitted, resolve

Image = pytest.importorskip("PIL.Image")


def images(root: Path, count: int, side: int, split: str = "train", classes: int = 2) -> None:
    for index in range(count):
        folder = root / split / f"c{index % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(
            0, 256, (side, side + index % 3, 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """24 training and 6 test images of 12 pixels."""
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "tree", 24, 12)
    images(tmp_path / "tree", 6, 12, "val")
    threads = torch.get_num_threads()
    yield tmp_path / "tree"
    torch.set_num_threads(threads)


def test_open_settings_are_those_of_the_files(tree: Path):
    config = resolve(fitted(TrainConfig(data="folder", data_dir=str(tree), batch_size=8)))
    assert (config.max_batch_size, config.probe_examples, config.image_size) == (24, 24, 12)
    given = TrainConfig(
        data="folder",
        data_dir=str(tree),
        batch_size=8,
        max_batch_size=16,
        image_size=20,
        probe_examples=4,
    )
    assert fitted(given) == given
    few = fitted(TrainConfig(data="folder", data_dir=str(tree), batch_size=8, train_examples=10))
    assert (few.max_batch_size, few.probe_examples) == (10, 10)
    assert fitted(TrainConfig(data="digits")) == TrainConfig(data="digits")
    imagenet = fitted(TrainConfig(data="imagenet", data_dir=str(tree), batch_size=8))
    assert (imagenet.image_size, imagenet.max_batch_size) == (224, 24)


def test_the_size_of_a_folder_that_is_not_there_is_the_preset(tmp_path: Path):
    for config in (
        TrainConfig(data="folder"),
        TrainConfig(data="folder", data_dir=str(tmp_path / "nowhere")),
    ):
        assert (fitted(config).image_size, fitted(config).max_batch_size) == (224, None)
        assert resolve(config).image_size == 224


def test_resolutions_end_with_the_size_of_the_files(tree: Path):
    config = resolve(
        fitted(TrainConfig(data="folder", data_dir=str(tree), batch_size=8, resolution="cyclic"))
    )
    assert (config.resolutions, config.image_size) == ((9, 12), 12)
    chosen = fitted(
        TrainConfig(data="folder", data_dir=str(tree), resolution="once", resolutions=(16, 32))
    )
    assert resolve(chosen).image_size == 32


def test_most_files_count_and_what_is_none_is_passed_over(tree: Path):
    """Two large ones, a text, a pipe and a link to nowhere among them change nothing; none is
    waited for."""
    folder = tree / "train" / "c0"
    for name in ("large1.png", "large2.png"):
        Image.new("RGB", (400, 300)).save(folder / name)
    (folder / "text.png").write_text("no image")
    os.mkfifo(folder / "pipe.png")
    (folder / "lost.png").symlink_to("nowhere")
    began = time.monotonic()
    files = training_images(tree, 1000)
    assert len(files) == 29
    assert usual_side(files, 224) == 12
    assert len(training_images(tree, 5)) == 5
    assert time.monotonic() - began < 5


def test_large_images_are_cut_to_the_preset(tmp_path: Path):
    images(tmp_path, 2, 300)
    assert usual_side(training_images(tmp_path, 10), 224) == 224
    assert usual_side([], 224) == 224


def test_a_run_on_few_images_spends_little_on_its_first_reading(tree: Path, capsys):
    """48 gradients of an example in all, where a reading could take 100 products of 24: it is left
    out, and said."""
    options = [
        "--data",
        "folder",
        "--data-dir",
        str(tree),
        "--model",
        "resnet8",
        "--batch-size",
        "8",
        "--epochs",
        "2",
    ]
    assert main(["train", *options, "--plots", "false", "--run-dir", "run"]) == 0
    assert (
        "no curvature was measured: the first reading may cost at most a quarter of the"
        in capsys.readouterr().out
    )
    history = History.load("run")
    assert history.curvature == []
    assert [row["event"] for row in history.of_kind("event")] == ["budget"]
    settings = history.config["settings"]
    assert (settings["image_size"], settings["max_batch_size"]) == (12, 24)
    assert (
        main(
            ["train", *options, "--plots", "false", "--run-dir", "all", "--curvature-budget", "100"]
        )
        == 0
    )
    assert len(History.load("all").curvature) == 2
    assert main(["train", *options, "--max-batch-size", "25"]) == 2
    assert (
        "--max-batch-size 25 is larger than the 24 training examples of folder"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("settings", "products"),
    [
        # (90 * 50,000 / 4 / 64 - 1) / 2: no bound in effect, a call takes 100 at most
        ({"data": "cifar10"}, 8788),
        ({"data": "cifar10", "epochs": 5, "curvature_budget": 0.5}, 976),
        ({"data": "digits"}, None),  # no budget
    ],
)
def test_the_first_reading_may_take_a_quarter_of_the_run_or_what_the_budget_allows(
    settings, products: int | None
):
    config = resolve(TrainConfig(precision="float32", **settings))
    assert first_products(config, 64, 50_000) == products


def test_too_few_products_for_a_reading_are_none():
    config = resolve(TrainConfig(data="cifar10", precision="float32", epochs=1))
    assert first_products(config, 64, 2800) == 0  # (2,800 / 4 / 64 - 1) / 2 = 4.97
    assert first_products(config, 64, 2816) == 5


def test_images_are_not_cropped_where_that_is_not_wanted(tree: Path):
    """Twice through the training set: the same pixels, in another order."""
    shown = []
    for augment in (True, False):
        config = TrainConfig(
            data="folder", data_dir=str(tree), batch_size=8, augment=augment, model="resnet8"
        )
        parts = build_parts(resolve(fitted(config)))
        shown.append(
            [
                torch.cat([inputs for inputs, _ in parts.train]).sum(dim=(1, 2, 3)).sort().values
                for _ in "ab"
            ]
        )
    assert not torch.allclose(*shown[0])
    assert torch.allclose(*shown[1])


def test_a_run_in_the_words_of_before_fits_its_files_too(tree: Path):
    recorded = {"data": "folder", "data_dir": str(tree), "batch_size": 8, "patience": 3}
    (tree / "config.json").write_text(json.dumps({"settings": recorded}))
    config = load_config(tree)
    assert (config.max_batch_size, config.image_size) == (24, 12)
    assert config.controller.options["patience"] == 3
