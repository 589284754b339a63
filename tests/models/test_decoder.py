"""The decoder: causality, rotary positions in closed form, sizes, curvature and Muon."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hessianflow import models
from hessianflow.curvature import GGNOperator, HessianOperator
from hessianflow.models.decoder import DECODERS, Decoder, DecoderShape, rotated
from hessianflow.optim import muon_groups

SMALL = DecoderShape(layers=2, width=16, heads=2)


def decoder(shape: DecoderShape = SMALL, classes: int = 11) -> Decoder:
    torch.manual_seed(0)
    return Decoder(shape, classes).double()


def tokens(*shape: int, classes: int = 11) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def test_the_future_does_not_change_the_past() -> None:
    model = decoder()
    inputs = tokens(3, 9)
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(inputs), model(changed)
    assert torch.equal(before[..., :5], after[..., :5])
    assert ((before - after)[..., 5:].abs().amax(dim=(0, 1)) > 1e-6).all()


def test_cross_entropy_takes_the_scores_of_sequences_of_any_length() -> None:
    model = decoder()
    for length in (1, 7, 40):
        scores = model(tokens(2, length))
        assert scores.shape == (2, 11, length)
        cross_entropy(scores, tokens(2, length))


def test_a_pair_is_turned_by_its_position_times_its_frequency() -> None:
    """The angle of pair i of a head of 2 * half numbers at position t is t * 10000^(-i / half)."""
    half, length = 4, 6
    frequencies = decoder(DecoderShape(1, 2 * half, 1)).frequencies()
    heads = torch.randn(1, 1, length, 2 * half, dtype=torch.float64)
    angles = torch.arange(length)[:, None] * frequencies
    found = rotated(heads, angles.cos(), angles.sin())
    for t in range(length):
        for i in range(half):
            pair = complex(float(heads[0, 0, t, i]), float(heads[0, 0, t, i + half]))
            angle = t * 10_000 ** (-i / half)
            turned = pair * complex(math.cos(angle), math.sin(angle))
            assert float(found[0, 0, t, i]) == pytest.approx(turned.real, abs=1e-12)
            assert float(found[0, 0, t, i + half]) == pytest.approx(turned.imag, abs=1e-12)


def test_a_cast_to_16_bits_leaves_the_angles_alone() -> None:
    model = decoder()
    before = model.frequencies()
    model.bfloat16()
    assert torch.equal(model.frequencies(), before)
    assert model(tokens(2, 300)).dtype == torch.bfloat16


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention written out, with the future masked."""
    products = query @ key.mT / math.sqrt(query.shape[-1])
    future = torch.ones(products.shape[-2:]).triu(1).bool()
    return products.masked_fill(future, -math.inf).softmax(-1) @ value


def test_the_decoder_equals_a_forward_pass_written_out() -> None:
    model = decoder()
    inputs = tokens(3, 8)
    angles = torch.arange(8)[:, None] * model.frequencies()
    stream = model.embedding.weight[inputs]

    def normalised(x: Tensor, norm: nn.RMSNorm) -> Tensor:
        epsilon = torch.finfo(x.dtype).eps
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm.weight

    for block in model.blocks:
        assert isinstance(block.attention, nn.Module)
        attention = block.attention
        x = normalised(stream, block.norm1)  # type: ignore[arg-type]
        weights = (attention.query.weight, attention.key.weight, attention.value.weight)
        query, key, value = ((x @ w.T).view(3, 8, 2, 8).transpose(1, 2) for w in weights)
        turn = (angles.cos(), angles.sin())
        mixed = plain_attention(rotated(query, *turn), rotated(key, *turn), value)
        stream = stream + mixed.transpose(1, 2).reshape(3, 8, 16) @ attention.project.weight.T
        x = normalised(stream, block.norm2) @ block.widen.weight.T  # type: ignore[arg-type]
        gelu = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        stream = stream + gelu @ block.narrow.weight.T  # type: ignore[operator]
    expected = (normalised(stream, model.norm) @ model.head.weight.T).transpose(1, 2)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt-tiny", 0.853), ("gpt-mini", 4.853), ("gpt-compact", 25.437), ("gpt-small", 125.052)],
)
def test_the_catalogue_has_the_stated_sizes(name: str, millions: float) -> None:
    """A layer has 12 width^2 in matrices and two normalisations; head and embedding differ."""
    shape = DECODERS[name]
    with torch.device("meta"):
        model = models.create(name, 256)
    counted = shape.layers * (12 * shape.width**2 + 2 * shape.width)
    counted += shape.width * (2 * 256 + 1)
    assert models.count_parameters(model) == counted
    assert counted / 1e6 == pytest.approx(millions, abs=5e-4)
    assert name in models.names()


