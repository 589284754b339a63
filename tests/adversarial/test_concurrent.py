"""ConAdv against the worked cases of its reference, id traces, and the synchronous method written
out in full."""

import copy
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial import (
    FGSM,
    PGD,
    ConcurrentAdversary,
    GradientReuse,
    SecondStream,
    fgsm,
)
from hessianflow.data import DeviceBatches
from hessianflow.interfaces import Exposure
from hessianflow.normalisation import split_batch_norm
from hessianflow.training import Ahead, exposed_loss

D = torch.float64


class Scale(nn.Module):
    """f(x) = theta * x."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(float(theta), dtype=D))

    def forward(self, x):
        return self.theta * x


def half_squared_error(outputs, targets):
    return 0.5 * ((outputs - targets) ** 2).mean()


def scale_adversary(**options):
    return ConcurrentAdversary(FGSM(0.1, value_range=None, loss_fn=half_squared_error), **options)


X, Y = torch.ones(1, 1, dtype=D), torch.full((1, 1), 2.0, dtype=D)


def net(split=False):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ).double()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return split_batch_norm(model) if split else model


def batches(count, rows=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(rows, 1, 6, 6, generator=generator, dtype=D),
            torch.randint(0, 3, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


def fgsm_adversary(**options):
    return ConcurrentAdversary(FGSM(0.1, value_range=(0, 1)), **options)


def pgd_adversary(seed=0):
    return ConcurrentAdversary(PGD(0.1, value_range=(0, 1), steps=2, seed=seed), staleness=2)


def train(model, exposures, lr=0.1):
    """The loop a user writes: returns at which steps there were twins."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    made = []
    for exposure in exposures:
        optimizer.zero_grad()
        exposed_loss(model, exposure, cross_entropy).backward()
        optimizer.step()
        made.append(exposure.twins is not None)
    return made


def test_loss_and_gradient_of_a_fresh_twin():
    """Reference, tests 1 and 3: xhat = .9, loss .605 beside .5; gradient -1 - .99 = -1.99, the
    average -.995."""
    model = Scale(1.0)
    for combine, total, slope in (("sum", 1.105, -1.99), ("average", 0.5525, -0.995)):
        adversary = scale_adversary(staleness=0, combine=combine)
        (exposure,) = Ahead([(X, Y)], adversary, model)
        assert exposure.twins[0].item() == pytest.approx(0.9, abs=1e-15)
        loss = exposed_loss(model, exposure, half_squared_error)
        assert loss.item() == pytest.approx(total, abs=1e-14)
        (gradient,) = torch.autograd.grad(loss, model.parameters())
        assert gradient.item() == pytest.approx(slope, abs=1e-14)


def test_twin_of_stale_weights():
    """Reference, test 2: made at theta = -1, xhat = 1.1; at theta = 1 its loss is .405 beside .5:
    it is too stale to be harder."""
    model = Scale(-1.0)
    exposures = iter(Ahead([(X, Y)] * 3, scale_adversary(staleness=1), model))
    assert next(exposures).twins is None
    model.theta.data.fill_(1.0)
    exposure = next(exposures)
    assert exposure.twins[0].item() == pytest.approx(1.1, abs=1e-15)
    loss = exposed_loss(model, exposure, half_squared_error)
    assert loss.item() == pytest.approx(0.5 + 0.405, abs=1e-14)


def test_eps_zero_doubles_the_gradient():
    """Reference, test 4, without batch statistics: xhat = x and the gradient of the sum is twice
    the clean one."""
    model = net().eval()
    x, y = batches(1)[0]
    adversary = ConcurrentAdversary(FGSM(0.0, value_range=(0, 1)), staleness=0)
    (exposure,) = Ahead([(x, y)], adversary, model)
    assert torch.equal(exposure.twins[0], x)
    loss = exposed_loss(model, exposure, cross_entropy)
    doubled = torch.autograd.grad(loss, list(model.parameters()))
    clean = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    for a, b in zip(doubled, clean, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=0, atol=1e-13)


