"""The parts of models that Muon is given, told by hand for each model."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from experiments.controllers.networks import plain
from hessianflow.interfaces import HessianFlowError
from hessianflow.models import create
from hessianflow.normalisation import split_batch_norm
from hessianflow.optim import muon_groups


def parts(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters of each part, without biases and other vectors."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = muon_groups(model)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {p for p in model.parameters() if p.requires_grad}
    assert all(p.ndim > 1 for group in groups if group["part"] != "rest" for p in group["params"])
    return {
        group["part"]: [names[p] for p in group["params"] if p.ndim > 1]
        for group in muon_groups(model)
    }


def test_all_convolutions_of_a_resnet_are_normalised_and_the_head_is_left() -> None:
    """Its convolutions, on shortcuts too, have no other use than their batch normalisation."""
    for model in (create("resnet8"), split_batch_norm(create("resnet8"))):
        found = parts(model)
        head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        assert found["rest"] == [f"{name}.weight" for name in head]
        assert len(found["normalised"]) == 9
        assert "unnormalised" not in found


def test_a_convolution_that_is_added_to_a_shortcut_is_not_normalised() -> None:
    """In a preactivation network conv1 goes into norm2, conv2 into a sum, project into a sum."""
    found = parts(create("wrn-16-4"))
    assert {name.rsplit(".", 2)[-2] for name in found["normalised"][1:]} == {"conv1"}
    assert {name.rsplit(".", 2)[-2] for name in found["unnormalised"]} == {"conv2", "project"}
    assert found["normalised"][0] == "0.weight"  # the first block's shortcut begins after norm1


def test_the_linear_layers_after_the_last_convolution_are_left() -> None:
    found = parts(plain())
    assert found["unnormalised"] == ["0.weight", "2.weight", "5.weight", "7.weight"]
    assert found["rest"] == ["11.weight", "13.weight"]


def test_hidden_layers_are_for_muon_where_no_convolution_is() -> None:
    found = parts(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)))
    assert found == {"unnormalised": ["0.weight", "2.weight"], "rest": ["3.weight"]}


def test_linear_layers_of_blocks_with_convolutions_are_for_muon() -> None:
    """A normalisation after the last block shows that they are of the trunk (ConvNeXt, ViT)."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4),
        nn.Flatten(2),
        nn.Linear(16, 16),
        nn.LayerNorm(16),
        nn.Linear(16, 2),
    )
    assert parts(model)["unnormalised"] == ["0.weight", "2.weight"]
    assert parts(model)["rest"] == ["4.weight"]


def test_a_bias_is_cancelled_by_batch_normalisation_and_by_no_other() -> None:
    for bias in (False, True):
        for norm, undoes in (
            (nn.BatchNorm2d(4), True),
            (nn.InstanceNorm2d(4), True),
            (nn.GroupNorm(2, 4), not bias),
            (nn.LayerNorm([4, 3, 3]), not bias),
        ):
            conv = nn.Conv2d(2, 4, 3, bias=bias)
            model = nn.Sequential(conv, norm, nn.Flatten(), nn.Linear(36, 2))
            part = "normalised" if undoes else "unnormalised"
            assert parts(model)[part] == ["0.weight"], (norm, bias)
            scaled = copy.deepcopy(model)
            with torch.no_grad():
                scaled[0].weight.mul_(3)
            inputs = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0)) * 30
            same = torch.allclose(model(inputs), scaled(inputs), rtol=1e-3, atol=1e-3)
            assert same or not undoes, (norm, bias)


def test_a_normalisation_after_an_activation_or_a_frozen_one_is_none() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)
    )
    assert parts(net)["unnormalised"] == ["0.weight"]
    frozen = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    frozen[1].requires_grad_(False)
    assert parts(frozen)["unnormalised"] == ["0.weight"]


class Branching(nn.Module):
    """Registered in another order than called, with a branch on data if asked."""

    def __init__(self, on_data: bool) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.on_data = on_data
        self.last: object = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.add_(1)
        hidden = self.norm(self.first(inputs))
        self.last = hidden
        if self.on_data and hidden.sum() > 0:
            hidden = relu(hidden)
        output: Tensor = self.head(hidden)
        return output


def test_the_order_of_calls_decides_and_that_of_registration_where_it_is_hidden() -> None:
    assert parts(Branching(False)) == {"normalised": ["first.weight"], "rest": ["head.weight"]}
    assert parts(Branching(True)) == {"unnormalised": ["head.weight"], "rest": ["first.weight"]}


def test_looking_at_a_model_leaves_no_trace() -> None:
    model = Branching(False)
    state = copy.deepcopy(model.state_dict())
    before = torch.get_rng_state()
    muon_groups(model)
    assert model.last is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Drawing(nn.Module):
    """A network that draws in its forward pass, as with layers that are dropped at random."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        if random.random() + np.random.rand() < 0:
            return inputs
        output: Tensor = self.head(self.first(inputs))
        return output


def test_looking_at_a_model_draws_no_numbers_of_numpy_and_python() -> None:
    random.seed(0)
    np.random.seed(0)
    expected = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    muon_groups(Drawing())
    assert (random.random(), np.random.rand()) == expected


def test_a_scripted_model_is_refused_on_one_line() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # such models are deprecated altogether
        model = torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.ones(1, 3))
    with pytest.raises(HessianFlowError, match="a scripted model hides its layers"):
        muon_groups(model)


def test_a_layer_called_twice_is_normalised_if_every_call_is() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    norm = nn.BatchNorm2d(4)
    tail = [nn.Flatten(), nn.Linear(36, 2)]
    assert parts(nn.Sequential(shared, norm, shared, norm, *tail))["normalised"] == ["0.weight"]
    assert parts(nn.Sequential(shared, norm, shared, nn.ReLU(), *tail))["unnormalised"] == [
        "0.weight"
    ]


def test_embeddings_tied_heads_and_tables_are_left() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 8)
            self.position = nn.Parameter(torch.zeros(5, 8))
            self.block = nn.TransformerEncoderLayer(8, 2, 16)
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.words.weight

        def forward(self, words: Tensor) -> Tensor:
            output: Tensor = self.head(self.norm(self.block(self.words(words) + self.position)))
            return output

    found = parts(Language())
    attention = ["block.self_attn.in_proj_weight", "block.self_attn.out_proj.weight"]
    assert found["unnormalised"] == [*attention, "block.linear1.weight", "block.linear2.weight"]
    assert found["rest"] == ["position", "words.weight"]


def test_depthwise_convolutions_and_parametrized_weights_are_left_but_grouped_ones_not() -> None:
    deep = nn.Conv2d(4, 4, 3, groups=4)
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    free = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), deep, grouped, free, nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(HessianFlowError, match="lazy layers: run it once on a batch before"):
        muon_groups(model)
    model(torch.zeros(2, 1, 9, 9))
    assert parts(model)["unnormalised"] == ["0.weight", "2.weight"]
    assert "1.weight" in parts(model)["rest"]


def test_frozen_weights_are_in_no_part() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert parts(model) == {"unnormalised": ["1.weight"], "rest": ["2.weight"]}


def test_a_wrapped_model_is_read_inside() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert muon_groups(nn.DataParallel(model))[0]["part"] == "normalised"


def test_a_model_without_a_matrix_for_muon_is_refused_on_one_line() -> None:
    for model in (
        nn.LayerNorm(4),
        nn.Linear(3, 2),
        nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)),
    ):
        with pytest.raises(
            HessianFlowError, match=r"has none: train it with SGD or AdamW"
        ) as caught:
            muon_groups(model)
        assert "\n" not in str(caught.value)
