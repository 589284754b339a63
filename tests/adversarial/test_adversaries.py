"""The training plug-ins: which rows change, what is drawn, and that nothing else is touched."""

import pytest
import torch
from torch import nn

from hessianflow.adversarial import FGSM, PGD, ConcurrentAdversary, fgsm, perturbed_rows
from hessianflow.interfaces import HessianFlowError


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    ).to(dtype)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.rand(32, 1, 8, 8, generator=generator, dtype=dtype)
    return model, x, torch.arange(32) % 10


def test_only_the_share_is_perturbed_and_by_fgsm():
    model, x, y = problem()
    original = x.clone()
    result = FGSM(0.05, value_range=(0, 1)).perturb(model, x, y, 0.2)
    rows = perturbed_rows(32, 0.2)
    expected = x.clone()
    expected[rows] = fgsm(model, x[rows], y[rows], 0.05, value_range=(0, 1))
    assert torch.equal(result, expected)
    assert torch.equal(x, original)
    assert (result != x).flatten(1).any(1).nonzero().flatten().tolist() == rows.tolist()


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_share_zero_returns_the_very_tensor(share):
    """Off switch equals baseline: also a share worth less than one row touches nothing, not even
    the model."""
    _, x, y = problem()

    class Untouchable(nn.Module):
        def forward(self, inputs):
            pytest.fail("the model was called")

    assert FGSM(value_range=(0, 1)).perturb(Untouchable(), x, y, share) is x


@pytest.mark.parametrize("adversary", [FGSM, PGD])
@pytest.mark.parametrize("microbatch_size", [1, 3, 7, 100])
def test_microbatch_size_does_not_matter(adversary, microbatch_size):
    """Random starts included; float64 rounding of a convolution may depend on the batch, hence no
    exact equality."""
    model, x, y = problem()
    whole = adversary(0.05, value_range=(0, 1), random_start=True).perturb(model, x, y, 0.5)
    parts = adversary(0.05, value_range=(0, 1), random_start=True).perturb(
        model, x, y, 0.5, microbatch_size
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_stored_and_resumed_random_starts_continue():
    model, x, y = problem()
    uninterrupted = PGD(0.05, value_range=(0, 1), seed=5)
    first = uninterrupted.perturb(model, x, y, 0.5)
    state = uninterrupted.state_dict()
    second = uninterrupted.perturb(model, x, y, 0.5)
    resumed = PGD(0.05, value_range=(0, 1), seed=0)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.perturb(model, x, y, 0.5), second)
    assert not torch.equal(first, second)


def test_seeds_give_different_starts():
    model, x, y = problem()
    a, b = (PGD(0.05, value_range=(0, 1), seed=s).perturb(model, x, y, 0.5) for s in (0, 1))
    assert not torch.equal(a, b)


def test_model_and_global_generator_are_as_found():
    model, x, y = problem()
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = torch.get_rng_state()
    adversary = PGD(0.05, value_range=(0, 1))
    adversary.perturb(model, x, y, 0.5, 4)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_layout_is_kept(layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 5, 5, generator=generator).contiguous(memory_format=layout)
    model, y = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 10)), torch.arange(8)
    assert FGSM(0.05, value_range=(0, 1)).perturb(model, x, y, 0.25).stride() == x.stride()
    assert fgsm(model, x, y, 0.05, value_range=(0, 1)).stride() == x.stride()


def test_range_is_checked_on_the_first_batch():
    model, x, y = problem()
    with pytest.raises(ValueError, match=r"inputs must lie in value_range \[0, 1\]"):
        FGSM(value_range=(0, 1)).perturb(model, 5 * x, y, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.2,), r"adversarial share must lie in \[0, 1\], got 1.2"),
        ((0.5, 0), "microbatch_size must be at least 1"),
    ],
)
def test_bad_arguments_of_perturb(arguments, message):
    model, x, y = problem()
    with pytest.raises(ValueError, match=message):
        FGSM(value_range=(0, 1)).perturb(model, x, y, *arguments)


@pytest.mark.parametrize("adversary", [FGSM, PGD])
def test_bad_eps_is_refused_at_construction(adversary):
    with pytest.raises(ValueError, match="eps must be finite"):
        adversary(-1.0, value_range=(0, 1))


@pytest.mark.parametrize("attack", [FGSM, PGD])
def test_a_loss_that_does_not_fit_the_model_is_reported(attack):
    """Cross-entropy over a single output is 0 whatever the input: nothing would be perturbed, and
    nobody would know."""
    model = torch.nn.Linear(4, 1)
    inputs, targets = torch.rand(6, 4), torch.rand(6, 1)
    adversary = attack(0.1, value_range=(0.0, 1.0))
    for _ in range(2):
        adversary.perturb(model, inputs, targets, 0.5)
    with pytest.raises(
        HessianFlowError, match=r"zero everywhere, .* give it the loss that is trained on"
    ):
        adversary.perturb(model, inputs, targets, 0.5)
    adversary = attack(0.1, value_range=(0.0, 1.0), loss_fn=torch.nn.MSELoss())
    for _ in range(4):
        assert not torch.equal(adversary.perturb(model, inputs, targets, 0.5), inputs)


def test_a_last_layer_that_begins_at_zero_is_no_reason_to_stop():
    model = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(model.weight)
    adversary = FGSM(0.1, value_range=(0.0, 1.0))
    inputs, targets = torch.rand(6, 4), torch.randint(3, (6,))
    assert torch.equal(adversary.perturb(model, inputs, targets, 0.5), inputs)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "half", True])
@pytest.mark.parametrize(
    "make",
    [
        lambda share: FGSM(0.1, share=share, value_range=None),
        lambda share: PGD(0.1, share=share, value_range=None),
        lambda share: ConcurrentAdversary(FGSM(0.1, value_range=None), share=share),
    ],
)
def test_a_share_that_is_none_is_refused(make, share):
    with pytest.raises(HessianFlowError, match=r"share must be a number in \[0, 1\], got"):
        make(share)


def test_shares_are_those_of_the_published_methods():
    """ABSA's reference implementation attacks a fifth of each batch; ConAdv gives all of it
    twins."""
    attack = FGSM(0.1, value_range=None)
    assert (attack.share, PGD(0.1, value_range=None).share) == (0.2, 0.2)
    assert ConcurrentAdversary(attack).share == 1
