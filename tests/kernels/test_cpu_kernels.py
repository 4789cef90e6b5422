"""CPU kernels against a float64 oracle, on the instruction sets this machine runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build
from mst_compile.kernels.cpu.library import Library
from oracles import Exact, assert_as_good_as, assert_within, block_sums, of_rounding, of_sum, product, total
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, write_index

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32)]  # of activations and weight


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


class Case:
    """A random weight, its mask and index, and operands that are views into wider buffers."""

    def __init__(self, rows: int, cols: int, m: int, block: int, density: float, seed: int, pad: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.rows, self.cols, self.m, self.block, self.pad = rows, cols, m, block, pad
        self.grid = BlockGrid(rows, cols, block)
        self.mask = torch.rand(self.grid.shape, generator=self.random) < density
        self.index = new_index(self.grid)
        write_index(self.index, self.grid, self.mask)
        self.elements = self.grid.expand(self.mask)

    def randn(self, rows: int, cols: int, dtype: torch.dtype, pad: int = 0) -> Tensor:
        return torch.randn(rows, cols + pad, generator=self.random).to(dtype)[:, :cols]

    def canvas(self, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A buffer of sentinels and the view of it that a kernel writes."""
        buffer = torch.full((rows, cols + self.pad), 7.0, dtype=dtype)
        return buffer, buffer[:, :cols]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block = draw(st.sampled_from([4, 8, 16, 32, 64]))
    side = st.integers(1, max(70, 3 * block + 1))
    return Case(
        rows=draw(side),
        cols=draw(side),
        m=draw(st.one_of(st.sampled_from([0, 1, 2, 16, 17, 48, 96, 128, 256]), st.integers(1, 300))),
        block=block,
        density=draw(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])),
        seed=draw(st.integers(0, 2**31)),
        pad=draw(st.sampled_from([0, 1, 5])),
    )


def assert_summed(got: Tensor, exact: Exact, terms: int, dtype: torch.dtype) -> None:
    """A float32 sum of ``terms`` products, rounded to ``dtype``."""
    assert got.dtype == dtype
    assert_within(got, exact.value, of_sum(terms) * exact.magnitude + of_rounding(dtype) * exact.value.abs())


def check_spmm(lib: Library, case: Case, dtypes: tuple[torch.dtype, torch.dtype], by_rows: bool, bias_dtype) -> Tensor:
    outputs, reduction = (case.rows, case.cols) if by_rows else (case.cols, case.rows)
    x = case.randn(case.m, reduction, dtypes[0], case.pad)
    w = case.randn(case.rows, case.cols, dtypes[1])
    bias = None if bias_dtype is None else case.randn(1, outputs, bias_dtype)[0]
    buffer, out = case.canvas(case.m, outputs, dtypes[0])
    lib.spmm(x, w, bias, case.index, case.block, by_rows, out)

    weight = w.to(dtypes[0]) * case.elements
    assert_summed(out, product(x, weight.t() if by_rows else weight, bias), reduction + 1, dtypes[0])
    assert (buffer[:, outputs:] == 7).all()
    return out


def check_grad_weight(
    lib: Library, case: Case, in_dtype: torch.dtype, out_dtype: torch.dtype, colsum_of: str
) -> Tensor:
    a = case.randn(case.m, case.rows, in_dtype, case.pad)
    b = case.randn(case.m, case.cols, in_dtype, 2 * case.pad)
    buffer, out = case.canvas(case.rows, case.cols, out_dtype)
    summed = {"a": a, "b": b, "": None}[colsum_of]
    colsum = None if summed is None else torch.full((summed.shape[1],), 7.0)
    lib.grad_weight(a, b, case.index, case.block, out, colsum, colsum_of == "a")

    exact = product(a.t(), b)
    assert_summed(out, Exact(exact.value * case.elements, exact.magnitude), case.m, out_dtype)
    assert (out[~case.elements] == 0).all()
    assert (buffer[:, case.cols :] == 7).all()
    if summed is not None:
        assert_summed(colsum, total(summed), case.m, F32)
    return out


@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    dtypes=st.sampled_from(DTYPES),
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
@pytest.mark.parametrize(("rows", "cols", "m", "block"), [(40, 9001, 70, 4), (9001, 40, 130, 32), (2100, 1900, 20, 64)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_layers(lib, rows, cols, m, block, dtype):
    case = Case(rows, cols, m, block, density=0.9, seed=1)
    for by_rows in (True, False):
        check_spmm(lib, case, (dtype, dtype), by_rows, dtype)
    for colsum_of in ("a", "b"):
        check_grad_weight(lib, case, dtype, dtype, colsum_of)


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


@pytest.mark.parametrize("block", [4, 8, 16, 32, 64])
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


def test_nonfinite_activations_stay_in_their_row(lib):
    """A NaN token must poison its own row of y only, whatever tile it shares with others."""
    case = Case(64, 64, 50, 8, 1.0, seed=3)
    x, w, y = torch.ones(50, 64, dtype=BF16), torch.ones(64, 64, dtype=BF16), torch.empty(50, 64, dtype=BF16)
    x[13] = float("nan")
    lib.spmm(x, w, None, case.index, 8, True, y)
    assert y[13].isnan().all()
    assert (torch.cat([y[:13], y[14:]]) == 64).all()


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


def test_supports():
    assert all(cpu.supports(b, x, w) for b in (4, 8, 16, 32, 64) for x, w in DTYPES)
    assert not cpu.supports(8, F32, BF16)
    assert not cpu.supports(8, torch.float16, torch.float16)
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


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=True
    )
    return done.stdout


def test_portable_path_can_be_forced():
    code = "from mst_compile.kernels.cpu import available, build; print(available(), build.build().name)"
    ok, name = run_python(code, MST_CPU_ISA="portable").split()
    assert ok == "True"
    assert "avx512" not in name


@pytest.mark.parametrize("environment", [{"CXX": "/nonexistent/c++"}, {"CXX": "false"}, {"MST_CPU_ISA": "z80"}])
def test_without_a_compiler_importing_works(environment):
    code = "from mst_compile.kernels import cpu; print(cpu.available(), cpu.why_unavailable())"
    assert run_python(code, **environment).startswith("False BuildError: ")


def test_failing_compiler_is_reported(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho no such flag >&2\nexit 1\n')
    compiler.chmod(0o755)
    code = "from mst_compile.kernels import cpu; print(cpu.available(), cpu.why_unavailable())"
    out = run_python(code, CXX=str(compiler), MST_COMPILE_CACHE_DIR=str(tmp_path / "cache"))
    assert out.startswith("False BuildError: ")
    assert "no such flag" in out


def test_processes_share_one_build(tmp_path):
    """Two processes that want the same library at once: one compiles, the other waits. The compiler is a stub."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && echo stub 1.0 && exit 0\n'
        f"sleep 0.5; echo call >> {tmp_path}/calls\n"
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    code = "from mst_compile.kernels.cpu import build; print(build.build().stat().st_size)"
    environment = os.environ | {"MST_COMPILE_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(compiler)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["1", "1"]
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    assert (tmp_path / "calls").read_text().count("call") == len(build.UNITS) + 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    """torch ships its own libgomp; a second one would mean a second pool of threads fighting over the cores."""
    code = (
        "from mst_compile.kernels import cpu; assert cpu.available(); "
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'libomp' in l}))"
    )
    assert run_python(code).strip() == "1"
