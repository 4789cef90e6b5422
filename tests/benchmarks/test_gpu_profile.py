"""The command that profiles what missed its goal, with a script in place of Nsight Compute."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks import ledger
from benchmarks.gpu import options, plan, profile
from benchmarks.gpu.plan import LayerCell

CASE = "M=64 N=128 K=96 B=32 max-autotune d=0.333 sum"


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a script called ncu first on the path."""

    def write(code: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        script = tmp_path / "bin" / "ncu"
        script.write_text(f"#!{sys.executable}\nimport sys, time\n{code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent))

    return write


def _record(path: Path, case: str, note: str, side: str = "mst") -> None:
    ledger.record("gpu_layers", case, side, 1.0, 1.0, 1, "bfloat16", note, path=path)


def test_every_case_leads_back_to_its_cell() -> None:
    for cell in (*plan.speed_cells(), *options.SMOKE_ATTENTIONS):
        if isinstance(cell, LayerCell):
            for density in cell.densities:
                one = LayerCell(cell.m, cell.n, cell.k, cell.block, (density,), cell.tuned_for, cell.tune)
                assert profile.cell_of(f"{cell.case} d={density:.3f} sum") == one
        elif cell.kind == "attention":
            assert profile.cell_of(f"{cell.case} forward and backward") == cell
        else:
            assert profile.cell_of(f"{cell.case} B=32 d=0.100") is None
    assert profile.cell_of("M=64 N=128 K=96 B=32 crossover sum") is None


def test_what_missed_its_goal_is_profiled(tmp_path, ncu, capsys) -> None:
    ncu("open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write(' '.join(sys.argv))")
    path = tmp_path / "ledger.csv"
    _record(path, CASE, "goal 6x missed")
    _record(path, "M=64 N=128 K=96 B=64 d=0.300 sum", "goal 2x missed")
    _record(path, "M=64 N=128 K=96 B=64 d=0.300 sum", "9 TFLOP/s in active blocks; goal 2x met")
    _record(path, "M=64 N=128 K=96 B=32 d=0.500 sum", "goal 2x missed", side="stk")
    _record(path, "gpt-small d=768 B=32 d=0.100", "goal 2.5x missed")
    assert profile.main(["--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("ncu-*.txt")
    called = report.read_text()
    assert f"--launch --case {CASE} --device cuda" in called
    assert "--profile-from-start off" in called
    assert "not profiled, neither a layer nor an attention of the benchmark: gpt-small" in capsys.readouterr().out


def test_a_profiler_that_fails_or_hangs(tmp_path, ncu, capsys) -> None:
    ncu("sys.exit(9)")
    assert profile.main(["--out", str(tmp_path), "--case", CASE]) == 1
    assert "ncu ended with status 9" in capsys.readouterr().out
    ncu("time.sleep(100)")
    start = time.monotonic()
    assert profile.main(["--out", str(tmp_path), "--case", CASE, "--minutes", "0.01"]) == 1
    assert time.monotonic() - start < 10
    assert "time was over" in capsys.readouterr().out
    assert profile.main(["--out", str(tmp_path), "--case", "no such case"]) == 2


def test_nothing_to_profile(tmp_path, ncu, capsys, monkeypatch) -> None:
    ncu("raise SystemExit(1)")
    assert profile.main(["--out", str(tmp_path)]) == 0
    assert "missed a goal" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(profile, "_PLACES", (f"{tmp_path}/*/ncu",))
    assert profile.find_ncu() == f"{tmp_path}/bin/ncu"
    monkeypatch.setattr(profile, "_PLACES", ())
    assert profile.main(["--out", str(tmp_path), "--case", CASE]) == 0
    assert "there is no ncu" in capsys.readouterr().out


def test_what_is_launched_under_the_profiler(capsys) -> None:
    """Each product of a layer, and an attention with its backward pass."""
    assert profile.main(["--launch", "--device", "cpu", "--case", CASE.replace(" max-autotune", "")]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == [
        f"profiled: {n}" for n in ("forward", "grad-input", "grad-weight")
    ]
    attention = f"{options.SMOKE_ATTENTIONS[0].case} forward and backward"
    assert profile.main(["--launch", "--device", "cpu", "--case", attention]) == 0
    assert capsys.readouterr().out == "profiled: forward and backward\n"
