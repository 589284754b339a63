"""The loop against bare PyTorch, hand-counted steps, and itself interrupted."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bright_or_dark
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, CurvatureReading, Decision, HessianFlowError, History
from hessianflow.control import AdaBatch
from hessianflow.data import DeviceBatches
from hessianflow.interfaces import Exposure
from hessianflow.training import AfterEpoch, Checkpoints, Passes, Reporting, Schedule
from hessianflow.training.checks import LOOP_SIGNALS

N = 50


def data(batch_size: int = 8, seed: int = 0, count: int = N, shuffle: bool = True) -> DeviceBatches:
    return bright_or_dark(count, batch_size, seed=seed, shuffle=shuffle)


def network(dropout: float = 0.0, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.BatchNorm1d(12) if norm else nn.Identity(),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(12, 2))


class Script:
    """A controller that follows a script: {examples: decision}; due after every step."""

    def __init__(
        self, start: Decision, script: Mapping[int, Decision], needs: frozenset[str] = frozenset()
    ) -> None:
        self.decision, self.script, self.needs = start, dict(script), needs
        self.readings: list[CurvatureReading | None] = []

    def is_due(self, progress):
        return progress.examples in self.script

    def update(self, progress, reading=None, signals=None):
        self.readings.append(reading)
        self.decision = self.script[progress.examples]
        return self.decision

    def state_dict(self) -> dict[str, Any]:
        return {"decision": dict(vars(self.decision))}

    def load_state_dict(self, state):
        self.decision = Decision(**state["decision"])


class Probe:
    """Counts its calls and reads 1/calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> CurvatureReading:
        self.calls += 1
        return CurvatureReading(1 / self.calls, 0.0, 3, True)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def trainer(
    model: nn.Module, batches: DeviceBatches, evaluation: Any = None, **options: Any
) -> AdaptiveBatchTrainer:
    settings: dict[str, Any] = {
        "epochs": 3,
        "loss_fn": F.cross_entropy,
        "reporting": Reporting(show_progress=False),
    }
    settings["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return AdaptiveBatchTrainer(model, batches, evaluation, **(settings | options))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.flatten().double() for v in model.state_dict().values()])


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "rmsprop", "adagrad"])
def test_fixed_batch_is_the_bare_loop_bit_for_bit(name: str):
    """Off switch equals baseline, for optimizers the published code could not run."""
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    }[name]
    bare, ours = network(norm=True), network(norm=True)
    optimizer = make(bare.parameters())
    stream = data()
    for _ in range(3):
        for x, y in stream:
            optimizer.zero_grad()
            F.cross_entropy(bare(x), y).backward()
            optimizer.step()
    history = trainer(
        ours, data(), optimizer=make(ours.parameters()), passes=Passes(norm_statistics="running")
    ).fit()
    assert torch.equal(weights(ours), weights(bare))
    assert history.summary["updates"] == 3 * math.ceil(N / 8)
    assert history.summary["examples"] == 3 * N


def test_every_example_is_used_once_an_epoch_and_a_short_tail_is_shared():
    seen: list[torch.Tensor] = []

    def watch(inputs, targets, progress):
        seen.append(inputs.flatten(1))
        return inputs, targets

    trainer(network(), data(), transform=watch, epochs=2).fit()
    sizes = [len(x) for x in seen]
    assert sizes == ([8] * 5 + [5, 5]) * 2  # not five of 8 and one of 2
    full, _ = data().examples(torch.arange(N))
    for epoch in (torch.cat(seen[:7]), torch.cat(seen[7:])):
        assert torch.equal(epoch.sort(0).values, full.flatten(1).sort(0).values)


def test_a_decision_takes_effect_on_the_very_next_batch_with_its_rate():
    sizes: list[int] = []
    rates: list[float] = []
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda made, *_: rates.append(made.param_groups[0]["lr"]))

    def watch(inputs, targets, progress):
        sizes.append(len(inputs))
        return inputs, targets

    script = Script(
        Decision(8), {16: Decision(22, 3.0, reason="test"), 38: Decision(6, 0.5, reason="down")}
    )
    history = trainer(
        model, data(), optimizer=optimizer, controller=script, transform=watch, epochs=1
    ).fit()
    assert sizes == [8, 8, 22, 6, 6]
    assert rates == pytest.approx([0.1, 0.1, 0.3, 0.05, 0.05])
    rows = history.of_kind("batch")
    assert [(r["from"], r["to"], r["examples"], r["lr_factor"], r["reason"]) for r in rows] == [
        (8, 22, 16, 3.0, "test"),
        (22, 6, 38, 0.5, "down"),
    ]
    assert len(history.growths) == 1


