"""What several products read is computed once and stored once, however cheap it is to compute."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import loss_and_grads, static
from mst_compile.lowering import cpu_inductor  # noqa: F401  (names the kernels that generated code calls)
from oracles import assert_reordered
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.select_algorithm import extern_kernels
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


class Channels(nn.Module):
    """Linear layers over the channels of images behind a convolution, as of ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(F.layer_norm(self.conv(x).permute(0, 2, 3, 1), (32,))))
        return self.conv(self.down(hidden).permute(0, 3, 1, 2))


def test_permuted_operands_reach_kernels_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they did not, each product copied them anew, the weight's gradient while it ran."""
    seen: list[Tensor] = []

    def spy(grad: Tensor, x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        seen.extend((grad, x))
        return grad_weight_made(grad, x, *rest)

    grad_weight_made = extern_kernels.mst_linear_grad_weight
    monkeypatch.setattr(extern_kernels, "mst_linear_grad_weight", spy)
    torch.manual_seed(0)
    model, x = sparsify(Channels(), static(0.5), block=8), torch.randn(2, 32, 6, 5)
    want = loss_and_grads(model, model, (x,))
    with inductor.patch(force_disable_caches=True):
        got = loss_and_grads(model, torch.compile(model, backend="mst"), (x,))
    for name, value in want.items():
        assert_reordered(got[name], value, terms=64)
    assert len(seen) == 4
    assert all(operand.stride(-1) == 1 for operand in seen)
