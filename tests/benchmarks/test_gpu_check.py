"""The command that checks a GPU, with small tests in place of those of tests/gpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_parts import COMBINATIONS

from benchmarks.gpu import check, worker

_TESTS = """
import os, pathlib, signal, time
import pytest

@pytest.fixture(autouse=True)
def _log(request):
    with open({log!r}, "a") as file:
        file.write(f"{{request.node.name}} {{os.getpid()}}\\n")

def error_of(module):
    return type("OutOfResources", (Exception,), {{"__module__": module}})("shared memory")

def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_hangs(): time.sleep(100)
def test_wrong(): assert 1 == 2, "these differ"
def test_skipped(): pytest.skip("no card")
def test_the_kernel_does_not_compile(): raise error_of("triton.runtime.errors")
def test_backward_does_not_compile(): raise RuntimeError("backward") from error_of("torch._inductor.exc")
@pytest.mark.parametrize("n", range(4))
def test_many(n): assert n < 4
"""
# Stands in for torch on a GPU whose context is lost once a test asks for it.
_TORCH = """
import sys, types, pytest
lost = []
def synchronize():
    if lost:
        raise RuntimeError("illegal memory access")
times = types.SimpleNamespace(compilation_time_metrics={"compile_fx_inner": [1.0, 0.5], "other": [9.0]})
cuda = types.SimpleNamespace(
    is_available=lambda: True, is_initialized=lambda: True, get_device_name=lambda: "Card", synchronize=synchronize
)
sys.modules["torch"] = types.SimpleNamespace(__version__="9", cuda=cuda, _dynamo=types.SimpleNamespace(utils=times))
"""


@pytest.fixture
def tests(tmp_path: Path):
    """Writes a file of tests; returns the folder, and what reads the names of those that began."""
    log = tmp_path / "log"

    def write(code: str, conftest: str = "") -> tuple[str, Any]:
        folder = tmp_path / "tests"
        folder.mkdir(exist_ok=True)
        (folder / "test_things_on_gpu.py").write_text(code.format(log=str(log)))
        (folder / "conftest.py").write_text(conftest)

        def began() -> list[str]:
            lines = log.read_text().splitlines() if log.exists() else []
            log.unlink(missing_ok=True)
            return lines

        return str(folder), began

    return write


def _check(folder: str, out: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status, and the newest line of each test."""
    status = check.main(["--tests", folder, "--out", str(out), "-n", "2", "--timeout", "2", *arguments])
    lines = (out / "check.jsonl").read_text().splitlines() if (out / "check.jsonl").exists() else []
    return status, {line["test"].partition("::test_")[2]: line for line in map(json.loads, lines)}


def test_no_test_costs_another_and_none_is_run_twice(tests, tmp_path, capsys, monkeypatch) -> None:
    folder, began = tests(_TESTS)
    status, found = _check(folder, tmp_path)
    assert status == 1
    assert {name: line["outcome"] for name, line in found.items()} == {
        "crashes": "died", "hangs": "hung", "wrong": "wrong", "skipped": "skipped",
        "the_kernel_does_not_compile": "not compiled", "backward_does_not_compile": "not compiled",
        **{f"many[{n}]": "right" for n in range(4)},
    }  # fmt: skip
    assert "SIGSEGV: Fatal Python error" in found["crashes"]["why"]
    assert "these differ" in found["wrong"]["why"]
    assert found["hangs"]["seconds"] >= 2
    out = capsys.readouterr().out
    assert "DIED" in out
    rows = {line.split("  ")[1].strip(): line.split() for line in out.splitlines() if line.startswith("things  ")}
    assert rows["many"][:3] == ["things", "many", "4"]
    assert out.splitlines()[-1].split()[:7] == ["all", "4", "1", "2", "1", "1", "1"]
    assert len(began()) == 10

    assert _check(folder, tmp_path, "-k", "not hangs and not compile")[0] == 1
    assert {line.split()[0] for line in began()} == {"test_crashes", "test_wrong"}
    assert "7 tests, 5 right before" in capsys.readouterr().out
    some = ("-k", "many or skipped")
    assert _check(folder, tmp_path, "--again", *some)[0] == 0
    assert len(began()) == 5
    monkeypatch.setattr(check, "fingerprint", lambda *_: "other")
    assert _check(folder, tmp_path, *some)[0] == 0
    assert len(began()) == 5