def test_growth_inside_an_epoch_keeps_every_weight_sum_at_one():
    """No gradient is carried over a change of the batch: each step is the plain mean over exactly
    its examples."""
    model = network()
    script = Script(Decision(8), {24: Decision(20, 1.0, reason="grow")})
    seen = []

    def watch(inputs, targets, progress):
        seen.append((inputs, targets))
        return inputs, targets

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer(
        model,
        data(),
        optimizer=optimizer,
        controller=script,
        transform=watch,
        epochs=2,
        passes=Passes(microbatch_size=3),
    ).fit()
    bare = network()
    plain = torch.optim.SGD(bare.parameters(), lr=0.1)
    for x, y in seen:
        plain.zero_grad()
        F.cross_entropy(bare(x), y).backward()
        plain.step()
    torch.testing.assert_close(weights(model), weights(bare), rtol=1e-5, atol=1e-6)


def test_curvature_is_measured_once_an_epoch_or_only_when_needed():
    needing = frozenset({"eigenvalue"})
    for every_epoch, needs, expected in (
        (True, needing, 3),
        (False, needing, 1),
        (False, frozenset(), 0),
    ):
        probe = Probe()
        script = Script(Decision(8), {N: Decision(8)}, needs)
        history = trainer(
            network(),
            data(),
            controller=script,
            probe=probe,
            after_epoch=AfterEpoch(curvature=every_epoch),
        ).fit()
        assert probe.calls == expected
        assert len(history.curvature) == expected
        if expected:
            assert history.curvature[0]["epoch"] == 1
            assert script.readings[0].eigenvalue == 1.0


def test_adversary_sees_its_share_times_the_factor_of_the_controller():
    calls: list[tuple[float, int]] = []

    class Adversary:
        share, staleness, attacks_late = 0.8, 0, True

        def attack(self, model, inputs, targets, share, microbatch_size=None):
            calls.append((share, microbatch_size))
            return lambda: inputs + 1

        def expose(self, model, inputs, targets, adversarial, share):
            return Exposure((adversarial, targets))

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    adversary = Adversary()
    script = Script(
        Decision(10, attack_factor=0.5), {20: Decision(10, attack_factor=0.0, reason="off")}
    )
    trainer(network(), data(), controller=script, adversary=adversary, epochs=1).fit()
    assert calls == [(0.4, 10), (0.4, 10)]


def test_epoch_rows_hold_what_the_run_did():
    model = network()
    evaluation = data(7, count=21, shuffle=False)
    history = trainer(model, data(), evaluation, epochs=2).fit()
    assert [r["epoch"] for r in history.epochs] == [1, 2]
    assert [r["updates"] for r in history.epochs] == [7, 14]
    last = history.epochs[-1]
    x, y = evaluation.examples(torch.arange(21))
    outputs = model.eval()(x)
    assert last["eval_accuracy"] == (outputs.argmax(1) == y).double().mean().item()
    assert last["eval_loss"] == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-6)
    assert last["seconds"] >= last["seconds_training"] + last["seconds_evaluation"] > 0
    assert history.summary["final_accuracy"] == last["eval_accuracy"]


def test_regression_has_no_accuracy():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    x = torch.rand(N, 1, 4, 4)
    batches = DeviceBatches(x, x.mean((1, 2, 3))[:, None], 8)
    history = trainer(model, batches, batches.examples(torch.arange(N)), loss_fn=nn.MSELoss()).fit()
    assert history.epochs[-1]["train_accuracy"] is None
    assert history.epochs[-1]["eval_accuracy"] is None
    assert history.epochs[-1]["eval_loss"] < history.epochs[0]["eval_loss"]


def resumable(run_dir: Path | None, model: nn.Module, **options: Any) -> AdaptiveBatchTrainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.2)
    decisions = {24: Decision(12, 1.5, reason="a"), 2 * N: Decision(20, 2.5, reason="b")}
    script = Script(Decision(8), decisions, frozenset({"eigenvalue"}))
    settings = {
        "optimizer": optimizer,
        "schedule": Schedule(scheduler),
        "controller": script,
        "probe": Probe(),
        "epochs": 4,
    }
    return trainer(
        model, data(), data(11, count=21, shuffle=False), run_dir=run_dir, **(settings | options)
    )


