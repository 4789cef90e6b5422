"""The CPU kernels as clang builds them, and for aarch64: whatever the sources leave to a compiler or a processor.

The table's and attention's own tests go through these libraries as well (``OTHERS``).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cpu_cases import F32, Case, cases, check_grad_weight, check_spmm
from hypothesis import given, settings
from hypothesis import strategies as st
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build, table
from mst_compile.kernels.cpu.processes import run_all
from other_libraries import OTHERS, clang, compile_commands, library

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=40)
@given(
    case=cases(),
    dtypes=st.sampled_from(table.PRODUCTS),
    by_rows=st.booleans(),
    bias_dtype=st.sampled_from([None, F32, torch.bfloat16]),
)
def test_products(
    name: str, case: Case, dtypes: tuple[torch.dtype, torch.dtype], by_rows: bool, bias_dtype: torch.dtype | None
) -> None:
    check_spmm(library(name), case, dtypes, by_rows, bias_dtype)


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=40)
@given(case=cases(), dtypes=st.sampled_from(table.GRADIENTS), colsum_of=st.sampled_from(["", "a", "b"]))
def test_gradients(name: str, case: Case, dtypes: tuple[torch.dtype, torch.dtype], colsum_of: str) -> None:
    check_grad_weight(library(name), case, *dtypes, colsum_of)


@pytest.mark.parametrize("isa", [isa.name for isa in table.ISAS if isa.name not in build.supported_isas()])
def test_clang_compiles_what_does_not_run_here(isa: str, tmp_path: Path) -> None:
    """Without optimisation: every instruction is asked for by name, and has to be one that the flags allow."""
    run_all(compile_commands([str(clang())], table.isa_named(isa), tmp_path, "-O0"), 1800)
    assert all((tmp_path / f"{unit.stem}.o").stat().st_size > 1000 for unit in build.units())
