"""Constant causal masks become ``is_causal``; every other attention stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from mst_compile.passes.attention import is_causal, recover_causal

T = 12
SHAPE = (2, 3, T, 8)


def graph_of(function: Callable[..., Tensor], *args: Tensor) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend."""
    caught: list[fx.GraphModule] = []

    def keep(graph_module: fx.GraphModule, _: object) -> Callable[..., object]:
        caught.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*args)
    return caught[0]


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As transformers' eager code builds its mask."""
    position = torch.arange(T)
    mask = torch.where(position[None] <= position[:, None], 0.0, torch.finfo(torch.float32).min)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], scale=0.3)


def boolean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, torch.ones(T, T, dtype=torch.bool).tril())


def strict(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries do not see themselves (the first sees only itself): looks causal, is not."""
    mask = torch.ones(T, T, dtype=torch.bool).tril(-1) | (torch.arange(T)[:, None] + torch.arange(T) == 0)
    return scaled_dot_product_attention(q, k, v, mask)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(T, T, dtype=torch.bool)
    return scaled_dot_product_attention(q, k, v, keep.tril() & keep.triu(-4))


def random(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (torch.rand(T, T) < 0.5) | torch.eye(T, dtype=torch.bool)
    return scaled_dot_product_attention(q, k, v, mask)


def tensors() -> list[Tensor]:
    return [torch.randn(SHAPE, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("attention", [additive, boolean])
def test_causal_masks_are_recovered_and_results_stay(attention: Callable[..., Tensor]) -> None:
    args = tensors()
    graph_module = graph_of(attention, *args)
    want = attention(*args)
    want_grads = torch.autograd.grad(want.square().sum(), args)
    assert recover_causal(graph_module) == 1
    node = next(n for n in graph_module.graph.nodes if "attention" in str(n.target))
    assert node.kwargs["is_causal"] is True
    assert node.kwargs["attn_mask"] is None
    (got,) = graph_module(*args)
    # The order of summation may differ, no more: sums of T terms of size one
    torch.testing.assert_close(got, want, rtol=0, atol=4 * T * torch.finfo(torch.float32).eps)
    for a, b in zip(torch.autograd.grad(got.square().sum(), args), want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * T * torch.finfo(torch.float32).eps * float(b.abs().max()))


@pytest.mark.parametrize("attention", [strict, window])
def test_other_masks_stay(attention: Callable[..., Tensor]) -> None:
    assert recover_causal(graph_of(attention, *tensors())) == 0


def test_a_mask_that_depends_on_an_input_stays() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool).tril() & keep[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, mask)

    assert recover_causal(graph_of(padded, *tensors(), torch.ones(2, T, dtype=torch.bool))) == 0


def test_a_random_mask_stays_and_the_users_generator_does_not_notice() -> None:
    graph_module = graph_of(random, *tensors())
    before = torch.get_rng_state()
    assert recover_causal(graph_module) == 0
    assert torch.equal(before, torch.get_rng_state())


@given(size=st.integers(2, 9), flip=st.booleans(), data=st.data())
def test_is_causal_wants_every_entry_right(size: int, flip: bool, data: st.DataObject) -> None:
    mask = torch.ones(2, 1, size, size, dtype=torch.bool).tril()
    if flip:
        where = data.draw(st.tuples(st.integers(0, 1), st.integers(0, size - 1), st.integers(0, size - 1)))
        mask[where[0], 0, where[1], where[2]] ^= True
    additive_mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    assert is_causal(mask) is (not flip)
    assert is_causal(additive_mask) is (not flip)
    assert not is_causal(additive_mask.clamp(min=-100.0))  # exp(-100) is small, not 0
    assert not is_causal(mask[..., :-1])


def test_a_sparse_model_with_an_explicit_mask_equals_eager() -> None:
    import mst_compile

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, T, 3, 4, 8).permute(2, 0, 3, 1, 4)
            return additive(q, k, v)

    model = mst_compile.sparsify(Attention(), mst_compile.Constant(0.5, growth="none"), block=4)
    x = torch.randn(2, T, 32)
    got = torch.compile(model, backend="mst", options={"mst.inner": "aot_eager"})(x)
    torch.testing.assert_close(got, model(x), rtol=0, atol=64 * torch.finfo(torch.float32).eps)
