"""The study's model, the library's small byte-level GPT: shapes that match, and what is measured on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mst_compile.tryout.model import GPT, VOCABULARY, Attention, Block, Shape

__all__ = ["GPT", "VOCABULARY", "Attention", "Block", "Shape"]


def narrowed(shape: Shape, width: int) -> Shape:
    """A shape of the same depth and another width; the head size stays as near to the original as an even one can."""
    head = shape.width / shape.heads
    fitting = [h for h in range(1, width + 1) if width % h == 0 and (width // h) % 2 == 0]
    return Shape(width, shape.layers, min(fitting, key=lambda h: (abs(width / h - head), h)), shape.context)


def matching_shape(shape: Shape, tokens: int, flops: float) -> Shape:
    """The dense shape of the same depth, its width a multiple of 8, whose step costs closest to ``flops``."""
    found = [narrowed(shape, width) for width in range(8, shape.width + 1, 8)]
    return min(found, key=lambda s: abs(s.dense_flops(tokens) - flops))


def hidden_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of the linear layers, the head's excepted, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            yield f"{name}.weight", module.weight


def active_weights(model: nn.Module, sparse: Mapping[str, Any]) -> tuple[float, float]:
    """Weights of the hidden linear layers that take part in (forward and grad-input, grad-weight) of the coming step.

    Args:
        sparse: ``mst_compile.sparsifier(model).weights``, or nothing; layers that are not in it count as a whole.
    """
    active = in_gradient = 0.0
    for name, parameter in hidden_weights(model):
        weight = sparse.get(name)
        active += parameter.numel() if weight is None else weight.active
        in_gradient += parameter.numel() if weight is None or weight.dense_grad else weight.active
    return active, in_gradient


@torch.no_grad()
def dead_units(model: GPT) -> tuple[float, float]:
    """Share of hidden units of the MLPs, and of value/output pairs, that are zero on both sides.

    Such a unit computes nothing, and both of its gradients are exactly zero: it never comes back.
    """
    hidden, values = [], []
    for block in model.blocks:
        assert isinstance(block, Block)
        width = block.attention.proj.in_features
        hidden.append(_zero_rows(block.up.weight) & _zero_rows(block.down.weight.t()))
        value_rows = block.attention.qkv.weight[2 * width :]
        values.append(_zero_rows(value_rows) & _zero_rows(block.attention.proj.weight.t()))
    return torch.cat(hidden).float().mean().item(), torch.cat(values).float().mean().item()


def _zero_rows(weight: Tensor) -> Tensor:
    return (weight == 0).all(1)


@torch.no_grad()
def nonzero_share(model: GPT) -> float:
    """Share of the weights of the hidden linear layers that are not zero."""
    weights = [weight for _, weight in hidden_weights(model)]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
