"""Causal attention of whole models is found, rewritten exactly, and all else stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_backend import (
    SPARSE,
    Backend,
    Compiled,
    T,
    assert_close,
    assert_same,
    assert_same_training,
    causal_mask,
    compiled,
    tensors,
    training,
)
from attention_models import LENGTH, WIDTH, NanoAttention, cases, first_tensor
from oracles import assert_reordered
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from mst_compile.graph import passes
from mst_compile.graph.attention import patterned
from mst_compile.graph.context import Context
from mst_compile.rules.patterns import Parts, allowed


@pytest.mark.parametrize("name", cases())
def test_models_equal_eager(name: str) -> None:
    """Every attention of every model is replaced or explained; the operator with the full pattern changes nothing."""
    case, backend = cases()[name](), Backend()
    case.model.train()
    assert_same_training(case, backend)
    assert len(backend.operators()) == sum(site.replaced for site in backend.sites) == case.replaced
    assert len(backend.reasons()) == len(case.kept)
    assert all(part in reason for part, reason in zip(case.kept, backend.reasons(), strict=True))
    assert all(site.where for site in backend.sites)


@pytest.mark.parametrize("name", ["nanoGPT-manual", "GPT-2-eager", "encoder-mask", "Llama-sdpa"])
def test_full_keeps_the_models_own_kernels(name: str) -> None:
    case, backend = cases()[name](), Backend(None)
    compiled(case.model, backend)(*case.args, **case.kwargs)
    assert [(s.causal, s.replaced, s.reason) for s in backend.sites] == [(True, False, "the pattern is full")] * 2
    assert not backend.operators()
    sdpa = torch._C._nn.scaled_dot_product_attention
    flags = [n.kwargs["is_causal"] for n in backend.graphs[0].graph.nodes if n.target is sdpa]
    assert flags == ([True] * 2 if name == "Llama-sdpa" else [False] * 2 if name == "encoder-mask" else [])


def masked(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """``scaled_dot_product_attention`` with a sparse pattern in its mask."""
    pattern = allowed(SPARSE, q.shape[2])
    keep = pattern if attn_mask is None else pattern & attn_mask
    return scaled_dot_product_attention(q, k, v, attn_mask=keep, **kwargs | {"is_causal": False})


@pytest.mark.parametrize(
    "name",
    ["nanoGPT-flash", "GPT-2-sdpa", "GPT-2-padded-sdpa", "Llama-sdpa", "Llama-padded-sdpa", "Mistral-sdpa"],
)
def test_sparse_sdpa_equals_eager_with_a_dense_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, backend = cases()[name](), Backend(SPARSE)
    parameters = list(case.model.parameters())
    got = training(case, compiled(case.model, backend), parameters)
    assert len(backend.operators()) == 2
    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    monkeypatch.setattr("attention_models.scaled_dot_product_attention", masked)
    assert_same(got, training(case, case.model, parameters))


@pytest.mark.parametrize("name", ["nanoGPT-manual", "encoder-mask"])
def test_sparse_masks_of_buffers_equal_eager_with_another_buffer(name: str) -> None:
    case, backend = cases()[name](), Backend(SPARSE)
    eager = copy.deepcopy(case.model)
    keep = allowed(SPARSE, LENGTH + 4)
    for module in eager.modules():
        if isinstance(module, NanoAttention):
            module.bias = keep[None, None].float()  # type: ignore[assignment]
        elif hasattr(module, "mask"):
            module.mask = torch.zeros(LENGTH, LENGTH).masked_fill(~keep[:LENGTH, :LENGTH], -torch.inf)  # type: ignore[assignment]
    got = training(case, compiled(case.model, backend), list(case.model.parameters()))
    assert_same(got, training(case, eager, list(eager.parameters())))
    assert len(backend.operators()) == 2


def padded(mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask(keep))

    return attention


PADDING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "bool": (lambda keep: causal_mask() & keep.bool()[:, None, None, :], ""),
    "not zero": (lambda keep: causal_mask() & (keep != 0)[:, None, None, :], ""),
    "additive": (
        lambda keep: (
            torch.zeros(T, T).masked_fill(~causal_mask(), -torch.inf)
            + (1.0 - keep[:, None, None, :].float()) * torch.finfo(torch.float32).min
        ),
        "",
    ),
    "of queries": (lambda keep: causal_mask() & keep.bool()[:, None, :, None], "padding"),
    "hidden keys": (lambda keep: causal_mask() & (keep == 0)[:, None, None, :], ""),
    "documents": (lambda keep: causal_mask() & (keep[:, None, :, None] == keep[:, None, None, :]), "padding"),
    "exactly one": (lambda keep: causal_mask() & (keep == 1)[:, None, None, :], "padding"),
    "another number": (lambda keep: causal_mask() & (keep != 5)[:, None, None, :], "padding"),
    "not causal": (lambda keep: keep.bool()[:, None, None, :].expand(2, 1, T, T), "not causal"),
    "reversed": (lambda keep: causal_mask() & keep.bool().flip(1)[:, None, None, :], "padding"),
    "other sequence": (lambda keep: causal_mask() & keep.bool().flip(0)[:, None, None, :], "padding"),
}


@pytest.mark.parametrize("name", PADDING)
def test_padding_is_kept_as_a_key_mask_where_it_is_one(name: str) -> None:
    mask, reason = PADDING[name]
    torch.manual_seed(0)
    keep = torch.ones(2, T, dtype=torch.long)
    keep[1, -4:] = 0
    hides = name == "hidden keys"
    keep = 1 - keep if hides else keep
    q, k, v = tensors()
    backend = Backend()
    got = compiled(padded(mask), backend)(q, k, v, keep)
    assert len(backend.operators()) == (not reason)
    assert reason in backend.sites[0].reason
    seen = (keep.bool() != hides)[:, None, :, None]  # queries at padding have no defined result
    assert_close(got * seen, padded(mask)(q, k, v, keep) * seen)
    if not reason:
        (node,) = backend.operators()
        assert node.args[3] is not None


@pytest.mark.parametrize("shape", ["[batch, queries, keys]", "[queries, keys]"])
def test_padding_is_a_mask_of_sequences_not_of_heads_or_queries(shape: str) -> None:
    """As many sequences as heads, or as positions: nothing but where a dimension stands says what it means."""
    batch = {"[batch, queries, keys]": 3, "[queries, keys]": T}[shape]
    q, k, v = (torch.randn(batch, 3, T, 8) for _ in range(3))
    keep = torch.rand(batch, T) < 0.5
    keep[:, 0] = True

    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = causal_mask() & (keep if shape == "[queries, keys]" else keep[:, None])
        return scaled_dot_product_attention(q, k, v, mask)

    backend = Backend()
    assert_close(compiled(attention, backend)(q, k, v, keep), attention(q, k, v, keep))
    assert backend.reasons() == ["its mask and its padding differ in shape"]


def test_a_query_without_keys_gets_zero() -> None:
    keep = torch.ones(2, T, dtype=torch.long)
    keep[0, :3] = 0
    backend = Backend()
    got = compiled(padded(PADDING["bool"][0]), backend)(*tensors(), keep)
    assert not bool(got[0, :, :3].any())
    assert bool(got[0, :, 3:].all())


def test_masks_that_are_inputs_stay() -> None:
    mask = causal_mask()
    backend = Backend()
    compiled(lambda q, k, v, m: scaled_dot_product_attention(q, k, v, m[None]), backend)(*tensors(), mask[None])
    assert not backend.operators()
    assert "input" in backend.sites[0].reason


@pytest.mark.parametrize("name", ["nanoGPT-manual", "Llama-padded-sdpa", "GPT-2-padded-eager", "encoder-hint"])
def test_one_graph_serves_all_lengths(name: str) -> None:
    case, backend = cases()[name](), Backend(Parts(window=3))
    fast = compiled(case.model, backend, dynamic=True)
    fast(*case.args, **case.kwargs)
    assert len(backend.operators()) == case.replaced == 2
    want = Backend(Parts(window=3))
    shorter = [a[:, :9].contiguous() if name != "encoder-hint" else torch.cat([a, a[:1]]) for a in case.args]
    kwargs = {k: v[:, :9].contiguous() for k, v in case.kwargs.items()}
    with torch.compiler.set_stance("fail_on_recompile"):
        got = first_tensor(fast(*shorter, **kwargs))
    assert_close(got, first_tensor(compiled(case.model, want, dynamic=False)(*shorter, **kwargs)))


def test_a_window_longer_than_the_sequence_counts_where_sequences_may_grow() -> None:
    def windowed(q: Tensor) -> Tensor:
        position = torch.arange(q.shape[2])
        distance = position[:, None] - position[None]
        return scaled_dot_product_attention(q, q, q, attn_mask=(distance >= 0) & (distance < 100))

    static, dynamic = Backend(), Backend()
    q, _, _ = tensors()
    compiled(windowed, static)(q)
    torch._dynamo.mark_dynamic(q, 2)
    compiled(windowed, dynamic)(q)
    assert len(static.operators()) == 1
    assert "fewer keys" in dynamic.sites[0].reason


@pytest.mark.parametrize("name", ["nanoGPT-manual", "GPT-2-padded-eager", "GPT-2-sdpa"])
def test_activation_checkpointing(name: str) -> None:
    """The body of a checkpoint is rewritten; masks and paddings come from outside of it."""
    case, backend = cases()[name](), Backend()
    if name.startswith("GPT-2"):
        case.model.train().gradient_checkpointing_enable()  # type: ignore[operator]
    else:
        for attention in case.model.attention:  # type: ignore[union-attr]
            forward = attention.forward
            attention.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    assert_same_training(case, backend)
    assert len(backend.operators()) == 2


def test_a_checkpoint_within_a_checkpoint_receives_its_padding() -> None:
    def nested(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        def inner(q: Tensor) -> Tensor:
            return padded(PADDING["bool"][0])(q, k, v, keep)

        def outer(q: Tensor) -> Tensor:
            return checkpoint(inner, q * 2.0, use_reentrant=False)  # type: ignore[return-value]

        return checkpoint(outer, q, use_reentrant=False)  # type: ignore[return-value]

    keep = torch.ones(2, T, dtype=torch.long)
    keep[1, -4:] = 0
    args, backend = tensors(), Backend(inner="aot_eager")
    seen = keep.bool()[:, None, :, None]
    got, want = compiled(nested, backend)(*args, keep) * seen, nested(*args, keep) * seen
    assert [site.replaced for site in backend.sites] == [True]
    assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), args), torch.autograd.grad(want.sum(), args), strict=True):
        assert_close(a, b, terms=256)


@pytest.mark.parametrize("name", ["nanoGPT-manual", "GPT-2-eager", "Llama-eager", "encoder-mask", "GPT-2-upcast-eager"])
@pytest.mark.parametrize("where", ["outside", "inside", "weights"])
def test_bfloat16(name: str, where: str) -> None:
    """The dtype of results stays, under autocast and without; errors are those of rounding."""
    case, backend = cases()[name](), Backend()
    if where == "weights":
        case.model.bfloat16()
        case.args = tuple(a.bfloat16() if a.is_floating_point() else a for a in case.args)

    def run(model: Compiled) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "weights"), torch.no_grad():
            return first_tensor(model(*case.args, **case.kwargs))

    function = (lambda *a, **k: run(case.model)) if where == "inside" else case.model
    got, want = run(compiled(function, backend)), run(case.model)
    assert len(backend.operators()) == 2
    assert got.dtype == want.dtype
    assert_reordered(got, want, 4, dtype=torch.bfloat16)


def test_autograd_takes_the_rewritten_graph() -> None:
    case, backend = cases()["GPT-2-padded-eager"](), Backend(inner="aot_eager")
    assert_same_training(case, backend)
    assert len(backend.operators()) == 2


def test_buffers_that_were_relied_on_are_named_and_watched() -> None:
    case, backend = cases()["nanoGPT-manual"](), Backend()
    compiled(case.model, backend)(*case.args)
    buffers = [attention.bias for attention in case.model.attention]  # type: ignore[union-attr]
    placeholders = [n for n in backend.nodes() if n.op == "placeholder"]
    assert len(backend.constants) == 2
    for constant, buffer in zip(backend.constants, buffers, strict=True):
        assert placeholders[constant.position].meta["example_value"].shape == buffer.shape
        assert constant.holds(buffer)
        assert constant.holds(buffer.clone())  # another layer's
        buffer.copy_(buffer.clone())  # a checkpoint was loaded
        assert constant.holds(buffer)
        buffer[..., 0, 1] = 1
        assert not constant.holds(buffer)
        assert not constant.holds(buffer[..., 1:])


def test_inputs_can_be_given_when_dynamo_has_forgotten_them() -> None:
    case = cases()["nanoGPT-manual"]()
    caught: list[tuple[fx.GraphModule, list[Any]]] = []

    def late(graph_module: fx.GraphModule, inputs: list[Any]) -> Compiled:
        def call(*args: Any) -> Any:
            caught.append((graph_module, list(args)))
            return graph_module.forward(*args)

        return call

    torch._dynamo.reset()
    torch.compile(case.model, backend=late)(*case.args)
    graph_module, inputs = caught[0]
    for node in graph_module.graph.nodes:
        node.meta.pop("grapharg", None)
    for known, replaced in ([], False), (inputs, True):
        context = Context(pattern=Parts(window=4), inputs=known)
        passes.apply((patterned.run,), copy.deepcopy(graph_module), context)
        assert [s.replaced for s in context.sites] == [replaced] * 2


def test_a_buffer_that_the_graph_writes_to_is_not_relied_on() -> None:
    class Writes(NanoAttention):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.bias.mul_(1.0)  # type: ignore[operator]
            return y

    backend = Backend()
    compiled(Writes(flash=False), backend)(torch.randn(2, T, WIDTH))
    assert not backend.operators()
    assert "written to" in backend.sites[0].reason


def test_the_table_of_models_is_made_of_the_same_cases() -> None:
    from benchmarks.attention_coverage import table

    lines = table(["nanoGPT-manual", "T5-sdpa"]).splitlines()
    assert lines[2].startswith("| nanoGPT | manual | 2 | 2 |")
    assert lines[3].startswith("| T5 | sdpa | 3 | 0 |")
