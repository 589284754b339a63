"""Running statistics that have not settled: told apart, measured anew, and never compared by a
controller.

The oracle is a network of one normalised weight, whose losses and whose Hessian are known in closed
form.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer
from hessianflow.control import ABS, CriticalBatch
from hessianflow.curvature import CurvatureProbe, GGNOperator, HessianOperator
from hessianflow.data import DeviceBatches
from hessianflow.distributed import LocalReducer
from hessianflow.distributed.curvature import AllReducedOperator
from hessianflow.interfaces import CurvatureReading, HessianFlowError, Progress
from hessianflow.losses import BatchLoss
from hessianflow.normalisation.settle import settle
from hessianflow.normalisation.statistics import compared_losses, is_unsettled, moving_layers
from hessianflow.training import Passes, Reporting
from hessianflow.training.world import LocalWorld

N = 64


class Normalised(nn.Module):
    """gamma (x - mean) / sqrt(var + eps) of one feature, with the mean and variance of the data or
    of the buffers."""

    def __init__(self, gamma: float = 1.0):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, eps=1e-12).double()
        with torch.no_grad():
            self.norm.weight.fill_(gamma)
        self.norm.bias.requires_grad_(False)

    def forward(self, x):
        return self.norm(x)


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().mean()


def problem(scale: float = 0.01):
    """Inputs of standard deviation `scale`: their running variance, 1 at the start, has not
    settled."""
    x = torch.linspace(-1, 1, N, dtype=torch.float64)[:, None]
    x = scale * x / x.std(unbiased=False)
    return x, torch.zeros(N, 1, dtype=torch.float64)


def running(model, mean=0.0, var=1.0):
    model.norm.running_mean.fill_(mean)
    model.norm.running_var.fill_(var)
    return model


@pytest.mark.parametrize(
    ("running_loss", "own_loss", "unsettled"),
    [
        (1.0, 1.0, False),
        (1.5, 1.0, False),
        (1.51, 1.0, True),
        (0.2, 1.0, False),
        (616_582.0, 2.37, True),
        (math.inf, 1.0, True),
        (math.nan, 1.0, True),
        (1.0, math.nan, False),
        (-1.0, -3.0, True),
        (-2.0, -3.0, False),
        (0.0, 0.0, False),
        (1e-9, 0.0, True),
    ],
)
def test_what_counts_as_unsettled(running_loss, own_loss, unsettled):
    assert is_unsettled(running_loss, own_loss) is unsettled


def test_a_difference_that_is_small_beside_the_usual_loss_tells_nothing():
    assert is_unsettled(0.004, 0.002)
    assert not is_unsettled(0.004, 0.002, scale=0.4)
    assert is_unsettled(1.0, 0.5, scale=0.4)
    assert is_unsettled(math.nan, 0.5, scale=0.4)


def test_losses_by_statistics_in_closed_form():
    """With the buffers E x^2 gamma^2 / 2 / var, with the data's own gamma^2 / 2, whatever their
    scale."""
    model, (x, y) = running(Normalised(3.0).train(), var=0.25), problem(scale=2.0)
    layers = moving_layers(model)
    found = compared_losses(model, (x, y), BatchLoss(half_square), layers)
    assert found == pytest.approx((0.5 * 9 * 4 / 0.25, 0.5 * 9, N / 2)), (
        "half of the examples, which is as many as count"
    )
    one = compared_losses(model, (x[:1], y[:1]), BatchLoss(half_square), layers)
    assert one == (0.0, 0.0, 0.0), "one example has no spread"


def test_a_model_of_one_batch_size_and_a_loss_that_differentiates_are_asked_about_all_examples():
    class Whole(Normalised):
        def forward(self, x):
            return self.norm(x.reshape(N, 1))

    def slope(outputs, targets):
        (by_outputs,) = torch.autograd.grad(
            half_square(outputs, targets), outputs, create_graph=True
        )
        return 0.5 * N * by_outputs.square().sum()

    batch = problem(scale=2.0)
    model = running(Whole().train(), var=0.25)
    assert compared_losses(
        model, batch, BatchLoss(half_square), moving_layers(model)
    ) == pytest.approx((8, 0.5, N))
    model = running(Normalised().train(), var=0.25)
    assert compared_losses(model, batch, BatchLoss(slope), moving_layers(model)) == pytest.approx(
        (8, 0.5, N)
    )


def test_measuring_leaves_no_trace():
    model, (x, y) = running(Normalised().train()), problem()
    model.norm.weight.grad = torch.ones(1, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, versions = torch.get_rng_state(), [b._version for b in model.buffers()]
    compared_losses(model, (x, y), BatchLoss(half_square), moving_layers(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [b._version for b in model.buffers()] == versions
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.norm.training, model.norm.track_running_stats) == (True, True)
    assert model.norm.weight.grad == 1


def test_frozen_layers_belong_to_the_function():
    model = nn.Sequential(
        nn.BatchNorm1d(1), nn.BatchNorm1d(1), nn.BatchNorm1d(1, track_running_stats=False)
    ).train()
    model[0].eval()
    assert moving_layers(model) == [model[1]]
    assert moving_layers(model.eval()) == [model[0], model[1]]


class TestReading:
    """The Hessian by gamma is E x^2 / var under the buffers, 1 under the data's own statistics."""

    def test_of_buffers_that_have_not_settled(self):
        x, y = problem(scale=100.0)
        reading = CurvatureProbe(running(Normalised().train()), half_square, (x, y))()
        assert reading.eigenvalue == pytest.approx(1e4)
        assert reading.converged
        assert not reading.reliable
        assert reading.details == pytest.approx({"running_loss": 5e3, "own_loss": 0.5})

    def test_of_those_that_have(self):
        x, y = problem(scale=100.0)
        reading = CurvatureProbe(running(Normalised().train(), var=1e4), half_square, (x, y))()
        assert (reading.eigenvalue, reading.reliable, reading.details) == (
            pytest.approx(1.0),
            True,
            {},
        )

    @pytest.mark.parametrize("options", [{"norm_mode": "batch"}, {"check_statistics": False}])
    def test_where_nothing_is_asked(self, options):
        reading = CurvatureProbe(
            running(Normalised().train()), half_square, problem(scale=100.0), **options
        )()
        assert reading.reliable

    def test_of_frozen_statistics_and_of_none(self):
        model = nn.Sequential(running(Normalised())).train()
        model[0].eval()
        model[0].norm.eval()
        assert CurvatureProbe(model, half_square, problem(scale=100.0))().reliable
        x, y = problem(scale=100.0)
        assert CurvatureProbe(nn.Linear(1, 1).double(), half_square, (x, y))().reliable

    def test_of_a_dict_in_microbatches(self):
        """Own statistics are those of each microbatch, as in training."""
        x, y = problem(scale=100.0)
        batch = {"x": x, "labels": y}
        probe = CurvatureProbe(
            running(Normalised().train()),
            lambda model, batch: half_square(model(batch["x"]), batch["labels"]),
            batch,
            microbatch_size=16,
        )
        reading = probe()
        assert not reading.reliable
        own = torch.cat(
            [
                (part / part.std(unbiased=False) - part.mean() / part.std(unbiased=False))
                for part in x.split(16)
            ]
        )
        assert reading.details["own_loss"] == pytest.approx(0.5 * float(own.square().mean()))

    def test_a_smoothed_value_holds_reliable_ones_alone(self):
        model = running(Normalised().train())
        probe = CurvatureProbe(model, half_square, problem(scale=100.0), smoothing="median")
        assert "smoothed" not in probe().details
        running(model, var=1e4)
        assert probe().details["smoothed"] == pytest.approx(1.0)
        running(model)
        assert probe().details["smoothed"] == pytest.approx(1.0)

    def test_losses_of_a_fitted_model_are_held_against_those_before(self):
        """Losses of 5000 x 1e-6 and 0.5 x 1e-6 beside 0.5, of the same model with a smaller
        weight."""
        model, batch = running(Normalised().train(), var=1e4), problem(scale=100.0)
        probe = CurvatureProbe(model, half_square, batch)
        assert probe().reliable
        with torch.no_grad():
            model.norm.weight.fill_(1e-3)
        running(model)
        assert probe().reliable
        other = CurvatureProbe(model, half_square, batch)
        assert not other().reliable, "it knows no other loss"
        other.load_state_dict(probe.state_dict())
        assert other().reliable

    @pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
    def test_over_ranks(self, kind):
        model, (x, y) = running(Normalised().train()), problem(scale=100.0)
        operator = AllReducedOperator(kind(model, half_square, (x, y)), LocalReducer())
        assert operator.statistics_losses() == pytest.approx((5e3, 0.5, N / 2))
        assert (
            AllReducedOperator(
                kind(running(Normalised().train()), half_square, (x, y), norm_mode="batch"),
                LocalReducer(),
            ).statistics_losses()
            is None
        )


