"""Observers against gradients computed one example at a time, and against the covariance they
estimate."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hessianflow.interfaces import GradientObserver, HessianFlowError
from hessianflow.optim import ExtraBatchNorms, GradientMoments, MicrobatchNorms

F64 = torch.float64


def problem(examples: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(examples, 5, generator=generator, dtype=F64)
    return model, inputs, torch.randint(3, (examples,), generator=generator)


def gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(inputs), targets)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_microbatch_norms_are_weighted_by_examples_and_start_afresh() -> None:
    """Norms 5 over 1 example and 10 over 3: (5 + 30) / 4."""
    parameter = torch.zeros(2, dtype=F64, requires_grad=True)
    observer = MicrobatchNorms([parameter])
    observer.on_microbatch([torch.tensor([99.0, 0.0], dtype=F64)], 7)
    observer.on_step([torch.zeros(2, dtype=F64)], 7)
    observer.on_microbatch([torch.tensor([3.0, 4.0], dtype=F64)], 1)
    observer.on_microbatch([torch.tensor([6.0, 8.0], dtype=F64)], 3)
    assert observer.mean_norms([parameter]).tolist() == [8.75]


def test_frozen_parameters_are_not_watched() -> None:
    first, second = torch.zeros(2, requires_grad=True), torch.zeros(3)
    observer = MicrobatchNorms([first, second])
    observer.on_microbatch([torch.ones(2)], 1)
    with pytest.raises(HessianFlowError, match=r"among the 1 watched, got another of shape \[3\]"):
        observer.mean_norms([second])
    with pytest.raises(
        HessianFlowError, match="gradients must match the 1 watched parameters, got 2"
    ):
        observer.on_microbatch([torch.ones(2), torch.ones(3)], 1)
    with pytest.raises(
        HessianFlowError, match="params must hold at least one trainable parameter, got none"
    ):
        MicrobatchNorms([second])


def test_gradients_in_another_order_are_refused() -> None:
    observer = MicrobatchNorms(
        [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    )
    message = r"number 0 has shape \[3\], its parameter \[2\]: call bind\(parameters\)"
    for show in (observer.on_microbatch, observer.on_step):
        with pytest.raises(HessianFlowError, match=message):
            show([torch.ones(3), torch.ones(2)], 1)


def test_watching_others_forgets_what_was_seen() -> None:
    first, second = (torch.zeros(2, dtype=F64, requires_grad=True) for _ in range(2))
    observer = MicrobatchNorms([first, second])
    observer.on_microbatch([torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)], 1)
    observer.bind([second, torch.zeros(2), first])  # a frozen one in between
    with pytest.raises(HessianFlowError, match="MicrobatchNorms has seen no gradient"):
        observer.mean_norms([first])
    observer.on_microbatch([torch.tensor([3.0, 4.0], dtype=F64), torch.zeros(2, dtype=F64)], 1)
    assert observer.mean_norms([first, second]).tolist() == [0, 5]


@pytest.mark.parametrize("per_sample", [True, False])
def test_extra_batches_equal_a_loop(per_sample: bool) -> None:
    """Per sample: the mean over all examples of the norm of its gradient, in evaluation mode."""
    model, inputs, targets = problem()
    pieces = [slice(0, 8), slice(8, 12)]
    observer = ExtraBatchNorms(
        model,
        nn.CrossEntropyLoss(),
        lambda: [(inputs[p], targets[p]) for p in pieces],
        per_sample=per_sample,
    )
    observer.on_step([], 12)
    model.eval()
    cuts = [slice(i, i + 1) for i in range(12)] if per_sample else pieces
    weighted = [
        torch.stack([g.norm() for g in gradients(model, inputs[c], targets[c])])
        * (c.stop - c.start)
        for c in cuts
    ]
    torch.testing.assert_close(
        observer.mean_norms(list(model.parameters())), torch.stack(weighted).sum(0) / 12
    )


def test_norms_of_examples_for_parameters_of_any_dimension() -> None:
    """Loss s * (w . x): the gradient by s is w . x, that by w is s x."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=F64))
            self.weight = nn.Parameter(torch.tensor([1.0, 1.0], dtype=F64))
            self.empty = nn.Parameter(torch.zeros(2, 0, dtype=F64))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.scale * inputs @ self.weight + self.empty.sum()

    inputs = torch.tensor([[3.0, 4.0], [-6.0, -8.0]], dtype=F64)
    observer = ExtraBatchNorms(
        Scaled(), lambda out, _: out.mean(), lambda: [(inputs, inputs)], per_sample=True
    )
    observer.measure()
    assert observer.mean_norms(observer.params).tolist() == pytest.approx(
        [(7 + 14) / 2, 2 * (5 + 10) / 2, 0]
    )


@pytest.mark.parametrize("norm_mode", ["eval", "batch"])
def test_extra_batches_leave_no_trace(norm_mode: str) -> None:
    model, inputs, targets = problem()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ExtraBatchNorms(
        model, nn.CrossEntropyLoss(), lambda: [(inputs, targets)], norm_mode=norm_mode
    ).measure()  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_extra_batches_are_measured_every_so_often_and_restored() -> None:
    model, inputs, targets = problem()
    drawn: list[int] = []

    def draw() -> Iterator[tuple[Tensor, Tensor]]:
        drawn.append(len(drawn))
        yield inputs, targets

    def make() -> ExtraBatchNorms:
        return ExtraBatchNorms(model, nn.CrossEntropyLoss(), draw, every=3)

    observer: GradientObserver = make()
    for _ in range(5):
        observer.on_microbatch([], 1)
        observer.on_step([], 1)
    assert drawn == [0, 1]
    restored = make()
    restored.load_state_dict(observer.state_dict())
    restored.on_step([], 1)
    assert drawn == [0, 1]
    restored.on_step([], 1)
    assert drawn == [0, 1, 2]
    assert observer.signals() == {}


