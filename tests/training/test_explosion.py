"""What counts as exploded: losses of known distributions, and runs against bare loops that are
healthy or are not."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.data import AdaptiveBatches, DeviceBatches
from hessianflow.training import Checkpoints, Divergence, Reporting
from hessianflow.training.divergence import ExplosionRule, streak_needed

Draw = Callable[[np.random.Generator, int], np.ndarray]
HEALTHY: dict[str, Draw] = {
    "log-normal": lambda source, n: np.exp(2.5 * source.standard_normal(n)),
    "claims, most batches without": lambda source, n: np.where(
        source.random(n) < 0.7, 1e-3, 1e5 * source.random(n)
    ),
    "claims, every other batch with": lambda source, n: np.where(
        source.random(n) < 0.5, 1e-3, 1e5 * source.random(n)
    ),
    "Pareto without a variance": lambda source, n: source.pareto(1.2, n),
    "falling from unscaled targets": lambda source, n: (
        1e9 / (1 + np.arange(n)) ** 2 * source.random(n)
    ),
    "rising slowly": lambda source, n: (1 + np.arange(n)) * source.random(n),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_losses_pass(name: str):
    """1,000 runs of 300 updates; the rule allows one in 10,000 for each of the first numbers of
    losses known."""
    source = np.random.default_rng(0)
    stopped = sum(
        ExplosionRule(100).first_bad(HEALTHY[name](source, 300).tolist()) is not None
        for _ in range(1000)
    )
    assert stopped <= 3


@pytest.mark.parametrize("count", [1, 2, 5, 16, 300])
@pytest.mark.parametrize(
    "how", ["grows tenfold a step", "stays at 10,000", "stays there but for one that is right"]
)
def test_losses_that_stay_far_above_do_not_pass(count: int, how: str):
    before = np.random.default_rng(0).uniform(1.0, 3.0, count).tolist()
    after = [1e4] * 60
    if how.startswith("grows"):
        after = [10.0 ** min(n, 300) for n in range(3, 63)]
    if how.endswith("right"):
        after[1] = 0.0
    rule = ExplosionRule(100)
    assert rule.first_bad(before + after) == count


def test_needed_streaks_worked_by_hand():
    """C(38 + 3, 3) = 10,660 and C(37 + 3, 3) = 9,880; C(5 + 13, 13) = 8,568 and C(5 + 14, 14) =
    11,628."""
    assert [streak_needed(n) for n in (1, 5, 37, 38, 10**6)] == [50, 14, 4, 3, 3]


def test_the_first_loss_has_none_to_be_compared_with():
    assert ExplosionRule(100).first_bad([1e30]) is None


def test_a_spike_is_not_judged_and_counts_for_the_mean():
    rule = ExplosionRule(100)
    assert rule.first_bad([1.0] * 20 + [1e5]) is None
    assert rule.in_doubt
    assert rule.first_bad([1.0, 1.0] + [4e5] * 3) is None, "the mean is 4,300 with the spike"
    assert not rule.in_doubt


def test_read_in_parts_is_judged_alike():
    losses = [1.0] * 40 + [1e5] * 3
    rule = ExplosionRule(100)
    assert [rule.first_bad([loss]) for loss in losses] == [None] * 42 + [-2]


def test_saved_and_loaded_goes_on():
    losses = [2.0] * 40 + [1e5] * 2
    first, second = ExplosionRule(100), ExplosionRule(100)
    first.first_bad(losses)
    second.load_state_dict(first.state_dict())
    assert first.first_bad([1e5]) == second.first_bad([1e5]) == -2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_always_bad(bad: float):
    assert ExplosionRule(None).first_bad([1.0, 1e30, bad]) == 2
    assert ExplosionRule(None).first_bad([1.0] + [1e30] * 100) is None


def test_negative_losses_are_judged_by_their_size():
    """Such as those of densities: -5 to -20 is no explosion, and -10^9 is."""
    assert ExplosionRule(100).first_bad([-5.0] * 40 + [-20.0] * 10) is None
    assert ExplosionRule(100).first_bad([-5.0] * 40 + [-1e9] * 3) == 40


def test_an_epoch_of_one_step_is_held_against_those_before():
    rule = ExplosionRule(100)
    for _ in range(3):
        rule.first_bad([2.0])
        rule.start_epoch()
    rule.first_bad([1e4])
    assert rule.epoch_exploded(1e4)
    assert not rule.epoch_exploded(100.0)


# In runs


def claims(
    every: int, scale: float, batch_size: int = 16
) -> tuple[AdaptiveBatches, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(512, 4), torch.randn(512, 1) * 0.1
    y[::every] *= scale
    return AdaptiveBatches(TensorDataset(x, y), batch_size, seed=3), x, y


@pytest.mark.slow
@pytest.mark.parametrize(("every", "scale"), [(97, 400), (97, 4000), (31, 1000), (200, 1e5)])
@pytest.mark.parametrize("batch_size", [4, 16])
def test_a_regression_with_rare_large_targets_trains(every: int, scale: float, batch_size: int):
    """As in a bare loop, whose losses are finite and whose weights stay small."""
    torch.manual_seed(0)
    model, hand = nn.Linear(4, 1), nn.Linear(4, 1)
    hand.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(hand.parameters(), lr=1e-3)
    stream = claims(every, scale, batch_size)[0]
    for _ in range(3):
        for inputs, targets in stream:
            optimizer.zero_grad()
            nn.functional.mse_loss(hand(inputs), targets).backward()
            optimizer.step()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = claims(every, scale, batch_size)[0]
    run = AdaptiveBatchTrainer(
        model,
        batches,
        optimizer=optimizer,
        loss_fn=nn.MSELoss(),
        epochs=3,
        reporting=Reporting(show_progress=False),
    )
    assert run.fit().summary["status"] == "finished"
    assert torch.equal(model.weight, hand.weight)
    assert hand.weight.abs().max() < 1


def diverging(optimizer: Callable[[nn.Module], torch.optim.Optimizer], **options: Any) -> str:
    batches, _, _ = claims(97, 40)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    run = AdaptiveBatchTrainer(
        model,
        batches,
        optimizer=optimizer(model),
        loss_fn=nn.MSELoss(),
        epochs=3,
        reporting=Reporting(show_progress=False),
        **options,
    )
    with pytest.raises(HessianFlowError, match="exploded") as caught:
        run.fit()
    return str(caught.value)


def test_a_run_that_diverges_is_stopped_early():
    """Adam at a rate of 100: the loss stays finite, and a hundred thousand times what it was."""
    message = diverging(lambda model: torch.optim.Adam(model.parameters(), lr=100.0))
    assert "in epoch 1 at update" in message
    assert "set Divergence(max_loss_ratio=None)" in message


def test_the_limit_can_be_taken_off():
    batches, _, _ = claims(97, 40)
    model = nn.Linear(4, 1)
    run = AdaptiveBatchTrainer(
        model,
        batches,
        optimizer=torch.optim.Adam(model.parameters(), lr=100.0),
        loss_fn=nn.MSELoss(),
        epochs=2,
        divergence=Divergence(max_loss_ratio=None),
        reporting=Reporting(show_progress=False),
    )
    assert run.fit().summary["status"] == "finished"


def test_full_batches_that_explode_are_stopped_after_one(tmp_path):
    """One step an epoch; the batch of the third is made to explode, and its checkpoint would be a
    bad one."""
    images = torch.randn(32, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    batches = DeviceBatches(images, images.sum((1, 2, 3)), 32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0))

    def poison(inputs, targets, progress):
        return inputs * (1e6 if progress.epoch == 2 else 1.0), targets

    run = AdaptiveBatchTrainer(
        model,
        batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        loss_fn=nn.MSELoss(),
        epochs=6,
        transform=poison,
        run_dir=tmp_path / "run",
        reporting=Reporting(show_progress=False),
    )
    with pytest.raises(HessianFlowError, match="exploded, in epoch 3 at update 3"):
        run.fit()


def test_no_checkpoint_is_made_in_doubt(tmp_path):
    """Saved every 8 examples, a step each: not while the loss is far up, which may be the beginning
    of the end."""
    images = torch.randn(320, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    batches = DeviceBatches(images, images.sum((1, 2, 3)), 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0))
    saved: list[int] = []

    def spike(inputs, targets, progress):
        if progress.updates in (22, 23):
            targets = targets + 1e4
        path = tmp_path / "run" / "checkpoints" / "last.pt"
        saved.append(torch.load(path, weights_only=True)["updates"] if path.exists() else -1)
        return inputs, targets

    AdaptiveBatchTrainer(
        model,
        batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-4),
        loss_fn=nn.MSELoss(),
        epochs=1,
        transform=spike,
        run_dir=tmp_path / "run",
        checkpoints=Checkpoints(every_examples=8),
        reporting=Reporting(show_progress=False),
    ).fit()
    assert saved[20:28] == [20, 21, 22, 22, 22, 22, 26, 27]