class TestSettling:
    def test_statistics_become_those_of_the_batch(self):
        model, (x, y) = running(Normalised().train(), mean=7.0), problem(scale=100.0)
        found = settle(model, (x, y), half_square, 0.0, N, LocalWorld())
        assert "had not settled (loss" in found
        assert float(model.norm.running_mean) == pytest.approx(0.0, abs=1e-9)
        assert float(model.norm.running_var) == pytest.approx(float(x.var()))
        assert settle(model, (x, y), half_square, 0.0, N, LocalWorld()) == ""

    @pytest.mark.parametrize("scale", [1.0, 0.9, 1.2])
    def test_settled_ones_stay_bit_for_bit(self, scale):
        model, (x, y) = running(Normalised().train()), problem(scale=scale)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert settle(model, (x, y), half_square, 0.0, N, LocalWorld()) == ""
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_nothing_to_tell_is_left_alone(self):
        x, y = problem(scale=100.0)
        model = running(Normalised().train())
        assert settle(model, (x[:1], y[:1]), half_square, 0.0, N, LocalWorld()) == ""
        assert settle(model.eval(), (x[:1], y[:1]), half_square, 0.0, N, LocalWorld()) == ""
        assert settle(nn.Linear(1, 1).double(), (x, y), half_square, 0.0, N, LocalWorld()) == ""


