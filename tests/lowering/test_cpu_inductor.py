"""What Inductor's code calls for the products on the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import static
from mst_compile.lowering import cpu_linear
from oracles import assert_reordered
from torch import Tensor, nn
from torch._inductor.utils import run_fw_bw_and_get_code

from mst_compile import sparsifier, sparsify


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return sparsify(nn.Linear(96, 64), static(0.7), block=4)


def grads(layer: nn.Linear, run: nn.Module, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    run(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    return [layer.weight.grad.clone(), layer.bias.grad.clone()]


def test_the_weight_gradient_needs_no_dispatcher(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the operator run; only where there is no kernel, as for a gradient on all blocks, it does."""
    fast = torch.compile(layer, backend="mst", options={"mst.dense_threshold": 1.0})
    x = torch.randn(20, 96)
    _, code = run_fw_bw_and_get_code(lambda: fast(x))
    assert any("extern_kernels.mst_linear_grad_weight(" in one for one in code)
    made: list[bool] = []
    grad_weight = cpu_linear.grad_weight

    def noting(*args: object) -> tuple[Tensor, Tensor] | None:
        found = grad_weight(*args)  # type: ignore[arg-type]
        made.append(found is not None)
        return found

    monkeypatch.setattr(cpu_linear, "grad_weight", noting)
    weight = sparsifier(layer).weights["weight"]
    for dense, calls in (False, [True]), (True, [False]):
        made.clear()
        weight.set_dense_grad(dense)
        got = grads(layer, fast, x)
        assert made == calls
        assert bool(got[0][~weight.grid.expand(weight.mask)].any()) is dense
        for one, exact in zip(got, grads(layer, layer, x), strict=True):
            assert_reordered(one, exact, 20)
