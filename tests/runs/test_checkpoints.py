"""Checkpoints survive what happens to files, and never run code."""

import contextlib
import math
import os
import pickle
import random
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs import checkpoints
from hessianflow.training import checkpoint
from hessianflow.training.divergence import largest


def test_round_trip_is_exact_and_loads_without_code(tmp_path: Path):
    state = {
        "x": torch.randn(3),
        "n": 7,
        "nested": {"list": [1, 2.5, "s", None]},
        "o": OrderedDict(a=torch.ones(1)),
    }
    checkpoints.save(tmp_path / "checkpoints" / "last.pt", state)
    loaded = checkpoints.load(tmp_path / "checkpoints" / "last.pt")
    assert torch.equal(loaded["x"], state["x"])
    assert loaded["nested"] == state["nested"]
    assert (
        torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["format"]
        == checkpoints.FORMAT
    )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.pt"]


def test_the_one_before_is_kept_and_used_when_the_last_is_damaged(tmp_path: Path):
    last = tmp_path / "last.pt"
    for n in (1, 2, 3):
        checkpoints.save(last, {"n": n, "x": torch.zeros(1000), "history_bytes": 10 * n})
    assert checkpoints.load(tmp_path / "previous.pt")["n"] == 2
    state, name, warning = checkpoints.load_newest(tmp_path, 100)
    assert (state["n"], name, warning) == (3, "last.pt", None)
    last.write_bytes(last.read_bytes()[:1500])
    state, name, warning = checkpoints.load_newest(tmp_path, 100)
    assert (state["n"], name) == (2, "previous.pt")
    assert "last.pt" in warning
    assert "continuing from previous.pt" in warning


def test_a_checkpoint_later_than_the_history_is_passed_over(tmp_path: Path):
    """A power cut may keep the checkpoint and lose the end of the history."""
    for n in (1, 2, 3):
        checkpoints.save(tmp_path / "last.pt", {"n": n, "history_bytes": 10 * n}, keep=3)
    assert checkpoints.load_newest(tmp_path, 30)[0]["n"] == 3
    assert checkpoints.load_newest(tmp_path, 29)[0]["n"] == 2
    assert (tmp_path / "last.pt").exists(), "whoever goes on from an older one sets it aside"
    state, name, warning = checkpoints.load_newest(tmp_path, 10)
    assert (state["n"], name) == (1, "previous-2.pt")
    assert "had 30 bytes; it has 10 now: damaged; continuing from previous-2.pt" in warning
    with pytest.raises(HessianFlowError, match="had 30 bytes; it has 9 now: damaged"):
        checkpoints.load_newest(tmp_path, 9)
    checkpoints.set_aside(tmp_path)
    assert checkpoints.load(tmp_path / "last.damaged")["n"] == 3
    assert checkpoints.load_newest(tmp_path, 30)[0]["n"] == 2


def test_one_that_the_history_beside_it_does_not_fit_is_passed_over(tmp_path: Path):
    """Edited between two checkpoints: the older one still ends with a row."""
    folder = tmp_path / "checkpoints"
    for n in (1, 2):
        checkpoints.save(folder / "last.pt", {"n": n, "history_bytes": 10 * n})
    (tmp_path / "history.jsonl").write_bytes(b"x" * 9 + b"\n" + b"x" * 11 + b"\n")
    state, name, warning = checkpoints.load_newest(folder, 22)
    assert (state["n"], name) == (1, "previous.pt")
    assert "history.jsonl was changed after" in warning
    assert "byte 20 no longer ends a row" in warning


@pytest.mark.parametrize("made_at", [None, "12", -1, 1.5, torch.ones(2)])
def test_one_that_does_not_know_its_history_is_passed_over(made_at: object, tmp_path: Path):
    checkpoints.save(tmp_path / "last.pt", {"history_bytes": 1})
    checkpoints.save(tmp_path / "last.pt", {"history_bytes": made_at})
    assert checkpoints.load_newest(tmp_path, 10)[1] == "previous.pt"


