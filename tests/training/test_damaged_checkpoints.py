"""A last checkpoint that holds anything but what was saved: the one before it is used, and the run
ends the same."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bright_or_dark
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, HessianFlowError, History
from hessianflow.adversarial import FGSM
from hessianflow.control import AdaBatch
from hessianflow.curvature import CurvatureProbe
from hessianflow.runs import checkpoints
from hessianflow.runs.states import TrainingState
from hessianflow.training import Reporting, Schedule

N, EPOCHS = 48, 4
Change = Callable[[dict[str, Any]], None]


def trainer(run_dir: Path | None) -> AdaptiveBatchTrainer:
    """With something of everything: momentum, schedule, controller, adversary, probe, batch
    normalisation."""
    torch.manual_seed(0)
    batches = bright_or_dark(N)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return AdaptiveBatchTrainer(
        model,
        batches,
        batches.examples(torch.arange(N)),
        optimizer=optimizer,
        schedule=Schedule(torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])),
        controller=AdaBatch(8, 32, every_epochs=2),
        adversary=FGSM(0.1, share=0.5, value_range=(0.0, 1.0)),
        probe=CurvatureProbe(model, F.cross_entropy, batches.sample(8), seed=0),
        loss_fn=F.cross_entropy,
        epochs=EPOCHS,
        run_dir=run_dir,
        reporting=Reporting(show_progress=False),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all epochs; its last checkpoint is of the end, the one before it of the epoch
    before."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer(folder).fit()
    (folder / "summary.json").unlink()
    return folder


def outcome(run_dir: Path) -> tuple[dict[str, torch.Tensor], History]:
    made = trainer(None)
    history = made.resume(run_dir)
    return made.model.state_dict(), history


def without_clocks(history: History) -> list[dict[str, Any]]:
    rows = [row for row in history.records if row["kind"] != "event"]
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def damaged(whole: Path, folder: Path, change: Change) -> Path:
    """A copy whose last checkpoint was changed and is again a well-formed file."""
    shutil.copytree(whole, folder)
    path = folder / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return folder


def assert_falls_back(whole: Path, folder: Path, case: object) -> None:
    expected = torch.load(whole / "checkpoints" / "last.pt", weights_only=True)["model"]
    weights, history = outcome(folder)
    [event] = history.of_kind("event")
    assert event["event"] == "fallback", case
    assert "continuing from previous.pt" in event["message"], case
    assert all(torch.equal(weights[name], expected[name]) for name in expected), case
    assert without_clocks(history) == without_clocks(History.load(whole)), case
    assert (folder / "checkpoints" / "last.damaged").exists(), case


OTHERS = {"none": None, "number": 5, "text": "x", "list": [1, [2]], "tensor": torch.ones(2)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["missing", *OTHERS])
def test_every_entry_is_checked_before_any_is_used(kind: str, whole: Path, tmp_path: Path):
    names = sorted(
        torch.load(whole / "checkpoints" / "last.pt", weights_only=True).keys()
        - {"format", "version"}
    )
    for name in names:

        def change(state: dict[str, Any], name: str = name) -> None:
            if kind == "missing" and name not in TrainingState.__optional_keys__:
                del state[name]
            else:
                state[name] = OTHERS.get(kind)

        if (name, kind) not in (
            ("optimizer_class", "text"),
            ("examples", "number"),
            ("updates", "number"),
        ):
            assert_falls_back(whole, damaged(whole, tmp_path / name, change), name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["missing", *OTHERS])
def test_the_state_of_every_part_is_checked(kind: str, whole: Path, tmp_path: Path):
    parts = torch.load(whole / "checkpoints" / "last.pt", weights_only=True)["parts"]
    for name in sorted(name for name, part in parts.items() if part):

        def change(state: dict[str, Any], name: str = name) -> None:
            if kind == "missing":
                for entry in list(state["parts"][name]):
                    del state["parts"][name][entry]
            else:
                state["parts"][name] = OTHERS[kind]

        # The size of a microbatch was given here, so what a search found is of no use.
        if (kind, name) != ("missing", "microbatch"):
            assert_falls_back(whole, damaged(whole, tmp_path / name, change), (kind, name))


def first_weight(state: dict[str, Any], change: Callable[[torch.Tensor], Any]) -> None:
    state["model"]["1.weight"] = change(state["model"]["1.weight"])


DAMAGES: dict[str, Change] = {
    "int8 weights": lambda s: first_weight(s, lambda w: w.to(torch.int8)),
    "weights of another shape": lambda s: first_weight(s, lambda w: w.T.contiguous()),
    "weights that are text": lambda s: first_weight(s, lambda w: "weights"),
    "infinite weights": lambda s: first_weight(s, lambda w: w / 0),
    "sparse weights": lambda s: first_weight(s, lambda w: w.to_sparse()),
    "quantized weights": lambda s: first_weight(
        s, lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)
    ),
    "no weights": lambda s: s["model"].clear(),
    "momentum of another shape": lambda s: s["optimizer"]["state"][0].update(
        momentum_buffer=torch.ones(3, 3)
    ),
    "momentum that is text": lambda s: s["optimizer"]["state"][0].update(momentum_buffer="x"),
    "momentum of no weight": lambda s: s["optimizer"]["state"].update(
        {99: {"momentum_buffer": torch.ones(1)}}
    ),
    "momentum that is a list": lambda s: s["optimizer"]["state"].update({0: [1]}),
    "a rate that is text": lambda s: s["optimizer"]["param_groups"][0].update(lr="x"),
    "momentum that is infinite": lambda s: s["optimizer"]["param_groups"][0].update(
        momentum=float("inf")
    ),
    "an option that is missing": lambda s: s["optimizer"]["param_groups"][0].pop("dampening"),
    "a flag that is a list": lambda s: s["optimizer"]["param_groups"][0].update(nesterov=[1]),
    "no parameter groups": lambda s: s["optimizer"].update(param_groups=[]),
    "groups that are numbers": lambda s: s["optimizer"].update(param_groups=[1]),
    "short generator": lambda s: s["generators"].update(torch=torch.zeros(3, dtype=torch.uint8)),
    "generator that is text": lambda s: s["generators"].update(torch="x"),
    "no generator": lambda s: s["generators"].pop("python"),
    "numpy's generator": lambda s: s["generators"].update(numpy={"bit_generator": "PCG64"}),
    "python's generator": lambda s: s["generators"].update(python=[3, [1], None]),
    "generator of a rank": lambda s: s["rank_generators"].append({"torch": 5}),
    "unknown counter": lambda s: s["counters"].update(zzz=1),
    "no counters": lambda s: s["counters"].clear(),
    "negative counter": lambda s: s["counters"].update(examples=-1),
    "counters that differ": lambda s: s.update(examples=s["examples"] + 8),
    "best that is text": lambda s: s["counters"].update(best="high"),
    "empty decision": lambda s: s["decision"].clear(),
    "batch of 0": lambda s: s["decision"].update(batch_size=0),
    "factor that is not finite": lambda s: s["decision"].update(lr_factor=float("nan")),
    "reason that is a list": lambda s: s["decision"].update(reason=[]),
    "seconds that are text": lambda s: s["seconds"].update(wall="x"),
    "classes that are numbers": lambda s: s["classes"].update(controller=5),
    "no class": lambda s: s["classes"].pop("controller"),
    "history of another length": lambda s: s.update(history_bytes=s["history_bytes"] - 1),
    "history longer than there is": lambda s: s.update(history_bytes=10**9),
    "very deep": lambda s: s["parts"].update(controller=nested(200)),
}


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("damage", DAMAGES)
def test_well_formed_and_wrong(damage: str, whole: Path, tmp_path: Path):
    assert_falls_back(whole, damaged(whole, tmp_path / "run", DAMAGES[damage]), damage)


@pytest.mark.parametrize("damage", ["int8 weights", "no counters", "momentum of another shape"])
def test_with_no_older_one_nothing_is_changed(damage: str, whole: Path, tmp_path: Path):
    folder = damaged(whole, tmp_path / "run", DAMAGES[damage])
    (folder / "checkpoints" / "previous.pt").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(HessianFlowError, match=r"checkpoint .*last\.pt: ") as caught:
        outcome(folder)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_part_that_cannot_be_put_back_changes_no_file(whole: Path, tmp_path: Path):
    """All checkpoints fail alike: the fault lies elsewhere, so none is set aside."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    made = trainer(None)

    def broken(state: Any) -> None:
        raise KeyError("gone")

    made.controller.load_state_dict = broken
    with pytest.raises(
        HessianFlowError, match=r"the checkpoint in .* cannot be put back: .* \(KeyError: 'gone'\)"
    ):
        made.resume(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_files_are_read_whole_before_they_are_used(whole: Path, tmp_path: Path):
    """One bit in the weights of a file that torch reads without complaint."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "checkpoints" / "last.pt"
    weight = torch.load(path, weights_only=True)["model"]["1.weight"]
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(bytes(content))
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["1.weight"], weight)
    with pytest.raises(HessianFlowError, match="does not fit its checksum"):
        checkpoints.load(path)
    assert_falls_back(whole, folder, "a flipped bit")
