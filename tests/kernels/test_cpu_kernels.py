"""CPU kernels against a float64 oracle, on the instruction sets this machine runs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch
from cpu_cases import F32, Case, assert_summed, cases, check_grad_weight, check_spmm
from hypothesis import given, settings
from hypothesis import strategies as st
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build, table
from mst_compile.kernels.cpu.library import Library
from oracles import Exact, assert_as_good_as, assert_within, block_sums, of_sum, product, total
from torch import Tensor

from mst_compile.blocks.index import write_index

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")

BF16 = torch.bfloat16


# All code paths: bf16 dot products, AVX-512 without them, and vector extensions at the width of AVX2.
ISAS = [isa for isa in build.supported_isas() if isa != "baseline"] or ["baseline"]


@pytest.fixture(scope="module", params=ISAS)
def lib(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    dtypes=st.sampled_from(table.PRODUCTS),
    by_rows=st.booleans(),
    bias_dtype=st.sampled_from([None, F32, BF16]),
    threads=st.sampled_from([1, 2]),
)
def test_spmm_matches_oracle(lib, case, dtypes, by_rows, bias_dtype, threads):
    torch.set_num_threads(threads)
    check_spmm(lib, case, dtypes, by_rows, bias_dtype)


@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    in_dtype=st.sampled_from([F32, BF16]),
    out_dtype=st.sampled_from([F32, BF16]),
    colsum_of=st.sampled_from(["", "a", "b"]),
    threads=st.sampled_from([1, 2]),
)
def test_grad_weight_matches_oracle(lib, case, in_dtype, out_dtype, colsum_of, threads):
    torch.set_num_threads(threads)
    check_grad_weight(lib, case, in_dtype, out_dtype, colsum_of)


@pytest.mark.parametrize(("rows", "cols", "m"), [(90, 130, 70), (30, 200, 5), (200, 30, 96), (8, 8, 1)])
def test_more_threads_than_cores(lib, rows, cols, m):
    """Six threads split a weight by rows and columns, and the outputs of few tokens."""
    torch.set_num_threads(6)
    for density, colsum_of in [(0.3, "a"), (0.3, "b"), (0.0, "a"), (0.0, "b")]:
        case = Case(rows, cols, m, 8, density, seed=6)
        check_spmm(lib, case, (F32, F32), True, F32)
        check_grad_weight(lib, case, F32, F32, colsum_of)


# Sizes beyond the kernels' bounds: a reduction cut into chunks, packed weights and sums cut into pieces.
@pytest.mark.parametrize(
    ("rows", "cols", "m", "block"),
    [
        (40, 9001, 70, 4),
        (9001, 40, 130, 32),
        (2100, 1900, 20, 64),
        (40, 9001, 70, 1),
        (5000, 900, 40, 1),
        (900, 3001, 70, 2),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_layers(lib, rows, cols, m, block, dtype):
    case = Case(rows, cols, m, block, density=0.9, seed=1)
    for by_rows in (True, False):
        check_spmm(lib, case, (dtype, dtype), by_rows, dtype)
    for colsum_of in ("a", "b"):
        check_grad_weight(lib, case, dtype, dtype, colsum_of)


@pytest.mark.parametrize("block", [4, 8, 32])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_that_share_a_set_of_the_cache(lib, block, dtype):
    """Rows of y 8192 bytes apart or more, of tiles that are whole and that are not."""
    case = Case(96, 64, 100, block, density=0.5, seed=2, pad=4096 - 64)
    check_spmm(lib, case, (dtype, dtype), False, dtype)
    case = Case(64, 96, 100, block, density=0.5, seed=3, pad=4096 - 64)
    check_spmm(lib, case, (dtype, dtype), True, dtype)


@settings(max_examples=40, deadline=None)
@given(case=cases(), dtype=st.sampled_from([F32, BF16]), threads=st.sampled_from([1, 2]))
def test_weight_passes(lib, case, dtype, threads):
    torch.set_num_threads(threads)
    w = case.randn(case.rows, case.cols, dtype, case.pad)
    before = w.clone()
    sums = lib.block_sumsq(w, case.block)
    exact = block_sums(w.double().square(), case.block)
    assert_summed(sums, Exact(exact, exact), case.block**2, F32)

    buffer = w._base if w._base is not None else w
    beyond = buffer[:, case.cols :].clone()
    lib.zero_inactive_(w, case.index, case.block)
    assert torch.equal(w, torch.where(case.elements, before, 0))
    assert torch.equal(buffer[:, case.cols :], beyond)


@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    dtype=st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]),
    threads=st.sampled_from([1, 2]),
)
def test_zeroing_takes_bits_as_they_are(lib, case, dtype, threads):
    """Elements of any size, by runs and by whole rows: what stays has the bits it had, NaN or not."""
    torch.set_num_threads(threads)
    bits = torch.randint(-128, 128, (case.rows, 8 * (case.cols + case.pad)), generator=case.random, dtype=torch.int8)
    buffer = bits.view(dtype)[:, : case.cols + case.pad].contiguous()
    w, before = buffer[:, : case.cols], buffer.clone()
    lib.zero_inactive_(w, case.index, case.block)
    assert torch.equal(w, torch.where(case.elements, before[:, : case.cols], 0))
    assert torch.equal(buffer[:, case.cols :], before[:, case.cols :])


@pytest.mark.parametrize("block", table.BLOCKS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_deterministic_for_any_number_of_threads(lib, block, dtype):
    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        case = Case(200, 330, 500, block, 0.3, seed=2)
        forward = check_spmm(lib, case, (dtype, dtype), True, dtype)
        backward = check_spmm(lib, case, (dtype, dtype), False, None)
        return [forward, backward, check_grad_weight(lib, case, dtype, dtype, "a")]

    first = results(1)
    for threads in (1, 2, 2):
        assert all(torch.equal(p, q) for p, q in zip(first, results(threads), strict=True))


@pytest.mark.parametrize("block", [1, 2, 8])
def test_nonfinite_activations_stay_in_their_row(lib, block):
    """A NaN token must poison its own row of y only, whatever tile it shares with others."""
    case = Case(64, 64, 50, block, 1.0, seed=3)
    x, w, y = torch.ones(50, 64, dtype=BF16), torch.ones(64, 64, dtype=BF16), torch.empty(50, 64, dtype=BF16)
    x[13] = float("nan")
    lib.spmm(x, w, None, case.index, block, True, y)
    assert y[13].isnan().all()
    assert (torch.cat([y[:13], y[14:]]) == 64).all()


@pytest.mark.parametrize("block", [4, 8, 32])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_few_tokens_are_the_same_on_any_number_of_threads(lib, block, dtype):
    """Enough work for several threads, and parts of the outputs that hold as many blocks each."""
    for m, by_rows in itertools.product((1, 5, 16), (True, False)):
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(check_spmm(lib, Case(1027, 901, m, block, 0.3, seed=m), (dtype, dtype), by_rows, dtype))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("block", [4, 8, 32])
@pytest.mark.parametrize("by_rows", [True, False])
def test_few_tokens_read_active_blocks_alone(lib, block, by_rows):
    """What stands elsewhere, and beside a weight that its blocks do not divide, has no part in any result."""
    case = Case(70, 90, 3, block, 0.5, seed=5)
    w, x = torch.randn(70, 90), torch.randn(3, 90 if by_rows else 70)
    spoilt, out, want = torch.where(case.elements, w, torch.nan), *torch.empty(2, 3, 70 if by_rows else 90)
    beside = torch.full((71, 90), torch.nan)  # after its last number
    beside[:70] = spoilt
    lib.spmm(x, w, None, case.index, block, by_rows, want)
    lib.spmm(x, beside[:70], None, case.index, block, by_rows, out)
    assert torch.equal(out, want)
    x[1] = torch.inf
    lib.spmm(x, w, None, case.index, block, by_rows, out)
    assert torch.equal(out[::2], want[::2]), "a token that is not finite spoils its own results alone"
    assert not out[1].isfinite().all()


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_fine_blocks_in_many_chunks(lib, block, dtype, density):
    """Lines of outputs, groups of them and chunks of the reduction that end anywhere, on more threads than cores."""
    torch.set_num_threads(5)
    for rows, cols, m in [(700, 1001, 70), (33, 2050, 3), (1300, 65, 129)]:
        case = Case(rows, cols, m, block, density, seed=block)
        for by_rows in (True, False):
            check_spmm(lib, case, (dtype, dtype), by_rows, dtype)
        for colsum_of in ("a", "b"):
            check_grad_weight(lib, case, dtype, dtype, colsum_of)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("active", [1, 2, 3, 7])
def test_what_fills_up_a_pair_is_no_element(lib, block, dtype, active):
    """Dot products take two elements of a list at a time; those of inactive blocks have no part in any result."""
    for m, by_rows in itertools.product((1, 33, 70), (True, False)):
        case = Case(12 * block, 12 * block, m, block, 0.0, seed=1)
        lists = case.mask if by_rows else case.mask.t()
        lists[:, 2 : 2 + active] = True
        write_index(case.index, case.grid, case.mask)
        x, w, y = (torch.full((n, 12 * block), 1.0, dtype=dtype) for n in (m, 12 * block, m))
        x[:, : 2 * block], x[:, (2 + active) * block :] = torch.nan, torch.inf
        lib.spmm(x, w, None, case.index, block, by_rows, y)
        assert (y == active * block).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_an_infinite_last_token_is_added_once(lib, dtype):
    """A tile of the weight gradient is filled up with zeros, not with the last token."""
    for block in (1, 2, 8):
        case = Case(16, 24, 5, block, 1.0, seed=4)
        a, b = torch.ones(5, 16, dtype=dtype), torch.ones(5, 24, dtype=dtype)
        out, colsum = torch.empty(16, 24), torch.empty(24)
        b[4, 3] = torch.inf
        lib.grad_weight(a, b, case.index, block, out, colsum, False)
        assert torch.isinf(out[:, 3]).all()
        assert torch.isinf(colsum[3])
        assert (out[:, :3] == 5).all()


def test_concurrent_callers(lib):
    """ctypes releases the GIL: calls from several Python threads must not share scratch memory."""
    torch.set_num_threads(2)
    failures = []

    def work(seed: int) -> None:
        try:
            for k in range(10):
                case = Case(150, 130, 200, 8, 0.4, seed=10 * seed + k)
                check_spmm(lib, case, (F32, F32), True, F32)
                check_grad_weight(lib, case, F32, F32, "b")
        except AssertionError as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# ---- the Python surface ----------------------------------------------------------------------------------------------


def test_public_functions_use_the_best_library():
    case = Case(70, 90, 33, 8, 0.5, seed=4)
    x, w, y = case.randn(33, 90, F32), case.randn(70, 90, F32), torch.empty(33, 70)
    cpu.spmm(x, w, None, case.index, 8, True, y)
    kept = w * case.elements
    assert_as_good_as(y, x @ kept.t(), product(x, kept.t()).value, F32)
    dw, colsum = torch.empty(70, 90), torch.empty(70)
    cpu.grad_weight(y, x, case.index, 8, dw, colsum, True)
    assert_as_good_as(dw, y.t() @ x * case.elements, product(y.t(), x).value * case.elements, F32)
    assert_as_good_as(colsum, y.sum(0), total(y).value, F32)
    cpu.zero_inactive_(w, case.index, 8)
    assert torch.equal(w, kept)
    energy = kept.double().square().sum()
    assert_within(cpu.block_sumsq(w, 8).sum(), energy, of_sum(64 + case.mask.numel()) * energy)
    assert len(cpu.source_hash()) == 64


def test_a_number_of_an_index():
    index = torch.arange(12, dtype=torch.int32)
    assert [cpu.number_at(index, 3), cpu.number_at(index[4:], 1), cpu.number_at(index[::2], 3)] == [3, 5, 6]
    with pytest.raises(ValueError, match="plain tensors"):
        cpu.number_at(index.to("meta"), 0)


def test_supports():
    dtypes = [(F32, F32), (BF16, BF16), (BF16, F32)]
    assert all(cpu.supports(b, x, w) for b in (1, 2, 4, 8, 16, 32, 64) for x, w in dtypes)
    assert not cpu.supports(8, F32, BF16)
    assert not cpu.supports(8, torch.float64, torch.float64)
    assert not cpu.supports(12, F32, F32)


def test_misfits_raise_value_error():
    case = Case(24, 16, 5, 8, 0.5, seed=5)
    x, w, y = torch.ones(5, 16), torch.ones(24, 16), torch.empty(5, 24)
    for bad_x, bad_w, bad_y in [
        (torch.ones(16, 5).t(), w, y),
        (x, torch.ones(16, 24).t(), y),
        (x, w, torch.empty(24, 5).t()),
        (x[:, :8], w, y),
        (x, w, y.bfloat16()),
        (x.double(), w.double(), y.double()),
    ]:
        with pytest.raises(ValueError, match=r"spmm|CPU kernels"):
            cpu.spmm(bad_x, bad_w, None, case.index, 8, True, bad_y)
    with pytest.raises(ValueError, match="index"):
        cpu.spmm(x, w, None, case.index, 4, True, y)
    with pytest.raises(ValueError, match="colsum"):
        cpu.grad_weight(y, x, case.index, 8, torch.empty(24, 16), torch.empty(16), True)
    with pytest.raises(RuntimeError, match="dtypes"):
        cpu.spmm(x, w.bfloat16(), None, case.index, 8, True, y)
