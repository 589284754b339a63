"""Progressive resolution inside the trainer, and the statistics of normalisation it has to measure
anew."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import hessianflow as hf
from hessianflow.control import (
    FixedBatch,
    Level,
    ProgressiveResolution,
    resolution_stages,
    stage_at,
)
from hessianflow.interfaces import HessianFlowError, Progress
from hessianflow.models.dropout import with_head_dropout
from hessianflow.normalisation import split_batch_norm
from hessianflow.normalisation.recalibrate import recalibrate
from hessianflow.training import AfterEpoch, Reporting
from hessianflow.training.progressive import ProgressiveResize, check_resolutions, resized

STAGES = resolution_stages([2, 4], [Level(8, 12, 0.1), Level(16, 8, 0.3)], "cyclic")


def level_at(epoch: int) -> Level:
    return stage_at(STAGES, epoch).level


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(*layers, nn.Dropout(0.9), nn.Linear(4, 10))


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_the_batch_and_the_dropout_follow_the_epoch() -> None:
    model, batch = network(), images(5)
    resize = ProgressiveResize(model, level_at)
    for epoch, side, dropout in (
        (0, 8, 0.1),
        (1, 16, 0.3),
        (2, 8, 0.1),
        (3, 16, 0.3),
        (9, 16, 0.3),
    ):
        inputs, targets = resize(batch, torch.arange(5), Progress(epoch, 0, 0, 5, 4))
        assert inputs.shape == (5, 3, side, side)
        assert targets.tolist() == [0, 1, 2, 3, 4]
        assert model[5].p == dropout
        assert resize.at_hand((batch, targets))[0].shape[-1] == side
    assert inputs is batch, "full resolution costs nothing"


def test_halving_is_the_antialiased_average() -> None:
    """The triangle filter of twice the width: weights 1/8, 3/8, 3/8, 1/8 in each direction, away
    from the border."""
    weights = torch.tensor([1.0, 3, 3, 1]) / 8
    kernel = (weights[:, None] * weights[None, :]).expand(3, 1, 4, 4)
    expected = functional.conv2d(images(2), kernel, stride=2, padding=1, groups=3)
    inner = slice(1, -1)
    assert torch.allclose(
        resized(images(2), 8)[:, :, inner, inner], expected[:, :, inner, inner], atol=1e-6
    )


def test_what_the_data_cannot_give() -> None:
    with pytest.raises(
        HessianFlowError, match="resolution 24 is more than the data can give: they have 16 pixels"
    ):
        resized(images(1), 24)
    with pytest.raises(HessianFlowError, match="needs square images, got 16 x 12 pixels"):
        resized(images(1)[..., :12], 8)
    with pytest.raises(
        HessianFlowError, match=r"a dropout of 0\.1 needs a model with a torch\.nn\.Dropout layer"
    ):
        ProgressiveResize(nn.Linear(1, 1), level_at)


def test_a_head_that_fixes_the_resolution_is_named() -> None:
    model = hf.models.create("c1", input_size=16)
    check_resolutions(model, images(1), [16])
    message = (
        r"layer '9' \(Linear\(in_features=1024, .* takes no images of 8 pixels: mat1 and mat2"
        r" shapes"
    )
    with pytest.raises(HessianFlowError, match=message):
        check_resolutions(model, images(1), [8, 16])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    check_resolutions(network(), images(1), [4, 8, 16])


class Positional(nn.Module):
    """Adds one learned number a pixel, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(16, 16))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.position


def test_a_fixed_positional_embedding_is_named() -> None:
    with pytest.raises(
        HessianFlowError, match=r"layer '0' \(Positional\(\)\) takes no images of 8 pixels"
    ):
        check_resolutions(nn.Sequential(Positional(), nn.Flatten()), images(1), [8])
    with pytest.raises(HessianFlowError, match="the model takes no images of 8 pixels"):
        check_resolutions(Positional(), images(1), [8])


def test_dropout_is_put_before_the_last_linear_layer() -> None:
    model = hf.models.create("resnet8")
    inputs = images(3)
    model.eval()
    before = model(inputs)
    assert with_head_dropout(model, 0.5) is model
    assert torch.equal(model(inputs), before)
    assert isinstance(model[-1][0], nn.Dropout)
    assert model[-1][0].p == 0.5
    with pytest.raises(HessianFlowError, match="in front of a last linear layer: ReLU holds none"):
        with_head_dropout(nn.ReLU())


