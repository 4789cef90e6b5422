"""Products with stacks of matrices in one Parameter, in every form: found, rewritten, and as right as in eager mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check_model, compiled, loss_and_grads, static, statuses
from mask_cases import element_masks
from oracles import assert_reordered
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mst_compile
from mst_compile.state import weight as weights

pytest.importorskip("transformers.integrations.moe")  # defines an operator

E, IN, OUT, ROWS = 4, 32, 48, 21
ENDS = (3, 3, 12, 20)  # a matrix without rows, and a row of none
Rule = Callable[[Tensor, Tensor], Tensor]


class Stack(nn.Module):
    """A stack ``[E, in, out]``, or ``[E, out, in]``, and what is computed with it."""

    def __init__(self, rule: Rule, rows_are_out: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, *((OUT, IN) if rows_are_out else (IN, OUT))) / 4)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.w, x)


def offsets() -> Tensor:
    return torch.tensor(ENDS, dtype=torch.int32)


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """As torchtitan does it; what stands in rows of no group, and in their gradients, is anybody's guess."""
    inside = torch.arange(len(x))[:, None] < ENDS[-1]
    y = F.grouped_mm(torch.where(inside, x, 0).bfloat16(), w.bfloat16(), offs=offsets()).type_as(x)
    return torch.where(inside, y, 0)


def by_transformers(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, w, offs=offsets())  # type: ignore[no-any-return]


CHOSEN = torch.tensor([2, 0, -1, 1, 2])  # matrices, one of them from behind


# Name -> rule, whether outputs are the stack's rows, shape of the input, how many products there are.
FORMS: dict[str, tuple[Rule, bool, tuple[int, ...], int]] = {
    "grouped_mm": (lambda w, x: grouped(x, w), False, (ROWS, IN), 1),
    "grouped_mm, transposed": (lambda w, x: grouped(x, w.transpose(-2, -1)), True, (ROWS, IN), 1),
    "grouped_mm of batches": (
        lambda w, x: torch._grouped_mm(x.bfloat16(), w.bfloat16()).type_as(x), False, (E, 5, IN), 1),
    "transformers": (lambda w, x: by_transformers(x, w), False, (ROWS, IN), 1),
    "transformers, transposed": (lambda w, x: by_transformers(x, w.mT), True, (ROWS, IN), 1),
    "bmm": (lambda w, x: torch.bmm(x, w), False, (E, 5, IN), 1),
    "bmm method, transposed": (lambda w, x: x.bmm(w.permute(0, 2, 1)), True, (E, 5, IN), 1),
    "matmul": (lambda w, x: x @ w.mT, True, (E, 5, IN), 1),
    "matmul of tokens in front": (lambda w, x: torch.matmul(x, w), False, (2, 3, E, 5, IN), 1),
    "matmul of a batch of one": (lambda w, x: x @ w, False, (1, 5, IN), 1),
    "the same tokens for all": (lambda w, x: x @ w, False, (5, IN), 1),
    "one token for all": (lambda w, x: x @ w, False, (IN,), 1),
    "from the left": (lambda w, x: w @ x, True, (E, IN, 5), 1),
    "from the left, to all": (lambda w, x: torch.matmul(w, x), True, (IN, 5), 1),
    "a vector from the left": (lambda w, x: w @ x, True, (IN,), 1),
    "baddbmm": (lambda w, x: torch.baddbmm(x.new_ones(E, 1, OUT), x, w), False, (E, 5, IN), 1),
    "einsum": (lambda w, x: torch.einsum("eti,eio->eto", x, w), False, (E, 5, IN), 1),
    "einsum, the result in another order": (lambda w, x: torch.einsum("eoi,eti->toe", w, x), True, (E, 5, IN), 1),
    "einsum of GShard": (lambda w, x: torch.einsum("becd,edh->bech", x, w), False, (2, E, 3, IN), 1),
    "einsum, viewed": (
        lambda w, x: torch.einsum("becd,edh->bech", x, w).transpose(0, 1).view(E, -1), False, (2, E, 3, IN), 1),
    "einsum to all": (lambda w, x: torch.einsum("td,edh->teh", x, w), False, (5, IN), 1),
    "cast": (lambda w, x: torch.bmm(x.bfloat16(), w.bfloat16()).float(), False, (E, 5, IN), 1),
    "chosen by number": (lambda w, x: x @ w[0] + F.linear(x, w[-1].t()) + x @ w.select(0, 1), False, (5, IN), 3),
    "chosen and cast": (lambda w, x: (x.bfloat16() @ w.bfloat16()[2]).float(), False, (5, IN), 1),
    "chosen of transposes": (lambda w, x: F.linear(x, w.mT[1]), False, (5, IN), 1),
    "one after the other": (lambda w, x: sum(x @ one for one in w), False, (5, IN), E),  # type: ignore[arg-type, return-value]
    "unbound": (lambda w, x: torch.cat([F.linear(x, one) for one in w.unbind()]), True, (5, IN), E),
    "chosen for every token": (lambda w, x: torch.bmm(x[:, None], w[CHOSEN]).squeeze(1), False, (5, IN), 1),
    "chosen for every token, from the left": (
        lambda w, x: torch.bmm(w[CHOSEN], x[..., None]).squeeze(-1), True, (5, IN), 1),
    "chosen for every token, einsum": (
        lambda w, x: torch.einsum("bi,bio->bo", x, w.index_select(0, CHOSEN % E)), False, (5, IN), 1),
    "chosen for some tokens each": (lambda w, x: torch.einsum("tbi,boi->tob", x, w[CHOSEN]), True, (3, 5, IN), 1),
    "chosen for all tokens": (lambda w, x: (x @ w[torch.tensor([2])]).squeeze(0), False, (5, IN), 1),
    "chosen twice, cast": (
        lambda w, x: (x[:, None].bfloat16() @ w.mT[CHOSEN].bfloat16()).type_as(x) @ w.mT[CHOSEN].mT, True, (5, IN), 2),
    "of two kinds": (lambda w, x: torch.bmm(x, w).sum(0) + x[0] @ w[3], False, (E, 5, IN), 2),
    "checkpointed": (
        lambda w, x: checkpoint(lambda y: torch.bmm(y, w) + y[0] @ w[1], x, use_reentrant=False),
        False, (E, 5, IN), 2),
}  # fmt: skip


