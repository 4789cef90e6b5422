"""Products with parts of a weight: chunks, halves, slices of rows and columns."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check_model, compiled, loss_and_grads, static, statuses
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import element_masks
from mst_compile.lowering import device
from oracles import assert_reordered
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import mst_compile
from mst_compile.blocks.layout import Part
from mst_compile.cost.flops import CompiledFlopCounter
from mst_compile.graph.views import before_part
from mst_compile.ops import watching
from mst_compile.state import weight as weights
from mst_compile.state.sparsifier import sparsifier

TOKENS, ROWS, COLS = 6, 96, 64
Rule = Callable[[Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """A weight ``[96, 64]`` and a rule."""

    def __init__(self, rule: Rule, shape: tuple[int, ...] = (ROWS, COLS)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape) / 8)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x, self.w)


def gated(x: Tensor, w: Tensor) -> Tensor:
    up, gate = w.chunk(2)
    return F.linear(x, up) * torch.sigmoid(F.linear(x, gate, x.new_ones(ROWS // 2)))


def again(x: Tensor, w: Tensor) -> Tensor:
    first = w[:32]
    return F.linear(x, first).relu() @ first + x @ w[:32].t() @ first


# Name -> rule, how many products there are.
FORMS: dict[str, tuple[Rule, int]] = {
    "chunk": (lambda x, w: torch.cat([F.linear(x, p) for p in w.chunk(3)], -1), 3),
    "one of three": (lambda x, w: F.linear(x, torch.chunk(w, 3)[1]), 1),
    "split": (lambda x, w: F.linear(x, w.split([32, 64])[1]), 1),
    "split by length": (lambda x, w: F.linear(x, torch.split(w, 24)[-1]), 1),
    "tensor_split": (lambda x, w: F.linear(x, w.tensor_split((8, 40))[1]), 1),
    "narrow": (lambda x, w: F.linear(x, w.narrow(0, 16, 48)), 1),
    "slices": (lambda x, w: torch.cat([F.linear(x, w[:32]), x @ w[-64:].t()], -1), 2),
    "gated": (gated, 2),
    "the same part again": (again, 4),
    "a part and the whole": (lambda x, w: F.linear(x, w)[..., :32] + F.linear(x, w[:32]), 2),
    "parts that overlap": (lambda x, w: F.linear(x, w[:64]) + F.linear(x, w[32:]), 2),
    "a part of a part": (lambda x, w: F.linear(x, w[16:].chunk(2)[1][8:]), 1),
    "columns": (lambda x, w: F.linear(x[..., :24], w[:, :24]) + x[..., 24:] @ w.t()[24:], 2),
    "rows and columns": (lambda x, w: F.linear(x[..., 16:48], w[32:, 16:48]), 1),
    "columns of the transposed": (lambda x, w: x @ w.t()[:, 32:], 1),
    "within blocks": (lambda x, w: F.linear(F.linear(x, w[:50])[..., :40], w[20:70, 10:50]), 2),
    "of three dimensions": (lambda x, w: F.linear(x, w.view(3, 32, COLS)[1]), 1),
    "unbound": (lambda x, w: torch.stack([F.linear(x, p) for p in w.view(3, 32, COLS).unbind()]), 3),
    "cast before": (lambda x, w: F.linear(x.bfloat16(), w.bfloat16()[:32]).float(), 1),
    "cast after": (lambda x, w: F.linear(x.bfloat16(), w.chunk(3)[0].bfloat16()).float(), 1),
    "einsum": (lambda x, w: torch.einsum("tk,nk->tn", x, w[32:64]), 1),
    "addmm": (lambda x, w: torch.addmm(x.new_ones(32), x, w[32:64].t()), 1),
    "from the left": (lambda x, w: w[:32] @ x.t(), 1),
    "checkpointed": (lambda x, w: checkpoint(gated, x, w, use_reentrant=False), 2),
}


def precision_of(form: str) -> torch.dtype:
    return torch.bfloat16 if "cast" in form else torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_sparse(form: str) -> None:
    rule, uses = FORMS[form]
    model = check_model(
        lambda: Layer(rule), torch.randn(TOKENS, COLS), precision=precision_of(form), include="w", block=8
    )
    assert statuses(model)["w"].startswith(f"matched ({uses} use")
    assert "dense" not in statuses(model)["w"]


@pytest.mark.parametrize(
    ("form", "inner"),
    [("chunk", "eager"), ("within blocks", "eager"), ("gated", "inductor"), ("columns", "inductor")],
)
def test_a_form_under_another_compiler(form: str, inner: str) -> None:
    rule, uses = FORMS[form]
    model = check_model(lambda: Layer(rule), torch.randn(TOKENS, COLS), inner=inner, include="w", block=8)
    assert statuses(model)["w"].startswith(f"matched ({uses} use")


def test_under_autocast() -> None:
    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    given = torch.randn(TOKENS, COLS)
    check_model(lambda: Layer(gated), given, context=autocast, precision=torch.bfloat16, include="w", block=8)


@pytest.mark.parametrize("block", [1, 4, 32])
@pytest.mark.parametrize("tokens", [1, 70])
def test_columns_are_read_where_they_lie(tokens: int, block: int) -> None:
    """By kernels of few tokens, of many, and of fine blocks."""
    rule = FORMS["rows and columns"][0]
    check_model(lambda: Layer(rule), torch.randn(tokens, COLS), include="w", block=block)


cuts = st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 60))


@given(st.lists(cuts, min_size=1, max_size=3), st.booleans(), st.sampled_from([4, 8, 32]), st.integers(0, 99))
@settings(max_examples=25)
def test_parts_of_any_place(chain: list[tuple[bool, int, int]], turned: bool, block: int, seed: int) -> None:
    """Rows and columns cut off one after the other, of the weight or its transpose: as the masked model has it."""

    def part(w: Tensor) -> Tensor:
        w = w.t() if turned else w
        for of_rows, start, length in chain:
            dim = 0 if of_rows else 1
            start = min(start, w.shape[dim] - 1)
            w = w.narrow(dim, start, min(length, w.shape[dim] - start))
        return w

    torch._dynamo.reset()
    torch.manual_seed(seed)
    width = part(torch.empty(ROWS, COLS)).shape[1]
    model = mst_compile.sparsify(Layer(lambda x, w: F.linear(x, part(w))), static(0.7), include="w", block=block)
    x = torch.randn(TOKENS, width)
    want = loss_and_grads(model, model, (x,))
    got = loss_and_grads(model, compiled(model, "eager"), (x,))
    for name in want:
        assert_reordered(got[name], want[name], 4 * ROWS)
    assert statuses(model)["w"].startswith("matched (1 use")


def test_only_active_elements_are_multiplied() -> None:
    rule = FORMS["chunk"][0]
    model = mst_compile.sparsify(Layer(rule), static(), include="w", block=8)
    run, x = compiled(model), torch.randn(TOKENS, COLS, requires_grad=True)
    with CompiledFlopCounter(display=False) as counter:
        run(x).sum().backward()
    (weight,) = sparsifier(model).weights.values()
    assert counter.get_total_flops() == 6 * TOKENS * weight.active


# -- masks that change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_decoder_trains_as_in_eager_mode(inner: str) -> None:
    """Through warm-up, events that grow by gradient, and restoration, one graph with gradients and one without."""
    schedule = mst_compile.MixedSparsity(12, sparsity=0.7, interval=3, growth="gradient")
    torch.manual_seed(0)
    plain = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    models = [mst_compile.sparsify(copy.deepcopy(plain), schedule, block=4) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    runs = models[0], compiled(models[1], inner)
    changed = 0
    for _ in range(12):
        x, memory, masks = torch.randn(2, 5, 32), torch.randn(2, 7, 32), element_masks(models[0])
        for optimizer, run in zip(optimizers, runs, strict=True):
            run(x, memory).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert sparsifier(models[0]).masks.keys() == sparsifier(models[1]).masks.keys()
        for name, mask in sparsifier(models[0]).masks.items():
            assert torch.equal(mask, sparsifier(models[1]).masks[name])
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            assert_reordered(other.detach(), one.detach(), 64)
        changed += any(not torch.equal(mask, masks[name]) for name, mask in element_masks(models[0]).items())
        with torch.no_grad():
            assert_reordered(runs[1](x, memory), runs[0](x, memory), 256)
    assert changed == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert statuses(models[1])["multihead_attn.in_proj_weight"].startswith("matched (2 uses)")


@pytest.mark.parametrize(("width", "block"), [(64, 8), (36, 8)])
def test_a_decoder_of_any_width(width: int, block: int) -> None:
    """Thirds of its packed projections may begin within blocks."""
    model = check_model(
        lambda: nn.TransformerDecoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True),
        torch.randn(2, 5, width), torch.randn(2, 7, width), sparsity=0.5, block=block,
    )  # fmt: skip
    (cross,) = (w for name, w in sparsifier(model).weights.items() if name == "multihead_attn.in_proj_weight")
    assert [one.part.rows for one in cross.ranges] == [width, 2 * width]
    assert (width % cross.grid.block > 0) is (width == 36)
    assert statuses(model)[cross.name].startswith("matched (2 uses)")


def test_gradients_on_all_blocks_where_growth_reads_them() -> None:
    model = mst_compile.sparsify(Layer(gated), static(), include="w", block=8)
    (weight,) = sparsifier(model).weights.values()
    run, x = compiled(model), torch.randn(TOKENS, COLS)
    for wanted in (False, True, False):
        weight.set_dense_grad(wanted)
        want, got = (loss_and_grads(model, function, (x,)) for function in (model, run))
        assert_reordered(got["grad w"], want["grad w"], 4 * COLS)
        assert bool(got["grad w"][~element_masks(model)["w"]].any()) is wanted


def test_copies_and_shared_graphs_have_indexes_of_their_own() -> None:
    first = mst_compile.sparsify(Layer(gated), static(), include="w", block=8)
    run, x = compiled(first), torch.randn(TOKENS, COLS)
    run(x)
    other = copy.deepcopy(first)
    for model in (first, other):
        (weight,) = sparsifier(model).weights.values()
        weight.set_mask(torch.rand(weight.mask.shape) < 0.4)
        with torch.no_grad():
            model.w.normal_()
            weight.zero_inactive_(model.w)
            weight.note_clean(model.w)
    want, got = (loss_and_grads(other, function, (x,)) for function in (other, compiled(other)))
    for name in want:
        assert_reordered(got[name], want[name], 8 * COLS)
    assert_reordered(run(x), first(x), 8 * COLS)


@pytest.mark.parametrize(("form", "written"), [("gated", 0), ("columns", 0), ("within blocks", 1)])
def test_nothing_is_written_to_gradients_that_products_computed(
    form: str, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where a part begins within blocks, those that it reaches into hold more than the mask."""
    count: list[int] = []
    original = weights.zero_all_inactive_
    monkeypatch.setattr(weights, "zero_all_inactive_", lambda whole: (count.append(len(whole)), original(whole)))
    model = mst_compile.sparsify(Layer(FORMS[form][0]), static(), include="w", block=8)
    run, x = compiled(model), torch.randn(TOKENS, COLS)
    run(x).square().sum().backward()
    count.clear()
    model.zero_grad()
    run(x).square().sum().backward()
    assert sum(count) == written
    assert model.w.grad is not None
    assert not model.w.grad[~element_masks(model)["w"]].any()


