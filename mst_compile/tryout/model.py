"""A small byte-level GPT, and the FLOPs of a training step on it.

Pre-LN blocks of causal attention (rotary positions) and a GELU MLP, no biases, an output head of its own: what most
language models of today look like, in a hundred lines. Nothing in it knows about sparsity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Shape:
    """What decides the size of the model and its FLOPs."""

    width: int
    layers: int
    heads: int
    context: int

    @property
    def hidden_size(self) -> int:
        """Weights of the linear layers without the head: these become sparse."""
        return 12 * self.layers * self.width**2

    @property
    def head_size(self) -> int:
        return VOCABULARY * self.width

    def step_flops(self, tokens: int, active: float, in_gradient: float) -> float:
        """FLOPs of one training step, 2 a multiply-add, matrix products only, counted the same way for every run.

        Linear layers: forward and grad-input on the ``active`` weights, grad-weight on ``in_gradient`` of them (more
        than ``active`` on steps whose dense gradient growth reads); the head, always dense, is added. Attention: QK and
        AV over all keys, forward once and backward twice.

        Args:
            tokens: of the batch.
            active, in_gradient: numbers of weights of the hidden linear layers.
        """
        attention = 3 * 4 * self.context * self.width * self.layers
        return float(tokens) * (4 * active + 2 * in_gradient + 6 * self.head_size + attention)

    def dense_flops(self, tokens: int) -> float:
        """FLOPs of one dense training step."""
        return self.step_flops(tokens, self.hidden_size, self.hidden_size)


class Attention(nn.Module):
    """Causal self-attention; ``qkv`` holds queries, keys and values in this order."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Bytes in, mean cross-entropy of the next byte out."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        cos, sin = rotations(shape.context, shape.width // shape.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # 1 / sqrt(inputs), outputs into the residual stream scaled down; a quiet head, a loud embedding.
                special = {"embedding.weight": 0.5, "head.weight": 0.02}
                std = special.get(name, parameter.shape[1] ** -0.5)
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=std / math.sqrt(2 * shape.layers) if residual else std)

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the next byte, float32 ``[batch, length, 256]``; a length of at most the shape's context."""
        hidden, length = self.embedding(x), x.shape[1]
        for block in self.blocks:
            hidden = block(hidden, self.cos[:length], self.sin[:length])
        return self.head(self.norm(hidden)).float()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).flatten(0, 1), y.flatten())


def rotations(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each ``[length, size / 2]``."""
    frequencies = 1000.0 ** -(torch.arange(size // 2) / (size // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``[..., length, size]``; keeps the dtype."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)
