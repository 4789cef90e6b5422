"""CPU kernels of ``mst::attention`` and its gradient against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from attention_parts import COMBINATIONS, combine
from hypothesis import given, settings
from hypothesis import strategies as st
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build, table
from oracles import assert_within, of_rounding, of_sum
from other_libraries import OTHERS, library
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mst_compile.ops import attention as attention_op
from mst_compile.rules.patterns import Parts, allowed

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ISAS = [isa for isa in build.supported_isas() if isa != "baseline"] or ["baseline"]
LAYOUTS = ["heads first", "tokens first", "part of a wider row", "every other"]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    key_mask: Tensor | None
    parts: list[int]
    scale: float

    @property
    def settings(self) -> tuple[Any, ...]:
        return self[4:]


def laid_out(t: Tensor, how: str) -> Tensor:
    """The same values, NaN all around them."""
    if how == "tokens first":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "part of a wider row":
        wide = torch.full((*t.shape[:3], t.shape[3] + 5), torch.nan, dtype=t.dtype).transpose(1, 2).contiguous()
        wide = wide.transpose(1, 2)[..., 3:-2]
        return wide.copy_(t)
    if how == "every other":
        return torch.full((*t.shape[:3], 2 * t.shape[3]), torch.nan, dtype=t.dtype)[..., ::2].copy_(t)
    return t


@st.composite
def cases(draw: st.DrawFn, layouts: tuple[str, ...] = tuple(LAYOUTS), dtypes: tuple[torch.dtype, ...] = (F32, BF16)):
    combination = draw(st.sampled_from(COMBINATIONS))
    batch = draw(st.integers(1, 3))
    heads, key_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (6, 2), (9, 9)]))
    length = draw(st.one_of(st.sampled_from([1, 2, 31, 32, 33, 64, 128, 129, 160]), st.integers(1, 200)))
    sizes = st.one_of(st.sampled_from([16, 64, 64, 128, 192, 256]), st.integers(1, 70), st.integers(1, 512))
    size = draw(sizes)
    value_size = draw(st.one_of(st.just(size), sizes))
    some = st.one_of(st.sampled_from([1, 2, 16, 32, 64, 100]), st.integers(1, length + 3), st.just(2**40))
    parts = combine(combination, draw(some), draw(some), draw(st.integers(0, 40)), draw(st.integers(1, 3)))
    dtype = draw(st.sampled_from(dtypes))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([1.0, 1.0, 4.0]))  # wider scores move the maximum about

    def normal(heads: int, size: int, factor: float = 1.0) -> Tensor:
        values = torch.randn(batch, heads, length, size, generator=gen) * factor
        return laid_out(values.to(dtype), draw(st.sampled_from(layouts)))

    def some_true(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))

    q, k = normal(heads, size, spread), normal(key_heads, size)
    v, grad = normal(key_heads, value_size), normal(heads, value_size)
    if "every other" in layouts and draw(st.integers(0, 5)) == 0:
        grad = grad[:, :, :1, :1].expand(grad.shape)  # what sum().backward() sends
    return Case(
        q, k, v, grad,
        some_true(batch, length) if draw(st.booleans()) else None,
        parts.numbers, draw(st.sampled_from([size**-0.5, 0.3, -0.1, 0.0])),
    )  # fmt: skip


def dense_mask(case: Case) -> Tensor:
    mask = allowed(Parts(*case.parts), case.q.shape[2])
    return mask if case.key_mask is None else mask & case.key_mask[:, None, None, :]


class Exact(NamedTuple):
    """float64 results, each with the error that float32 arithmetic and the rounding to the dtype allow."""

    out: tuple[Tensor, Tensor]
    lse: tuple[Tensor, Tensor]
    dq: tuple[Tensor, Tensor]
    dk: tuple[Tensor, Tensor]
    dv: tuple[Tensor, Tensor]


def narrows(case: Case, isa: str | None = None) -> bool:
    """Whether a library (the usual one if not named) rounds probabilities and slopes to the operands' dtype."""
    name = (isa or build.choose_isa()).split()[-1]
    pairs = name in {i.name for i in table.ISAS if "MST_BF16_PAIRS" in i.macros}
    return pairs and case.q.dtype == BF16


