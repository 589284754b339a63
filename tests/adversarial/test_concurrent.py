"""ConAdv against the worked cases of its reference, id traces, and the synchronous method written
out in full."""

import copy
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial import FGSM, PGD, ConcurrentAdversary, SecondStream, fgsm, pair_loss
from hessianflow.normalisation import split_batch_norm

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


def train(model, pairs, lr=0.1):
    """The loop a user writes: returns the steps at which twins were made."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    made = []
    for pair in pairs:
        optimizer.zero_grad()
        pair_loss(model, pair, cross_entropy).total.backward()
        optimizer.step()
        made.append(pair.attacked_at)
    return made


def test_loss_and_gradient_of_a_fresh_twin():
    """Reference, tests 1 and 3: xhat = .9, loss .605 > .5; gradient -1 - .99 = -1.99, the average
    -.995."""
    model = Scale(1.0)
    (pair,) = scale_adversary(staleness=0).pairs(model, [(X, Y)])
    assert pair.adversarial.item() == pytest.approx(0.9, abs=1e-15)
    loss = pair_loss(model, pair, half_squared_error)
    assert loss.clean.item() == 0.5
    assert loss.gain.item() == pytest.approx(0.105, abs=1e-14)
    (gradient,) = torch.autograd.grad(loss.total, model.parameters())
    assert gradient.item() == pytest.approx(-1.99, abs=1e-14)
    average = pair_loss(model, pair, half_squared_error, combine="average").total
    assert torch.autograd.grad(average, model.parameters())[0].item() == pytest.approx(
        -0.995, abs=1e-14
    )


def test_twin_of_stale_weights():
    """Reference, test 2: made at theta = -1, xhat = 1.1; at theta = 1 its loss is .405 < .5, and
    the gain says so."""
    model = Scale(-1.0)
    pairs = scale_adversary(staleness=1).pairs(model, [(X, Y)] * 3)
    assert next(pairs).adversarial is None
    model.theta.data.fill_(1.0)
    pair = next(pairs)
    assert pair.attacked_at == 0
    assert pair.adversarial.item() == pytest.approx(1.1, abs=1e-15)
    assert pair_loss(model, pair, half_squared_error).gain.item() == pytest.approx(
        0.405 - 0.5, abs=1e-14
    )


def test_eps_zero_doubles_the_gradient():
    """Reference, test 4, without batch statistics: xhat = x and the gradient of the sum is twice
    the clean one."""
    model = net().eval()
    x, y = batches(1)[0]
    (pair,) = ConcurrentAdversary(FGSM(0.0, value_range=(0, 1)), staleness=0).pairs(model, [(x, y)])
    assert torch.equal(pair.adversarial, x)
    doubled = torch.autograd.grad(
        pair_loss(model, pair, cross_entropy).total, list(model.parameters())
    )
    clean = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    for a, b in zip(doubled, clean, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=0, atol=1e-13)


def test_staleness_zero_is_the_synchronous_method():
    """Reference, test 5: bitwise equal to a loop that attacks with fgsm at the current weights, for
    5 steps."""
    ours, theirs = net().train(), net().train()
    data = batches(5)
    train(ours, fgsm_adversary(staleness=0).pairs(ours, data))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        twin = fgsm(theirs, x, y, 0.1, value_range=(0, 1))
        optimizer.zero_grad()
        outputs = theirs(torch.cat([x, twin]))
        (cross_entropy(outputs[:4], y) + cross_entropy(outputs[4:], y)).backward()
        optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_frozen_weights_make_staleness_invisible():
    """Reference, test 5: with a rate of 0 and fixed statistics, staleness 2 gives the twins of
    staleness 0."""
    model = net().eval()
    fresh, stale = (
        list(fgsm_adversary(staleness=s, first="synchronous").pairs(model, batches(5)))
        for s in (0, 2)
    )
    assert all(torch.equal(a.adversarial, b.adversarial) for a, b in zip(fresh, stale, strict=True))
    assert [p.attacked_at for p in stale] == [0, 1, 0, 1, 2]


def test_ids_attacked_are_those_trained_two_steps_later():
    """Reference, test 6: rows carry their number; what is attacked at step t is used, the same
    tensor, at t + 2."""
    attacked = []

    class Recording(FGSM):
        def perturb(self, model, inputs, targets, share, microbatch_size=None):
            attacked.append(inputs[:, 0].tolist())
            return super().perturb(model, inputs, targets, share, microbatch_size)

    data = [
        ((torch.arange(3.0) + 3 * i)[:, None].repeat(1, 2), torch.tensor([0, 1, 0]))
        for i in range(6)
    ]
    model = nn.Linear(2, 2)
    ahead = ConcurrentAdversary(Recording(0.1, value_range=None), staleness=2)
    used = []
    # two epochs: the queue crosses their end
    for pair in ahead.pairs(model, chain(data[:3], data[3:])):
        used.append(pair.inputs[:, 0].tolist())
        assert pair.inputs is data[pair.step][0]
        assert pair.attacked_at == (None if pair.step < 2 else pair.step - 2)
    assert attacked == used[2:]
    assert used == [x[:, 0].tolist() for x, _ in data]


@pytest.mark.parametrize("attack_set", ["adversarial", "main"])
def test_main_statistics_are_those_of_clean_training(attack_set):
    """Reference, tests 7 and 8: with a rate of 0, main statistics are those of clean forwards."""
    split, plain = net(split=True).train(), net().train()
    ahead = fgsm_adversary(staleness=1, attack_set=attack_set)
    train(split, ahead.pairs(split, batches(4)), lr=0.0)
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
        next(fgsm_adversary(staleness=0, attack_set=s).pairs(model, batches(1)))
        for s in ("adversarial", "main")
    ]
    assert not torch.equal(twins[0].adversarial, twins[1].adversarial)


def test_stored_and_resumed_in_the_middle_ends_the_same():
    data = batches(7)
    uninterrupted = net().train()
    train(
        uninterrupted,
        pgd_adversary().pairs(uninterrupted, data),
        lr=0.1,
    )

    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ahead = pgd_adversary()
    stream = iter(data)

    def advance(pairs, count):
        for _, pair in zip(range(count), pairs, strict=False):
            optimizer.zero_grad()
            pair_loss(model, pair, cross_entropy).total.backward()
            optimizer.step()

    advance(ahead.pairs(model, stream), 3)
    state = copy.deepcopy(ahead.state_dict())
    resumed = pgd_adversary(seed=9)
    resumed.load_state_dict(state)
    advance(resumed.pairs(model, data[5:]), 10)  # 3 steps taken, 2 batches queued
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), uninterrupted.parameters(), strict=True)
    )


def test_batches_may_change_size():
    """The queue drains at the old size: every batch keeps its own twin."""
    data = [*batches(2, rows=4), *batches(3, rows=6)]
    pairs = list(fgsm_adversary(staleness=1).pairs(net(), data))
    assert [len(p.inputs) for p in pairs] == [4, 4, 6, 6, 6]
    assert all(p.adversarial.shape == p.inputs.shape for p in pairs[1:])


def test_first_steps_are_clean_alone_or_synchronous():
    model = net().eval()
    x, y = batches(1)[0]
    (clean, _) = fgsm_adversary().pairs(model, [(x, y)] * 2)
    loss = pair_loss(model, clean, cross_entropy)
    assert loss.gain.isnan()
    torch.testing.assert_close(loss.total, cross_entropy(model(x), y))
    assert clean.concatenated() == (x, y)


def test_bad_input_is_named():
    model = Scale(1.0)
    with pytest.raises(ValueError, match="staleness must be a whole number >= 0, got -1"):
        scale_adversary(staleness=-1)
    with pytest.raises(
        ValueError, match="staleness must be smaller than the number of steps, got 5 for a run of 2"
    ):
        list(scale_adversary(staleness=5).pairs(model, [(X, Y)] * 2))
    with pytest.raises(ValueError, match="staleness 1 needs as many batches queued, got 0"):
        scale_adversary().step(model, X, Y)
    full = scale_adversary()
    full.prime(X, Y)
    with pytest.raises(ValueError, match="the queue of 1 batches is full"):
        full.prime(X, Y)
    with pytest.raises(ValueError, match="SecondStream needs a model on a CUDA device, got cpu"):
        list(scale_adversary(staleness=1, runner=SecondStream()).pairs(model, [(X, Y)] * 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_second_stream_trains_like_interleaving():
    """Same twins and weights, although the attack overlaps with a step that changes weights and
    statistics."""
    ends = []
    for runner in (None, SecondStream()):
        model = net(split=True).cuda().train()
        data = [(x.cuda(), y.cuda()) for x, y in batches(8, rows=64)]
        train(model, fgsm_adversary(staleness=1, runner=runner).pairs(model, data))
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
