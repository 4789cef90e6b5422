"""The GPU benchmark's program, on tiny sizes on a CPU: what it records, and that nothing stops it."""

from __future__ import annotations

import csv
import functools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import ledger
from benchmarks.gpu import checkout, cli, layers, models, options, plan, rivals, supervisor
from benchmarks.gpu.plan import LayerCell, ModelCell
from mst_compile.graph.backend import mst

SMOKE = ["--device", "cpu", "--smoke", "--runs", "2"]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A ledger of the test's own; call it to read the rows."""
    path = tmp_path / "ledger.csv"
    monkeypatch.setattr(ledger, "LEDGER", path)

    def read() -> list[dict[str, str]]:
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(autouse=True)
def _quick_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models without Inductor: its C++ takes most of a minute to compile, and other tests compile enough of it."""
    quick = {"inductor": "aot_eager", "mst": functools.partial(mst, options={"mst.inner": "aot_eager"})}
    monkeypatch.setattr(models, "BACKENDS", quick)


def _cells(*arguments: str) -> list[plan.Cell]:
    return options.cells_of(options.parser().parse_args(arguments))


def test_smoke_records_every_part(rows, capsys) -> None:
    assert cli.run(SMOKE) == 0
    found = rows()
    for row in found:
        assert 0 < float(row["median_s"]) < 60
        assert 0 < float(row["ratio"]) < 1000
        assert row["dtype"] == "float32"
        assert row["cpu"] == ledger.cpu_name()
    operations = {(r["case"].split()[-2], r["case"].split()[-1], r["side"]) for r in found if "d=" in r["case"]}
    for density in ("d=0.333", "d=1.000"):
        for operation in (*layers.OPERATIONS, "sum"):
            assert {(density, operation, "dense"), (density, operation, "mst")} <= operations
    steps = {r["side"]: r for r in found if r["benchmark"] == "gpu_train_step"}
    assert steps.keys() == {"inductor", "mst"}
    assert all("tokens/s" in r["note"] for r in steps.values())
    attention = {(r["side"], "backward" in r["case"]) for r in found if r["benchmark"] == "gpu_attention"}
    assert attention == {(side, backward) for side in ("sdpa", "mst") for backward in (False, True)}
    assert "without bsr: needs a GPU" in capsys.readouterr().out


def test_each_density_can_be_tuned_for(rows, tmp_path) -> None:
    path = tmp_path / "other.csv"
    arguments = ["--part", "layers", "--tune-each", "--densities", "1,.4", "--ledger", str(path)]
    assert cli.run(SMOKE + arguments) == 0
    assert rows() == []
    assert "for=0.4" in path.read_text()


def test_no_time_skips_everything(rows, capsys) -> None:
    assert cli.run([*SMOKE, "--minutes", "0"]) == 0
    out = capsys.readouterr().out
    for cell in _cells(*SMOKE):
        assert f"skipped, no time left: {cell.case}" in out
    assert rows() == []


def test_failing_cell_is_recorded_and_the_rest_goes_on(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(cli.models, "measure", fail)
    assert cli.run(SMOKE) == 1
    failed, *others = rows()
    assert failed["benchmark"] == "gpu_train_step"
    assert failed["note"] == "failed: RuntimeError: no such kernel"
    assert math.isnan(float(failed["median_s"]))
    assert {r["benchmark"] for r in others} == {"gpu_layers", "gpu_attention"}


def test_wrong_result_gets_no_time(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    real = layers.ours

    def wrong(layer: layers.Layer, *density: float):
        calls = real(layer, *density)
        grad_weight = calls["grad-weight"]
        return calls | {"forward": lambda: torch.mm(layer.x, layer.weight.t()) + 1, "grad-weight": grad_weight}

    monkeypatch.setattr(layers, "ours", wrong)
    assert cli.run([*SMOKE, "--part", "layers"]) == 1
    mine = {r["case"].split()[-1]: r for r in rows() if r["side"] == "mst" and "d=1.000" in r["case"]}
    assert "wrong result" in mine["forward"]["note"]
    assert math.isnan(float(mine["forward"]["ratio"]))
    assert float(mine["grad-input"]["ratio"]) > 0
    assert "sum" not in mine


def test_gradient_outside_the_active_blocks_is_wrong() -> None:
    layer = layers.Layer(LayerCell(8, 64, 64, 32, (0.5,), 0.2), torch.device("cpu"), torch.float32)
    layer.set_density(0.5)
    reference = layer.reference()["grad-weight"]
    assert layer.complaint("grad-weight", reference.clone(), reference) is None
    assert "not exactly 0" in (layer.complaint("grad-weight", reference + 1e-9, reference) or "")
    assert "wrong" in (layer.complaint("forward", reference * torch.nan, reference) or "")


def test_goal_cells_come_first() -> None:
    cells = _cells()
    assert [(c.m, c.n, c.k, c.block) for c in cells[:3] if isinstance(c, LayerCell)] == [
        (*plan.GOAL, block) for block in (128, 64, 32)
    ]
    assert isinstance(cells[3], ModelCell)
    assert isinstance(cells[0], LayerCell)
    assert cells[0].densities[:2] == (0.3, 0.1)
    assert cells[0].goal(0.1) == 6.0
    assert len({c.case for c in cells}) == len(cells)
    chosen = _cells("--part", "layers", "--blocks", "64", "--densities", "1,.1")
    assert {(c.block, c.densities) for c in chosen if isinstance(c, LayerCell)} == {(64, (0.1, 1.0))}


def test_crossover() -> None:
    assert plan.crossover([]) is None
    assert plan.crossover([(0.1, 0.9), (0.5, 0.5)]) is None
    assert plan.crossover([(1.0, 1.1), (0.1, 5.0)]) == 1.0
    # In a model of 1 / (2 density) the crossover lies at a half; interpolation in the logarithm comes close.
    points = [(d, 1 / (2 * d)) for d in (1.0, 0.3, 0.4, 0.6, 0.1)]
    assert plan.crossover(points) == pytest.approx(0.5, abs=0.02)
    assert plan.crossover([(0.4, 2.0), (0.6, 0.5)]) == pytest.approx(0.5)


def test_budget_learns_how_long_a_cell_takes() -> None:
    now = [0.0]
    budget = plan.Budget(1, {"layer": 10.0}, lambda: now[0])
    assert budget.allows("layer")
    budget.spent("layer", 40.0)
    now[0] = 30.0
    assert not budget.allows("layer")
    assert budget.allows("model")


def test_rivals_are_kept_from_layers_that_they_cannot_compute() -> None:
    def why(name: str, m: int, n: int, block: int) -> str | None:
        return rivals.why_unfit(name, LayerCell(m, n, 1024, block, (0.5,), 0.2))

    assert tuple(rivals.RIVALS) == plan.RIVALS
    assert why("stk", 8192, 1024, 128) is None
    assert why("stk", 8192, 1024, 64) is not None
    assert why("stk", 8200, 1024, 128) is not None
    assert why("bsr", 8192, 1024, 64) is None
    assert why("bsr", 8192, 1600, 128) is not None


def test_a_gpu_is_needed_unless_smoke(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.run([]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().out
    assert cli.run(["--device", "cpu"]) == 2


# -- the supervisor, with small workers in place of the benchmark ------------------------------------------------------

_WORKER = """
import sys, time, pathlib, os, signal
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log: log.write(" ".join(a for a in sys.argv[1:] if "/" not in a) + "\\n")
first = int(args.get("--from", 0))
if first < 2: pathlib.Path(args["--progress"]).write_text(f"{{first}} {{['mst', 'bsr'][first]}}")
if first == 0: os.kill(os.getpid(), signal.SIGSEGV)
if first == 1: time.sleep(100)
"""


def test_supervisor_goes_on_behind_a_crash_and_a_hang(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = _WORKER.format(log=str(log))

    def make(arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", code, *arguments]

    assert supervisor.supervise([], 1, make, cell_seconds=2) == 1
    first, second, third = log.read_text().splitlines()
    assert "--from" not in first
    assert "--from 1 --died mst:killed by SIGSEGV" in second
    assert "--from 2 --died bsr:killed by SIGKILL" in third
    assert "--without bsr" in third


def test_death_of_a_worker_is_recorded_by_the_next(rows) -> None:
    assert cli.run([*SMOKE, "--from", "2", "--died", "mst:killed by SIGSEGV"]) == 1
    row = rows()[0]
    assert row["note"] == "failed: killed by SIGSEGV"
    assert row["case"] == _cells(*SMOKE)[1].case


def test_package_is_found_in_a_bare_checkout() -> None:
    """In a process that no installation helps."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import benchmarks.gpu.options, mst_compile.lowering, mst_compile.kernels.cpu.build as b; print(b.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == checkout.ROOT / "kernels" / "cpu" / "build.py"
