"""Data sets by name: the bundled digits against scikit-learn, the synthetic set, and bad names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import SMALL, write_cifar_binary
from sklearn.datasets import load_digits

from hessianflow import data
from hessianflow.data import ImageSet
from hessianflow.interfaces import HessianFlowError


def load(name: str, split: str = "train", root: Path | None = None) -> ImageSet:
    loaded = data.load(name, root, split)  # type: ignore[arg-type]
    assert isinstance(loaded, ImageSet)
    return loaded


def test_digits_are_those_of_scikit_learn_split_by_class() -> None:
    train, test = load("digits"), load("digits", "test")
    bunch = load_digits()
    assert (len(train), len(test)) == (1438, 359)
    rows = np.concatenate([split.images.reshape(len(split), 64).numpy() for split in (train, test)])
    labels = np.concatenate([split.targets.numpy() for split in (train, test)])
    found = sorted(map(tuple, np.column_stack([rows, labels]).tolist()))
    expected = sorted(map(tuple, np.column_stack([bunch.data, bunch.target]).astype(int).tolist()))
    assert found == expected
    for label in range(10):
        share = (test.targets == label).sum() / (bunch.target == label).sum()
        assert abs(share - 0.2) < 0.5 / 174


@pytest.mark.parametrize(("name", "tolerance"), [("digits", 5e-5), ("fake", 0.02)])
def test_mean_and_std_are_those_of_the_training_pixels(name: str, tolerance: float) -> None:
    train = load(name)
    pixels = train.images.double() / train.value_scale
    assert (pixels.mean((0, 2, 3)) - torch.tensor(train.mean).double()).abs().max() < tolerance
    assert (
        pixels.std((0, 2, 3), correction=0) - torch.tensor(train.std).double()
    ).abs().max() < tolerance


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_loading_is_deterministic_and_leaves_the_global_generators_alone(name: str) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
    first = load(name)
    np.random.rand()
    second = load(name)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.targets, second.targets)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
    load(name)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr,index]
    assert numpy_state is not None


def test_the_synthetic_set_can_be_learned_but_not_at_a_glance() -> None:
    """Nearest class mean, a linear rule, does well; a single pixel does not."""
    train, test = load("fake"), load("fake", "test")
    flat, held_out = (split.images.reshape(len(split), -1).float() for split in (train, test))
    means = torch.stack([flat[train.targets == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(held_out, means).argmin(1) == test.targets).double().mean()
    one_pixel = (
        (torch.cdist(held_out[:, :1], means[:, :1]).argmin(1) == test.targets).double().mean()
    )
    assert accuracy > 0.9
    assert one_pixel < 0.4


def test_cifar_by_name_from_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cifar10", "cifar100"):
        write_cifar_binary(SMALL[name], tmp_path)
        with pytest.raises(
            HessianFlowError, match=r"found 307.0 bytes, expected (30730000|153700000) bytes"
        ):  # the official record count is required
            load(name, root=tmp_path)
    read = data.datasets.read_cifar
    monkeypatch.setattr(
        data.datasets, "read_cifar", lambda layout, *rest: read(SMALL[layout.name], *rest)
    )
    train = load("cifar10", root=tmp_path)
    assert (train.num_classes, train.input_shape, len(train)) == (10, (3, 32, 32), 50)
    monkeypatch.setenv("HESSIANFLOW_DATA", str(tmp_path))
    assert load("cifar100", "test").num_classes == 100


def test_batches_are_ready_to_train_on() -> None:
    train = load("digits").take(100)
    batches = train.batches(32, train=True, seed=3, channels_last=True)
    inputs, _ = next(iter(batches))
    assert (batches.num_examples, batches.num_classes, inputs.shape) == (100, 10, (32, 1, 8, 8))
    plain = train.batches(200, train=False, dtype=torch.float64)
    inputs, targets = next(iter(plain))
    assert torch.equal(targets, train.targets)
    expected = (train.images.double() / 16 - train.mean[0]) / train.std[0]
    torch.testing.assert_close(inputs, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagenet"])
def test_names_are_listed(name: str) -> None:
    assert name in data.names()


def test_unknown_names_and_splits_are_answered() -> None:
    with pytest.raises(
        HessianFlowError,
        match=r"unknown data set 'cifar' \(did you mean cifar10\?\); known: cifar10,",
    ):
        load("cifar")
    with pytest.raises(HessianFlowError, match="unknown data set 'zzz'; known: cifar10"):
        load("zzz")
    with pytest.raises(
        HessianFlowError, match="split of digits must be one of train, test, got 'extra'"
    ):
        load("digits", "extra")
