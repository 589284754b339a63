"""Checkpoints survive what happens to files, and never run code."""

import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.training import checkpoint


def test_round_trip_is_exact_and_loads_without_code(tmp_path: Path):
    state = {"x": torch.randn(3), "n": 7, "nested": {"list": [1, 2.5, "s", None]}, "o": OrderedDict(a=torch.ones(1))}
    checkpoint.save(tmp_path / "checkpoints" / "last.pt", state)
    loaded = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert torch.equal(loaded["x"], state["x"])
    assert loaded["nested"] == state["nested"]
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["format"] == checkpoint.FORMAT
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.pt"]


def test_the_one_before_is_kept_and_used_when_the_last_is_damaged(tmp_path: Path):
    last = tmp_path / "last.pt"
    for n in (1, 2, 3):
        checkpoint.save(last, {"n": n, "x": torch.zeros(1000), "history_bytes": 10 * n})
    assert checkpoint.load(tmp_path / "previous.pt")["n"] == 2
    state, warning = checkpoint.load_newest(tmp_path, 100)
    assert (state["n"], warning) == (3, None)
    last.write_bytes(last.read_bytes()[:1500])
    state, warning = checkpoint.load_newest(tmp_path, 100)
    assert state["n"] == 2
    assert "last.pt" in warning
    assert "continuing from previous.pt" in warning


def test_a_checkpoint_later_than_the_history_is_passed_over(tmp_path: Path):
    """A power cut may keep the checkpoint and lose the end of the history."""
    for n in (1, 2, 3):
        checkpoint.save(tmp_path / "last.pt", {"n": n, "history_bytes": 10 * n}, keep=3)
    assert checkpoint.load_newest(tmp_path, 30)[0]["n"] == 3
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert checkpoint.load_newest(tmp_path, 29)[0]["n"] == 2
    assert (tmp_path / "last.damaged").exists(), "set aside, so that the next save does not move it over a good one"
    for path, content in files.items():
        path.write_bytes(content)
    state, warning = checkpoint.load_newest(tmp_path, 10)
    assert state["n"] == 1
    assert "had 30 bytes; it has 10 now: damaged; continuing from previous-2.pt" in warning
    for path, content in files.items():
        path.write_bytes(content)
    with pytest.raises(HessianFlowError, match="had 30 bytes; it has 9 now: damaged"):
        checkpoint.load_newest(tmp_path, 9)


def test_so_many_are_kept(tmp_path: Path):
    for n in range(6):
        checkpoint.save(tmp_path / "last.pt", {"n": n}, keep=4)
    kept = {
        name: checkpoint.load(tmp_path / f"{name}.pt")["n"] for name in ("last", "previous", "previous-2", "previous-3")
    }
    assert kept == {"last": 5, "previous": 4, "previous-2": 3, "previous-3": 2}
    assert len(list(tmp_path.iterdir())) == 4


def test_numpy_scalars_become_plain_and_readable(tmp_path: Path):
    state = {"a": np.float64(0.1), "b": [np.int64(3), (np.float32(0.5),)], "c": {"d": np.bool_(True)}}
    checkpoint.save(tmp_path / "x.pt", {"state": checkpoint.plain(state)})
    assert checkpoint.load(tmp_path / "x.pt")["state"] == {"a": 0.1, "b": [3, (0.5,)], "c": {"d": True}}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_all_finite_sees_weights_and_buffers(value: float):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    tensors = [*model.parameters(), *model.buffers()]
    assert checkpoint.all_finite(tensors)
    assert checkpoint.all_finite([])
    model[1].running_mean[1] = value
    assert not checkpoint.all_finite(tensors)
    model[1].running_mean[1] = 0
    model[0].bias.data[0] = -value
    assert not checkpoint.all_finite(tensors)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 torn"])
def test_damaged_file_is_named_with_its_size(tmp_path: Path, content: bytes):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(HessianFlowError, match=rf"last.pt \({len(content)} bytes\) cannot be read: damaged or foreign"):
        checkpoint.load_newest(tmp_path, 100)


def test_absent_file(tmp_path: Path):
    with pytest.raises(HessianFlowError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "last.pt")


def test_foreign_file_of_torch(tmp_path: Path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "last.pt")
    with pytest.raises(HessianFlowError, match="not a hessianflow checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("version", [1, 99])
def test_other_version(tmp_path: Path, version: int):
    torch.save({"format": checkpoint.FORMAT, "version": version}, tmp_path / "last.pt")
    with pytest.raises(HessianFlowError, match=f"version {version}, this release reads 2"):
        checkpoint.load(tmp_path / "last.pt")


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "bomb": _Bomb()}, tmp_path / "last.pt")
    with pytest.raises(HessianFlowError, match="cannot be read"):
        checkpoint.load(tmp_path / "last.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(HessianFlowError, match="cannot be read"):
        checkpoint.load(tmp_path / "raw.pt")
    assert not (tmp_path / "exploded").exists()


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    last = tmp_path / "last.pt"
    checkpoint.save(last, {"n": 1})

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(HessianFlowError, match="No space left on device; older ones are intact"):
        checkpoint.save(last, {"n": 2})
    monkeypatch.undo()
    assert checkpoint.load(last)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_generators_come_back(tmp_path: Path):
    checkpoint.save(tmp_path / "g.pt", {"g": checkpoint.generator_states()})
    expected = (torch.rand(3), np.random.rand(3), random.random())
    checkpoint.restore_generators(checkpoint.load(tmp_path / "g.pt")["g"])
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (nn.Sequential(nn.Linear(3, 5)), r"'0.weight' has shape \[2, 3\] there, \[5, 3\] here"),
        (nn.Sequential(nn.Linear(3, 2, bias=False)), "only the checkpoint has '0.bias'"),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), "only the model has '1.weight'"),
    ],
    ids=["shape", "fewer", "more"],
)
def test_another_model_is_named(other: nn.Module, match: str):
    state = nn.Sequential(nn.Linear(3, 2)).state_dict()
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(HessianFlowError, match=match):
        checkpoint.load_model(other, state, "x")
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