def exact(case: Case, narrow: bool = False) -> Exact:
    """By the formulas, first-order errors beside them.

    A probability errs, relatively, by what its score and its row's log-sum err by, and by a few roundings in the
    exponential and in its argument.

    Args:
        narrow: see :func:`narrows`.
    """
    _, heads, length, size = case.q.shape
    value_size = case.v.shape[-1]
    group = heads // case.k.shape[1]
    q, g = case.q.double(), case.grad.double()
    k, v = (t.double().repeat_interleave(group, 1) for t in (case.k, case.v))
    rounding, once = of_rounding(case.q.dtype), of_rounding(F32)
    packed = rounding if narrow else 0.0
    mask = dense_mask(case)

    scores = (q @ k.mT * case.scale).masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    of_score = (of_sum(size, beside=4) * abs(case.scale) * (q.abs() @ k.abs().mT)).masked_fill(~mask, 0)
    largest = scores.masked_fill(~mask, 0).abs().amax(-1)
    of_lse = (
        of_score.amax(-1)
        + of_sum(length, beside=8)
        + once * (4 * largest + 2 * lse.masked_fill(lse == -torch.inf, 0).abs())
    )
    of_p = (of_score.amax(-1) + of_lse + (8 + 8 * largest) * once)[..., None]  # relative
    out = p @ v
    of_out = (of_p + packed + of_sum(length, beside=4)) * (p @ v.abs()) + rounding * out.abs()

    dp, magnitude_dp = g @ v.mT, g.abs() @ v.abs().mT
    delta, magnitude_delta = (g * out).sum(-1, keepdim=True), (g * out).abs().sum(-1, keepdim=True)
    ds = p * (dp - delta)
    of_ds = of_p * (dp.abs() + delta.abs()) + of_sum(value_size, beside=4) * (magnitude_dp + magnitude_delta)
    of_ds = p * (of_ds + (g.abs() * of_out).sum(-1, keepdim=True)) + packed * ds.abs()

    def product(a: Tensor, of_a: Tensor, b: Tensor, factor: float, to_keys: bool) -> tuple[Tensor, Tensor]:
        exact, magnitude = a @ b * factor, (of_a + of_sum(length * group, beside=4) * a.abs()) @ b.abs() * abs(factor)
        if to_keys:
            exact, magnitude = (t.unflatten(1, (-1, group)).sum(2) for t in (exact, magnitude))
        return exact, magnitude + rounding * exact.abs()

    return Exact(
        (out, of_out),
        (lse, of_lse),
        product(ds, of_ds, k, case.scale, False),
        product(ds.mT, of_ds.mT, q, case.scale, True),
        product(p.mT, ((of_p + packed) * p).mT, g, 1.0, True),
    )


def assert_exact(case: Case, results: dict[str, Tensor], isa: str | None = None) -> None:
    for name, want in exact(case, narrows(case, isa))._asdict().items():
        assert results[name].dtype == (F32 if name == "lse" else case.q.dtype)
        assert_within(results[name], *want, name)


def canvas(like: Tensor, how: str) -> Tensor:
    """Where a kernel writes: the middle of sentinels."""
    return laid_out(torch.full(like.shape, 7.0, dtype=like.dtype), how)