def precision_of(form: str) -> torch.dtype:
    return torch.bfloat16 if "cast" in form or form.startswith("grouped_mm") else torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_sparse(form: str) -> None:
    rule, rows_are_out, shape, uses = FORMS[form]
    model = check_model(
        lambda: Stack(rule, rows_are_out), torch.randn(shape), precision=precision_of(form), include="w", block=8
    )
    assert statuses(model)["w"].startswith(f"matched ({uses} use")
    assert "dense" not in statuses(model)["w"]


@pytest.mark.parametrize(
    "form",
    ["transformers", "grouped_mm, transposed", "einsum, viewed", "one after the other", "chosen for every token"],
)
def test_a_form_under_inductor(form: str) -> None:
    rule, rows_are_out, shape, _ = FORMS[form]
    model = check_model(
        lambda: Stack(rule, rows_are_out),
        torch.randn(shape),
        inner="inductor",
        precision=precision_of(form),
        include="w",
        block=8,
    )
    assert statuses(model)["w"].startswith("matched")


@pytest.mark.parametrize("form", ["bmm", "matmul of tokens in front", "einsum of GShard", "from the left"])
def test_under_autocast(form: str) -> None:
    rule, rows_are_out, shape, _ = FORMS[form]
    model = check_model(
        lambda: Stack(rule, rows_are_out),
        torch.randn(shape),
        precision=torch.bfloat16,
        context=lambda: torch.autocast("cpu", torch.bfloat16),
        include="w",
        block=8,
    )
    assert statuses(model)["w"].startswith("matched (1 use")


# What stays dense -> part of the reason.
DENSE: dict[str, tuple[Rule, tuple[int, ...], str]] = {
    "chosen by a table": (
        lambda w, x: torch.einsum("bi,bcio->bo", x, w[CHOSEN[:, None]]), (5, IN), "copies matrices of a stack"),
    "summed over the stack": (lambda w, x: torch.einsum("etk,ekn->tn", x, w), (E, 5, IN), "used by einsum"),
    "in two dimensions": (lambda w, x: x @ w.view(E * IN, OUT), (5, E * IN), "used by view"),
    "one feature": (lambda w, x: torch.einsum("etk,ekn->etn", x, w), (E, 5, 1), "broadcast"),
    "of another dtype on the way": (
        lambda w, x: torch.bmm(x, w.bfloat16().to(x.dtype)), (E, 5, IN), "rounded by bfloat16"),
    "changed before": (
        lambda w, x: torch.bmm(x, torch.mul(w, 2)) + torch.bmm(x, w * 1), (E, 5, IN), "used by mul"),
    "a copy without gradients": (
        lambda w, x: torch.bmm(x, w.detach().clone()) + w.sum(), (E, 5, IN), "used by detach"),
}  # fmt: skip


@pytest.mark.parametrize("form", DENSE)
def test_what_stays_dense_says_why(form: str) -> None:
    rule, shape, why = DENSE[form]
    model = check_model(
        lambda: Stack(rule), torch.randn(shape), precision=torch.bfloat16 if "dtype" in form else torch.float32,
        include="w", block=8,
    )  # fmt: skip
    assert why in statuses(model)["w"]
    assert "block-sparse" not in statuses(model)["w"]


