"""Every entry of the CPU kernels' table has a kernel that is right, and what is no entry is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from cpu_cases import Case, assert_summed, check_grad_weight, check_spmm
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build, processor, table
from mst_compile.kernels.cpu.library import loaded
from oracles import Exact, assert_as_good_as
from other_libraries import OTHERS, library
from torch.nn.functional import scaled_dot_product_attention

from mst_compile.rules.patterns import FULL

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")

F32 = torch.float32
DTYPES = [dtype.torch for dtype in table.DTYPES]
PAIRS = list(itertools.product(DTYPES, DTYPES))

every_isa = pytest.mark.parametrize("isa", [*build.supported_isas(), *OTHERS])
every_block = pytest.mark.parametrize("block", table.BLOCKS)


def case(block: int, m: int = 61) -> Case:
    """Ragged blocks, several tiles of tokens."""
    return Case(2 * block + 3, 3 * block + 2, m, block, 0.6, seed=block)


@every_isa
@every_block
@pytest.mark.parametrize("dtypes", table.PRODUCTS)
def test_products(isa: str, block: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    assert cpu.supports(block, *dtypes)
    assert dtypes in table.GRADIENTS  # or such a weight could not be trained
    for by_rows, bias_dtype in itertools.product((True, False), (None, *DTYPES)):
        check_spmm(library(isa), case(block), dtypes, by_rows, bias_dtype)


@every_isa
@every_block
@pytest.mark.parametrize("dtypes", table.PRODUCTS)
def test_products_of_few_tokens(isa: str, block: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Groups of tokens of every size, whole blocks and such as reach beyond the weight."""
    for by_rows, m in itertools.product((True, False), (1, 2, 7)):
        check_spmm(library(isa), case(block, m), dtypes, by_rows, F32)
        check_spmm(library(isa), Case(2 * block, 3 * block, m, block, 0.6, seed=m, pad=1), dtypes, by_rows, None)


@every_isa
@every_block
@pytest.mark.parametrize("dtypes", table.GRADIENTS)
def test_gradients(isa: str, block: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for colsum_of in ("", "a", "b"):
        check_grad_weight(library(isa), case(block), *dtypes, colsum_of)


@every_isa
@every_block
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes(isa: str, block: int, dtype: torch.dtype) -> None:
    this = case(block)
    w = this.randn(this.rows, this.cols, dtype)
    want = (w.double() * this.elements).square().sum()
    library(isa).zero_inactive_(w, this.index, block)
    assert (w[~this.elements] == 0).all()
    assert_summed(library(isa).block_sumsq(w, block).sum(), Exact(want, want), w.numel(), F32)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(isa: str, dtype: torch.dtype) -> None:
    assert cpu.supports_head(dtype, 32, 32)
    q, k, v = (torch.randn(1, 2, 50, 32).to(dtype) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(1, 2, 50)
    cpu.attention(q, k, v, None, FULL.numbers, 0.2, out=out, lse=lse, library=library(isa))
    want = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=0.2)
    usual = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    assert_as_good_as(out, usual, want, dtype)
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    cpu.attention_backward(out, q, k, v, out, lse, None, FULL.numbers, 0.2, dq=dq, dk=dk, dv=dv, library=library(isa))
    assert all(t.isfinite().all() and t.any() for t in (dq, dk, dv))


@pytest.mark.parametrize("dtypes", [pair for pair in PAIRS if pair not in table.PRODUCTS])
def test_products_that_are_no_entry(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    assert not cpu.supports(table.BLOCKS[0], *dtypes)
    with pytest.raises(RuntimeError, match="dtypes"):
        check_spmm(loaded(), case(8), dtypes, True, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_dtypes_that_are_no_entry(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"take {table.dtype_names()}, not {dtype}"):
        loaded().block_sumsq(torch.ones(8, 8, dtype=dtype), 8)


def test_blocks_that_are_no_entry() -> None:
    this = Case(24, 24, 5, 12, 0.5, seed=0)
    assert not cpu.supports(12, F32, F32)
    with pytest.raises(RuntimeError, match="block size"):
        check_spmm(loaded(), this, (F32, F32), True, None)
    with pytest.raises(RuntimeError, match="block size"):
        check_grad_weight(loaded(), this, F32, F32, "")


# ---- instruction sets ------------------------------------------------------------------------------------------------


def supported(monkeypatch: pytest.MonkeyPatch, features: str) -> tuple[str, ...]:
    monkeypatch.setattr(processor, "features", lambda: frozenset(features.replace("_", "").split()))
    build.supported_isas.cache_clear()
    try:
        return build.supported_isas()
    finally:
        build.supported_isas.cache_clear()


def test_the_best_that_the_cpu_has_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(isa.name for isa in table.ISAS)
    for i, isa in enumerate(table.ISAS):
        assert supported(monkeypatch, isa.needs) == names[i:]
    assert supported(monkeypatch, "avx2 fma") == ("baseline",)
    assert supported(monkeypatch, "sse2 avx avx2 fma bmi1 bmi2 f16c avx512f avx512vl") == ("avx2", "baseline")


def test_a_new_instruction_set_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = table.Isa("toy", "toy_1", "-mtoy", 32, "MST_TOY MST_AVX512")
    monkeypatch.setattr(table, "ISAS", (toy, *table.ISAS))
    assert supported(monkeypatch, "toy_1") == ("toy", "baseline")
    header = table.header(table.isa_named("toy")).splitlines()
    assert {"#define MST_LANES 32", "#define MST_TOY 1", "#define MST_AVX512 1"} <= set(header)