def trained(**options):
    """Four normalised layers of large weights, two updates an epoch.

    After two updates a running variance is 0.19 of the true one, so that each layer's outputs are
    2.3 times too large.
    """
    torch.manual_seed(0)
    x = torch.rand(32, 8)
    data = DeviceBatches(x, (x.sum(1) > 4).long(), 16)
    layers = [
        layer
        for _ in range(4)
        for layer in (nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    with torch.no_grad():
        for layer in layers[::3]:
            layer.weight.mul_(30)
    history = AdaptiveBatchTrainer(
        model,
        data,
        data.examples(torch.arange(32)),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=F.cross_entropy,
        epochs=3,
        reporting=Reporting(show_progress=False),
        **options,
    ).fit()
    return model, history


class TestTrainer:
    def test_the_first_evaluation_is_of_the_network_that_is_trained(self):
        _, left = trained(passes=Passes(norm_statistics="running"))
        _, settled = trained()
        assert left.epochs[0]["eval_loss"] > 2 * left.epochs[0]["train_loss"]
        assert settled.epochs[0]["eval_loss"] < 1.2 * settled.epochs[0]["train_loss"]
        assert settled.epochs[0]["statistics"] == "remeasured"
        [event] = settled.of_kind("event")
        assert event["event"] == "statistics"
        assert 'norm_statistics="running" leaves them alone' in event["message"]
        assert left.of_kind("event") == []
        assert "statistics" not in left.epochs[0]

    def test_weights_are_trained_as_ever(self):
        settled, _ = trained()
        left, _ = trained(passes=Passes(norm_statistics="running"))
        for (name, own), other in zip(settled.named_parameters(), left.parameters(), strict=True):
            assert torch.equal(own, other), name

    def test_a_reading_that_nobody_was_shown_has_no_note(self):
        """After the last epoch nothing is decided: the reason of the last growth belongs to an
        earlier reading."""
        torch.manual_seed(0)
        x = torch.rand(32, 8)
        data = DeviceBatches(x, (x.sum(1) > 4).long(), 8)
        model = nn.Linear(8, 2)
        history = AdaptiveBatchTrainer(
            model,
            data,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            loss_fn=F.cross_entropy,
            controller=ABS(8, 32, patience=1),
            probe=CurvatureProbe(model, F.cross_entropy, data.sample(16)),
            epochs=2,
            reporting=Reporting(show_progress=False),
        ).fit()
        assert [row["reason"] for row in history.growths] == ["no growth for 1 estimate"]
        assert [row.get("note") for row in history.curvature] == [None, None]

    def test_a_choice_that_there_is_not(self):
        with pytest.raises(
            HessianFlowError, match="norm_statistics must be one of settled, running, got 'batch'"
        ):
            trained(passes=Passes(norm_statistics="batch"))


def reading(eigenvalue: float, *, reliable: bool = True) -> CurvatureReading:
    return CurvatureReading(eigenvalue, 0.0, 5, True, reliable=reliable)


def progress(epoch: int) -> Progress:
    return Progress(epoch, epoch * 1000, epoch, 1000, 10)


class TestControllers:
    def test_absa_compares_no_unreliable_reading(self):
        controller = ABS(16, 256, patience=None)
        decision = controller.update(progress(1), reading(1e9, reliable=False))
        assert (
            decision.reason
            == "eigenvalue not used: on running statistics that have not settled (1e+09)"
        )
        controller.update(progress(2), reading(100.0))
        assert controller.update(progress(3), reading(1.0, reliable=False)).batch_size == 16
        assert controller.update(progress(4), reading(50.0)).batch_size == 32

    def test_critical_takes_none_into_its_median(self):
        controller = CriticalBatch(16, 256, loss_power=None, edge_share=0.5)
        signals = {"learning_rate": 0.1, "epoch_loss": 1.0}
        decision = controller.update(progress(1), reading(1e-3, reliable=False), signals)
        assert decision.batch_size == 16
        assert controller.update(progress(2), reading(1e-3), signals).batch_size == 32


def test_sorted_data_tell_the_same_as_shuffled_ones():
    """Half of the examples at -1, the other half at 1: the first alone have a variance of 0."""
    x = torch.cat([-torch.ones(N, 1), torch.ones(N, 1)]).double()
    y = torch.zeros_like(x)
    model = running(Normalised().train(), var=0.25)
    found = compared_losses(model, (x, y), BatchLoss(half_square), moving_layers(model))
    assert found == pytest.approx((0.5 / 0.25, 0.5, 32))


def test_a_batch_that_cannot_be_cut_is_asked_about_as_a_whole():
    x, y = problem(scale=2.0)
    batch = {"x": x, "labels": y, "edges": torch.zeros(3, dtype=torch.int64)}
    model = running(Normalised().train(), var=0.25)
    loss = BatchLoss(lambda model, batch: half_square(model(batch["x"]), batch["labels"]))
    assert compared_losses(model, batch, loss, moving_layers(model)) == pytest.approx((8, 0.5, N))
