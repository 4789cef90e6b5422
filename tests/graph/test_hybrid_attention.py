"""Attention that is sparse for a while: schedules, variants, and models through the backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import DEBUG, compiled, scalar
from oracles import assert_reordered
from torch import Tensor, nn

import mst_compile
from mst_compile import Constant, MixedSparsity
from mst_compile.errors import ScheduleError
from mst_compile.ops.attention import attention_reference
from mst_compile.rules.patterns import PATTERNS, Parts, Pattern, allowed

T = 24


class Block(nn.Module):
    """Causal self-attention as nanoGPT writes it, with a residual."""

    def __init__(self, masked: str = "is_causal") -> None:
        super().__init__()
        self.qkv, self.out, self.masked = nn.Linear(64, 192), nn.Linear(64, 64), masked
        self.override: Tensor | None = None  # a dense mask, for the model that serves as the reference
        self.register_buffer("tril", torch.ones(T, T).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = self.tril if self.masked == "buffer" else None
        if self.override is not None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.override)
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return x + self.out(y.transpose(1, 2).flatten(2))


def run(model: Any, module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    out = model(x)
    scalar(out).backward()
    return out.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert_reordered(a[0], b[0], 16)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert_reordered(a[1][name], b[1][name], 48)


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_sparse_attention_on_the_plateau_by_default() -> None:
    s = MixedSparsity.published(100, warmup=10, restoration=20, settle=10, attention="sparse", stride=64)
    assert [s.attention_at(t) for t in (0, 9, 10, 69, 70, 100)] == ["full", "full", "sparse", "sparse", "full", "full"]
    shares = MixedSparsity.published(100, attention="fixed", attention_window=(0.25, 50))
    assert [shares.attention_at(t) for t in (24, 25, 49, 50)] == ["full", "fixed", "fixed", "full"]
    assert {MixedSparsity.published(50).attention_at(t) for t in range(51)} == {"full"}
    always = Constant(0.5, attention="local")
    assert {always.attention_at(t) for t in range(9)} == {"local"}
    window = Constant(0.5, attention="local", attention_window=(2, 5))
    assert [window.attention_at(t) for t in (1, 2, 4, 5)] == ["full", "local", "local", "full"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"attention": "dense"}, "'dense'"),
        ({"attention": "blocks"}, "'blocks'"),
        ({"stride": 0}, "stride"),
        ({"span": 0}, "span"),
        ({"span": 1.5}, "1.5"),
        ({"attention_window": (5, 5)}, "empty"),
        ({"attention_window": (0.5, 0.2)}, "empty"),
        ({"attention_window": (1,)}, "attention_window"),
        ({"attention_window": (0.1, 1.5)}, "1.5"),
        ({"attention_window": (-1, 3)}, "-1"),
        ({"attention_window": "all"}, "'all'"),
    ],
)
def test_mistakes(wrong: dict[str, Any], said: str) -> None:
    for make in (lambda: MixedSparsity.published(100, **wrong), lambda: Constant(0.5, **wrong)):
        with pytest.raises(ScheduleError, match=said.replace("(", r"\(")):
            make()
    with pytest.raises(ScheduleError, match="numbers of steps"):
        Constant(0.5, attention="local", attention_window=(0.1, 0.5))


def test_a_schedule_from_before_attention_patterns() -> None:
    names = ("growth", "gradient_share", "distribution", "max_sparsity", "min_sparsity")
    methods = ("sparsity_at", "drop_fraction_at", "is_topology_event")
    new = Constant(0.5)
    old = SimpleNamespace(**{name: getattr(new, name) for name in (*names, *methods)})
    model = mst_compile.sparsify(nn.Linear(64, 64), old)  # type: ignore[arg-type]
    assert mst_compile.sparsifier(model).attention.pattern == "full"


# -- through the backend -----------------------------------------------------------------------------------------------


SPARSE = [p for p in PATTERNS if p != "full"]
# One of each where the graphs are compiled to machine code: they are the same.
RUNS = [("aot_eager", masked, pattern) for masked in ("is_causal", "buffer") for pattern in SPARSE]
RUNS += [("inductor", "buffer", "sparse"), ("inductor", "is_causal", "fixed")]


@pytest.mark.parametrize(("inner", "masked", "pattern"), RUNS)
def test_the_pattern_of_the_moment_runs(inner: str, masked: str, pattern: Any) -> None:
    schedule = Constant(0.5, growth="none", attention=pattern, attention_window=(1, 3), stride=8, span=5)
    model = mst_compile.sparsify(Block(masked), schedule, block=8)
    reference = Block(masked)
    reference.load_state_dict(model.state_dict())
    fast, own, x = compiled(model, inner), mst_compile.sparsifier(model), torch.randn(2, T, 64)
    masks = {"full": None, pattern: allowed(PATTERNS[pattern].parts(5, 8), T)}
    zero = {n: p != 0 for n, p in model.named_parameters() if n in own.masks}
    seen = []
    for step in range(5):
        if step == 2:
            torch._dynamo.config.error_on_recompile = True
        try:
            got = run(fast, model, x)
        finally:
            torch._dynamo.config.error_on_recompile = False
        seen.append(own.attention.pattern)
        reference.override = masks[own.attention.pattern]
        expected = run(reference, reference, x)
        for name, active in zero.items():
            expected[1][name] *= active
        assert_same(got, expected)
        own.step()
    assert seen == ["full", pattern, pattern, "full", "full"]


class ChunkAndDiagonals(Pattern):
    """A pattern that the package does not have: the query's own chunk, and diagonals behind it."""

    name = "chunk and diagonals"

    def parts(self, window: int, stride: int) -> Parts:
        return Parts(chunk=window, first=window + 1, step=stride)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_pattern_from_outside_runs(inner: str) -> None:
    """Through the reference, the kernels and a model."""
    pattern = ChunkAndDiagonals()
    parts = pattern.parts(5, 8)
    assert parts.numbers not in [p.parts(5, 8).numbers for p in PATTERNS.values()]
    q, k, v = torch.randn(3, 2, 2, T, 32)
    want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed(parts, T))
    for run_operator in (torch.ops.mst.attention, attention_reference):
        torch.testing.assert_close(run_operator(q, k, v, None, parts.numbers, 32**-0.5)[0], want)

    names = ("growth", "gradient_share", "distribution", "max_sparsity", "min_sparsity")
    methods = ("sparsity_at", "drop_fraction_at", "is_topology_event")
    constant = Constant(0.5, growth="none")
    schedule: Any = SimpleNamespace(**{name: getattr(constant, name) for name in (*names, *methods)})
    schedule.attention, schedule.span, schedule.stride = pattern, 5, 8
    schedule.attention_at = lambda step: pattern.name
    model = mst_compile.sparsify(Block(), schedule, block=8)
    reference = Block()
    reference.load_state_dict(model.state_dict())
    reference.override = allowed(parts, T)
    x = torch.randn(2, T, 64)
    expected = run(reference, reference, x)
    own = mst_compile.sparsifier(model)
    for name in own.masks:
        expected[1][name] *= model.get_parameter(name) != 0
    assert_same(run(compiled(model, inner), model, x), expected)
    assert own.attention.parts == parts
    assert "chunk and diagonals (sdpa)" in str(mst_compile.explain(model))