def test_extra_batches_refuse_bad_settings() -> None:
    model, _, _ = problem()
    for every in (0, 1.5, True):
        with pytest.raises(
            HessianFlowError, match=f"every must be a whole number >= 1, got {every}"
        ):
            ExtraBatchNorms(model, nn.CrossEntropyLoss(), list, every=every)  # type: ignore[arg-type]
    with pytest.raises(HessianFlowError, match='norm_mode must be "eval" with per_sample'):
        ExtraBatchNorms(model, nn.CrossEntropyLoss(), list, per_sample=True, norm_mode="batch")
    with pytest.raises(HessianFlowError, match="draw must return at least one batch, got none"):
        ExtraBatchNorms(model, nn.CrossEntropyLoss(), list).measure()


def test_moments_of_known_gradients() -> None:
    """Microbatches of 1 and 3 with squared norms 4 and 16, the whole of 4 with 9; then a second
    step of 2."""
    observer = GradientMoments(accumulate=True)
    assert observer.signals() == {}
    observer.on_microbatch([torch.tensor([2.0]), torch.zeros(1)], 1)
    observer.on_microbatch([torch.tensor([0.0]), torch.tensor([4.0])], 3)
    observer.on_step([torch.tensor([0.0]), torch.tensor([3.0])], 4)
    observer.on_microbatch([torch.tensor([1.0]), torch.tensor([0.0])], 2)
    observer.on_step([torch.tensor([1.0]), torch.tensor([0.0])], 2)
    assert observer.signals() == pytest.approx(
        {
            "small_gradient_sq": (4 + 16 + 1) / 3,
            "small_batch_size": 3 / (1 + 1 / 3 + 1 / 2),
            "large_gradient_sq": (9 + 1) / 2,
            "large_batch_size": 2 / (1 / 4 + 1 / 2),
            "gradient_sum_sq": (4 * 3) ** 2 + (2 * 1) ** 2,
            "gradient_examples": 6,
        }
    )
    assert observer.signals() == {}


def test_moments_are_unbiased_for_unequal_sizes() -> None:
    """Gradients of examples drawn from N(mu, I) in 50 dimensions: ||G||^2 = ||mu||^2 and S = 50
    must come out, with microbatches of 3 and 7 in turn; tolerance four standard errors, from the
    spread over 40 repetitions."""
    generator = torch.Generator().manual_seed(5)
    mu, estimates = torch.full((50,), 0.5, dtype=F64), []
    for _ in range(40):
        observer = GradientMoments()
        for _ in range(20):
            parts = [mu + torch.randn(size, 50, generator=generator, dtype=F64) for size in (3, 7)]
            for part in parts:
                observer.on_microbatch([part.mean(0)], len(part))
            observer.on_step([torch.cat(parts).mean(0)], 10)
        s = observer.signals()
        inverse = 1 / s["small_batch_size"] - 1 / s["large_batch_size"]
        noise = (s["small_gradient_sq"] - s["large_gradient_sq"]) / inverse
        estimates.append([noise, s["large_gradient_sq"] - noise / s["large_batch_size"]])
    found = torch.tensor(estimates, dtype=F64)
    errors = (found.mean(0) - torch.tensor([50.0, 12.5], dtype=F64)).abs() / (
        found.std(0) / 40**0.5
    )
    assert errors.max() < 4


def test_moments_restored_in_the_middle() -> None:
    whole, first, second = (GradientMoments(accumulate=True) for _ in range(3))
    for observer in (whole, first):
        observer.on_microbatch([torch.tensor([2.0])], 1)
        observer.on_step([torch.tensor([3.0])], 4)
    second.load_state_dict(first.state_dict())
    for observer in (whole, second):
        observer.on_microbatch([torch.tensor([1.0])], 2)
        observer.on_step([torch.tensor([1.0])], 2)
    assert second.signals() == whole.signals()


def test_a_saved_state_stays_as_it_was() -> None:
    """Neither the observer it came from nor the one it went to changes it."""
    first, second = GradientMoments(accumulate=True), GradientMoments(accumulate=True)
    first.on_microbatch([torch.tensor([3.0])], 4)
    first.on_step([torch.tensor([3.0])], 4)
    state = first.state_dict()
    second.load_state_dict(state)
    for observer in (first, second):
        observer.on_step([torch.tensor([1.0])], 2)
        assert state["total"][0].item() == 12
        assert observer.signals()["gradient_sum_sq"] == 14**2


def test_restored_sums_go_where_the_gradients_are() -> None:
    """A checkpoint holds them on the processor; the device without memory stands for a GPU."""
    saved, restored = GradientMoments(accumulate=True), GradientMoments(accumulate=True)
    for observer, device in ((saved, "cpu"), (restored, "meta")):
        observer.on_microbatch([torch.ones(2, device=device)], 1)
        observer.on_step([torch.ones(2, device=device)], 1)
        restored.load_state_dict(saved.state_dict())
    restored.on_microbatch([torch.ones(2, device="meta")], 1)
    restored.on_step([torch.ones(2, device="meta")], 1)
    assert restored.state_dict()["total"][0].device.type == "meta"