def test_the_work_of_a_token_is_its_matrices() -> None:
    """Each of 64 tokens costs 12 width^2 per layer and the head; the embedding is looked up."""
    work = models.count_multiply_adds(models.create("gpt-tiny", 256), (64,))
    assert work == 64 * (4 * 12 * 128**2 + 256 * 128)


def test_at_the_start_all_bytes_are_equally_likely_and_all_parameters_get_a_gradient() -> None:
    torch.manual_seed(0)
    model = models.create("gpt-tiny", 256)
    inputs, targets = tokens(4, 32, classes=256), tokens(4, 32, classes=256).flip(0)
    loss = cross_entropy(model(inputs), targets)
    # The scores have a variance of 0.02^2 * 128 = 0.05, half of which is added to the loss.
    assert float(loss.detach()) == pytest.approx(math.log(256), abs=0.1)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 1e-6, name


def test_muon_gets_the_matrices_of_the_blocks_and_no_other() -> None:
    model = decoder()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["part"]: [names[p] for p in group["params"]] for group in muon_groups(model)}
    layers = ("query", "key", "value", "project")
    matrices = [
        f"blocks.{block}.{name}.weight"
        for block in range(2)
        for name in (*(f"attention.{layer}" for layer in layers), "widen", "narrow")
    ]
    assert groups["unnormalised"] == matrices
    assert {"embedding.weight", "head.weight", "norm.weight"} < set(groups["rest"])
    assert groups.keys() == {"unnormalised", "rest"}


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_products_with_curvature_equal_dense_autograd(
    kind: type[HessianOperator | GGNOperator],
) -> None:
    """The Hessian differentiates the written-out loss twice; the GGN is J^T (d^2 loss) J."""
    model = decoder(DecoderShape(1, 4, 1), 5)
    batch = (tokens(3, 4, classes=5), tokens(3, 4, classes=5).flip(0))
    operator = kind(model, nn.CrossEntropyLoss(), [batch])
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    names = [name for name, _ in model.named_parameters()]

    def outputs(flat: Tensor) -> Tensor:
        pieces = [piece.view_as(p) for piece, p in zip(flat.split(sizes), parameters, strict=True)]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            result: Tensor = torch.func.functional_call(
                model, dict(zip(names, pieces, strict=True)), (batch[0],)
            )
        return result

    flat = torch.cat([p.detach().flatten() for p in parameters])
    if kind is HessianOperator:
        dense = torch.autograd.functional.hessian(
            lambda flat: cross_entropy(outputs(flat), batch[1]), flat
        )
    else:
        jacobian = torch.autograd.functional.jacobian(outputs, flat).flatten(0, -2)
        scores = outputs(flat).detach()
        inner = torch.autograd.functional.hessian(lambda s: cross_entropy(s, batch[1]), scores)
        dense = jacobian.T @ inner.reshape(scores.numel(), -1) @ jacobian
    vector = torch.randn(len(flat), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(operator @ vector, dense @ vector, rtol=1e-8, atol=1e-10)


def test_a_copy_with_a_cast_keeps_the_type_of_its_weights() -> None:
    model = copy.deepcopy(decoder()).float()
    assert model(tokens(1, 4)).dtype == torch.float32
