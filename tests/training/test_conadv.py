"""ConAdv in the trainer: against loops written out in full, id traces, clean-only statistics,
itself interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bright_or_dark
from stopping import StopAfter
from torch import Tensor, nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, Decision, HessianFlowError
from hessianflow.adversarial import FGSM, PGD, ConcurrentAdversary, fgsm
from hessianflow.control import FixedBatch
from hessianflow.curvature import CurvatureProbe
from hessianflow.data import DeviceBatches
from hessianflow.normalisation import split_batch_norm
from hessianflow.optim import GradientMoments
from hessianflow.training import Checkpoints, Divergence, Passes, Reporting

N, BATCH = 50, 8  # seven steps an epoch, the last two of five examples
RANGE = (0.0, 1.0)


def data(batch_size: int = BATCH) -> DeviceBatches:
    return bright_or_dark(N, batch_size)


def network(split: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    return split_batch_norm(model) if split else model


def attack() -> FGSM:
    return FGSM(0.1, value_range=RANGE)


def trainer(model: nn.Module, adversary: Any, batches: DeviceBatches | None = None, **options: Any):
    settings: dict[str, Any] = {
        "epochs": 2,
        "loss_fn": F.cross_entropy,
        "reporting": Reporting(show_progress=False),
        "passes": Passes(norm_batch_size=0),
    }
    settings["optimizer"] = torch.optim.SGD(
        model.parameters(), lr=options.pop("lr", 0.1), momentum=0.9
    )
    settings["controller"] = FixedBatch((batches or data()).batch_size)
    return AdaptiveBatchTrainer(
        model, batches or data(), adversary=adversary, **(settings | options)
    )


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("combine", ["sum", "average"])
def test_staleness_zero_is_the_synchronous_method_bit_for_bit(combine: Any):
    """A loop with torch alone and `fgsm`: attack, clean pass, adversarial pass, step."""
    ours, theirs = network(), network()
    trainer(ours, ConcurrentAdversary(attack(), staleness=0, combine=combine)).fit()
    optimizer, batches = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9), data()
    factor = 1.0 if combine == "sum" else 0.5
    for _ in range(2):
        for x, y in batches:
            twin = fgsm(theirs, x, y, 0.1, value_range=RANGE)
            optimizer.zero_grad()
            (factor * F.cross_entropy(theirs(x), y)).backward()
            (factor * F.cross_entropy(theirs(twin), y)).backward()
            optimizer.step()
    assert_same(ours, theirs)


def test_staleness_two_is_the_published_algorithm():
    """Algorithm 1 written out: the twins of step t come from the weights (and statistics) of step t
    - 2."""
    ours, theirs = network(), network()
    trainer(
        ours,
        ConcurrentAdversary(attack(), staleness=2),
        passes=Passes(norm_batch_size=0, norm_statistics="running"),
    ).fit()
    optimizer, batches = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9), data()
    stream = [batch for _ in range(2) for batch in batches]
    twins: dict[int, Tensor] = {}
    for step, (x, y) in enumerate(stream):
        if step + 2 < len(stream):
            twins[step + 2] = fgsm(theirs, *stream[step + 2], 0.1, value_range=RANGE)
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        if step in twins:
            F.cross_entropy(theirs(twins[step]), y).backward()
        optimizer.step()
    assert_same(ours, theirs)


def test_what_is_attacked_is_trained_on_two_steps_later_across_the_ends_of_epochs():
    """Examples carry their number: it is their first pixel, which no perturbation of 1e-4 hides."""
    images = torch.rand(N, 1, 4, 4)
    images[:, 0, 0, 0] = torch.arange(N) / N
    batches = DeviceBatches(images, torch.arange(N) % 2, BATCH)
    attacked: list[list[int]] = []
    trained: list[list[int]] = []

    def numbers(x: Tensor) -> list[int]:
        return (x[:, 0, 0, 0] * N).round().int().tolist()

    class Recording(FGSM):
        def perturb(self, model, inputs, targets, share, microbatch_size=None):
            attacked.append(numbers(inputs))
            return super().perturb(model, inputs, targets, share, microbatch_size)

    model = network()
    model.register_forward_pre_hook(
        lambda m, args: trained.append(numbers(args[0])) if m.training else None
    )
    history = trainer(
        model, ConcurrentAdversary(Recording(1e-4, value_range=RANGE), staleness=2), batches
    ).fit()
    clean, twins = [*trained[:2], *trained[2::2]], trained[3::2]
    assert attacked == twins == clean[2:]
    expected = [
        (x[:, 0, 0, 0] * N).round().int().tolist()
        for x, _ in [*data_again(batches), *data_again(batches, 1)]
    ]
    assert clean == expected
    assert [row["examples"] for row in history.epochs] == [N, 2 * N]  # clean rows alone are counted
    assert [row["updates"] for row in history.epochs] == [7, 14]


def data_again(batches: DeviceBatches, epoch: int = 0) -> list[Any]:
    batches.load_state_dict({**batches.state_dict(), "epoch": epoch, "cursor": 0})
    return list(batches)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("microbatch", [8, 3])
def test_main_statistics_are_those_of_clean_training(staleness: int, microbatch: int):
    """With a rate of 0 the weights stay, so the running statistics depend on what was normalised
    alone."""
    split, plain = network(split=True), network()
    options = {"lr": 0.0, "passes": Passes(microbatch_size=microbatch, norm_batch_size=4)}
    trainer(split, ConcurrentAdversary(attack(), staleness=staleness), **options).fit()
    trainer(plain, None, **options).fit()
    assert torch.equal(split[1].main.running_mean, plain[1].running_mean)
    assert torch.equal(split[1].main.running_var, plain[1].running_var)
    assert split[1].adversarial.num_batches_tracked > 0
    assert not torch.allclose(split[1].adversarial.running_mean, split[1].main.running_mean)


def test_evaluation_and_probe_use_the_main_set_alone():
    """Ruining the adversarial set changes neither the evaluation nor the eigenvalue."""
    found = []
    for ruin in (False, True):
        model = network(split=True)
        evaluation = data().examples(torch.arange(N))
        probe = CurvatureProbe(model, F.cross_entropy, evaluation, seed=0)
        made = trainer(
            model, ConcurrentAdversary(attack()), eval_data=evaluation, probe=probe, lr=0.0
        )
        if ruin:
            with torch.no_grad():
                model[1].adversarial.weight.fill_(50.0)
        history = made.fit()
        found.append((history.epochs[-1]["eval_loss"], history.curvature[-1]["eigenvalue"]))
    assert found[0] == found[1]


class Growing(FixedBatch):
    """Doubles the batch and the rate after 24 examples."""

    def update(self, progress, reading=None, signals=None):
        self._decision = (
            Decision(16, 2.0, 1.0, "grown") if progress.examples >= 24 else Decision(8, 1.0, 1.0)
        )
        return self._decision

    @property
    def decision(self) -> Decision:
        return getattr(self, "_decision", Decision(8, 1.0, 1.0))

    def is_due(self, progress) -> bool:
        return True


@pytest.mark.parametrize(
    ("staleness", "late", "rest"), [(0, 3, [16, 10]), (1, 4, [9, 9]), (2, 5, [10])]
)
def test_a_growth_arrives_staleness_steps_late_and_brings_its_rate(
    staleness: int, late: int, rest: list[int]
):
    model = network()
    noted, adversary = Noted(model), ConcurrentAdversary(attack(), staleness=staleness)
    made = trainer(model, adversary, controller=Growing(8), epochs=1, optimizer=noted)
    noted.trainer = made
    made.fit()
    assert noted.steps() == [(8, 0.1)] * late + [(examples, 0.2) for examples in rest]


class Noted(torch.optim.SGD):
    """Notes before every step how many examples were trained, and the rate in force."""

    trainer: AdaptiveBatchTrainer

    def __init__(self, model: nn.Module, momentum: float = 0.9) -> None:
        super().__init__(model.parameters(), lr=0.1, momentum=momentum)
        self.places: list[int] = []
        self.rates: list[float] = []

    def step(self, closure=None):
        super().step(closure)
        self.places.append(self.trainer.progress.examples)
        self.rates.append(self.param_groups[0]["lr"])

    def steps(self, **ends: int) -> list[tuple[int, float]]:
        """Return examples and rate of every step; `ends` says where steps before a jump ended."""
        after = [*self.places[1:], self.trainer.progress.examples]
        for number, place in ends.items():
            after[int(number.removeprefix("step"))] = place
        sizes = [end - place for place, end in zip(self.places, after, strict=True)]
        return list(zip(sizes, self.rates, strict=True))


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_resumed_in_mid_epoch_it_ends_bit_for_bit_the_same(staleness: int, tmp_path: Path):
    """Queue, twins, decisions and random starts go on; the batch grows while batches are queued."""

    def make(run_dir: Path | None, split: nn.Module, **options: Any) -> AdaptiveBatchTrainer:
        adversary = ConcurrentAdversary(PGD(0.1, value_range=RANGE, steps=2), staleness=staleness)
        return trainer(
            split, adversary, controller=Growing(8), run_dir=run_dir, epochs=3, **options
        )

    whole, broken, again = (network(split=True) for _ in range(3))
    make(None, whole, observers=[GradientMoments()]).fit()
    stop = StopAfter(70)
    stop.trainer = make(tmp_path / "run", broken, observers=[GradientMoments()], transform=stop)
    assert stop.trainer.fit().summary["status"] == "preempted"
    assert stop.trainer.progress.examples % N > 0
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    make(None, again, observers=[GradientMoments()]).resume(tmp_path / "run")
    assert_same(again, whole)


def test_after_a_divergence_the_queue_goes_back_and_is_held_too(tmp_path: Path):
    """The weights are ruined once, while batches drawn at twice the rate are queued: they get the
    held rate."""

    class Glitch(Noted):
        def step(self, closure=None):
            super().step(closure)
            if len(self.places) == 6:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].fill_(float("nan"))

    model = network(split=True)
    options: dict[str, Any] = {
        "run_dir": tmp_path / "run",
        "divergence": Divergence("rollback"),
        "checkpoints": Checkpoints(every_examples=8),
        "epochs": 3,
    }
    noted, adversary = Glitch(model, momentum=0.0), ConcurrentAdversary(attack(), staleness=2)
    made = trainer(model, adversary, controller=Growing(8), optimizer=noted, **options)
    noted.trainer = made
    history = made.fit()
    diverged, rollback = history.of_kind("event")
    assert (diverged["event"], rollback["event"]) == ("diverged", "rollback")
    steps = noted.steps(step5=diverged["examples"])
    # ruined; it and the other queued one; new
    assert steps[5:9] == [(10, 0.2), (10, 0.1), (16, 0.1), (8, 0.1)]
    assert all(rate == 0.1 for _, rate in steps[6:])
    assert sum(examples for examples, _ in steps) == 3 * N + 10
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_the_gain_of_the_twins_is_recorded():
    """Fixed weights, one batch: the loss of the twins minus that of the clean rows, each by
    hand."""
    model, whole = network(), data(N)
    history = trainer(
        model, ConcurrentAdversary(attack(), staleness=0), whole, lr=0.0, epochs=1
    ).fit()
    model = network()
    x, y = next(iter(data(N)))
    twins = fgsm(model, x, y, 0.1, value_range=RANGE)
    gain = F.cross_entropy(model(twins), y) - F.cross_entropy(model(x), y)
    assert history.epochs[0]["adversarial_gain"] == pytest.approx(gain.item(), rel=1e-5)
    plain = trainer(network(), attack(), epochs=1).fit()
    assert "adversarial_gain" not in plain.epochs[0]


def test_a_share_makes_twins_of_that_share_and_every_row_counts_alike():
    """Share 1/2 of 8 rows: the gradient is the summed loss of 12 rows over 8."""
    ours, theirs = network().eval(), network().eval()
    seen: list[Tensor] = []

    class Seen(torch.optim.SGD):
        """Keeps the gradients that it is given."""

        def step(self, closure=None):
            seen.append(torch.cat([p.grad.flatten() for p in ours.parameters()]))

    optimizer, controller = Seen(ours.parameters(), lr=0.1), FixedBatch(BATCH)
    adversary = ConcurrentAdversary(attack(), share=0.5, staleness=0)
    options: dict[str, Any] = {"controller": controller, "optimizer": optimizer, "epochs": 1}
    x, y = next(iter(data()))
    theirs.train()
    twins = fgsm(theirs, x, y, 0.1, value_range=RANGE)[1::2]
    trainer(ours, adversary, **options).fit()
    loss = F.cross_entropy(theirs(x), y, reduction="sum") + F.cross_entropy(
        theirs(twins), y[1::2], reduction="sum"
    )
    expected = torch.autograd.grad(loss / 8, list(theirs.parameters()))
    torch.testing.assert_close(
        seen[0], torch.cat([g.flatten() for g in expected]), rtol=1e-5, atol=1e-6
    )


def test_share_zero_is_clean_training():
    ours, theirs = network(), network()
    trainer(ours, ConcurrentAdversary(attack(), share=0.0)).fit()
    trainer(theirs, None).fit()
    assert_same(ours, theirs)


def test_observers_see_the_mean_gradient_whatever_is_summed():
    """Of the sum of two means `.grad` is twice the mean over all rows: the observer is shown the
    mean."""
    shown: list[Tensor] = []

    class Recorder(GradientMoments):
        def on_step(self, gradients, examples):
            shown.append((torch.cat([g.flatten() for g in gradients]), examples))

    for combine in ("sum", "average"):
        model = network()
        adversary = ConcurrentAdversary(attack(), staleness=0, combine=combine)
        trainer(model, adversary, observers=[Recorder()], lr=0.0, epochs=1).fit()
    half = len(shown) // 2
    for (a, rows), (b, _) in zip(shown[:half], shown[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert rows in (16, 10)  # the last two share an epoch's 20


def test_out_of_memory_repeats_step_and_attack(tmp_path: Path):
    """Memory runs out once, in the pass of the twins: the run ends as one with that microbatch from
    the start."""

    class Small(nn.Module):
        def __init__(self, limit: int) -> None:
            super().__init__()
            self.inner, self.limit = network().eval(), limit

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.limit and torch.is_grad_enabled() and self.training:
                raise torch.OutOfMemoryError("no room")
            return self.inner(x)

    ends = []
    for limit, size in ((4, 8), (8, 4)):
        model = Small(limit)
        adversary = ConcurrentAdversary(PGD(0.1, value_range=RANGE, steps=2), staleness=1)
        trainer(model, adversary, passes=Passes(microbatch_size=size, norm_batch_size=4)).fit()
        ends.append(model)
    assert_same(*ends)


def test_staleness_must_fit_in_the_run():
    with pytest.raises(
        HessianFlowError,
        match="staleness must be smaller than the number of steps, got 14 for a run",
    ):
        trainer(network(), ConcurrentAdversary(attack(), staleness=14))
    trainer(network(), ConcurrentAdversary(attack(), staleness=13)).fit()