def comparable(history: History) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if "second" not in k}
        for row in history.records
        if row["kind"] != "event"
    ]


@pytest.mark.parametrize("stop_at", [8, 36, N, 2 * N, 117])
def test_resumed_run_is_bit_equal(tmp_path: Path, stop_at: int):
    """Stop after any step, in or at the end of an epoch, with dropout and batch norm: same weights,
    same records."""
    whole = network(dropout=0.3, norm=True)
    expected = resumable(tmp_path / "whole", whole).fit()
    first = network(dropout=0.3, norm=True)
    interrupted: AdaptiveBatchTrainer

    def stop(inputs, targets, progress):
        if progress.examples + len(inputs) >= stop_at:
            interrupted.request_stop()
        return inputs, targets

    interrupted = resumable(tmp_path / "run", first, transform=stop)
    history = interrupted.fit()
    assert history.summary["status"] == "preempted"
    assert history.summary["examples"] < 4 * N
    torch.manual_seed(99)  # a new process would not have the generators where they were
    second = network(dropout=0.3, norm=True)
    for parameter in second.parameters():
        parameter.data.zero_()
    resumed = resumable(None, second).resume(tmp_path / "run")
    assert torch.equal(weights(second), weights(whole))
    assert comparable(resumed) == comparable(expected)
    assert comparable(History.load(tmp_path / "run")) == comparable(expected)
    assert resumed.summary["status"] == "finished"


def test_rows_after_the_checkpoint_are_made_again(tmp_path: Path):
    whole = network()
    expected = resumable(tmp_path / "whole", whole).fit()

    class DiesAtTheThird:
        """A sink that ends the program when the row of an epoch is written, but no checkpoint."""

        def write(self, record):
            if record["kind"] == "epoch" and record["epoch"] == 3:
                raise KeyboardInterrupt

        def close(self) -> None: ...

    broken = resumable(tmp_path / "run", network(), reporting=Reporting(sinks=[DiesAtTheThird()]))
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    assert len(History.load(tmp_path / "run").epochs) == 3
    again = network()
    resumed = resumable(None, again).resume(tmp_path / "run")
    assert torch.equal(weights(again), weights(whole))
    assert comparable(resumed) == comparable(expected)


def test_checkpoints_within_an_epoch(tmp_path: Path):
    from hessianflow.runs import checkpoints

    cursors = []

    def watch(inputs, targets, progress):
        path = tmp_path / "run" / "checkpoints" / "last.pt"
        cursors.append(checkpoints.load(path)["examples"] if path.exists() else 0)
        return inputs, targets

    trainer(
        network(),
        data(),
        run_dir=tmp_path / "run",
        transform=watch,
        checkpoints=Checkpoints(every_examples=13),
        epochs=1,
    ).fit()
    assert cursors == [0, 0, 16, 16, 32, 32, 45]


def test_resume_refuses_another_model_and_a_missing_probe(tmp_path: Path):
    resumable(tmp_path / "run", network()).fit()
    with pytest.raises(HessianFlowError, match="is of another model"):
        resumable(None, nn.Sequential(nn.Flatten(), nn.Linear(16, 2))).resume(tmp_path / "run")
    other = trainer(network(), data(), epochs=4)
    with pytest.raises(HessianFlowError, match="was made with a controller"):
        other.resume(tmp_path / "run")


def test_resume_after_a_damaged_checkpoint_says_so(tmp_path: Path):
    whole = network()
    expected = resumable(tmp_path / "run", whole).fit()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:3000])
    again = network()
    resumed = resumable(None, again).resume(tmp_path / "run")
    assert torch.equal(weights(again), weights(whole))
    assert comparable(resumed) == comparable(expected)
    [event] = resumed.of_kind("event")
    assert event["event"] == "fallback"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_history(tmp_path: Path):
    model = network()

    def poison(inputs, targets, progress):
        return (inputs * float("nan") if progress.updates == 9 else inputs), targets

    with pytest.raises(
        HessianFlowError, match=r"epoch 2 at update 10 .* last good checkpoint is .*last.pt"
    ):
        trainer(model, data(), run_dir=tmp_path / "run", transform=poison).fit()
    history = History.load(tmp_path / "run")
    assert [row["epoch"] for row in history.epochs] == [1]
    assert history.of_kind("event")[0]["event"] == "diverged"
    from hessianflow.runs import checkpoints

    state = checkpoints.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_model_mode_is_left_as_found():
    model = network().eval()
    trainer(model, data(), epochs=1).fit()
    assert not model.training


