"""What a checkpoint must hold: everything that the next step depends on and that the trainer can
reach.

The oracle is the uninterrupted run, bit for bit; a run is stopped by a request in the middle of an
epoch.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, Decision, HessianFlowError
from hessianflow.adversarial import FGSM, PGD, ConcurrentAdversary
from hessianflow.control import ABSA, AdaBatch, CriticalBatch, FixedBatch
from hessianflow.control.rate_rule import RateRule
from hessianflow.data import AdaptiveBatches
from hessianflow.optim import SAM, Extrapolation, GradientMoments
from hessianflow.runs import checkpoints
from hessianflow.training import Checkpoints, Divergence, Reporting, Schedule

INPUTS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(3, (64,), generator=torch.Generator().manual_seed(1))
STOP = 10  # of 16 updates, in the third of 4 epochs

Prepared = tuple[dict[str, Any], Callable[[], list[Tensor]]]
"""Options of a trainer, and what must be equal at the end."""


class Stopping(AdaptiveBatches):
    """Calls for a stop as it hands out a batch."""

    stop_at, handed_out, stop = -1, 0, staticmethod(lambda: None)

    def __iter__(self):
        for batch in super().__iter__():
            self.handed_out += 1
            if self.handed_out == self.stop_at:
                self.stop()
            yield batch


def trainer(prepare: Callable[[], Prepared], stop_at: int = -1, **further: Any) -> Any:
    torch.manual_seed(0)
    options, result = prepare()
    model, data = options.pop("model"), Stopping(TensorDataset(INPUTS, TARGETS), 16)
    settings: dict[str, Any] = {
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": 4,
        "reporting": Reporting(show_progress=False),
    }
    made = AdaptiveBatchTrainer(model, data, **(settings | options | further))
    data.stop_at, data.stop = stop_at, made.request_stop
    return made, result


def check_resumed(prepare: Callable[[], Prepared], folder: Path) -> AdaptiveBatchTrainer:
    whole, expected = trainer(prepare)
    whole.fit()
    trainer(prepare, STOP, run_dir=folder)[0].fit()
    again, found = trainer(prepare)
    again.resume(folder)
    assert len(found()) == len(expected())
    for mine, other in zip(found(), expected(), strict=True):
        assert torch.equal(mine, other)
    return again


def sgd(parameters: Any, lr: float = 0.5) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def tensors(*modules: nn.Module) -> Callable[[], list[Tensor]]:
    return lambda: [t for module in modules for t in module.state_dict().values()]


def averaged() -> Prepared:
    model = nn.Linear(4, 3)
    optimizer = sgd(model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    return {
        "model": model,
        "optimizer": optimizer,
        "checkpoints": Checkpoints(state={"average": average}),
    }, tensors(model, average)


class Noise:
    """A generator of its own, as a state that plain tensors can hold."""

    def __init__(self) -> None:
        self.source = torch.Generator().manual_seed(3)

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self.source.set_state(state["source"])


class NoisyTransform(Noise):
    def __call__(self, inputs, targets, progress):
        return inputs + torch.randn(inputs.shape, generator=self.source), targets


def stateful_transform() -> Prepared:
    model = nn.Linear(4, 3)
    return {
        "model": model,
        "optimizer": sgd(model.parameters()),
        "transform": NoisyTransform(),
    }, tensors(model)


def state_of_the_user() -> Prepared:
    model, noise = nn.Linear(4, 3), Noise()

    def transform(inputs, targets, progress):
        return inputs + torch.randn(inputs.shape, generator=noise.source), targets

    options = {
        "model": model,
        "optimizer": sgd(model.parameters()),
        "checkpoints": Checkpoints(state={"noise": noise}),
        "transform": transform,
    }
    return options, tensors(model)


def parameter_of_the_optimizer_alone() -> Prepared:
    """A temperature in a loss that is a function."""
    model, heat = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.0))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs * heat, targets)

    options = {"model": model, "optimizer": sgd([*model.parameters(), heat]), "loss_fn": loss}
    return options, lambda: [*tensors(model)(), heat.detach()]


class LearnedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heat = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.tensor(0.0))

    def forward(self, outputs, targets):
        self.seen += 1
        return nn.functional.cross_entropy(outputs * self.heat / (1 + 0.01 * self.seen), targets)


def module_as_a_loss() -> Prepared:
    model, loss = nn.Linear(4, 3), LearnedLoss()
    options = {
        "model": model,
        "optimizer": sgd([*model.parameters(), *loss.parameters()]),
        "loss_fn": loss,
    }
    return options, tensors(model, loss)


class LateBuffer(nn.Module):
    """Makes a buffer in its first pass, and goes on with it; another one is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("passes", torch.tensor(0.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.ones(4))
        if self.training:
            self.cache.mul_(0.99)
            self.passes += 1
        return self.linear(x * self.cache) / (1 + 0.01 * self.passes)


def late_and_transient_buffers() -> Prepared:
    model = nn.Sequential(LateBuffer())
    return {"model": model, "optimizer": sgd(model.parameters())}, tensors(model)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


class OnceAfterTheFirstEpoch:
    """A sink that changes something when the first epoch is over, and never again: a resumed run
    does not call it."""

    def __init__(self, change: Callable[[], Any]) -> None:
        self.change = change

    def write(self, row: Any) -> None:
        if row["kind"] == "epoch" and row["epoch"] == 1:
            self.change()

    def close(self) -> None:
        pass


def unfrozen_once() -> Prepared:
    model = layers()
    model[0].requires_grad_(False)
    sink = OnceAfterTheFirstEpoch(lambda: model[0].requires_grad_(True))
    options = {
        "model": model,
        "optimizer": sgd(model.parameters()),
        "reporting": Reporting(sinks=[sink]),
    }
    return options | {"observers": [GradientMoments(accumulate=True)]}, tensors(model)


def frozen_once() -> Prepared:
    model = layers()
    sink = OnceAfterTheFirstEpoch(lambda: model[0].requires_grad_(False))
    return {
        "model": model,
        "optimizer": sgd(model.parameters()),
        "reporting": Reporting(sinks=[sink]),
    }, tensors(model)


def statistics_held_once() -> Prepared:
    model = layers()
    sink = OnceAfterTheFirstEpoch(model[1].eval)
    return {
        "model": model,
        "optimizer": sgd(model.parameters()),
        "reporting": Reporting(sinks=[sink]),
    }, tensors(model)


def group_added_once() -> Prepared:
    model = layers()
    optimizer = sgd(model[3].parameters())
    sink = OnceAfterTheFirstEpoch(
        lambda: optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    )
    return {"model": model, "optimizer": optimizer, "reporting": Reporting(sinks=[sink])}, tensors(
        model
    )


def rate_set_once() -> Prepared:
    model = layers()
    optimizer = sgd(model.parameters())
    sink = OnceAfterTheFirstEpoch(lambda: optimizer.param_groups[0].update(lr=0.03))
    options = {"model": model, "optimizer": optimizer, "reporting": Reporting(sinks=[sink])}
    return options | {"controller": AdaBatch(16, 32, every_epochs=2, lr_decay=0.25)}, tensors(model)


@pytest.mark.parametrize(
    "prepare",
    [
        averaged,
        stateful_transform,
        state_of_the_user,
        parameter_of_the_optimizer_alone,
        module_as_a_loss,
        late_and_transient_buffers,
        unfrozen_once,
        frozen_once,
        statistics_held_once,
        group_added_once,
        rate_set_once,
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(prepare: Callable[[], Prepared], tmp_path: Path):
    check_resumed(prepare, tmp_path / "run")


def test_a_rollback_puts_back_what_a_checkpoint_holds(tmp_path: Path):
    """To the start, where the buffer did not exist, and the layer was frozen: then it goes on."""
    model = nn.Sequential(LateBuffer())

    def poison(inputs, targets, progress):
        return inputs * (torch.nan if len(inputs) > 16 else 1), targets

    options: dict[str, Any] = {
        "controller": AdaBatch(16, 32, every_epochs=1),
        "divergence": Divergence("rollback"),
    }
    made, _ = trainer(
        lambda: ({"model": model, "optimizer": sgd(model.parameters()), "transform": poison}, list),
        run_dir=tmp_path / "run",
        **options,
    )
    history = made.fit()
    assert history.summary["status"] == "finished"
    assert [row["event"] for row in history.of_kind("event")] == ["diverged", "rollback"]


def test_a_model_handed_over_for_evaluation_trains_on_after_a_rollback_to_the_start(tmp_path: Path):
    """The first checkpoint has it as it was handed over; the batch explodes before a second."""
    model, modes = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)).eval(), []

    class GrowsAtOnce(FixedBatch):
        """Doubles the batch after the first step."""

        @property
        def decision(self) -> Decision:
            return self.made

        made = Decision(16)

        def is_due(self, progress):
            return True

        def update(self, progress, reading=None, signals=None):
            self.made = Decision(32, reason="grown")
            return self.made

    def poison(inputs, targets, progress):
        modes.append(model.training and model[1].training)
        return inputs * (torch.nan if len(inputs) > 16 else 1), targets

    options: dict[str, Any] = {"controller": GrowsAtOnce(16), "divergence": Divergence("rollback")}
    options |= {"checkpoints": Checkpoints(), "run_dir": tmp_path / "run", "transform": poison}
    made, _ = trainer(
        lambda: ({"model": model, "optimizer": sgd(model.parameters())}, list), **options
    )
    history = made.fit()
    (back,) = [row for row in history.of_kind("event") if row["event"] == "rollback"]
    assert back["message"].startswith("back to 0 examples")
    assert all(modes[1:])
    assert not model.training


def test_step_hooks_without_a_state_are_pointed_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def prepare() -> Prepared:
        options, result = averaged()
        del options["checkpoints"]
        return options, result

    with caplog.at_level(logging.WARNING, "hessianflow"):
        trainer(prepare, STOP, run_dir=tmp_path / "run")[0].fit()
        history = trainer(prepare)[0].resume(tmp_path / "run")
    notices = [row["message"] for row in history.of_kind("event") if row["event"] == "notice"]
    assert len(notices) == len(caplog.records) == 1
    assert 'it is named, as checkpoints=Checkpoints(state={"average": average})' in notices[0]
    assert trainer(prepare)[0].fit().of_kind("event") == [], (
        "nothing is kept without a run directory"
    )


def test_a_state_that_the_run_did_not_have_is_refused(tmp_path: Path):
    trainer(averaged, STOP, run_dir=tmp_path / "run")[0].fit()
    made, _ = trainer(
        lambda: (
            {**averaged()[0], "checkpoints": Checkpoints(state={"mean": nn.Linear(1, 1)})},
            list,
        )
    )
    with pytest.raises(HessianFlowError, match="was made without a state mean"):
        made.resume(tmp_path / "run")


def only_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint; none is left to fall back to."""
    for older in (run_dir / "checkpoints").glob("previous*.pt"):
        older.unlink()
    return run_dir / "checkpoints" / "last.pt"


@pytest.mark.parametrize("missing", ["buffer", "layer"])
def test_another_model_is_refused_with_a_way_out(tmp_path: Path, missing: str):
    """The model that was saved has a buffer from the start, or a layer that this one lacks."""
    trainer(late_and_transient_buffers, STOP, run_dir=tmp_path / "run")[0].fit()
    path = only_checkpoint(tmp_path / "run")
    state = checkpoints.load(path)
    if missing == "buffer":
        state["late_buffers"] = []
    else:
        state["model"]["1.weight"] = torch.zeros(3)
    torch.save(state, path)
    name = "0.cache" if missing == "buffer" else "1.weight"
    message = (
        rf"only the checkpoint has '{name}' \(if the model makes it in its first forward pass, run"
        r" it once on a"
    )
    with pytest.raises(HessianFlowError, match=message):
        trainer(late_and_transient_buffers)[0].resume(tmp_path / "run")


OTHERS: dict[str, tuple[Callable[[Any], dict[str, Any]], Callable[[Any], dict[str, Any]], str]] = {
    "optimizer in SAM": (
        lambda m: {"optimizer": SAM(sgd(m.parameters()))},
        lambda m: {"optimizer": SAM(torch.optim.Adam(m.parameters()))},
        r"was made with the optimizer SAM\(SGD\), this run has SAM\(Adam\)",
    ),
    "optimizer in an extrapolation": (
        lambda m: {"optimizer": Extrapolation(sgd(m.parameters()), 0.1)},
        lambda m: {"optimizer": Extrapolation(torch.optim.Adam(m.parameters()), 0.1)},
        r"was made with the optimizer Extrapolation\(SGD\), this run has Extrapolation\(Adam\)",
    ),
    "controller in a rate rule": (
        lambda m: {"controller": RateRule(AdaBatch(16, 64, every_epochs=1), "sqrt")},
        lambda m: {"controller": RateRule(FixedBatch(16), "sqrt")},
        r"was made with the controller RateRule\(AdaBatch\), this run has RateRule\(FixedBatch\)",
    ),
    "attack in twins": (
        lambda m: {
            "adversary": twins(FGSM(0.1, value_range=None)),
            "controller": FixedBatch(16),
        },
        lambda m: {
            "adversary": twins(PGD(0.1, value_range=None)),
            "controller": FixedBatch(16),
        },
        (
            r"was made with the adversary ConcurrentAdversary\(FGSM\), this run has"
            r" ConcurrentAdversary\(PGD\)"
        ),
    ),
}


def twins(attack: Any) -> ConcurrentAdversary:
    return ConcurrentAdversary(attack, staleness=0)


@pytest.mark.parametrize("name", OTHERS)
def test_another_part_within_a_part_is_refused(tmp_path: Path, name: str):
    first, second, message = OTHERS[name]

    def prepared(options: Callable[[Any], dict[str, Any]]) -> Callable[[], Prepared]:
        def prepare() -> Prepared:
            model = nn.Linear(4, 3)
            return {
                "model": model,
                "optimizer": sgd(model.parameters()),
                **options(model),
            }, tensors(model)

        return prepare

    check_resumed(prepared(first), tmp_path / "run")
    with pytest.raises(HessianFlowError, match=message):
        trainer(prepared(second), epochs=8)[0].resume(tmp_path / "run")


def settings_event(prepare: Callable[..., Prepared], folder: Path, **changed: Any) -> str:
    """What is said when a finished run of 4 epochs is resumed otherwise."""
    trainer(prepare, run_dir=folder)[0].fit()
    history = trainer(lambda: prepare(**changed), epochs=8)[0].resume(folder)
    events = [row["message"] for row in history.of_kind("event") if row["event"] == "settings"]
    assert len(events) == 1
    return events[0]


def scheduled(epochs: int = 4, decay: float = 0.0, cap: int = 32) -> Prepared:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    controller = AdaBatch(16, cap, every_epochs=2)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": Schedule(scheduler),
        "controller": controller,
    }, tensors(model)


def test_it_is_said_which_settings_are_in_force(tmp_path: Path):
    message = settings_event(scheduled, tmp_path / "run", epochs=8, decay=0.1, cap=64)
    assert (
        message
        == "resumed with other settings: in force from here on: epochs 8 (4 in the checkpoint),"
        " controller.max_batch_size 64 (32 in the checkpoint); of the checkpoint, and still in"
        " force: optimizer.weight_decay 0.0 (this run was built with 0.1), scheduler.T_max 4"
        " (this run was built with 8)"
    )


def test_what_is_said_to_be_in_force_is(tmp_path: Path):
    """The schedule is torch's own cosine of 4 steps, gone on with for 4 more; and the weight decay
    is the old one."""
    trainer(scheduled, run_dir=tmp_path / "run")[0].fit()
    prepared = scheduled(epochs=8, decay=0.1)
    taken = prepared[0]["optimizer"]
    made, _ = trainer(lambda: prepared, epochs=8)
    history = made.resume(tmp_path / "run")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    alone, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4), []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        alone.step()
    factors = [row["lr_factor"] for row in history.epochs]
    assert [row["lr"] for row in history.epochs] == pytest.approx(
        [a * b for a, b in zip(expected, factors, strict=True)]
    )
    assert taken.param_groups[0]["weight_decay"] == 0.0


def test_the_same_settings_say_nothing(tmp_path: Path):
    trainer(scheduled, STOP, run_dir=tmp_path / "run")[0].fit()
    history = trainer(scheduled)[0].resume(tmp_path / "run")
    assert [row["event"] for row in history.of_kind("event")] == ["preempted"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("parts"),
        lambda state: state.pop("counters"),
        lambda state: state.update(counters={"zzz": 1}),
        lambda state: state.update(decision={}),
        lambda state: state.update(optimizer={}),
        lambda state: state["parts"].update(totals={}),
        lambda state: state["parts"].update(totals=None),
        lambda state: state["parts"].update({"learning rate": 5}),
        lambda state: state.update(seconds=None),
        lambda state: state["rank_generators"][0].update(torch=torch.zeros(3, dtype=torch.uint8)),
        lambda state: state.update(
            late_buffers=["weight.missing"], model={**state["model"], "a.b": torch.ones(1)}
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Any], Any]
):
    """A checkpoint that reads well and is wrong within."""
    trainer(scheduled_with_momentum, STOP, run_dir=tmp_path / "run")[0].fit()
    path = only_checkpoint(tmp_path / "run")
    state = checkpoints.load(path)
    damage(state)
    torch.save(state, path)
    with pytest.raises(HessianFlowError, match=str(tmp_path / "run")) as caught:
        trainer(scheduled_with_momentum)[0].resume(tmp_path / "run")
    assert "\n" not in str(caught.value)


def scheduled_with_momentum() -> Prepared:
    model = nn.Linear(4, 3)
    return {"model": model, "optimizer": sgd(model.parameters())}, tensors(model)


def test_labels_stop_somewhere():
    """An object that holds itself, or the run, has a name all the same."""
    from hessianflow.training.optimizers import label

    class Loop:
        def state_dict(self):
            return {}

        load_state_dict = state_dict

    made = Loop()
    made.me = made
    assert label(made) == "Loop(Loop(Loop))"
    assert label(ABSA(16, 32)) == "ABSA"
    assert label(RateRule(CriticalBatch(16, 32), "sqrt")) == "RateRule(CriticalBatch)"