# -- what is faster ----------------------------------------------------------------------------------------------------


def test_each_part_is_judged_by_its_own_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight whose first half is full and whose second is nearly empty."""
    asked: list[device.Layer] = []

    def times(layers: Any, _: bool) -> Any:
        asked.extend(layers)
        return [{p: device.Times(1.0, 0.0, 2.0) for p in device.PRODUCTS} for _ in layers]

    monkeypatch.delenv("MST_COMPILE_DENSE_THRESHOLD")
    record = dataclasses.replace(device.of("cpu"), times=times, chooses=False)
    monkeypatch.setitem(device._records, "cpu", record)
    model = mst_compile.sparsify(Layer(lambda x, w: F.linear(x, w[48:])), static(), include="w", block=8)
    (weight,) = sparsifier(model).weights.values()
    mask = torch.zeros_like(weight.mask)
    run, x = compiled(model), torch.randn(TOKENS, COLS)
    for full, dense in ((mask[:6], False), (mask[6:], True)):
        mask[:], full[:] = False, True
        weight.set_mask(mask.clone())
        with torch.no_grad():
            weight.zero_inactive_(model.w)
        run(x)
        assert weight.uses.dense_now is dense
    assert [(layer.grid.rows, layer.grid.cols, layer.tokens) for layer in asked] == [(48, COLS, TOKENS)] * len(asked)


# What stays dense -> part of the reason.
DENSE: dict[str, tuple[Rule, str]] = {
    "every other row": (lambda x, w: F.linear(x, w[::2]), "used by getitem"),
    "chosen rows": (lambda x, w: F.linear(x, w[torch.arange(5)]), "used by getitem"),
    "no rows": (lambda x, w: F.linear(x, w[:0]).sum() + x, "without elements"),
    "detached": (lambda x, w: F.linear(x, w[:32].detach()), "used by detach"),
    "added": (lambda x, w: F.linear(x, w[:32] + 1), "used by add"),
}


@pytest.mark.parametrize("form", DENSE)
def test_what_stays_dense_says_why(form: str) -> None:
    rule, why = DENSE[form]
    model = mst_compile.sparsify(Layer(rule), static(), include="w", block=8)
    x = torch.randn(TOKENS, COLS)
    assert_reordered(compiled(model)(x), model(x), 2 * COLS)
    assert why in statuses(model)["w"]
    assert not statuses(model)["w"].startswith("matched")


def test_parts_of_matrices_in_a_stack_stay_dense() -> None:
    model = mst_compile.sparsify(
        Layer(lambda x, w: F.linear(x, w[1][:16]), (3, 32, COLS)), static(), include="w", block=8
    )
    x = torch.randn(TOKENS, COLS)
    assert_reordered(compiled(model)(x), model(x), 2 * COLS)
    assert "part of a matrix in a stack" in statuses(model)["w"]


def test_a_part_that_was_written_to_stays_dense() -> None:
    def rule(x: Tensor, w: Tensor) -> Tensor:
        before = F.linear(x, w[:32])
        with torch.no_grad():
            w[32:].mul_(1.0)
        return before + F.linear(x, w[:32])

    model = mst_compile.sparsify(Layer(rule), static(), include="w", block=8)
    x = torch.randn(TOKENS, COLS)
    with torch.no_grad():
        assert_reordered(compiled(model)(x), model(x), 2 * COLS)
    assert "matched (1 use" in statuses(model)["w"]
    assert "its values are changed before by mul_" in statuses(model)["w"]


def test_operators_are_the_same_views_as_methods() -> None:
    """Compiled autograd hands graphs of operators over."""
    graph, w = fx.Graph(), torch.empty(ROWS, COLS)
    source = graph.placeholder("w")
    rows = graph.call_function(torch.ops.aten.slice.Tensor, (source, 0, 8, 32))
    both = graph.call_function(torch.ops.aten.split.Tensor, (source, 48))
    half = graph.call_function(operator.getitem, (both, 1))
    pairs = (source, w), (rows, w[8:32]), (both, w.split(48)), (half, w.split(48)[1])
    for node, example in pairs:
        node.meta["example_value"] = example
    assert before_part(rows) == (source, Part(8, 0, 24, COLS))
    assert before_part(half) == (source, Part(48, 0, 48, COLS))
    rows.meta["example_value"] = w[8:32].clone()
    assert before_part(rows) is None


# -- for inference, and for who watches --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_after_masks_have_changed(mode: Callable[[], Any]) -> None:
    model = mst_compile.sparsify(Layer(gated), static(), include="w", block=8).eval()
    run, x = compiled(model), torch.randn(TOKENS, COLS)
    (weight,) = sparsifier(model).weights.values()
    for _ in range(2):
        with mode():
            assert_reordered(run(x).clone(), model(x).clone(), 4 * COLS)
        weight.set_mask(torch.rand(weight.mask.shape) < 0.4)
        with torch.no_grad():
            model.w.normal_()
            weight.zero_inactive_(model.w)
    assert statuses(model)["w"].startswith("matched (2 uses)")
    assert weight.uses.dense_now is False


def test_a_packed_decoder_computes_the_same() -> None:
    """The packed projection of its cross attention is no layer's weight and stays whole."""
    model = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    mst_compile.sparsify(model, static(), block=4)
    with pytest.warns(mst_compile.MSTWarning, match=r"multihead_attn\.in_proj_weight"):
        packed = mst_compile.export.packed(model)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    with torch.no_grad():
        for run in (packed, torch.compile(packed, backend="aot_eager")):
            assert_reordered(run(x, memory), model(x, memory), 256)


def test_parts_have_names_in_profiles() -> None:
    model = mst_compile.sparsify(Layer(FORMS["rows and columns"][0]), static(), include="w", block=8)
    compiled(model)(torch.randn(TOKENS, COLS))
    (weight,) = sparsifier(model).weights.values()
    (one,) = weight.ranges
    assert [find(one.index) for find in watching.finders] == ["w[32:96, 16:48]"]
