"""Two sets of statistics: against training on clean examples only, and two separate forward
passes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial import fgsm
from hessianflow.normalisation import clean_rows, merge_batch_norm, split_batch_norm


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 2),
    ).double()


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng():
        yield


def batch(rows=8):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(rows, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(
        rows
    ) % 2


def sum_of_means(model, x, adversarial, y):
    with clean_rows(model, len(x)):
        outputs = model(torch.cat([x, adversarial]))
    return cross_entropy(outputs[: len(x)], y) + cross_entropy(outputs[len(x) :], y)


def test_main_statistics_are_those_of_clean_training():
    """ConAdv reference, test 7: main running statistics equal those of clean-only training;
    adversarial ones differ."""
    x, y = batch()
    plain = net().train()
    split = split_batch_norm(net()).train()
    plain(x)
    sum_of_means(split, x, x + 0.3, y)
    for name, value in plain[1].named_buffers():
        torch.testing.assert_close(
            dict(split[1].main.named_buffers())[name], value, rtol=0, atol=1e-14
        )
    assert not torch.allclose(split[1].adversarial.running_mean, split[1].main.running_mean)


def test_one_concatenated_forward_is_two_separate_ones():
    """Loss and gradients equal those of two passes through the two sets, by autograd on each
    alone."""
    x, y = batch()
    adversarial = (x + 0.1).clamp(0, 1)
    one, two = split_batch_norm(net()).train(), split_batch_norm(net()).train()
    loss = sum_of_means(one, x, adversarial, y)
    with clean_rows(two, None):
        reference = cross_entropy(two(x), y)
    with clean_rows(two, 0):
        reference = reference + cross_entropy(two(adversarial), y)
    torch.testing.assert_close(loss, reference, rtol=0, atol=1e-13)
    gradients = zip(
        torch.autograd.grad(loss, list(one.parameters())),
        torch.autograd.grad(reference, list(two.parameters())),
        strict=True,
    )
    for a, b in gradients:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_twins_with_shared_affine_and_eps_zero_double_the_gradient():
    """ConAdv reference, test 4: with xhat = x the gradient of the sum is twice the clean one."""
    x, y = batch()
    split, plain = split_batch_norm(net(), share_affine=True).train(), net().train()
    doubled = torch.autograd.grad(sum_of_means(split, x, x, y), list(split.parameters()))
    clean = torch.autograd.grad(cross_entropy(plain(x), y), list(plain.parameters()))
    for a, b in zip(doubled, clean, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("share", "extra"), [(True, 0), (False, 4)])
def test_affine_parameters_are_shared_or_not(share, extra):
    model = net()
    before = list(model.parameters())
    split = split_batch_norm(model, share_affine=share)
    assert split is model
    assert len(list(split.parameters())) == len(before) + extra
    assert {id(p) for p in before} <= {id(p) for p in split.parameters()}


def test_evaluation_and_export_use_the_main_set():
    x, y = batch()
    split = split_batch_norm(net()).train()
    sum_of_means(split, x, x + 0.3, y)
    split.eval()
    merged = merge_batch_norm(split)
    assert [type(m) for m in merged.modules()] == [type(m) for m in net().modules()]
    assert torch.equal(merged(x), split(x))
    assert set(merged.state_dict()) == set(net().state_dict())
    with clean_rows(split, 0):
        assert not torch.allclose(split(x), merged(x))


def test_attack_through_the_adversarial_set_moves_no_statistics():
    x, y = batch()
    split = split_batch_norm(net()).train()
    split[1].adversarial.running_mean.fill_(0.5)
    before = copy.deepcopy(split.state_dict())
    with clean_rows(split, 0):
        through_adversarial = fgsm(split, x, y, 0.1, value_range=(0, 1))
    assert not torch.equal(through_adversarial, fgsm(split, x, y, 0.1, value_range=(0, 1)))
    assert all(torch.equal(v, before[k]) for k, v in split.state_dict().items())


def test_a_layer_used_twice_stays_one_layer():
    norm = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": norm, "b": norm, "c": nn.Sequential(norm)})
    split = split_batch_norm(model)
    assert split["a"] is split["b"] is split["c"][0]


def test_a_bare_layer_is_converted():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    split = split_batch_norm(nn.BatchNorm1d(4))
    with clean_rows(split, 5):
        result = split(x)
    torch.testing.assert_close(result[:5].mean(0), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(result[5:].mean(0), torch.zeros(4), rtol=0, atol=1e-6)


def test_selection_is_put_back_when_the_body_raises():
    split = split_batch_norm(nn.BatchNorm1d(4))

    def fail():
        with clean_rows(split, 2):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert split.clean is None


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="needs a model with batch normalisation, found none"):
        split_batch_norm(nn.Linear(2, 2))
    split = split_batch_norm(net())
    with pytest.raises(ValueError, match="split already"):
        split_batch_norm(split)
    with (
        pytest.raises(ValueError, match="clean must be at least 0 rows, got -1"),
        clean_rows(split, -1),
    ):
        pass
    with pytest.raises(ValueError, match="no split batch normalisation"), clean_rows(net(), 1):
        pass
    with pytest.raises(ValueError, match="no split batch normalisation"):
        merge_batch_norm(net())
