"""Which instruction set multiplies bf16: by a measurement of the processor that is kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build, dot_rate, processor

HAS_PAIRS = "avx512_bf16" in build.supported_isas()
RUNS = ("avx512_bf16", "avx512", "avx2", "baseline")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine that runs all instruction sets, with a cache of its own."""
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MST_CPU_ISA", raising=False)
    monkeypatch.setattr(build, "supported_isas", lambda: RUNS)
    build._fastest.cache_clear()
    yield tmp_path
    build._fastest.cache_clear()


def no_compiler() -> NoReturn:
    raise build.NoCompilerError("none")


def keep(folder: Path, **rate: object) -> Path:
    file = folder / f"dot_rate_{dot_rate._key()}.json"
    file.write_text(json.dumps(rate))
    return file


@pytest.mark.parametrize(
    ("dot", "chosen"),
    [(1.0, "avx512_bf16"), (2.0, "avx512_bf16"), (2.4, "avx512_bf16"), (2.6, "avx512"), (3.8, "avx512")],
)
def test_slow_dot_products_are_left_out(folder: Path, dot: float, chosen: str) -> None:
    """In float32 multiply-adds; Sapphire Rapids takes 2.1 cycles against .55, which is 3.8."""
    keep(folder, dot=dot * 1e-10, fma=1e-10)
    assert build.choose_isa() == chosen


def test_another_processor_is_measured_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(folder, dot=4e-10, fma=1e-10)
    dot_rate._key.cache_clear()
    monkeypatch.setattr(processor, "processor_name", lambda: "another")
    try:
        assert dot_rate.dot_rate(no_compiler) is None
    finally:
        dot_rate._key.cache_clear()


def test_what_the_user_wants_is_not_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(folder, dot=4e-10, fma=1e-10)
    monkeypatch.setenv("MST_CPU_ISA", "avx512_bf16")
    assert build.choose_isa() == "avx512_bf16"


BROKEN = ["", "{", "[]", "{}", '{"dot": 0, "fma": 1e-10}', '{"dot": "a", "fma": 1}', '{"dot": 1e-9, "fma": NaN}']


@pytest.mark.parametrize("kept", BROKEN)
def test_without_a_measurement_the_best_is_taken(kept: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken file counts as none; where there is no compiler either, nothing is known."""
    keep(folder).write_text(kept)
    monkeypatch.setattr(build, "find_compiler", no_compiler)
    assert dot_rate.dot_rate(no_compiler) is None
    assert build.choose_isa() == "avx512_bf16"


def test_a_compiler_that_fails(folder: Path) -> None:
    assert dot_rate.dot_rate(lambda: ("false",)) is None
    assert dot_rate.dot_rate(lambda: ("no such compiler",)) is None
    assert not list(folder.iterdir()), "left something behind"


@pytest.mark.skipif(not HAS_PAIRS, reason="this processor has no bf16 dot products")
@pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")
def test_this_processor(folder: Path) -> None:
    """An instruction takes some cycles; what was measured is kept, and no compiler is asked for it again."""
    rate = dot_rate.dot_rate(build.find_compiler)
    assert rate is not None
    assert 1e-11 < rate.fma < 1e-7
    assert 0.2 < rate.dot / rate.fma < 20
    asked: Callable[[], tuple[str, ...]] = no_compiler
    assert dot_rate.dot_rate(asked) == rate
    assert [file.name for file in folder.iterdir()] == [f"dot_rate_{dot_rate._key()}.json"]
