"""``python -m mst_compile doctor``: what it says of this machine, and that it notices what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mst_compile.kernels import cpu as kernels
from mst_compile.lowering import cpu_facts, cuda

from mst_compile.__main__ import main
from mst_compile.doctor import command, trial
from mst_compile.rules.patterns import FULL, allowed

HAS_KERNELS = pytest.mark.skipif(not kernels.available(), reason=f"CPU kernels: {kernels.why_unavailable()}")
HAS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["doctor", *arguments])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return status, text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the timing, which takes longest."""
    monkeypatch.setattr(trial, "speed", lambda device, dtype: trial.Speed("of no size", 3.0, 2.0))


@HAS_KERNELS
def test_a_machine_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "--device", "cpu")
    assert status == 0
    assert "FAILED" not in text
    assert text.count("right: ") == 4, "products and attention in both dtypes"
    for fact in ("processor", "instructions", "bfloat16", "C++ compiler", "cache folder", "kernels"):
        assert f"cpu {fact}" in text
    assert kernels.choose_isa() in text
    assert "block 8" in text
    assert "x\n" in text.split("forward and backward dense", 1)[1]


@HAS_KERNELS
@HAS_NO_GPU
@pytest.mark.usefixtures("quick")
def test_a_device_that_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    """That is no fault, unless the user asked for it."""
    status, text = run(capsys)
    assert (status, "FAILED" in text) == (0, False)
    assert "1.50x" in text
    status, text = run(capsys, "--device", "cuda")
    assert status == 1
    assert "FAILED torch" in text


@pytest.mark.parametrize(("flags", "seconds"), [({"avx512bf16", "avx2"}, 0.5), ({"avx2"}, 15.0), ({"avx512f"}, 1.25)])
def test_bfloat16_that_is_slow_is_told(flags: set[str], seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_facts.processor, "features", lambda: frozenset(flags))
    monkeypatch.setattr(cpu_facts, "_product_seconds", lambda dtype: seconds if dtype == torch.bfloat16 else 1.0)
    fact = cpu_facts._bfloat16()
    assert fact.problem is None
    assert f"{seconds:.2g} times" in fact.value
    assert ("has instructions for it (avx512bf16)" in fact.value) == ("avx512bf16" in flags)
    assert ("has no instructions" in fact.value) == ("avx512bf16" not in flags)
    assert ("train in float32 here" in fact.value) == (seconds > 1.5)


def test_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "abacus"]) == 2
    assert "'abacus'" in capsys.readouterr().err
    assert main([]) == main(["nurse"]) == 2
    assert "doctor" in capsys.readouterr().err


def test_a_stdout_that_was_closed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As services close it, and ``>&-``: Python has none then."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--help"]) == 0


@HAS_KERNELS
@pytest.mark.usefixtures("quick")
def test_wrong_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of other weights, and attention to other keys, than those that the reference is made of."""
    plain = trial._plain

    def other(model: torch.nn.Module) -> torch.nn.Module:
        found = plain(model)
        with torch.no_grad():
            next(found.parameters())[3] += 0.1
        return found

    monkeypatch.setattr(trial, "_plain", other)
    monkeypatch.setattr(trial, "allowed", lambda parts, *rest: allowed(FULL, *rest))
    status, text = run(capsys, "--device", "cpu")
    assert status == 1
    for what in ("forward", "grad-input", "grad-weight of 2.weight", "grad-query", "grad-key", "grad-value"):
        assert f"FAILED {what} is" in text, what


@HAS_KERNELS
@pytest.mark.usefixtures("quick")
def test_products_that_stay_dense(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Right numbers are no proof of kernels."""
    monkeypatch.setattr(trial, "mst", "aot_eager")
    monkeypatch.setattr(trial, "_ALWAYS", {})
    status, text = run(capsys, "--device", "cpu")
    assert status == 1
    assert "stayed dense" in text


def test_no_compiler(tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/nonexistent/g++", "MST_COMPILE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "mst_compile", "doctor", "--device", "cpu"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "FAILED CXX='/nonexistent/g++'" in " ".join(done.stdout.split())
    assert "Install g++" in " ".join(done.stdout.split())
    assert "right" not in done.stdout


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path / "file" / "folder"))
    fact = cpu_facts._cache()
    assert fact.problem is not None
    assert "MST_COMPILE_CACHE_DIR" in fact.problem


@pytest.mark.parametrize(("major", "compiler", "problems"), [(9, "gcc", 0), (7, "gcc", 1), (9, "/nonexistent/cc", 1)])
def test_facts_of_a_gpu(major: int, compiler: str, problems: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties: Any = SimpleNamespace(
        name="NVIDIA H100", major=major, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setenv("CC", compiler)
    cuda._why_no_kernels.cache_clear()
    try:
        facts = cuda._facts()
    finally:
        cuda._why_no_kernels.cache_clear()
    assert sum(fact.problem is not None for fact in facts) == problems
    assert "132 multiprocessors" in facts[0].value


def test_lines_are_wrapped() -> None:
    lines = command._line("name", "word " * 60, failed=True).splitlines()
    assert lines[0].startswith("name ")
    assert "FAILED" in lines[0]
    assert all(line.startswith(" " * 24) for line in lines[1:])
