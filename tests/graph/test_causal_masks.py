"""What counts as a causal mask, and constant ones are given back as ``is_causal=True``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_backend import Backend, T, assert_close, causal_mask, compiled, tensors
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_reordered
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import mst_compile
from mst_compile.graph import passes
from mst_compile.graph.attention import causal
from mst_compile.graph.attention.causality import hides_below, is_causal
from mst_compile.graph.context import Context


def graph_of(function: Callable[..., Tensor], *args: Tensor) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend."""
    caught: list[fx.GraphModule] = []

    def keep(graph_module: fx.GraphModule, _: object) -> Callable[..., object]:
        caught.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*args)
    return caught[0]


def recovered(graph_module: fx.GraphModule) -> int:
    """How many attentions are told that they are causal."""
    return passes.apply((causal.run,), graph_module, Context())


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


@pytest.mark.parametrize("attention", [additive, boolean])
def test_causal_masks_are_recovered_and_results_stay(attention: Callable[..., Tensor]) -> None:
    args = tensors()
    graph_module = graph_of(attention, *args)
    want = attention(*args)
    want_grads = torch.autograd.grad(want.square().sum(), args)
    assert recovered(graph_module) == 1
    node = next(n for n in graph_module.graph.nodes if "attention" in str(n.target))
    assert node.kwargs["is_causal"] is True
    assert node.kwargs["attn_mask"] is None
    (got,) = graph_module(*args)
    # The order of summation may differ, no more: sums of T terms of size one
    assert_reordered(got, want, 4 * T, size=1.0)
    for a, b in zip(torch.autograd.grad(got.square().sum(), args), want_grads, strict=True):
        assert_reordered(a, b, 4 * T)


@pytest.mark.parametrize("attention", [strict, window])
def test_other_masks_stay(attention: Callable[..., Tensor]) -> None:
    assert recovered(graph_of(attention, *tensors())) == 0


def test_a_mask_that_depends_on_an_input_stays() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool).tril() & keep[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, mask)

    assert recovered(graph_of(padded, *tensors(), torch.ones(2, T, dtype=torch.bool))) == 0


def test_a_random_mask_stays_and_the_users_generator_does_not_notice() -> None:
    graph_module = graph_of(random, *tensors())
    before = torch.get_rng_state()
    assert recovered(graph_module) == 0
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


FILLS = {-torch.inf: True, "min": True, -1e9: True, -1e4: False, -100.0: False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", FILLS)
def test_what_hides_a_key_is_the_same_for_all_forms(fill: float | str, dtype: torch.dtype) -> None:
    number = torch.finfo(dtype).min if fill == "min" else fill
    number = -torch.inf if number == -1e9 and dtype == torch.float16 else number  # as it is in that dtype

    def mask() -> Tensor:
        return torch.zeros(T, T, dtype=dtype).masked_fill(~causal_mask(), number)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask())

    def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + mask()).softmax(-1) @ v

    def put(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).masked_fill(~causal_mask(), number).softmax(-1) @ v

    args = [t.detach().to(dtype) for t in tensors()]
    assert is_causal(mask()) is FILLS[fill]
    assert recovered(graph_of(sdpa, *args)) == FILLS[fill]
    for form in (sdpa, added, put):
        backend = Backend()
        compiled(form, backend)(*args)
        assert [site.replaced for site in backend.sites] == [FILLS[fill]], form


@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    added=st.booleans(),
    near=st.booleans(),
    data=st.data(),
)
def test_what_hides_a_key_leaves_it_no_weight(dtype: torch.dtype, added: bool, near: bool, data: st.DataObject) -> None:
    lowest = torch.finfo(dtype).min
    largest = min(2.0**16, -lowest / 4)
    threshold = torch.tensor(hides_below(dtype), dtype=dtype)
    fill = torch.nextafter(threshold, torch.tensor(-torch.inf, dtype=dtype)) if near else torch.tensor(lowest).to(dtype)
    hidden, diagonal = (data.draw(st.floats(-largest, largest)) for _ in range(2))
    row = torch.tensor([hidden, diagonal], dtype=dtype)
    row[0] = row[0] + fill if added else fill
    assert row.softmax(0).tolist() == [0.0, 1.0]


def test_float16_masks_of_ten_thousand_do_not_hide_keys() -> None:
    """Scores that float16 can hold lift them back."""
    diagonal, hidden = torch.tensor([-6000.0, 6000.0], dtype=torch.float16)
    assert torch.stack([hidden - 1e4, diagonal]).softmax(0)[0] == 1


def test_a_sparse_model_with_an_explicit_mask_equals_eager() -> None:
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
    assert_reordered(got, model(x), 64, size=1.0)


def test_causal_masks_are_recovered_in_checkpoints() -> None:
    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outside = causal_mask()
        x = checkpoint(lambda q: scaled_dot_product_attention(q, k, v, outside), q, use_reentrant=False)
        return checkpoint(boolean, x, k, v, use_reentrant=False)  # type: ignore[return-value]

    args = tensors()
    graph_module = graph_of(checkpointed, *args)
    assert recovered(graph_module) == 2
    assert_close(graph_module(*args)[0], checkpointed(*args))
