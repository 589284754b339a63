"""Every argument of the trainer is refused in one line that names it, what it may be and what it
was."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError, History
from hessianflow.adversarial import FGSM
from hessianflow.control import ABS, ABSA, AdaBatch
from hessianflow.curvature import CurvatureProbe
from hessianflow.data import AdaptiveBatches
from hessianflow.optim import GradientMoments
from hessianflow.training import AfterEpoch, Checkpoints, Divergence, Passes, Reporting, Schedule

INPUTS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(3, (64,), generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(INPUTS, TARGETS)


def trainer(eval_data: Any = None, **options: Any) -> AdaptiveBatchTrainer:
    torch.manual_seed(0)
    model = options.pop("model", nn.Linear(4, 3))
    batches = options.pop("train_data", AdaptiveBatches(DATA, 16))
    settings: dict[str, Any] = {
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": 2,
        "reporting": Reporting(show_progress=False),
    }
    if "optimizer" not in options:
        settings["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    return AdaptiveBatchTrainer(model, batches, eval_data, **(settings | options))


REFUSED: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (
        lambda: {"schedule": Schedule(unit="step")},
        "Schedule.unit must be one of epoch, reference_batch, update, got 'step'",
    ),
    (
        lambda: {"passes": Passes(precision="fp8")},
        "Passes.precision must be one of float32, bf16, fp16, got 'fp8'",
    ),
    (
        lambda: {"passes": Passes(precision=torch.float16)},
        "Passes.precision must be one of float32, bf16, fp16, got torch.float16",
    ),
    (
        lambda: {"divergence": Divergence("skip")},
        "Divergence.mode must be one of stop, rollback, got 'skip'",
    ),
    (
        lambda: {"after_epoch": AfterEpoch(curvature="never")},
        r"AfterEpoch.curvature must be True .*, got 'never'",
    ),
    (lambda: {"epochs": 2.5}, "epochs must be a whole number >= 1, got 2.5"),
    (lambda: {"epochs": True}, "epochs must be a whole number >= 1, got True"),
    (lambda: {"epochs": 0}, "epochs must be a whole number >= 1, got 0"),
    (lambda: {"epochs": "3"}, "epochs must be a whole number >= 1, got '3'"),
    (
        lambda: {"passes": Passes(max_grad_norm=0)},
        "Passes.max_grad_norm must be a finite number > 0, got 0: use None for no clipping",
    ),
    (
        lambda: {"passes": Passes(max_grad_norm=-1.0)},
        "Passes.max_grad_norm must be a finite number > 0, got -1.0",
    ),
    (
        lambda: {"passes": Passes(max_grad_norm=float("nan"))},
        "Passes.max_grad_norm must be a finite number > 0, got nan",
    ),
    (
        lambda: {"passes": Passes(max_grad_norm=float("inf"))},
        "Passes.max_grad_norm must be a finite number > 0, got inf",
    ),
    (
        lambda: {"passes": Passes(max_grad_norm="1")},
        "Passes.max_grad_norm must be a finite number > 0, got '1'",
    ),
    (
        lambda: {"divergence": Divergence(max_loss_ratio=1)},
        "Divergence.max_loss_ratio must be a finite number > 1, got 1: use None for no limit to a",
    ),
    (
        lambda: {"passes": Passes(norm_batch_size=-4)},
        "Passes.norm_batch_size must be a whole number >= 0, got -4: use None for the reference",
    ),
    (
        lambda: {"passes": Passes(norm_batch_size=2.5)},
        "Passes.norm_batch_size must be a whole number >= 0, got 2.5",
    ),
    (
        lambda: {"schedule": Schedule(reference_batch_size=0)},
        "Schedule.reference_batch_size must be a whole number >= 1, got 0: use None for that of",
    ),
    (
        lambda: {"passes": Passes(microbatch_size=0)},
        "Passes.microbatch_size must be a whole number >= 1, got 0: use None for the default, or"
        ' "auto"',
    ),
    (
        lambda: {"passes": Passes(microbatch_size="largest")},
        "Passes.microbatch_size must be a whole number >= 1, got 'largest'",
    ),
    (
        lambda: {"checkpoints": Checkpoints(every_examples=0)},
        "Checkpoints.every_examples must be a whole number >= 1, got 0",
    ),
    (
        lambda: {"checkpoints": Checkpoints(every_minutes=-1)},
        "Checkpoints.every_minutes must be a finite number > 0, got -1",
    ),
    (
        lambda: {"checkpoints": Checkpoints(keep=0)},
        "Checkpoints.keep must be a whole number >= 1, got 0",
    ),
    (
        lambda: {"divergence": Divergence(max_rollbacks=-1)},
        "Divergence.max_rollbacks must be a whole number >= 0, got -1",
    ),
    (
        lambda: {"reporting": Reporting(show_progress="yes")},
        r"Reporting.show_progress must be True, False or None \(on a terminal\), got 'yes'",
    ),
    (
        lambda: {"controller": "absa"},
        r"controller cannot be 'absa', which lacks decision: pass one such as hf.control.ABSA",
    ),
    (
        lambda: {"controller": ABSA},
        "controller cannot be the class ABSA, which lacks an instance: pass one such as",
    ),
    (
        lambda: {"adversary": "fgsm"},
        "adversary cannot be 'fgsm', which lacks attack: pass one such as hf.adversarial.FGSM",
    ),
    (
        lambda: {"probe": DataLoader(DATA)},
        "probe cannot be a DataLoader, which lacks __call__: pass one such as hf.curvature",
    ),
    (
        lambda: {"observers": GradientMoments()},
        "observers must be a list, got a GradientMoments: put it into one",
    ),
    (
        lambda: {"observers": [lambda: None]},
        "observers cannot be a function, which lacks on_microbatch: pass one such as",
    ),
    (
        lambda: {"after_epoch": AfterEpoch(measurements=[lambda: {}])},
        "measurements cannot be a function, which lacks kind: pass one such as",
    ),
    (
        lambda: {"reporting": Reporting(sinks=[len])},
        "sinks cannot be a builtin_function_or_method, which lacks write: pass one such as",
    ),
    (
        lambda: {"checkpoints": Checkpoints(state=[nn.Linear(1, 1)])},
        r'state must name its objects, as {"average": average}, got a list',
    ),
    (
        lambda: {"checkpoints": Checkpoints(state={"source": torch.Generator()})},
        "state cannot be a Generator, which lacks state_dict: pass one such as",
    ),
    (lambda: {"passes": "bf16"}, r"passes must be a hf.training.Passes\(...\), got 'bf16'"),
    (
        lambda: {"divergence": Passes},
        r"divergence must be a hf.training.Divergence\(...\), got the class Passes",
    ),
    (lambda: {"transform": "crop"}, "transform must be a function, got 'crop'"),
    (lambda: {"loss_fn": "mse"}, "loss_fn must be a function, got 'mse'"),
    (
        lambda: {"after_epoch": AfterEpoch(before_evaluation=1)},
        "before_evaluation must be a function, got 1",
    ),
    (
        lambda: {"after_epoch": AfterEpoch(after_evaluation=[])},
        "after_evaluation must be a function, got a list",
    ),
    (
        lambda: {"model": lambda x: x, "optimizer": None},
        "model must be a torch.nn.Module, got a function",
    ),
    (
        lambda: {"train_data": DataLoader(DATA)},
        "train_data must be batches whose size can change, got a DataLoader",
    ),
    (
        lambda: {"eval_data": DATA},
        "eval_data must be batches .*, got a TensorDataset, which has single examples at best: use",
    ),
    (lambda: {"eval_data": 5}, r"eval_data must be batches \(inputs, targets\), got 5"),
    (
        lambda: {"eval_data": iter([DATA.tensors])},
        "eval_data must be iterated after every epoch, and a list_iterator allows it",
    ),
    (
        lambda: {"eval_data": (pair for pair in [DATA.tensors])},
        "and a generator allows it only once: use a list of",
    ),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED]
)
def test_refused_before_anything_is_trained(options: Callable[[], dict[str, Any]], message: str):
    with pytest.raises(HessianFlowError, match=message) as caught:
        trainer(**options())
    assert "\n" not in str(caught.value)


def test_examples_in_a_stream_are_no_batches():
    class Stream(IterableDataset[Any]):
        def __iter__(self):
            return iter(DATA)

    with pytest.raises(HessianFlowError, match="got a Stream, which has single examples at best"):
        trainer(Stream())
    assert trainer(DataLoader(DATA, batch_size=32), epochs=1).fit().epochs[0]["eval_loss"] > 0


def test_evaluation_on_the_training_stream_is_refused():
    batches = AdaptiveBatches(DATA, 16)
    with pytest.raises(
        HessianFlowError,
        match="eval_data are the training data themselves, which would lose their pla",
    ):
        trainer(batches, train_data=batches)


def test_numbers_of_numpy_are_numbers():
    history = trainer(
        epochs=np.int64(2),
        passes=Passes(max_grad_norm=np.float32(1.0), microbatch_size=np.int32(8)),
        checkpoints=Checkpoints(every_minutes=np.float64(1)),
    ).fit()
    assert history.summary["status"] == "finished"


def test_without_a_controller_the_adversary_attacks_its_share():
    history = trainer(adversary=FGSM(0.1, share=0.25, value_range=None)).fit()
    assert history.of_kind("event") == []
    assert {row["adversarial_share"] for row in history.epochs} == {0.25}


@pytest.mark.parametrize(
    ("share", "controller", "message"),
    [
        (0, None, "FGSM has a share of 0: it attacks nothing"),
        (
            0.5,
            ABS(16, 16),
            "ABS sets the adversary's share to 0: FGSM attacks nothing until that changes",
        ),
    ],
)
def test_an_adversary_that_attacks_nothing_is_said(share: float, controller: Any, message: str):
    adversary = FGSM(0.1, share=share, value_range=None)
    history = trainer(adversary=adversary, controller=controller).fit()
    assert [row["message"] for row in history.of_kind("event")] == [message]
    assert {row["adversarial_share"] for row in history.epochs} == {0.0}


def test_without_an_adversary_a_share_of_0_is_recorded():
    history = trainer(controller=AdaBatch(16, 32, every_epochs=1), epochs=3).fit()
    assert history.of_kind("event") == []
    rows = [*history.epochs, *history.of_kind("batch")]
    assert {row["adversarial_share"] for row in rows} == {0.0}


def test_absa_at_its_cap_stops_attacking_half_way_and_without_an_adversary_nothing_changes():
    attacked = trainer(
        adversary=FGSM(0.1, share=0.5, value_range=None), controller=ABSA(16, 16), epochs=4
    ).fit()
    assert [row["adversarial_share"] for row in attacked.epochs] == [0.5, 0.5, 0.0, 0.0]
    (row,) = attacked.of_kind("batch")
    assert (row["epoch"], row["adversarial_share"]) == (2, 0.0)
    assert row["reason"] == "adversarial share 0 from half of the 4 epochs on"
    assert trainer(controller=ABSA(16, 16), epochs=4).fit().of_kind("batch") == []


def test_a_probe_of_another_model_is_refused():
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    loss = nn.CrossEntropyLoss()
    probe = CurvatureProbe(other, loss, DATA.tensors)
    with pytest.raises(
        HessianFlowError, match="the probe measures another Linear than the model that is trained"
    ):
        trainer(model=model, probe=probe)
    trainer(model=model, probe=CurvatureProbe(model, loss, DATA.tensors))
    trainer(
        model=model, probe=CurvatureProbe(torch.compile(model, backend="eager"), loss, DATA.tensors)
    )
    # a part of it
    trainer(model=nn.Sequential(model), probe=CurvatureProbe(model, loss, DATA.tensors))
    trainer(
        model=model, probe=probe, checkpoints=Checkpoints(state={"average": other})
    )  # kept with the run, so known to it


def test_a_probe_of_somebody_else_is_taken_at_its_word():
    probe = SimpleNamespace(
        __call__=lambda: None, state_dict=dict, load_state_dict=lambda state: None
    )
    trainer(probe=probe)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    trainer(run_dir="~/runs/a").fit()
    assert not (tmp_path / "~").exists()
    assert History.load("~/runs/a").summary["status"] == "finished"
    assert trainer(epochs=3).resume("~/runs/a").summary["epochs"] == 3
    with pytest.raises(HessianFlowError, match="~nobodyofthatname/a: no home folder is known"):
        trainer(run_dir="~nobodyofthatname/a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"transform": lambda x, y, progress: None},
            r"the transform must return a pair \(inputs, targets\), got a N",
        ),
        (
            {"transform": lambda x, y, progress: {"x": x}},
            "the transform must return a pair .*, got a dict",
        ),
        (
            {"loss_fn": lambda o, t: nn.functional.cross_entropy(o, t).detach()},
            "the loss depends on nothing that is",
        ),
        (
            {"loss_fn": lambda o, t: torch.tensor(1.0), "passes": Passes(microbatch_size=3)},
            "the loss depends on nothing that is",
        ),
        ({"run_dir": 5}, "a path must be text or a Path, got 5"),
    ],
)
def test_what_shows_at_the_first_step_is_one_line(options: dict[str, Any], message: str):
    with pytest.raises(HessianFlowError, match=message):
        trainer(**options).fit()


def test_a_model_frozen_during_the_run_is_one_line():
    made = trainer(transform=lambda x, y, progress: (made.model.requires_grad_(False), (x, y))[1])
    with pytest.raises(
        HessianFlowError, match=r"the loss depends on nothing that is trained: .* all .* are frozen"
    ):
        made.fit()
