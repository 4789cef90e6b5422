"""The kernel for packed weights against a float64 oracle, on the instruction sets this machine runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cpu_cases import Case, cases, check_packed
from hypothesis import given, settings
from hypothesis import strategies as st
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build, table
from mst_compile.kernels.cpu.library import Library
from other_libraries import OTHERS, library

from mst_compile.blocks.packed import LARGEST_BLOCK, pack

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [dtype.torch for dtype in table.DTYPES]
BLOCKS = (*table.BLOCKS, LARGEST_BLOCK)

every_isa = pytest.mark.parametrize("isa", [*build.supported_isas(), *OTHERS])


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lib() -> Library:
    return Library()


@settings(max_examples=60, deadline=None)
@given(
    case=cases(BLOCKS),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, *DTYPES]),
    threads=st.sampled_from([1, 2]),
    isa=st.sampled_from(build.supported_isas()),
)
def test_packed_products_match_the_oracle(case, dtype, bias_dtype, threads, isa):
    torch.set_num_threads(threads)
    check_packed(library(isa), case, dtype, bias_dtype)


@settings(max_examples=60, deadline=None)
@given(
    case=cases(BLOCKS, tokens=st.integers(1, 5)),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, *DTYPES]),
    threads=st.sampled_from([1, 2]),
    isa=st.sampled_from(build.supported_isas()),
)
def test_few_tokens(case, dtype, bias_dtype, threads, isa):
    """Kernels of their own up to four; one more is the first that has others."""
    torch.set_num_threads(threads)
    check_packed(library(isa), case, dtype, bias_dtype)


@every_isa
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_and_number_of_vectors(isa: str, block: int, dtype: torch.dtype) -> None:
    """Four tokens and fewer, tiles of one vector and of each larger number, whole and partial ones."""
    for m in (1, 2, 3, 4, 5, 16, 33, 61, 96):
        check_packed(library(isa), Case(2 * block + 3, 3 * block + 2, m, block, 0.6, seed=m, pad=m % 2), dtype, F32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols", "m", "block"),
    [(300, 9001, 200, 8), (40, 9001, 600, 32), (9001, 40, 130, 32), (9001, 300, 3, 64), (700, 3001, 70, 1)],
)
def test_large_layers(lib: Library, rows: int, cols: int, m: int, block: int, dtype: torch.dtype) -> None:
    """Transposed tokens beyond a panel and beyond a slab."""
    check_packed(lib, Case(rows, cols, m, block, density=0.3, seed=1), dtype, dtype)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same_on_any_number_of_threads(lib: Library, block: int, dtype: torch.dtype) -> None:
    for m in (1, 4, 130):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(check_packed(lib, Case(333, 410, m, block, 0.3, seed=m), dtype, dtype))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("m", [4, 50])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("block", "dtype"), itertools.product([1, 2, 8, 32], DTYPES))
def test_nonfinite_activations_stay_in_their_row(lib, block, dtype, value, m):
    """And where they meet no active block, they are not met."""
    case = Case(70, 64, m, block, 1.0, seed=3)
    mask = case.mask.clone()
    mask[:, -1] = False
    values, index = pack(torch.ones(70, 64, dtype=dtype), case.grid, mask)
    x, y = torch.ones(m, 64, dtype=dtype), torch.empty(m, 70, dtype=dtype)
    x[2, 1], x[1, 63] = value, value
    lib.packed(x, values, index, None, block, y)
    assert (y[2].isnan() | y[2].isinf()).all()
    assert (torch.cat([y[:2], y[3:]]) == 64 - block).all()


def test_nonfinite_weights_reach_their_output_alone(lib: Library) -> None:
    case = Case(24, 32, 5, 8, 1.0, seed=3)
    w = torch.ones(24, 32, dtype=BF16)
    w[9, 3], w[20, 0] = float("nan"), float("inf")
    values, index = pack(w, case.grid, case.mask)
    y = torch.empty(5, 24, dtype=BF16)
    lib.packed(torch.ones(5, 32, dtype=BF16), values, index, None, 8, y)
    assert y[:, 9].isnan().all()
    assert y[:, 20].isinf().all()
    assert (y[:, [i for i in range(24) if i not in (9, 20)]] == 32).all()


def test_what_is_no_packed_weight_is_refused(lib: Library) -> None:
    case = Case(24, 32, 5, 8, 0.5, seed=3)
    values, index = pack(torch.randn(24, 32), case.grid, case.mask)
    x, y = torch.randn(5, 32), torch.full((5, 24), 7.0)
    wrong = [
        ((x.bfloat16(), values, index, None, 8, y), "do not give out"),
        ((x, values.bfloat16(), index, None, 8, y), "do not give out"),
        ((x[:4], values, index, None, 8, y), "do not give out"),
        ((x, values[:-1], index, None, 8, y), "no packed weight"),
        ((x, values, index[:-1], None, 8, y), "no packed weight"),
        ((x, values, index.long(), None, 8, y), "no packed weight"),
        ((x, values, index, None, 4, y), "no packed weight"),
        ((x, values, index, torch.ones(23), 8, y), "bias"),
        ((x.t().contiguous().t(), values, index, None, 8, y), "contiguous"),
    ]
    for given_, message in wrong:
        with pytest.raises(ValueError, match=message):
            lib.packed(*given_)
        if message == "no packed weight" and given_[2].dtype == torch.int32:
            with pytest.raises(ValueError, match=message):
                lib.packed_as_laid_out(*given_)
    for block in (0, 3, 12, 256):
        counts = torch.zeros(-(-24 // max(block, 1)) + 1, dtype=torch.int32)
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            lib.packed(x, torch.empty(0), counts, None, block, y)
    assert (y == 7).all()