def run_kernels(case: Case, isa: str | None = None, outputs: str = "tokens first") -> dict[str, Tensor]:
    """All results, straight from one library."""
    lib = None if isa is None else library(isa)
    q, k, v, grad = (t if t.stride(-1) == 1 else t.contiguous() for t in case[:4])
    out, lse = canvas(grad, outputs), torch.full(q.shape[:3], 7.0)
    cpu.attention(q, k, v, *case.settings, out=out, lse=lse, library=lib)
    dq, dk, dv = canvas(q, outputs), canvas(k, outputs), canvas(v, outputs)
    cpu.attention_backward(grad, q, k, v, out, lse, *case.settings, dq=dq, dk=dk, dv=dv, library=lib)
    if outputs == "part of a wider row":
        for t in (out, dq, dk, dv):
            whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
            assert whole.isnan().sum() == whole.numel() - t.numel(), "written beside a row"
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def run_operator(case: Case) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in case[:3]]
    out, lse = torch.ops.mst.attention(*leaves, *case.settings)
    dq, dk, dv = torch.autograd.grad(out, leaves, case.grad)
    return {"out": out.detach(), "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@settings(max_examples=120)
@given(cases(), st.sampled_from(ISAS), st.sampled_from(LAYOUTS[:3]), st.sampled_from([1, 2]))
def test_kernels(case: Case, isa: str, outputs: str, threads: int) -> None:
    torch.set_num_threads(threads)
    assert_exact(case, run_kernels(case, isa, outputs), isa)


@settings(max_examples=40)
@given(cases())
def test_operator(case: Case) -> None:
    assert_exact(case, run_operator(case))


def make(what: str, length: int = 100, size: int = 64, window: int = 20, stride: int = 24, **kwargs: Any) -> Case:
    batch, heads, key_heads, dtype = (kwargs.get(n, d) for n, d in zip(_NAMES, (2, 4, 2, F32), strict=True))
    value_size = kwargs.get("value_size", size)
    q, k = (torch.randn(batch, h, length, size, dtype=dtype) for h in (heads, key_heads))
    v, grad = (torch.randn(batch, h, length, value_size, dtype=dtype) for h in (key_heads, heads))
    parts = combine(what, window, stride, gap=3, times=2)
    return Case(q, k, v, grad, kwargs.get("key_mask"), parts.numbers, size**-0.5)


_NAMES = ("batch", "heads", "key_heads", "dtype")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("what", COMBINATIONS)
def test_several_steps_and_residues(what: str, isa: str) -> None:
    """More keys than a step holds, tiles taken out of order, several shares of one head, window off the tiles."""
    for case in (
        make(what, 700, 32, 130, 64, batch=1, heads=1, key_heads=1),
        make(what, 430, 40, 45, 2, batch=1, heads=2, key_heads=1),
        make(what, 430, 72, 130, 64, batch=1, heads=2, key_heads=1, dtype=BF16),
        make(what, 430, 192, 130, 64, batch=1, heads=1, key_heads=1, dtype=BF16, value_size=128),
        make(what, 430, 24, 130, 64, batch=1, heads=1, key_heads=1, value_size=49),
    ):
        assert_exact(case, run_kernels(case, isa), isa)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (2, 5), (17, 1), (512, 511), (1, 512), (512, 1)])