def test_a_weight_that_is_written_in_the_graph_stays_dense_from_there_on() -> None:
    def rule(w: Tensor, x: Tensor) -> Tensor:
        before = torch.bmm(x, w)
        with torch.no_grad():
            w[1].mul_(1.0)
        return before + torch.bmm(x, w) + x[0] @ w[2]

    model = mst_compile.sparsify(Stack(rule), static(), include="w", block=8)
    x = torch.randn(E, 5, IN)
    with torch.no_grad():
        assert_reordered(compiled(model)(x), model(x), 3 * IN)
    assert "matched (1 use" in statuses(model)["w"]
    assert "its values are changed before by mul_" in statuses(model)["w"]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_offsets_and_masks_change_without_a_new_graph(inner: str) -> None:
    torch._dynamo.utils.counters.clear()

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(E, OUT, IN) / 4)

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, self.w.mT, ends)  # type: ignore[no-any-return]

    model = mst_compile.sparsify(Routed(), static(), include="w", block=8)
    (weight,) = mst_compile.sparsifier(model).weights.values()
    run, x = compiled(model, inner), torch.randn(ROWS, IN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        ends = torch.randint(0, ROWS + 1, (E,)).sort().values.int()
        want, got = (loss_and_grads(model, functools.partial(function, ends=ends), (x,)) for function in (model, run))
        mask = element_masks(model)["w"]
        want["grad w"] *= mask
        for name in want:
            assert_reordered(got[name], want[name], 2 * (IN + ROWS))
        run(x.clone().requires_grad_(), ends).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            other = torch.rand(weight.mask.shape, generator=torch.Generator().manual_seed(step)) < 0.4
            weight.set_mask(other)
            with torch.no_grad():
                weight.zero_inactive_(model.w)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert weight.uses.dense_now is False


@pytest.mark.parametrize("dynamic", [True, None])
def test_batches_of_several_lengths_share_a_graph(dynamic: bool | None) -> None:
    """Every matrix has as many rows as there are tokens, which is a symbol then."""
    torch._dynamo.utils.counters.clear()
    rule: Rule = lambda w, x: torch.einsum("becd,edh->bech", x, w).square() + (x @ w)  # noqa: E731
    model = mst_compile.sparsify(Stack(rule), static(), include="w", block=8)
    run = compiled(model, dynamic=dynamic)
    for batch, tokens in ((2, 3), (3, 5), (4, 2), (5, 7)):
        x = torch.randn(batch, E, tokens, IN)
        want, got = (loss_and_grads(model, function, (x,)) for function in (model, run))
        for name in want:
            assert_reordered(got[name], want[name], 4 * IN * batch * tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if dynamic else 2)
    assert "matched (2 uses" in statuses(model)["w"]


def test_nothing_is_written_to_gradients_that_products_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a stack is multiplied as a whole nor one by one; but where it is used otherwise too."""
    count: list[int] = []
    original = weights.zero_all_inactive_
    monkeypatch.setattr(weights, "zero_all_inactive_", lambda whole: (count.append(len(whole)), original(whole)))
    for more, written in ((0.0, 0), (1.0, 1)):
        torch._dynamo.reset()  # PyTorch 2.11 guards no defaults of functions

        def rule(w: Tensor, x: Tensor, more: float = more) -> Tensor:
            y = torch.bmm(x, w).sum(0) + sum(x[e] @ w[e] for e in range(E)) + x[0] @ w.unbind()[1]
            return y + w.sum() if more else y

        model = mst_compile.sparsify(Stack(rule), static(), include="w", block=8)
        run = compiled(model)
        run(torch.randn(E, 5, IN)).square().sum().backward()
        count.clear()
        model.zero_grad()
        run(torch.randn(E, 5, IN)).square().sum().backward()
        assert sum(count) == written
        mask = element_masks(model)["w"].view(model.w.shape)
        assert model.w.grad is not None
        assert not model.w.grad[~mask].any()


def test_a_form_of_grouped_products_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    from mst_compile.graph import grouped as passes
    from mst_compile.graph.fx import calls

    def match(node: Any) -> passes.Match | None:
        if not calls(node, {library_experts}):
            return None
        weight, x = node.args
        return passes.Match(x, weight, False, None, "tek", "ten")

    def build() -> nn.Module:
        return Stack(lambda w, x: library_experts(w, x))

    model = check_model(build, torch.randn(5, E, IN), include="w", block=8)
    assert statuses(model)["w"].startswith("not matched: used by library_experts")
    monkeypatch.setattr(passes, "FORMS", [*passes.FORMS, match])
    torch._dynamo.reset()
    model = check_model(build, torch.randn(5, E, IN), include="w", block=8)
    assert statuses(model)["w"].startswith("matched (1 use")


@torch.compiler.allow_in_graph
def library_experts(weight: Tensor, x: Tensor) -> Tensor:
    """Experts of somebody's library, which is one opaque node for Dynamo."""
    return torch.einsum("tek,ekn->ten", x, weight)
