"""What several products read is computed once and stored once, however cheap it is to compute."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import loss_and_grads, static
from oracles import assert_reordered
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from mst_compile import sparsify

HIDDEN = 184  # no other size of the model
# Inductor computes what it takes for heavy, as erf, once of itself; the others it would rather compute again.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "affine": lambda x: 2 * x + 1,
}


class Mlp(nn.Module):
    """The hidden units are read by two layers, and the gradient at them by two products."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, 64), nn.Linear(HIDDEN, 64)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.up(x))
        return self.down(hidden) * self.gate(hidden)


def hidden_buffers(code: str) -> int:
    """How many buffers of the size of the hidden units the code takes memory for."""
    return len(re.findall(rf"empty_strided_cpu\(\([0-9, ]*\b{HIDDEN}\), ", code))


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=list(ACTIVATIONS))
def test_operands_are_computed_once(activation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = sparsify(Mlp(activation), static(0.8), block=8), torch.randn(3, 8, 64)
    want = loss_and_grads(model, model, (x,))
    fast = torch.compile(model, backend="mst")
    with inductor.patch(force_disable_caches=True):  # for the code of a graph that comes out of one is not told
        got, (forward, backward) = run_and_get_code(loss_and_grads, model, fast, (x,))
    for name, value in want.items():
        assert_reordered(got[name], value, terms=HIDDEN)
    assert hidden_buffers(forward) <= 2  # before and after the activation
    assert hidden_buffers(backward) <= 2  # one gradient for each layer, added up in place