def test_smallest_and_largest_heads(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows are packed in whole vectors: what stands beside one is neither read nor written."""
    for what in COMBINATIONS:
        size, value_size = sizes
        case = make(what, 70, size, 20, 8, batch=1, heads=2, key_heads=1, dtype=dtype, value_size=value_size)
        case = case._replace(**{name: laid_out(getattr(case, name), LAYOUTS[2]) for name in ("q", "k", "v", "grad")})
        assert_exact(case, run_kernels(case, outputs=LAYOUTS[2]))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("what", COMBINATIONS)
def test_by_other_compilers(what: str, name: str) -> None:
    for dtype, size, value_size in ((F32, 40, 40), (BF16, 64, 64), (BF16, 21, 34)):
        case = make(what, 170, size, 45, 32, batch=1, heads=2, key_heads=1, dtype=dtype, value_size=value_size)
        case = case._replace(key_mask=torch.rand(1, 170) < 0.8)
        assert_exact(case, run_kernels(case, name, "part of a wider row"), name)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("what", COMBINATIONS)
def test_as_accurate_as_the_reference(what: str, dtype: torch.dtype) -> None:
    """Worst-case bounds leave room for small mistakes; the errors of the reference's products and libm's do not."""
    case = make(what, 200, dtype=dtype)
    ours, bounds = run_operator(case), exact(case)
    out, lse = attention_op.attention_reference(*case[:3], *case.settings)
    theirs = attention_op.attention_backward_reference(case.grad, *case[:3], out, lse, *case.settings)
    for name, reference in zip(Exact._fields, (out, lse, *theirs), strict=True):
        want = getattr(bounds, name)[0]
        known = want.isfinite()
        error, usual = ((t.double() - want)[known].square().mean().sqrt() for t in (ours[name], reference))
        assert error <= 3 * usual, f"{name}: {error:.2e}, the reference's {usual:.2e}"


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("what", COMBINATIONS)
def test_as_pytorch_does_with_the_dense_mask(what: str, dtype: torch.dtype) -> None:
    case = make(what, dtype=dtype, key_heads=4)
    blind = ~dense_mask(case).any(-1)
    case.grad[:, :, blind] = 0  # PyTorch averages where a query sees no key
    results = run_operator(case)
    leaves = [t.detach().requires_grad_() for t in case[:3]]
    out = scaled_dot_product_attention(*leaves, attn_mask=dense_mask(case), scale=case.scale)
    gradients = torch.autograd.grad(out, leaves, case.grad)
    out = out.detach().masked_fill(blind[:, None], 0)
    bounds = exact(case)
    for name, theirs in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        error = (results[name].double() - theirs.double()).abs()
        limit = getattr(bounds, name)[1]
        if dtype == BF16:  # PyTorch also rounds probabilities and slopes to bf16
            limit = limit + of_rounding(BF16, times=8) * theirs.abs().max()
        assert (error <= 2 * limit).all(), name


@pytest.mark.parametrize("what", COMBINATIONS)
def test_a_query_without_keys_gives_zero(what: str) -> None:
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[0] = False
    mask[1, :7] = False
    case = make(what, key_mask=mask)
    results = run_operator(case)
    assert not results["out"][0].any()
    assert (results["lse"][0] == -torch.inf).all()
    assert (results["lse"][1, :, :7] == -torch.inf).all()
    for name in ("dq", "dk", "dv"):
        assert not results[name][0].any()
    assert not results["dk"][1, :, :7].any()
    assert_exact(case, results)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (9, 9)])
@pytest.mark.parametrize("what", COMBINATIONS)
def test_same_bits_whatever_the_threads(what: str, heads: tuple[int, int]) -> None:
    case = make(what, 333, batch=1, heads=heads[0], key_heads=heads[1])
    runs = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        runs.append(run_kernels(case))
    for run in runs[1:]:
        for name, value in run.items():
            assert torch.equal(value, runs[0][name]), name


@pytest.mark.parametrize("what", COMBINATIONS)
def test_nothing_looks_ahead(what: str) -> None:
    """Bits of the first half do not change with the keys of the second."""
    case = make(what)
    other = case._replace(k=case.k.clone(), v=case.v.clone())
    other.k[:, :, 50:], other.v[:, :, 50:] = 99, -99
    assert torch.equal(run_kernels(case)["out"][:, :, :50], run_kernels(other)["out"][:, :, :50])


def test_large_scores_do_not_overflow() -> None:
    case = make("window and distances")
    case = case._replace(q=case.q * 300, k=case.k * 300)
    results = run_operator(case)
    assert all(t.isfinite().all() for t in results.values())
    assert_exact(case, results)


def test_nan_is_not_hidden() -> None:
    case = make("everything")
    case.k[0, 0, 3] = torch.nan
    out = run_operator(case)["out"]
    assert out[0, 0, 3:].isnan().all()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layout_of_the_results(dtype: torch.dtype) -> None:
    case = make("window and distances", dtype=dtype)
    results = run_operator(case)
    for name in ("out", "dq", "dk", "dv"):
        assert results[name].transpose(1, 2).is_contiguous()


def reference_calls(monkeypatch: pytest.MonkeyPatch, case: Case) -> bool:
    """Whether the operator runs the reference: it alone calls ``allowed``."""
    calls = []
    monkeypatch.setattr(attention_op, "allowed", lambda *args: calls.append(args) or allowed(*args))
    torch.ops.mst.attention(*case[:3], *case.settings)
    return bool(calls)


@pytest.mark.parametrize("what", COMBINATIONS)
def test_which_operands_have_a_kernel(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reference_calls(monkeypatch, make(what))
    assert not reference_calls(monkeypatch, make(what, dtype=BF16))
    assert reference_calls(monkeypatch, make(what, dtype=F64))
    assert not reference_calls(monkeypatch, make(what, size=36, value_size=7))
    assert not reference_calls(monkeypatch, make(what, size=512, value_size=512))
    assert reference_calls(monkeypatch, make(what, size=513))
    assert reference_calls(monkeypatch, make(what, value_size=513))
    assert reference_calls(monkeypatch, make(what, dtype=torch.float16))


@pytest.mark.parametrize("what", COMBINATIONS)
def test_opcheck(what: str) -> None:
    case = make(what, 40, 32, 5, 6, batch=1, heads=2, key_heads=1, value_size=20)
    leaves = [t.requires_grad_() for t in case[:3]]
    torch.library.opcheck(torch.ops.mst.attention.default, (*leaves, *case.settings))
    out, lse = torch.ops.mst.attention(*case[:3], *case.settings)
    args = (case.grad, *(t.detach() for t in case[:3]), out.detach(), lse, *case.settings)
    torch.library.opcheck(torch.ops.mst.attention_backward.default, args)


@pytest.mark.parametrize("what", COMBINATIONS)
def test_gradcheck(what: str) -> None:
    """In float64, which is to say the reference."""
    case = make(what, 9, 4, 3, 4, batch=1, heads=2, key_heads=1, dtype=F64, value_size=3)
    leaves = [t.requires_grad_() for t in case[:3]]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.mst.attention(*t, *case.settings)[0], leaves)
    assert torch.autograd.gradgradcheck(lambda *t: torch.ops.mst.attention(*t, *case.settings)[0], leaves)


BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "float64": lambda a: a | {n: a[n].double() for n in ("q", "k", "v", "out")},
    "mixed dtypes": lambda a: a | {"k": a["k"].bfloat16()},
    "size of a key": lambda a: a | {"k": a["k"][..., :36]},
    "size of a value": lambda a: a | {"v": a["v"][..., :36]},
    "large heads": lambda a: a | {n: a[n].repeat(1, 1, 1, 9) for n in ("q", "k")},
    "large values": lambda a: a | {n: a[n].repeat(1, 1, 1, 9) for n in ("v", "out")},
    "empty heads": lambda a: a | {n: a[n][..., :0] for n in ("q", "k")},
    "key heads": lambda a: a | {n: a[n][:, :1].repeat(1, 3, 1, 1) for n in ("k", "v")},
    "key length": lambda a: a | {n: a[n][:, :, :50] for n in ("k", "v")},
    "value length": lambda a: a | {"v": a["v"][:, :, :50]},
    "three dimensions": lambda a: a | {"q": a["q"][0]},
    "unit stride": lambda a: a | {"q": laid_out(a["q"], "every other")},
    "shape of out": lambda a: a | {"out": a["out"][:, :1]},
    "dtype of out": lambda a: a | {"out": a["out"].bfloat16()},
    "shape of lse": lambda a: a | {"lse": a["lse"][:1]},
    "dtype of lse": lambda a: a | {"lse": a["lse"].double()},
    "no parts": lambda a: a | {"parts": [0, 0, 0, 0, 0]},
    "a negative number": lambda a: a | {"parts": [20, 0, 0, -1, 0]},
    "overlapping parts": lambda a: a | {"parts": [20, 0, 19, 5, 0]},
    "key mask's dtype": lambda a: a | {"key_mask": torch.ones(2, 100)},
    "key mask's shape": lambda a: a | {"key_mask": torch.ones(100, 2, dtype=torch.bool)},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_inputs_raise(what: str) -> None:
    case = make("window and distances")
    good = case._asdict() | {"out": torch.empty_like(case.q), "lse": torch.empty(case.q.shape[:3])}
    grad = good.pop("grad")
    cpu.attention(**good)
    bad = BAD[what](good)
    with pytest.raises(ValueError, match="attention"):
        cpu.attention(**bad)
    with pytest.raises(ValueError, match="attention"):
        cpu.attention_backward(grad, **bad, **{d: torch.empty_like(good[d[1]]) for d in ("dq", "dk", "dv")})


@pytest.mark.parametrize("name", ["grad", "dq", "dk", "dv"])
def test_bad_gradients_raise(name: str) -> None:
    case = make("window and distances")
    args = case._asdict() | {"out": torch.empty_like(case.q), "lse": torch.zeros(case.q.shape[:3])}
    args |= {d: torch.empty_like(args[d[1]]) for d in ("dq", "dk", "dv")}
    cpu.attention_backward(**args)
    with pytest.raises(ValueError, match=name):
        cpu.attention_backward(**args | {name: args[name][:, :, 1:]})
