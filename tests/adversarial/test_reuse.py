"""Reuse against a loop that keeps full gradients in a dictionary, pixel by pixel."""

from typing import Any

import pytest
import torch
from problems import bright_or_dark
from stopping import StopAfterEpoch
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer
from hessianflow.adversarial import GradientReuse
from hessianflow.control import FixedBatch
from hessianflow.data import AdaptiveBatches, Augmentation, DeviceBatches
from hessianflow.optim import SAM, GradientMoments
from hessianflow.training import Passes, Reporting

N, SIDE, EPS = 20, 6, 0.1


def data(augment: Augmentation | None = None, batch: int = 8, **options: Any) -> DeviceBatches:
    options["augment"] = augment or Augmentation()
    return bright_or_dark(N, batch, (2, SIDE, SIDE), **options)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2))


def train(model: nn.Module, batches: DeviceBatches, adversary: Any, **options: Any):
    settings: dict[str, Any] = {
        "epochs": 3,
        "loss_fn": F.cross_entropy,
        "reporting": Reporting(show_progress=False),
    }
    settings["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    settings["controller"] = FixedBatch(batches.batch_size)
    return AdaptiveBatchTrainer(model, batches, adversary=adversary, **(settings | options))


AUGMENTED = Augmentation(crop_padding=2, flip=True)


@pytest.mark.parametrize(
    "augment", [Augmentation(), Augmentation(flip=True), Augmentation(crop_padding=2), AUGMENTED]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_go_to_the_batch_and_back(augment: Augmentation, channels_last: bool):
    """A map that numbers the stored pixels, moved along, must number the pixels of the batch; and
    back."""
    images = torch.arange(1.0, N * SIDE * SIDE + 1).view(N, 1, SIDE, SIDE)
    batches = DeviceBatches(
        images, torch.zeros(N, dtype=torch.int64), 8, augment=augment, channels_last=channels_last
    )
    for x, _ in batches:
        stored = images[batches.latest]
        assert torch.equal(batches.as_in_latest(stored), x)
        back = batches.as_stored(x.contiguous())
        assert torch.equal(back[back > 0], stored[back > 0])  # what comes back lies where it was
        assert (back > 0).sum() == (x > 0).sum()  # and everything that was seen comes back


def test_every_visit_uses_the_sign_of_the_last_one():
    """Without augmentation, three epochs by hand: full gradients kept by example, one pass each."""
    ours, theirs = network(), network()
    batches = data()
    train(ours, batches, GradientReuse(batches, EPS, share=1, value_range=(0, 1))).fit()
    optimizer, kept, again = (
        torch.optim.SGD(theirs.parameters(), lr=0.1),
        torch.zeros(N, 2, SIDE, SIDE),
        data(),
    )
    for _ in range(3):
        for x, y in again:
            moved = (x + EPS * kept[again.latest].sign()).clamp(0, 1).requires_grad_()
            optimizer.zero_grad()
            F.cross_entropy(theirs(moved), y).backward()
            kept[again.latest] = moved.grad
            optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_the_first_epoch_is_clean_and_a_share_moves_that_share():
    batches = data(AUGMENTED)
    adversary = GradientReuse(batches, EPS, share=1, value_range=(0, 1))
    x, y = next(iter(batches))
    assert torch.equal(adversary.attack(network(), x, y, 1.0)(), x)
    adversary.load_state_dict({"signs": torch.ones(N, 2, SIDE, SIDE, dtype=torch.int8)})
    moved = adversary.attack(network(), x, y, 0.5)()
    assert [bool((a != b).any()) for a, b in zip(moved, x, strict=True)] == [False, True] * 4
    assert moved.max() <= 1
    assert (moved - x).max() <= EPS + 1e-6


@pytest.mark.parametrize("observers", [[], [GradientMoments()]])
def test_microbatches_and_observers_change_nothing(observers: list[Any]):
    ends = []
    for size, watching in ((8, []), (3, observers)):
        model, batches = network(), data(AUGMENTED)
        adversary = GradientReuse(batches, EPS, share=0.5, value_range=(0, 1))
        passes = Passes(microbatch_size=size)
        train(model, batches, adversary, passes=passes, observers=watching).fit()
        ends.append((model, adversary.state_dict()["signs"]))
    for a, b in zip(ends[0][0].parameters(), ends[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # a sign may flip where the gradient is rounding alone
    assert (ends[0][1] == ends[1][1]).float().mean() > 0.99


def test_resumed_it_ends_the_same(tmp_path: Any):
    whole, again = network(), network()
    batches = data(AUGMENTED)
    train(whole, batches, GradientReuse(batches, EPS, share=1, value_range=(0, 1)), epochs=4).fit()
    model, batches, stop = network(), data(AUGMENTED), StopAfterEpoch(2)
    stop.trainer = train(
        model,
        batches,
        GradientReuse(batches, EPS, share=1, value_range=(0, 1)),
        epochs=4,
        run_dir=tmp_path / "run",
        reporting=Reporting(sinks=[stop], show_progress=False),
    )
    assert stop.trainer.fit().summary["status"] == "preempted"
    batches = data(AUGMENTED)
    train(
        again, batches, GradientReuse(batches, EPS, share=1, value_range=(0, 1)), epochs=4
    ).resume(tmp_path / "run")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )


def test_bad_input_is_named():
    batches = data()
    with pytest.raises(ValueError, match="eps must be finite and at least 0, got -1"):
        GradientReuse(batches, -1.0, value_range=(0, 1))
    with pytest.raises(
        ValueError, match="reuse must know which examples a batch holds, which AdaptiveBatches does"
    ):
        GradientReuse(AdaptiveBatches([(torch.zeros(1), 0)] * 4, 2), EPS, value_range=None)
    x, y = next(iter(batches))
    with pytest.raises(ValueError, match="inputs must lie in value_range"):
        GradientReuse(batches, EPS, share=1, value_range=(5, 6)).attack(network(), x, y, 1.0)
    adversary = GradientReuse(batches, EPS, share=1, value_range=(0, 1))
    with pytest.raises(
        ValueError, match=r"reuse keeps gradients of images as they are stored, \[8, 2, 6, 6\]"
    ):
        adversary.attack(network(), x[:, :, :3], y, 1.0)
    with pytest.raises(ValueError, match=r"adversarial share must lie in \[0, 1\], got 2"):
        adversary.attack(network(), x, y, 2.0)


def test_several_ranks_are_refused():
    class Two:
        rank, world_size = 0, 2

    with pytest.raises(ValueError, match="reuse keeps the gradients of one process's examples"):
        GradientReuse(data(), EPS, value_range=(0, 1)).join(Two())


def test_a_loss_without_input_gradient_is_named():
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.bias.expand(len(x), 2)

    batches, model = data(), Blind()
    with pytest.raises(
        ValueError, match="the loss does not depend on the inputs: there is no gradient by them"
    ):
        train(model, batches, GradientReuse(batches, EPS, share=1, value_range=(0, 1))).fit()


def test_kept_is_the_gradient_at_the_weights_and_not_where_sam_looks():
    """At rate 0 the weights stay; the first visit is clean."""
    model, batches = network(), data()
    adversary = GradientReuse(batches, EPS, share=1, value_range=(0, 1))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=5.0, model=model)
    train(model, batches, adversary, optimizer=sam, epochs=1).fit()
    x, y = batches.examples(torch.arange(N))
    x.requires_grad_()
    [slope] = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    assert torch.equal(adversary.state_dict()["signs"], slope.sign().to(torch.int8))