def test_staleness_zero_is_the_synchronous_method():
    """Reference, test 5: bitwise equal to a loop that attacks with fgsm at the current weights, for
    5 steps."""
    ours, theirs = net().train(), net().train()
    data = batches(5)
    train(ours, Ahead(data, fgsm_adversary(staleness=0), ours))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        twin = fgsm(theirs, x, y, 0.1, value_range=(0, 1))
        optimizer.zero_grad()
        (cross_entropy(theirs(x), y) + cross_entropy(theirs(twin), y)).backward()
        optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_a_share_makes_every_row_count_alike():
    """Half of 4 rows have twins: the summed loss of 6 rows over 4, or with the average over 6."""
    model = net().eval()
    x, y = batches(1)[0]
    twins = fgsm(model, x, y, 0.1, value_range=(0, 1))[1::2]
    summed = cross_entropy(model(x), y, reduction="sum")
    summed = summed + cross_entropy(model(twins), y[1::2], reduction="sum")
    for combine, rows in (("sum", 4), ("average", 6)):
        adversary = fgsm_adversary(share=0.5, staleness=0, combine=combine)
        (exposure,) = Ahead([(x, y)], adversary, model)
        loss = exposed_loss(model, exposure, cross_entropy)
        torch.testing.assert_close(loss, summed / rows, rtol=1e-12, atol=0)


def test_frozen_weights_make_staleness_invisible():
    """Reference, test 5: with a rate of 0 and fixed statistics, staleness 2 gives the twins of
    staleness 0."""
    model = net().eval()
    fresh, stale = (
        list(Ahead(batches(5), fgsm_adversary(staleness=s, first="synchronous"), model))
        for s in (0, 2)
    )
    assert len(stale) == 5
    assert all(torch.equal(a.twins[0], b.twins[0]) for a, b in zip(fresh, stale, strict=True))


@pytest.mark.parametrize(
    ("first", "order"),
    [("clean", [2, 3, 4, 5]), ("synchronous", [2, 0, 3, 1, 4, 5])],
)
def test_ids_attacked_are_those_trained_two_steps_later(first, order):
    """Reference, test 6: rows carry their number; what is attacked at step t is used, the same
    tensor, at t + 2."""
    attacked = []

    class Recording(FGSM):
        def perturb(self, model, inputs, targets, share, microbatch_size=None):
            attacked.append(int(inputs[0, 0]) // 3)
            return super().perturb(model, inputs, targets, share, microbatch_size)

    data = [
        ((torch.arange(3.0) + 3 * i)[:, None].repeat(1, 2), torch.tensor([0, 1, 0]))
        for i in range(6)
    ]
    model = nn.Linear(2, 2)
    adversary = ConcurrentAdversary(Recording(0.1, value_range=None), staleness=2, first=first)
    # two epochs: the queue crosses their end
    for step, exposure in enumerate(Ahead(chain(data[:3], data[3:]), adversary, model)):
        assert exposure.batch[0] is data[step][0]
        assert (exposure.twins is None) == (first == "clean" and step < 2)
        assert set(attacked) >= set(range(2, min(step + 3, 6)))
        assert step + 3 not in attacked  # not before its time
    assert attacked == order


@pytest.mark.parametrize("attack_set", ["adversarial", "main"])
def test_main_statistics_are_those_of_clean_training(attack_set):
    """Reference, tests 7 and 8: with a rate of 0, main statistics are those of clean forwards."""
    split, plain = net(split=True).train(), net().train()
    adversary = fgsm_adversary(staleness=1, attack_set=attack_set)
    assert train(split, Ahead(batches(4), adversary, split), lr=0.0) == [False, True, True, True]
    for x, _ in batches(4):
        plain(x)
    torch.testing.assert_close(
        split[1].main.running_mean, plain[1].running_mean, rtol=0, atol=1e-14
    )
    torch.testing.assert_close(split[1].main.running_var, plain[1].running_var, rtol=0, atol=1e-14)
    assert split[1].adversarial.num_batches_tracked == 3  # the first batch has no twin
    assert not torch.allclose(split[1].adversarial.running_mean, split[1].main.running_mean)


def test_the_attack_set_matters():
    model = net(split=True)
    model[1].adversarial.weight.data.neg_()
    twins = [
        next(iter(Ahead(batches(1), fgsm_adversary(staleness=0, attack_set=s), model))).twins[0]
        for s in ("adversarial", "main")
    ]
    assert not torch.equal(*twins)


def test_stored_and_resumed_in_the_middle_ends_the_same():
    data = batches(7)
    uninterrupted = net().train()
    train(uninterrupted, Ahead(data, pgd_adversary(), uninterrupted))

    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def advance(exposures, count):
        for _, exposure in zip(range(count), exposures, strict=False):
            optimizer.zero_grad()
            exposed_loss(model, exposure, cross_entropy).backward()
            optimizer.step()

    ahead = Ahead(data, pgd_adversary(), model)
    advance(ahead, 3)
    state = copy.deepcopy(ahead.state_dict())
    resumed = Ahead(data[5:], pgd_adversary(seed=9), model)
    resumed.load_state_dict(state)
    advance(resumed, 10)  # 3 steps taken, 2 batches queued
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), uninterrupted.parameters(), strict=True)
    )