def test_equal_patterns_of_other_names_share_a_graph() -> None:
    """What two patterns do decides whether a graph serves both, whatever they are called."""

    class Near(Pattern):
        name = "near"

        def parts(self, window: int, stride: int) -> Parts:
            return Parts(window=window)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return mst_compile.sparsify(Block(), Constant(0.5, growth="none", attention="local", stride=8), block=8)

    x, (local, near) = torch.randn(2, T, 64), (build(), build())
    state = mst_compile.sparsifier(near).attention
    state.pattern, state.sparse, state.parts = Near.name, Near.name, Near().parts(8, 8)
    for model in (local, near):
        model.compile(backend="mst", options=DEBUG)
    want = local(x)
    mst_compile.sparsifier(local).attention.pattern = "full"
    assert not torch.allclose(local(x), want, atol=1e-3)
    # Now the graph has all its variants, and is itself forgotten.
    torch.testing.assert_close(near(x), want)


def test_another_mask_in_the_buffer_is_not_taken_for_causal() -> None:
    schedule = Constant(0.5, growth="none", attention="sparse", stride=8)
    model = mst_compile.sparsify(Block("buffer"), schedule, block=8)
    fast, x = compiled(model), torch.randn(2, T, 64)
    sparse = fast(x)
    assert not torch.allclose(sparse, model(x), atol=1e-3), "eager mode knows no patterns"
    model.tril.fill_(True)
    torch.testing.assert_close(fast(x), model(x))
    model.tril.tril_()
    torch.testing.assert_close(fast(x), sparse)