def test_recalibration_measures_the_batches_given() -> None:
    """Mean and unbiased variance of the convolution's output, averaged over two batches; nothing
    else moves."""
    model = network()
    model(images(4, seed=7))  # leaves other running statistics behind
    model[5].eval()
    before, momentum = copy.deepcopy(model.state_dict()), model[1].momentum
    state = torch.get_rng_state()
    batches = [(images(6, seed=2), None), (images(6, seed=3), None)]
    recalibrate(model, batches)
    outputs = [model[0](inputs).detach() for inputs, _ in batches]
    means = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    variances = torch.stack([o.transpose(0, 1).flatten(1).var(1) for o in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-6)
    assert torch.allclose(model[1].running_var, variances, rtol=1e-5)
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"1.running_mean", "1.running_var"}
    assert model[1].momentum == momentum
    assert [module.training for module in model] == [True] * 5 + [False, True]
    assert torch.equal(torch.get_rng_state(), state)


def statistics(layer: nn.Module) -> torch.Tensor:
    return torch.cat([layer.running_mean, layer.running_var])


def test_recalibration_leaves_layers_that_evaluation_does_not_use() -> None:
    """The adversarial half of a split layer, used by twins alone, and a layer that runs in training
    mode alone."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.head = split_batch_norm(network()), nn.BatchNorm2d(3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.main(self.head(inputs) if self.training else inputs)

    model = Auxiliary()
    split = model.main[1]
    with torch.no_grad():
        for layer in (split.main, split.adversarial, model.head):
            layer.running_mean.fill_(7)
    unused = [statistics(layer).clone() for layer in (split.adversarial, model.head)]
    recalibrate(model, (images(6), None))
    assert torch.allclose(
        split.main.running_mean, model.main[0](images(6)).detach().mean((0, 2, 3)), atol=1e-6
    )
    assert all(map(torch.equal, map(statistics, (split.adversarial, model.head)), unused))


def test_recalibration_leaves_frozen_layers() -> None:
    """Frozen is what is in evaluation mode within a model in training mode; a whole model may
    be."""
    for frozen in (True, False):
        model = network()
        (model[1] if frozen else model).eval()
        before = statistics(model[1]).clone()
        recalibrate(model, (images(6), None))
        assert torch.equal(statistics(model[1]), before) is frozen


def test_recalibration_of_nothing() -> None:
    with pytest.raises(HessianFlowError, match="at least one batch, got none"):
        recalibrate(network(), [])
    recalibrate(nn.Linear(1, 1), [])  # not run at all


def trainer(epochs: int, calls: list[int]) -> hf.AdaptiveBatchTrainer:
    model, targets = network(), torch.arange(24) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    resize = ProgressiveResize(model, level_at)
    full = images(24)

    def calibrate() -> None:
        calls.append(resize.level.resolution)
        recalibrate(model, (full, targets))

    return hf.AdaptiveBatchTrainer(
        model,
        hf.data.DeviceBatches(full, targets, 12, seed=3),
        (full, targets),
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        controller=ProgressiveResolution(FixedBatch(8), STAGES),
        epochs=epochs,
        transform=resize,
        after_epoch=AfterEpoch(before_evaluation=calibrate),
        reporting=Reporting(show_progress=False),
    )


def test_in_the_trainer() -> None:
    """Batches of 12 at 8 pixels and of 8 at 16; evaluated at full resolution with statistics of
    that resolution."""
    calls: list[int] = []
    made = trainer(4, calls)
    history = made.fit()
    assert [row["updates"] for row in history.epochs] == [2, 5, 7, 10]
    assert calls == [8, 16, 8, 16]
    assert [(row["from"], row["to"]) for row in history.of_kind("batch")] == [
        (12, 8),
        (8, 12),
        (12, 8),
    ]
    model = made.model
    convolved = model[0](images(24)).detach()
    assert torch.allclose(model[1].running_mean, convolved.mean((0, 2, 3)), atol=1e-6)
    loss = functional.cross_entropy(model.eval()(images(24)), torch.arange(24) % 10).item()
    assert history.epochs[-1]["eval_loss"] == pytest.approx(loss, rel=1e-6)