def test_batches_may_change_size():
    """The queue drains at the old size: every batch keeps its own twin."""
    data = [*batches(2, rows=4), *batches(3, rows=6)]
    exposures = list(Ahead(data, fgsm_adversary(staleness=1), net()))
    assert [len(e.batch[1]) for e in exposures] == [4, 4, 6, 6, 6]
    assert all(e.twins[0].shape == e.batch[0].shape for e in exposures[1:])


def test_first_steps_are_clean():
    model = net().eval()
    x, y = batches(1)[0]
    (clean, _) = Ahead([(x, y)] * 2, fgsm_adversary(), model)
    assert clean == Exposure((x, y))
    torch.testing.assert_close(
        exposed_loss(model, clean, cross_entropy), cross_entropy(model(x), y)
    )


def test_any_adversary_and_iterable_of_batches_will_do():
    """A generator of batches through FGSM in place, and the gradients that reuse keeps."""
    model = net()
    data = batches(3)
    exposures = list(Ahead(iter(data), FGSM(0.1, share=1, value_range=(0, 1)), model))
    for exposure, (x, y) in zip(exposures, data, strict=True):
        assert torch.equal(exposure.batch[0], fgsm(model, x, y, 0.1, value_range=(0, 1)))

    images, targets = torch.rand(8, 1, 6, 6), torch.arange(8) % 3
    stored = DeviceBatches(images, targets, 4, shuffle=False)
    reuse = GradientReuse(stored, 0.1, share=1, value_range=(0, 1))
    single = net().float()
    train(single, Ahead(stored, reuse, single), lr=0.0)
    leaf = images.clone().requires_grad_()
    loss = cross_entropy(single(leaf[:4]), targets[:4]) + cross_entropy(
        single(leaf[4:]), targets[4:]
    )
    loss.backward()
    assert torch.equal(reuse.state_dict()["signs"], leaf.grad.sign().to(torch.int8))


def test_bad_input_is_named():
    model = Scale(1.0)
    with pytest.raises(ValueError, match="staleness must be a whole number >= 0, got -1"):
        scale_adversary(staleness=-1)
    with pytest.raises(
        ValueError, match="staleness must be smaller than the number of steps, got 5 for a run of 2"
    ):
        list(Ahead([(X, Y)] * 2, scale_adversary(staleness=5), model))
    with pytest.raises(ValueError, match="no batch"):
        list(Ahead([], scale_adversary(staleness=0), model))
    with pytest.raises(ValueError, match="SecondStream needs a model on a CUDA device, got cpu"):
        list(Ahead([(X, Y)] * 2, scale_adversary(staleness=1, runner=SecondStream()), model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_second_stream_trains_like_interleaving():
    """Same twins and weights, although the attack overlaps with a step that changes weights and
    statistics."""
    ends = []
    for runner in (None, SecondStream()):
        model = net(split=True).cuda().train()
        data = [(x.cuda(), y.cuda()) for x, y in batches(8, rows=64)]
        train(model, Ahead(data, fgsm_adversary(staleness=1, runner=runner), model))
        ends.append(model)
    for a, b in zip(ends[0].state_dict().values(), ends[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class Late(FGSM):
    """Reads its inputs only after a while."""

    def perturb(self, model, inputs, targets, share, microbatch_size=None):
        torch.cuda._sleep(10**8)
        return inputs.clone()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_attacked_on_the_second_stream_are_kept_until_they_are_read():
    model, (x, y) = net().cuda(), [tensor.cuda() for tensor in batches(1, rows=64)[0]]
    ahead = ConcurrentAdversary(Late(0.1, value_range=None), runner=SecondStream())
    wait = ahead.attack(model, x, y, 0.5)
    # in the memory of the rows, were that free
    others = [torch.full_like(x[:32], -1) for _ in range(8)]
    assert torch.equal(wait(), x[::2])
    assert len(others) == 8