def test_attention_that_cannot_be_sparse_is_said_once() -> None:
    class Bidirectional(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = mst_compile.sparsify(Bidirectional(), Constant(0.5, attention="sparse"), block=8)
    fast, x = compiled(model), torch.randn(2, T, 64)
    with pytest.warns(mst_compile.MSTWarning, match="asks for sparse attention.*not causal"):
        out = fast(x)
    torch.testing.assert_close(out, model(x))
    assert "not causal" in str(mst_compile.explain(model))


def test_explain_tells_what_attention_became() -> None:
    model = mst_compile.sparsify(Block(), Constant(0.5, attention="fixed", stride=8), block=8)
    compiled(model)(torch.randn(2, T, 64))
    assert "fixed (sdpa)" in str(mst_compile.explain(model))


def test_projections_of_multihead_attention_become_sparse() -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    model = mst_compile.sparsify(layer, Constant(0.5, growth="none", attention="local", stride=8), block=8)
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight"} <= mst_compile.sparsifier(model).masks.keys()
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    fast = torch.compile(model, backend="mst", options=DEBUG)
    reference = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, T, 64)
    got = fast(x, mask, is_causal=True)
    local = torch.zeros(T, T).masked_fill(~allowed(Parts(window=8), T), -torch.inf)
    assert_reordered(got, reference(x, local), 16)
    assert {r.name: r.kernel for r in mst_compile.explain(model)}["self_attn.in_proj_weight"] == "block-sparse"


def test_heads_without_a_kernel_keep_the_models_own_attention() -> None:
    class Wide(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            q = torch.cat([q] * 17, -1)
            y = nn.functional.scaled_dot_product_attention(q, torch.cat([k] * 17, -1), v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2))

    model = mst_compile.sparsify(Wide(), Constant(0.5, attention="sparse", stride=8), block=8)
    fast, x = compiled(model), torch.randn(2, T, 64)
    with pytest.warns(mst_compile.MSTWarning, match="no CPU attention kernel for heads of 544 with values of 32"):
        out = fast(x)
    torch.testing.assert_close(out, model(x))


def test_models_that_share_a_graph_keep_their_own_attention() -> None:
    def build(**attention: Any) -> nn.Module:
        torch.manual_seed(0)
        return mst_compile.sparsify(Block(), Constant(0.5, growth="none", **attention), block=8)

    models = [build(attention="local", stride=8), build(), build(attention="local", stride=8), build(attention="local")]
    models.append(Block())
    x = torch.randn(2, T, 64)
    full = models[1](x)
    for model in models:
        model.compile(backend="mst", options=DEBUG)
    mst_compile.sparsifier(models[2]).attention.pattern = "full"  # as outside its window
    outs = [model(x) for model in models]
    local = outs[0]
    assert not torch.allclose(local, full, atol=1e-3)
    for out in outs[1:3]:
        torch.testing.assert_close(out, full)
    with_stride = mst_compile.sparsifier(models[3]).attention
    assert (with_stride.pattern, with_stride.parts) == ("local", Parts(window=128))
    torch.testing.assert_close(outs[3], full)  # a span of 128 holds all of it
    mst_compile.sparsifier(models[2]).attention.pattern = "local"
    torch.testing.assert_close(models[2](x), local)
