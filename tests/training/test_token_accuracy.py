"""Accuracy over tokens or pixels if the classes are the second dimension of the outputs."""

import pytest
import torch
from torch import Tensor, nn

from hessianflow.training.evaluate import evaluate


class Scores(nn.Module):
    """Returns its inputs, which are scores already, times a trainable 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


def scores_of(best: Tensor, classes: int) -> Tensor:
    """Scores [B, classes, ...] that are largest at `best` [B, ...]."""
    return nn.functional.one_hot(best, classes).movedim(-1, 1).float()


def test_hits_are_counted_over_all_tokens() -> None:
    """Three of the six tokens are right."""
    targets = torch.tensor([[0, 1, 2], [3, 3, 3]])
    best = torch.tensor([[0, 1, 0], [0, 3, 0]])
    found = evaluate(Scores(), (scores_of(best, 4), targets), nn.CrossEntropyLoss())
    assert (found.accuracy, found.examples) == (3 / 6, 2)


def test_ignored_tokens_do_not_count() -> None:
    """Two of the four tokens that count are right."""
    targets = torch.tensor([[0, -100, 2], [3, 3, -100]])
    best = torch.tensor([[0, 1, 0], [0, 3, 0]])
    found = evaluate(Scores(), (scores_of(best, 4), targets), nn.CrossEntropyLoss())
    assert found.accuracy == 2 / 4


def test_pixels_count_like_tokens() -> None:
    targets = torch.arange(8).view(2, 2, 2) % 3
    found = evaluate(Scores(), (scores_of(targets, 3), targets), nn.CrossEntropyLoss())
    assert found.accuracy == 1.0


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5, 1)])
def test_outputs_of_other_shapes_have_no_accuracy(shape: tuple[int, ...]) -> None:
    """Class scores in the last dimension, as a user's loss may expect them, are not read."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean() + 0 * targets.sum()

    targets = torch.zeros(2, 5, dtype=torch.long)
    assert evaluate(Scores(), (torch.randn(shape), targets), loss).accuracy is None
