"""The shared problems are what they say."""

import torch
from problems import classification, mlp, train


def trained(**options: float) -> torch.Tensor:
    problem = classification(mlp(), (20,), 64)
    train(problem, 3, **options)
    return torch.cat([parameter.detach().flatten() for parameter in problem.model.parameters()])


def test_training_uses_its_momentum() -> None:
    assert torch.equal(trained(), trained(momentum=0.9))
    assert not torch.equal(trained(), trained(momentum=0.0))