def test_a_flipped_bit_is_found(tmp_path: Path):
    """Each in turn, over the weights' bytes and a few of the rest: torch would load most of
    them."""
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"x": torch.full((64,), -0.0495)})
    whole = path.read_bytes()
    at = whole.index(torch.full((64,), -0.0495).numpy().tobytes())
    for place in [*range(at, at + 256, 7), *range(0, len(whole), 97)]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x40
        path.write_bytes(bytes(damaged))
        # in a header that nothing reads a bit may be any
        with contextlib.suppress(HessianFlowError):
            assert torch.equal(checkpoints.load(path)["x"], torch.full((64,), -0.0495)), place
    damaged = bytearray(whole)
    damaged[at + 3] ^= 0x40
    path.write_bytes(bytes(damaged))
    with pytest.raises(
        HessianFlowError, match=r"damaged or foreign \(the record .* does not fit its checksum"
    ):
        checkpoints.load(path)


def test_a_bomb_of_compressed_zeros_is_not_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "last.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(HessianFlowError, match="its records are compressed"):
        checkpoints.load(tmp_path / "last.pt")


def test_a_file_that_may_not_be_read_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for n in (1, 2):
        checkpoints.save(tmp_path / "last.pt", {"n": n, "history_bytes": 0})

    def refusing(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoints, "_check_records", refusing)
    with pytest.raises(
        checkpoints.UnreadableError, match=r"last.pt cannot be read: Permission denied"
    ):
        checkpoints.load_newest(tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt"}


@pytest.mark.parametrize(
    "content", [pickle.dumps({"a": 1}), b"\x80\x02.", b"PK\x05\x06" + b"\0" * 18]
)
def test_a_foreign_file_is_refused_in_silence(
    content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "last.pt").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(HessianFlowError, match="cannot be read: damaged or foreign"):
            checkpoints.load(tmp_path / "last.pt")
    assert capfd.readouterr().err == ""


def test_two_names_of_one_file_leave_nothing_behind(tmp_path: Path):
    """As a kill between the last two renames of a save leaves them; renaming one to the other would
    do nothing."""
    checkpoints.save(tmp_path / "last.pt", {"n": 0})
    os.link(tmp_path / "last.pt", tmp_path / "previous.pt")
    checkpoints.save(tmp_path / "last.pt", {"n": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt"}
    assert [checkpoints.load(tmp_path / name)["n"] for name in ("last.pt", "previous.pt")] == [1, 0]


def test_any_number_may_be_kept(tmp_path: Path):
    """Names are looked at one by one, as far as there are files."""
    for n in range(4):
        checkpoints.save(tmp_path / "last.pt", {"n": n}, keep=10**12)
    names = ("last", "previous", "previous-2", "previous-3")
    assert [checkpoints.load(tmp_path / f"{name}.pt")["n"] for name in names] == [3, 2, 1, 0]


def test_a_gap_in_the_names_is_filled(tmp_path: Path):
    """As a kill between two of the renames leaves it."""
    for n in range(4):
        checkpoints.save(tmp_path / "last.pt", {"n": n}, keep=4)
    (tmp_path / "previous-2.pt").unlink()
    checkpoints.save(tmp_path / "last.pt", {"n": 4}, keep=4)
    names = ("last", "previous", "previous-2", "previous-3")
    assert [checkpoints.load(tmp_path / f"{name}.pt")["n"] for name in names] == [4, 3, 2, 0]


def test_so_many_are_kept(tmp_path: Path):
    for n in range(6):
        checkpoints.save(tmp_path / "last.pt", {"n": n}, keep=4)
    kept = {
        name: checkpoints.load(tmp_path / f"{name}.pt")["n"]
        for name in ("last", "previous", "previous-2", "previous-3")
    }
    assert kept == {"last": 5, "previous": 4, "previous-2": 3, "previous-3": 2}
    assert len(list(tmp_path.iterdir())) == 4


def test_numpy_scalars_become_plain_and_readable(tmp_path: Path):
    state = {
        "a": np.float64(0.1),
        "b": [np.int64(3), (np.float32(0.5),)],
        "c": {"d": np.bool_(True)},
    }
    checkpoints.save(tmp_path / "x.pt", {"state": checkpoint.plain(state)})
    assert checkpoints.load(tmp_path / "x.pt")["state"] == {
        "a": 0.1,
        "b": [3, (0.5,)],
        "c": {"d": True},
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_largest_value_sees_weights_and_buffers(value: float):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    tensors = [*model.parameters(), *model.buffers()]
    assert math.isfinite(largest(tensors))
    assert math.isfinite(largest([]))
    model[1].running_mean[1] = value
    assert not math.isfinite(largest(tensors))
    model[1].running_mean[1] = 0
    model[0].bias.data[0] = -value
    assert not math.isfinite(largest(tensors))


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 torn"])
def test_damaged_file_is_named_with_its_size(tmp_path: Path, content: bytes):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(
        HessianFlowError,
        match=rf"last.pt \({len(content)} bytes\) cannot be read: damaged or foreign",
    ):
        checkpoints.load_newest(tmp_path, 100)


def test_absent_file(tmp_path: Path):
    with pytest.raises(HessianFlowError, match="no checkpoint at"):
        checkpoints.load(tmp_path / "last.pt")


def test_foreign_file_of_torch(tmp_path: Path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "last.pt")
    with pytest.raises(HessianFlowError, match="not a hessianflow checkpoint"):
        checkpoints.load(tmp_path / "last.pt")


@pytest.mark.parametrize("version", [1, 99, "2", torch.ones(2)])
def test_other_version(tmp_path: Path, version: object):
    torch.save({"format": checkpoints.FORMAT, "version": version}, tmp_path / "last.pt")
    with pytest.raises(
        HessianFlowError, match=r"has checkpoint version .*, but this release reads 2"
    ):
        checkpoints.load(tmp_path / "last.pt")


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"format": checkpoints.FORMAT, "version": checkpoints.VERSION, "bomb": _Bomb()},
        tmp_path / "last.pt",
    )
    with pytest.raises(HessianFlowError, match="cannot be read"):
        checkpoints.load(tmp_path / "last.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(HessianFlowError, match="cannot be read"):
        checkpoints.load(tmp_path / "raw.pt")
    assert not (tmp_path / "exploded").exists()


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    last = tmp_path / "last.pt"
    checkpoints.save(last, {"n": 1})

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(HessianFlowError, match="No space left on device; older ones are intact"):
        checkpoints.save(last, {"n": 2})
    monkeypatch.undo()
    assert checkpoints.load(last)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_generators_come_back(tmp_path: Path):
    checkpoints.save(tmp_path / "g.pt", {"g": checkpoint.generator_states()})
    expected = (torch.rand(3), np.random.rand(3), random.random())
    checkpoint.restore_generators(checkpoints.load(tmp_path / "g.pt")["g"])
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (nn.Sequential(nn.Linear(3, 5)), r"'0.weight' has shape \[2, 3\] there, \[5, 3\] here"),
        (nn.Sequential(nn.Linear(3, 2, bias=False)), "only the checkpoint has '0.bias'"),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), "only the model has '1.weight'"),
        (nn.Sequential(nn.Linear(3, 2)).double(), "'0.weight' is float32 there, float64 here"),
    ],
    ids=["shape", "fewer", "more", "type"],
)
def test_another_model_is_named(other: nn.Module, match: str):
    state = nn.Sequential(nn.Linear(3, 2)).state_dict()
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(HessianFlowError, match=match):
        checkpoint.load_model(other, state, "x")
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_weights_that_are_not_finite_are_refused_and_buffers_may_be():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["1.running_var"][0] = float("inf")
    checkpoint.load_model(model, state, "x")
    state["0.bias"][1] = float("nan")
    with pytest.raises(HessianFlowError, match=r"model\.0\.bias holds numbers that are not finite"):
        checkpoint.load_model(model, state, "x")
