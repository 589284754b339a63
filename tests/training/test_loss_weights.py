"""Losses that do not divide by examples, in the loop. Oracle: autograd on the whole batch in one
pass, float64."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hessianflow as hf
from hessianflow.interfaces import Exposure, HessianFlowError
from hessianflow.training import Passes, Reporting, evaluate
from hessianflow.training.accumulate import GradientAccumulator

ROWS = 16


def tokens():
    torch.manual_seed(1)
    inputs = torch.randn(ROWS, 6, 4, dtype=torch.float64)
    targets = torch.randint(5, (ROWS, 6))
    for row in range(ROWS):
        targets[row, 1 + row % 6 :] = -100
    return inputs, targets


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 5).double()


def token_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def masked_by_hand(outputs, targets):
    losses = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
    return (losses * (targets != -100)).sum() / (targets != -100).sum()


def counted(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum"), (
        targets != -100
    ).sum()


LOSSES = {
    "observed": token_loss,
    "masked by hand": masked_by_hand,
    "sum and count": counted,
    "stated": hf.WeightedLoss(
        lambda o, t: o[t >= 0].square().mean(), lambda o, t: (t >= 0).sum() * 5
    ),
}


def one_pass(loss_fn, model, batch):
    found = loss_fn(model(batch[0]), batch[1])
    return found[0] / found[1] if isinstance(found, tuple) else found


@pytest.mark.parametrize("microbatch_size", [16, 5, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_give_the_gradient_of_the_whole_batch(name, microbatch_size):
    batch, loss_fn = tokens(), LOSSES[name]
    model = network()
    result = GradientAccumulator(model, loss_fn, list(model.parameters()))(batch, microbatch_size)
    loss = one_pass(loss_fn, model, batch)
    for parameter, expected in zip(
        model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("microbatch_size", [16, 5, 1])
def test_twins_count_by_their_own_targets(microbatch_size, average):
    inputs, targets = tokens()
    batch, twins = (inputs[:10], targets[:10]), (inputs[10:] + 1, targets[10:])
    model = network()
    accumulate = GradientAccumulator(model, token_loss, list(model.parameters()))
    accumulate.expose(Exposure(batch, twins, average=average), microbatch_size)
    sums = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        for x, y in (batch, twins)
    ]
    counts = [(y >= 0).sum() for _, y in (batch, twins)]
    whole = sum(sums) / (sum(counts) if average else counts[0])
    for parameter, expected in zip(
        model.parameters(), torch.autograd.grad(whole, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_a_microbatch_of_padding_alone_counts_for_nothing(name):
    inputs, targets = tokens()
    targets[5:10] = -100
    model, loss_fn = network(), LOSSES[name]
    result = GradientAccumulator(model, loss_fn, list(model.parameters()))((inputs, targets), 5)
    loss = one_pass(loss_fn, model, (inputs, targets))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], list(expected), rtol=1e-12, atol=1e-14
    )
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-6)


def fit(loss_fn, data, size=16, micro=None, rate=1.0, **options):
    model = network()
    history = hf.AdaptiveBatchTrainer(
        model,
        hf.data.AdaptiveBatches(TensorDataset(*data), size),
        optimizer=torch.optim.SGD(model.parameters(), lr=rate),
        loss_fn=loss_fn,
        epochs=1,
        passes=Passes(microbatch_size=micro),
        reporting=Reporting(show_progress=False),
        **options,
    ).fit()
    return model, history


@pytest.mark.parametrize("name", LOSSES)
def test_recorded_losses_of_weights_that_never_move_are_that_of_the_data(name):
    data = tokens()
    model, history = fit(
        LOSSES[name],
        data,
        size=5,
        micro=2,
        rate=0.0,
        eval_data=[(x[None], y[None]) for x, y in zip(*data, strict=True)],
    )
    expected = float(one_pass(LOSSES[name], model, data).detach())
    assert history.epochs[0]["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert history.epochs[0]["eval_loss"] == pytest.approx(expected, rel=1e-12)


def test_class_weights_and_ignored_targets_in_the_figures():
    torch.manual_seed(0)
    x, y, model = torch.randn(64, 4).double(), torch.randint(5, (64,)), network()
    half = y.clone()
    half[::2] = -100
    kept = half != -100
    expected = float((model(x)[kept].argmax(1) == half[kept]).double().mean())
    for loss_fn in (nn.CrossEntropyLoss(), lambda o, t: F.cross_entropy(o, t)):
        assert evaluate(model, (x, half), loss_fn).accuracy == expected
    _, history = fit(nn.CrossEntropyLoss(), (x, half), rate=0.0, eval_data=(x, half))
    assert history.epochs[0]["train_accuracy"] == expected
    assert history.epochs[0]["eval_accuracy"] == expected
    weight = torch.tensor([0.1, 1.0, 8.0, 0.5, 2.0]).double()
    _, history = fit(nn.CrossEntropyLoss(weight=weight), (x, y), rate=0.0, eval_data=(x, y))
    assert history.epochs[0]["train_loss"] == pytest.approx(
        history.epochs[0]["eval_loss"], rel=1e-6
    )


def test_an_ignored_class_is_never_a_hit():
    """Index 2 is ignored, and the model scores it highest everywhere."""
    outputs = torch.zeros(4, 3)
    outputs[:, 2] = 1
    found = evaluate(
        Constant(outputs),
        (torch.zeros(4, 1), torch.tensor([2, 2, 0, 1])),
        nn.CrossEntropyLoss(ignore_index=2),
    )
    assert found.accuracy == 0.0


class Constant(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, _):
        return self.outputs


def test_a_batch_without_a_target_that_counts_is_passed_over():
    """Torch's own loss of it is nan; nothing is learned from it, and the run goes on."""
    inputs, targets = tokens()
    targets[:] = -100
    model, history = fit(token_loss, (inputs, targets))
    torch.testing.assert_close(model.weight, network().weight)
    assert history.summary["status"] == "finished"
    assert (
        history.epochs[0]["train_loss"] is None
        or history.epochs[0]["train_loss"] != history.epochs[0]["train_loss"]
    )


