"""Gradients and state that lie in memory otherwise than their weight: PyTorch's fused optimizers of the CPU look at no
strides, and what was expanded cannot be masked in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import compiled, static
from mask_cases import element_masks
from oracles import assert_same_course
from torch import Tensor, nn

from mst_compile import sparsifier, sparsify
from mst_compile.blocks.memory import fills, overlaps
from mst_compile.errors import OptimizerError

Make = Callable[[Any, bool], torch.optim.Optimizer]
MAKE: dict[str, Make] = {
    "adamw": lambda p, fused: torch.optim.AdamW(p, 1e-2, fused=fused),
    "adam": lambda p, fused: torch.optim.Adam(p, 1e-2, fused=fused),
    "sgd": lambda p, fused: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=fused),
    "adagrad": lambda p, fused: torch.optim.Adagrad(p, 1e-2, fused=fused),
}


class Layer(nn.Module):
    """A product with a weight that is stored as ``how`` says."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32, bias=False)
        weight = self.linear.weight.detach()
        if how == "transposed":
            self.linear.weight = nn.Parameter(weight.t().contiguous().t())
        elif how == "gaps":
            self.linear.weight = nn.Parameter(torch.cat([weight, weight], 1)[:, :32])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def sparse(how: str = "plain") -> nn.Module:
    return sparsify(Layer(how), static(0.5), block=8)


def gradient(step: int) -> Tensor:
    return torch.randn(32, 32, generator=torch.Generator().manual_seed(step))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.t().contiguous().t(),
    "with gaps": lambda g: torch.cat([g, g], 1)[:, :32],
    "expanded": lambda g: g[:, :1].expand(32, 32),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["plain", "transposed"])
def test_a_gradient_of_other_strides_is_the_same_gradient(name: str, layout: str, how: str) -> None:
    ends = []
    for fused, given in ((True, LAYOUTS[layout]), (False, lambda g: LAYOUTS[layout](g).contiguous())):
        model = sparse(how)
        weight = model.linear.weight  # type: ignore[union-attr]
        optimizer = MAKE[name](model.parameters(), fused)
        before = weight.detach().clone()  # type: ignore[union-attr, operator]
        for step in range(3):
            weight.grad = given(gradient(step))  # type: ignore[union-attr]
            optimizer.step()
        mask = element_masks(model)["linear.weight"]
        assert not weight.detach()[~mask].any()  # type: ignore[union-attr, operator]
        assert (weight.detach() != before)[mask].float().mean() > 0.9  # type: ignore[union-attr, operator]
        ends.append(weight.detach().contiguous())  # type: ignore[union-attr, operator]
    assert_same_course(*ends, parted=32)


@pytest.mark.parametrize("fused", [True, False])
def test_an_expanded_gradient_of_a_mask_that_is_given(fused: bool) -> None:
    model = sparse()
    weight = model.linear.weight  # type: ignore[union-attr]
    optimizer = MAKE["sgd"](model.parameters(), fused)
    weight.grad = gradient(0)  # type: ignore[union-attr]
    optimizer.step()
    weight.grad = torch.ones(32, 1).expand(32, 32)  # type: ignore[union-attr]
    sparsifier(model).apply_mask("linear.weight", ~sparsifier(model).masks["linear.weight"])
    assert torch.equal(weight.grad != 0, element_masks(model)["linear.weight"])  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_of_a_checkpoint_lies_as_its_weight_does(name: str) -> None:
    ends = []
    for fused in (True, False):
        model = sparse("transposed")
        optimizer = MAKE[name](model.parameters(), fused)
        weight = model.linear.weight  # type: ignore[union-attr]
        for step in range(4):
            weight.grad = gradient(step).t().contiguous().t()  # type: ignore[union-attr]
            optimizer.step()
            if step == 1:
                state = copy.deepcopy(optimizer.state_dict())
                for entry in state["state"].values():
                    entry |= {k: v.contiguous() for k, v in entry.items() if isinstance(v, Tensor)}  # as by safetensors
                optimizer.load_state_dict(state)
        ends.append(weight.detach().contiguous())  # type: ignore[union-attr, operator]
    assert_same_course(*ends, parted=32)


def test_a_weight_with_gaps_is_refused_by_fused_optimizers_alone() -> None:
    model = sparse("gaps")
    weight = model.linear.weight  # type: ignore[union-attr]
    weight.grad = gradient(0)  # type: ignore[union-attr]
    before = weight.detach().clone()  # type: ignore[union-attr, operator]
    with pytest.raises(OptimizerError, match=r"linear\.weight has gaps in memory .*fused=False"):
        MAKE["adamw"](model.parameters(), True).step()
    assert torch.equal(weight, before)  # type: ignore[arg-type]
    MAKE["adamw"](model.parameters(), False).step()
    assert not torch.equal(weight, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["plain", "transposed"])
@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_backward_passes_leave_gradients_as_their_weights_lie(how: str, run: str) -> None:
    model = sparse(how)
    function = model if run == "eager" else compiled(model)
    weight = model.linear.weight  # type: ignore[union-attr]
    for _ in range(2):  # also of a sum
        function(torch.randn(64, 32)).square().mean().backward()
        assert weight.grad.stride() == weight.stride()  # type: ignore[union-attr, operator]


def test_what_shares_memory_and_what_has_gaps() -> None:
    whole = torch.zeros(6, 8)
    for tensor in (whole, whole.t(), whole[1:2], whole[:, :1][:1], torch.zeros(()), torch.zeros(1, 1).expand(1, 1)):
        assert not overlaps(tensor)
        assert fills(tensor)
    for tensor in (whole[:, :4], whole[::2], whole[:, ::2]):
        assert not overlaps(tensor)
        assert not fills(tensor)
    for tensor in (torch.zeros(6, 1).expand(6, 8), torch.zeros(13).unfold(0, 8, 1), torch.zeros(1).expand(8)):
        assert overlaps(tensor)
        assert not fills(tensor)