def test_time_over(tests, tmp_path, capsys) -> None:
    code = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(100)\ndef test_c(): pass\n"
    folder, _ = tests(code)
    status, found = _check(folder, tmp_path, "-n", "1", "--minutes", "0.05", "--timeout", "90")
    assert status == 3
    assert {name: line["outcome"] for name, line in found.items()} == {"a": "right", "b": "not reached"}
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["all", "1", "2"]


def test_a_lost_context_ends_its_process(tests, tmp_path) -> None:
    code = _TESTS.partition("def error_of")[0] + (
        "import conftest\n"
        "def test_breaks():\n    conftest.lost.append(1)\n    assert False, 'NaN'\n"
        "def test_next(): pass\ndef test_wrong(): assert False\ndef test_last(): pass\n"
    )
    folder, began = tests(code, _TORCH)
    status, found = _check(folder, tmp_path, "-n", "1")
    assert status == 1
    assert {name: line["outcome"] for name, line in found.items()} == {
        "breaks": "wrong", "next": "right", "wrong": "wrong", "last": "right",
    }  # fmt: skip
    assert found["breaks"]["why"].startswith("broke the GPU's context: AssertionError: NaN")
    assert all(line["on"] == "Card, torch 9" and line["compiling"] == 1.5 for line in found.values())
    processes = [line.split()[1] for line in began()]
    assert processes[1:] == [processes[1]] * 3
    assert processes[0] != processes[1]


def test_nothing_to_check(tests, tmp_path, capsys) -> None:
    folder, _ = tests("")
    assert _check(folder, tmp_path, "-n", "1")[0] == 2
    assert "no CUDA GPU here" in capsys.readouterr().out
    folder, _ = tests("import not_there\ndef test_a(): pass")
    assert _check(folder, tmp_path, "-n", "1")[0] == 2
    assert "not_there" in capsys.readouterr().out


def test_real_tests_on_the_cpu(tmp_path, monkeypatch) -> None:
    """They run, and what finds most comes first: each template, a layer, attention, a schedule; the rest last."""
    names: list[str] = []

    class Spy(check.Pool):
        def _collect(self, message: dict[str, Any]) -> None:
            names.extend(name.partition("::test_")[2] for name in message["tests"])
            super()._collect(message)

    monkeypatch.setattr(check, "Pool", Spy)
    monkeypatch.setenv("MST_TESTS_DEVICE", "")  # restored afterwards
    assert check.main(["--out", str(tmp_path), "-n", "1", "--device", "cpu", "--smoke"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()]
    assert [line["test"].partition("::test_")[2] for line in lines] == names[:3]
    assert all(line["outcome"] == "right" and line["on"].startswith("CPU, torch") for line in lines)
    assert any(line["compiling"] > 0 for line in lines)

    functions = [name.partition("[")[0] for name in names]
    first = [functions.index(name) for name in (
        "every_pattern", "every_tile", "one_step_against_float64", "a_schedule", "a_group_of_one", "modes",
        "gradients_scaled_for_float16", "more_elements_than_fit_32_bits", "odd_sizes",
    )]  # fmt: skip
    assert first == sorted(first)
    for dtype in ("bfloat16-half", "float16-half", "float32-tf32", "float32-ieee"):
        for block in (32, 64, 128):
            assert f"every_tile[{block}-{dtype}-0]" in names[: first[2]]
    assert functions.count("every_pattern") > len(COMBINATIONS)
    patterns = {name.split("[")[1].split("-")[0] for name in names[: first[3]] if name.startswith("every_pattern")}
    assert patterns == set(COMBINATIONS)


def test_what_was_raised_in_compilation() -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no such kernel")

    with pytest.raises(Exception, match="no such kernel") as found:
        torch.compile(lambda x: x + 1, backend=broken)(torch.ones(1))
    assert worker.raised_in_compilation(found.value)
    assert not worker.raised_in_compilation(AssertionError("far off"))
    scope: dict[str, Any] = {}
    exec(compile("def f(): assert False", "torch/_inductor/compile_fx.py", "exec"), scope)
    with pytest.raises(AssertionError) as found:
        scope["f"]()
    assert worker.raised_in_compilation(found.value)