class Paired(nn.Module):
    """The stated loss as a module, whose class is of no concern."""

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum"), (targets != -100).sum()


@pytest.mark.parametrize("precision", ["float32", "fp16"])
@pytest.mark.parametrize(
    "loss_fn",
    [hf.WeightedLoss(F.cross_entropy, lambda o, t: (t != -100).sum()), Paired()],
    ids=["stated", "pair"],
)
def test_in_a_batch_in_which_nothing_counts_momentum_goes_on(loss_fn, precision):
    """As for torch's own loss, whose gradient is 0 then; the second of four batches counts
    nothing."""
    inputs, targets = (
        torch.randn(8, 4, generator=torch.Generator().manual_seed(3)),
        torch.arange(8) % 5,
    )
    targets[2:4] = -100
    ends = []
    for used in (nn.CrossEntropyLoss(), loss_fn):
        model = network().float()
        hf.AdaptiveBatchTrainer(
            model,
            hf.data.DeviceBatches(inputs, targets, 2, shuffle=False),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            loss_fn=used,
            epochs=1,
            passes=Passes(microbatch_size=1, precision=precision),
            reporting=Reporting(show_progress=False),
        ).fit()
        ends.append(model.weight)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def contrastive(outputs, targets):
    rows = outputs.flatten(1)
    return F.cross_entropy(rows @ rows.T, torch.arange(len(rows)))


def test_a_loss_that_cannot_be_cut_is_refused_when_it_is_cut_and_not_before():
    data = tokens()
    fit(contrastive, data, rate=0.01)
    with pytest.raises(HessianFlowError, match=r"parts of .*hf\.WeightedLoss"):
        fit(contrastive, data, micro=8, rate=0.01)


def test_an_evaluation_in_parts_says_what_it_averages():
    inputs, targets = tokens()
    parts = [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]
    with pytest.warns(
        UserWarning,
        match="the evaluation loss is a mean over batches and not that of all examples at once",
    ):
        evaluate(network(), parts, contrastive)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(network(), (inputs, targets), contrastive)
