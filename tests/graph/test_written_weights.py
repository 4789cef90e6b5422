"""Graphs that write to a weight, or a copy of it, before they multiply with it: the product sees what was written."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import compiled, static, statuses
from oracles import assert_reordered
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mst_compile import sparsify

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("mst_tests::shift", mutates_args={"weight"})
def shift(by: float, weight: Tensor) -> None:
    weight.add_(by)


@shift.register_fake
def _(by: float, weight: Tensor) -> None:
    pass


def _set_data(weight: Tensor) -> None:
    weight.data = weight.data + 0.1


def _setitem(weight: Tensor) -> None:
    weight[:4] = 1.0


WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda w: w.add_(0.1),
    "copy_": lambda w: w.copy_(torch.ones_like(w)),
    "clamp_": lambda w: w.clamp_(0.1, 1.0),
    "normal_": lambda w: nn.init.constant_(w, 0.2),
    "setitem": _setitem,
    "through a view": lambda w: w.t().add_(0.1),
    "through a flat view": lambda w: w.view(-1)[:500].fill_(0.5),
    "through detach": lambda w: w.detach().add_(0.1),
    "foreach": lambda w: torch._foreach_add_([w], 0.1),
    "out": lambda w: torch.add(w, 0.1, out=w),
    "operator with a schema": lambda w: torch.ops.aten.add_.Tensor(w, torch.full((), 0.1)),
    "custom operator": lambda w: shift(0.1, w),
}
OF_WEIGHTS = WRITES | {"through data": lambda w: w.data.add_(0.1), "data replaced": _set_data}
# Autograd takes the others of no tensor that needs a gradient.
OF_COPIES = [how for how in WRITES if how not in ("out", "custom operator", "operator with a schema")]


class Written(nn.Module):
    """A layer that writes to its weight, or a copy of it, with every call."""

    def __init__(self, write: Callable[[Tensor], object], *, copies: bool, inside: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.write, self.copies, self.inside = write, copies, inside

    def written(self) -> Tensor:
        weight = self.fc.weight.clone() if self.copies else self.fc.weight
        if self.copies:
            self.write(weight)
        else:
            with torch.no_grad():
                self.write(weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.inside:
            return checkpoint(lambda x: F.linear(x, self.written()), x, use_reentrant=False)  # type: ignore[no-any-return]
        return F.linear(x, self.written())


def check(model: nn.Module, steps: int = 3) -> None:
    """Compiled equals eager at every call, each of which finds the weight as a training step leaves it."""
    sparsify(model, static())
    twin, run = copy.deepcopy(model), compiled(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    for _ in range(steps):
        out, expected = run(X), twin(X)
        assert_reordered(out.detach(), expected.detach(), 512)
        for loss, optimizer in zip((out, expected), optimizers, strict=True):
            loss.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert "changed before" in statuses(model)["fc.weight"] or "used by" in statuses(model)["fc.weight"]


@pytest.mark.filterwarnings("ignore:values stood", "ignore:values stand", "ignore:sparse weights of this graph")
@pytest.mark.parametrize("how", OF_WEIGHTS)
def test_a_weight_that_the_graph_writes_to(how: str) -> None:
    # What eager mode writes through .data leaves no trace, so that a step does not cut it.
    check(Written(OF_WEIGHTS[how], copies=False), steps=1 if how == "through data" else 3)


@pytest.mark.filterwarnings("ignore:sparse weights of this graph")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", OF_COPIES)
def test_a_copy_that_the_graph_writes_to(how: str, inside: bool) -> None:
    check(Written(WRITES[how], copies=True, inside=inside))


def test_a_write_after_the_product_leaves_it_sparse() -> None:
    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            with torch.no_grad():
                self.fc.weight.mul_(0.5)
            return out

    model = sparsify(After(), static())
    twin, run = copy.deepcopy(model), compiled(model)
    with torch.no_grad():
        for _ in range(3):
            assert_reordered(run(X), twin(X), 512)
    assert statuses(model)["fc.weight"].startswith("matched (1 use)")
