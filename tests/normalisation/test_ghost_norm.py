"""Oracle: the same network run on the groups one after the other."""

import pytest
import torch
from torch import nn

from hessianflow.normalisation.ghost import ghost_normalisation


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.BatchNorm1d(5),
    ).double()


@pytest.mark.parametrize(
    ("examples", "group"), [(12, 4), (13, 4), (12, 5), (4, 4), (3, 4), (12, 100)]
)
def test_one_pass_is_the_passes_over_its_groups(examples: int, group: int):
    """Outputs, gradients and running statistics, with groups that do not divide the batch."""
    ghost, plain = network(), network()
    inputs = torch.randn(examples, 2, 4, 4, dtype=torch.float64)
    groups = inputs.tensor_split(-(-examples // group))
    with ghost_normalisation(ghost, group):
        outputs = ghost(inputs)
    expected = torch.cat([plain(part) for part in groups])
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ghost.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ghost.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("examples", "expected"), [(3, [3]), (7, [3, 2, 2]), (2, [2])])
def test_no_example_is_normalised_alone(examples: int, expected: list[int]):
    """By twos, which batch normalisation of vectors refuses to train on one of."""
    ghost, plain = (nn.BatchNorm1d(3).double() for _ in range(2))
    inputs = torch.randn(examples, 3, dtype=torch.float64)
    holder = nn.Sequential(ghost)
    with ghost_normalisation(holder, 2):
        outputs = holder(inputs)
    torch.testing.assert_close(outputs, torch.cat([plain(part) for part in inputs.split(expected)]))


def test_names_parameters_and_layers_are_the_models_own():
    model = network()
    layers, parameters, names = list(model), list(model.parameters()), list(model.state_dict())
    with ghost_normalisation(model, 4):
        assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
        assert list(model.state_dict()) == names
        assert isinstance(model[1], nn.BatchNorm2d)
        model.eval()
    assert all(a is b for a, b in zip(model, layers, strict=True))
    assert not model[1].training


def test_evaluation_and_none_are_the_plain_layer():
    model = network()
    inputs = torch.randn(12, 2, 4, 4, dtype=torch.float64)
    expected = model.eval()(inputs)
    with ghost_normalisation(model, 4):
        assert torch.equal(model(inputs), expected)
    with ghost_normalisation(model, None):
        assert type(model[1]) is nn.BatchNorm2d


def test_layers_come_back_after_an_error():
    model = network()
    with pytest.raises(RuntimeError, match="boom"), ghost_normalisation(model, 4):
        raise RuntimeError("boom")
    assert type(model[1]) is nn.BatchNorm2d