def test_schedule_counted_in_reference_batches_survives_growth():
    """The rate of a step-wise schedule depends on examples alone, whatever the batch size."""
    rates = []
    for script in ({}, {8: Decision(24, 1.0, reason="grow")}):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        trainer(
            model,
            data(count=48),
            optimizer=optimizer,
            schedule=Schedule(scheduler, unit="reference_batch"),
            controller=Script(Decision(8), script),
            epochs=2,
        ).fit()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-3 * 0.9**12)
    assert rates[1] == pytest.approx(rates[0])


def test_bad_arguments():
    model = network()
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(HessianFlowError, match="no trainable parameter: nothing to train"):
        trainer(frozen, data(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(HessianFlowError, match="holds no trainable parameter of the model"):
        trainer(network(), data(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(HessianFlowError, match="epochs must be a whole number >= 1, got 0"):
        trainer(model, data(), epochs=0)
    with pytest.raises(HessianFlowError, match="batch size 51 must lie between 1 and the 50"):
        trainer(model, data(), controller=Script(Decision(51), {}))


def test_a_controller_that_nobody_measures_for_is_refused_at_the_start():
    for needs, message in (
        ({"eigenvalue"}, "Script decides by the top eigenvalue: pass probe="),
        (
            {"small_gradient_sq", "epoch_loss"},
            r"Script decides by small_gradient_sq: pass observers=\[...\]",
        ),
    ):
        with pytest.raises(HessianFlowError, match=message):
            trainer(
                network(),
                data(),
                controller=Script(Decision(8), {}, needs=frozenset(needs)),
                epochs=1,
            )


def test_what_the_loop_says_it_can_tell_it_tells():
    seen = {}

    class Listening(Script):
        def update(self, progress, reading=None, signals=None):
            seen.update(signals)
            return super().update(progress, reading, signals)

    controller = Listening(Decision(8), {16: Decision(8)}, needs=LOOP_SIGNALS)
    trainer(network(), data(), controller=controller, epochs=1).fit()
    assert seen.keys() == LOOP_SIGNALS
    assert all(math.isfinite(value) for value in seen.values())


def test_used_run_directory_is_refused(tmp_path: Path):
    trainer(network(), data(), run_dir=tmp_path / "run", epochs=1).fit()
    before = (tmp_path / "run" / "history.jsonl").read_bytes()
    with pytest.raises(HessianFlowError, match="already holds a run"):
        trainer(network(), data(), run_dir=tmp_path / "run", epochs=1).fit()
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == before


def test_a_weight_that_is_not_finite_under_a_finite_loss_is_never_kept(tmp_path: Path):
    """The square root has an infinite slope at 0: the loss is finite, the gradient is not."""
    from hessianflow.runs import checkpoints

    model = network()
    steps = []

    def loss_fn(outputs, targets):
        steps.append(1)
        return F.cross_entropy(outputs, targets) + (
            (outputs.sum() * 0).abs().sqrt() if len(steps) == 10 else 0
        )

    with pytest.raises(HessianFlowError, match=r"a weight was not finite"):
        trainer(
            model,
            data(),
            run_dir=tmp_path / "run",
            loss_fn=loss_fn,
            checkpoints=Checkpoints(every_examples=8),
        ).fit()
    for name in ("last", "previous"):
        state = checkpoints.load(tmp_path / "run" / "checkpoints" / f"{name}.pt")
        assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_mask_of_infinities_is_no_divergence():
    model = network()
    model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    assert trainer(model, data()).fit().summary["status"] == "finished"


def test_a_microbatch_of_ignored_targets_is_no_divergence():
    model = network()
    batches = data(16)
    x, y = batches.examples(torch.arange(N))
    y[: N // 2] = -100
    ignoring = DeviceBatches(x, y, 16, shuffle=False, num_classes=2)
    history = trainer(model, ignoring, (x[:10], y[:10]), passes=Passes(microbatch_size=4)).fit()
    assert history.summary["status"] == "finished"
    assert all(math.isfinite(row["train_loss"]) for row in history.epochs)


def test_what_a_checkpoint_cannot_hold_is_found_at_once(tmp_path: Path):
    import numpy as np

    model = network()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=np.float64(0.1), weight_decay=np.float64(1e-4)
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [np.int64(1)])
    options = {"optimizer": optimizer, "schedule": Schedule(scheduler)}
    assert (
        trainer(model, data(), run_dir=tmp_path / "numpy", **options).fit().summary["status"]
        == "finished"
    )

    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state["odd"]["array"] = np.zeros(2)

    odd = Odd(model.parameters(), lr=0.1)
    with pytest.raises(
        HessianFlowError, match="cannot be kept: a part of it holds values other than tensors"
    ):
        trainer(
            model,
            data(),
            run_dir=tmp_path / "odd",
            optimizer=odd,
            checkpoints=Checkpoints(every_examples=8),
        ).fit()


def test_a_run_that_died_before_its_first_checkpoint_can_be_started_again(tmp_path: Path):
    class Dying:
        """A part of the state that ends the program when it is asked for."""

        def state_dict(self):
            raise KeyboardInterrupt

        def load_state_dict(self, state): ...

    first = trainer(
        network(),
        data(),
        run_dir=tmp_path / "run",
        checkpoints=Checkpoints(state={"dying": Dying()}),
    )
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()
    assert (tmp_path / "run" / "config.json").exists()
    assert (
        trainer(network(), data(), run_dir=tmp_path / "run").fit().summary["status"] == "finished"
    )


def test_resume_refuses_another_scheduler_and_controller(tmp_path: Path):
    resumable(tmp_path / "run", network()).fit()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    other = resumable(None, model, optimizer=optimizer, schedule=Schedule(cosine))
    with pytest.raises(
        HessianFlowError, match="had the scheduler MultiStepLR, this run has CosineAnnealingLR"
    ):
        other.resume(tmp_path / "run")

    class Another(Script):
        pass

    other = resumable(None, network(), controller=Another(Decision(8), {}))
    with pytest.raises(
        HessianFlowError, match="made with the controller Script, this run has Another"
    ):
        other.resume(tmp_path / "run")


def test_a_transform_may_change_the_number_of_rows():
    def twice(inputs, targets, progress):
        return torch.cat([inputs, inputs]), torch.cat([targets, targets])

    history = trainer(network(), data(), transform=twice, epochs=2).fit()
    assert history.summary["examples"] == 2 * N
    assert 0 <= history.epochs[-1]["train_accuracy"] <= 1


def test_a_transform_that_leaves_no_row_is_named():
    with pytest.raises(
        HessianFlowError, match="the transform left no row of a batch of 8 examples"
    ):
        trainer(
            network(), data(), transform=lambda inputs, targets, _: (inputs[:0], targets[:0])
        ).fit()


@pytest.mark.parametrize("sizes", [(4, 8), (4, 16), (8, 100), (4, 12)])
def test_what_is_normalised_together_does_not_depend_on_the_microbatch(sizes: tuple[int, int]):
    """Ghost batch normalisation over a ragged batch: the same weights for every microbatch size."""
    models = []
    for size in sizes:
        model = network(norm=True).double()
        batches = DeviceBatches(*data().examples(torch.arange(N)), 15)
        batches._dtype = torch.float64
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer(
            model,
            batches,
            optimizer=optimizer,
            passes=Passes(microbatch_size=size, norm_batch_size=4),
        ).fit()
        models.append(weights(model))
    torch.testing.assert_close(models[0], models[1], rtol=1e-10, atol=1e-12)


def test_warm_up_of_a_large_batch_keeps_the_schedule_of_the_reference_batch():
    from hessianflow.control import Warmup

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 if step >= 12 else 1.0
    )
    history = trainer(
        model,
        data(count=48),
        optimizer=optimizer,
        schedule=Schedule(scheduler, unit="reference_batch", reference_batch_size=8),
        controller=Warmup(8, 24, warmup_epochs=0),
        epochs=4,
    ).fit()
    assert [row["lr"] for row in history.epochs] == pytest.approx([0.3, 0.3, 0.03, 0.03])


def test_a_run_from_python_records_the_options_of_optimizer_and_controller(tmp_path: Path):
    """Without them, runs at other rates would look like repetitions of one."""
    for name, rate in (("a", 0.1), ("b", 0.2)):
        made = network()
        optimizer = torch.optim.SGD(made.parameters(), lr=rate)
        controller = AdaBatch(8, 32, every_epochs=1)
        parts = {"optimizer": optimizer, "controller": controller}
        trainer(made, data(), run_dir=tmp_path / name, **parts).fit()
    options = [History.load(tmp_path / name).config["trainer"]["options"] for name in ("a", "b")]
    assert [held["optimizer.lr"] for held in options] == [0.1, 0.2]
    assert [held["controller.max_batch_size"] for held in options] == [32, 32]
