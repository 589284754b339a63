"""Decoders for language: pre-norm transformers with RMSNorm, rotary positions and causal attention.

A block is x + attention(norm(x)), then x + mlp(norm(x)), as in GPT-2 (Radford et al., 2019). Its
linear layers have no biases. RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467) replaces
LayerNorm, and rotary positions (Su et al., 2021, arXiv:2104.09864) replace learned ones, so that a
sequence may have any length. The perceptron is four times as wide as the stream and has a GELU.
Queries, keys and values have separate matrices, so that Muon makes each of them orthogonal. The
embedding and the head are not tied: a tied head would begin by predicting the token that it reads.

The initial weights have mean 0. Their standard deviation is 1 / sqrt(n) for a matrix of n inputs,
and 1 / sqrt(2 L n) for the matrices that add to the stream of a network of L layers. It is 0.02 for
the head, as in GPT-2, so that the first scores are nearly equal. It is 1 for embeddings, the scale
that the first normalisation gives them anyway. With 0.02 for all matrices, which GPT-2 has at a
width of 768, gpt-tiny had a held-out loss of 2.34 nats after 128 updates of AdamW on Python's
source files; with 0.09 for all, it had 2.08.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

ROTARY_BASE = 10_000.0
HEAD_DEVIATION = 0.02


@dataclass(frozen=True)
class DecoderShape:
    """The shape of a decoder.

    Attributes:
        layers: Number of blocks.
        width: Numbers per token in the stream; a multiple of twice the number of heads.
        heads: Heads of each attention.
    """

    layers: int
    width: int
    heads: int


DECODERS = {
    "gpt-tiny": DecoderShape(4, 128, 4),
    "gpt-mini": DecoderShape(6, 256, 8),
    "gpt-compact": DecoderShape(8, 512, 8),
    "gpt-small": DecoderShape(15, 832, 13),
}
"""Decoders by name, with 0.85, 4.9, 25.4 and 125 million parameters for bytes. The last is as large
as GPT-2 small, whose parameters include those for 50,257 tokens."""


class Attention(nn.Module):
    """Causal self-attention of several heads, [B, T, width] to [B, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, inputs: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Attend; `cosine` and `sine` of the angles of the positions are [T, width / heads / 2]."""
        query, key, value = (
            layer(inputs).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query = rotated(query, cosine, sine)
        key = rotated(key, cosine, sine)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.project(mixed.transpose(1, 2).flatten(-2))
        return output


class Block(nn.Module):
    """A block: attention and a perceptron, each added to the stream [B, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.activation = nn.GELU()
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, stream: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return the stream after the block."""
        stream = stream + self.attention(self.norm1(stream), cosine, sine)
        added: Tensor = self.narrow(self.activation(self.widen(self.norm2(stream))))
        return stream + added


class Decoder(nn.Module):
    """A language model from tokens int64 [B, T] to scores [B, num_classes, T] of the next tokens.

    The classes are the second dimension, where `torch.nn.CrossEntropyLoss` expects them; targets
    are int64 [B, T]. The scores at a position depend only on the tokens up to that position.

    Args:
        shape: Layers, width and heads.
        num_classes: Number of different tokens.
    """

    pairs: Tensor

    def __init__(self, shape: DecoderShape, num_classes: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, shape.width)
        blocks = (Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, num_classes, bias=False)
        half = shape.width // shape.heads // 2
        # Whole numbers, which a cast of the module to 16 bits leaves alone.
        self.register_buffer("pairs", torch.arange(half), persistent=False)
        self._initialise(shape.layers)

    def _initialise(self, layers: int) -> None:
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                terms = 1
                if name.endswith(("project", "narrow")):
                    terms = 2 * layers
                nn.init.normal_(module.weight, std=(terms * module.in_features) ** -0.5)
        nn.init.normal_(self.head.weight, std=HEAD_DEVIATION)

    def frequencies(self) -> Tensor:
        """Return the angle by which each pair of features turns per position, float64."""
        return ROTARY_BASE ** (-self.pairs.double() / self.pairs.shape[0])

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores [B, num_classes, T]."""
        # Positions are counted, because torch.fx could not trace the length of an arange.
        positions = torch.ones_like(tokens[0]).cumsum(0) - 1
        angles = positions[:, None] * self.frequencies()
        stream = self.embedding(tokens)
        cosine = angles.cos().to(stream.dtype)
        sine = angles.sin().to(stream.dtype)
        for block in self.blocks:
            stream = block(stream, cosine, sine)
        scores: Tensor = self.head(self.norm(stream))
        return scores.transpose(1, 2)


def rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + half]) of [B, heads, T, 2 half] by its angle, [T, half]."""
    first, second = heads.chunk(2, dim=-1)
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.cat(turned, dim=-1).to(heads.dtype)
