"""The GPU benchmark's program, on tiny sizes on a CPU: what it records, and that nothing stops it."""

from __future__ import annotations

import csv
import functools
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor import select_algorithm
from torch._inductor.codecache import PersistentCache

from benchmarks import ledger
from benchmarks.gpu import checkout, cli, keep, layers, models, options, plan, rivals, supervisor, tuning
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
    return options.cells_of(options.parse(arguments))


def test_smoke_records_every_part(rows, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GOALS", {(64, 128, 96): {32: {0.3: 1e-4, 1.0: 1e4}}})
    monkeypatch.setattr(plan, "MODEL_GOALS", {"tiny": 1e4})
    monkeypatch.setattr(plan, "ATTENTION_GOALS", {("sparse", 70): 1e-4})
    assert cli.run(SMOKE) == 0
    found = rows()
    judged = {r["case"].split(" d=0.100")[0]: r["note"].split("; ")[-1] for r in found if "goal" in r["note"]}
    assert judged.pop("gpt-tiny d=64 L=1 V=128 T=32 batch=2 B=4").startswith("goal 10000x missed")
    assert {case: note.split(", ")[0] for case, note in judged.items()} == {
        "sparse T=70 heads=2x32 batch=2 forward and backward": "goal 0.0001x met",
        "M=64 N=128 K=96 B=32 d=0.333 sum": "goal 0.0001x met",
        "M=64 N=128 K=96 B=32 d=1.000 sum": "goal 10000x missed",
    }
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
    experts = {(r["case"].split()[-1], r["side"]) for r in found if r["benchmark"] == "gpu_experts"}
    assert experts == {(operation, side) for operation in (*layers.OPERATIONS, "sum") for side in ("dense", "mst")}
    assert attention == {(side, backward) for side in ("sdpa", "mst") for backward in (False, True)}
    out = capsys.readouterr().out
    assert "without bsr: needs a GPU" in out
    assert len([line for line in out.splitlines() if "goal 0.0001x met" in line]) == 4  # as it comes, and in the end


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
    assert {r["benchmark"] for r in others} == {"gpu_layers", "gpu_attention", "gpu_experts"}


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


# -- speed: what decides, and going on where a run ended ---------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Cells that a run begins, in place of measuring them, and whether choices would be timed."""
    begun: list[tuple[str, bool]] = []

    def measure(cell: plan.Cell, *_: object) -> None:
        begun.append((cell.case, inductor_config.max_autotune_gemm))

    for part in (cli.layers, cli.models, cli.attention, cli.experts):
        monkeypatch.setattr(part, "measure", measure)
    monkeypatch.setattr(cli, "_broken", lambda _: False)  # collects garbage, a second for each run
    return begun


def test_speed_begins_with_what_decides() -> None:
    cells = _cells("speed")
    cases = [cell.case for cell in cells]
    goals = {128: (0.3, 0.1), 64: (0.3, 0.1), 32: (0.3, 0.1)}
    layers_first = [c for c in cells[:9] if isinstance(c, LayerCell)]
    assert [(c.m, c.n, c.k, c.block, *c.densities) for c in layers_first] == [
        (*plan.GOAL, block, density) for block in (128, 64, 32) for density in (0.3, 0.1, 0.2)
    ]
    assert all(c.tuned_for == c.densities[0] and not c.tune for c in layers_first)
    assert cases[9:11] == [f"M=8192 N=8192 K=8192 B={block} for=0.125" for block in (128, 64)]
    assert cases[11].startswith("gpt-small")
    assert cases[12] == "sparse T=4096 heads=12x64 batch=4"
    tuned = [cell for cell in cells if cell.tune]
    assert cases[13:15] == [f"experts=8 M=32768 N=14336 K=4096 B={block}" for block in (128, 64)]
    assert cells[15 : 15 + len(tuned)] == tuned
    wanted = [(block, density) for block, some in goals.items() for density in some] + [(128, 0.125)]
    assert [(c.block, *c.densities) for c in tuned if isinstance(c, LayerCell)] == wanted
    assert all("max-autotune" in cell.case for cell in tuned)
    keys = [cli._key(cell) for cell in cells]
    assert len(set(keys)) == len(keys)
    assert set(map(cli._key, _cells())) <= set(keys)
    args = options.parse(["speed"])
    assert (args.minutes, args.without, args.ledger) == (6.0, ["bsr"], args.out / "ledger.csv")
    assert options.parse([]).minutes == 9.0


def test_goals() -> None:
    def goal(m: int, n: int, k: int, block: int, density: float) -> float | None:
        return LayerCell(m, n, k, block, (density,), 0.2).goal(density)

    assert [goal(*plan.GOAL, 32, 0.1), goal(*plan.GOAL, 32, 0.2), goal(*plan.CUBE, 128, 0.125)] == [3.5, None, 4.5]
    assert goal(*plan.CUBE, 64, 0.125) is None
    assert [cell.goal for cell in plan.MODELS] == [2.5, None, None]
    assert {cell.case.split(" heads")[0]: cell.goal for cell in plan.ATTENTIONS if cell.goal} == {"sparse T=4096": 4.0}
    assert plan.verdict(2.0, 2.0) == "goal 2x met"
    assert plan.verdict(2.0, 1.99) == "goal 2x missed"
    assert plan.verdict(2.0, 0.96) == "goal 2x missed, below 0.97x of dense"
    assert plan.verdict(None, 0.97) == ""


def test_tuning_is_a_property_of_the_cell(rows, measured) -> None:
    assert cli.run(SMOKE) == 0
    assert all(not tuned and "max-autotune" not in case for case, tuned in measured)
    plain = len(measured)
    measured.clear()
    assert cli.run([*SMOKE, "--tune"]) == 0
    assert len(measured) == plain
    assert all(tuned and case.endswith(" max-autotune") for case, tuned in measured)


def test_a_second_run_goes_on_where_the_first_ended(tmp_path, measured, capsys, monkeypatch) -> None:
    speed = ["speed", *SMOKE, "--out", str(tmp_path / "out")]
    model, attended, experts, layer = (cell.case for cell in _cells(*speed))
    record = cli.layers.measure

    def cut(cell: plan.Cell, run: Any) -> None:
        record(cell, run)
        run.skipped("the second density")

    def fail(cell: plan.Cell, run: Any, *_: object) -> None:
        record(cell, run)
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(cli.layers, "measure", cut)
        patch.setattr(cli.models, "measure", fail)
        assert cli.run(speed) == 1
    assert [case for case, _ in measured] == [model, attended, experts, layer]
    assert "failed: RuntimeError: no such kernel" in (tmp_path / "out" / "ledger.csv").read_text()
    measured.clear()
    assert cli.run(speed) == 0
    assert [case for case, _ in measured] == [layer]
    assert f"measured before: {model}" in capsys.readouterr().out
    measured.clear()
    assert cli.run(speed) == 0
    assert not measured
    assert cli.run([*speed, "--again"]) == 0
    assert len(measured) == 4
    measured.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cli, "fingerprint", lambda: "other code")
        assert cli.run(speed) == 0
    with monkeypatch.context() as patch:
        patch.setattr(cli, "device_name", lambda _: "another card")
        assert cli.run(speed) == 0
    assert len(measured) == 8


def test_a_cell_that_died_is_not_begun_again(tmp_path, measured) -> None:
    speed = ["speed", *SMOKE, "--out", str(tmp_path)]
    assert cli.run([*speed, "--from", "2", "--died", "mst:killed by SIGSEGV"]) == 1
    measured.clear()
    assert cli.run(speed) == 0
    assert [case for case, _ in measured] == [_cells(*speed)[0].case]


def test_lines_that_are_cut_off_are_left_out(tmp_path) -> None:
    lines = keep.Lines(tmp_path / "new" / "lines")
    assert lines.read() == []
    lines.add({"a": 1})
    with (tmp_path / "new" / "lines").open("a") as file:
        file.write('{"a": 2')
    assert lines.read() == [{"a": 1}]
    lines.add({"a": 3})
    assert lines.read() == [{"a": 1}, {"a": 3}]


def test_the_fingerprint_is_that_of_the_sources(tmp_path, monkeypatch) -> None:
    assert keep.fingerprint() == keep.fingerprint(keep.PACKAGE)
    monkeypatch.setattr(keep, "ROOT", tmp_path)
    (tmp_path / "kernels" / "deep").mkdir(parents=True)
    seen = {keep.fingerprint(["kernels"])}
    for name, text in (("a.py", "1"), ("a.py", "2"), ("deep/b.cpp", ""), ("deep/t.py.jinja", "x")):
        (tmp_path / "kernels" / name).write_text(text)
        seen.add(keep.fingerprint(["kernels"]))
    (tmp_path / "kernels" / "a.pyc").write_text("3")
    assert len(seen) == 5
    assert keep.fingerprint(["kernels"]) in seen


class _Choice:
    """A choice of Inductor's autotuner."""

    mst_product = (None, "forward of something")

    def __init__(self, name: str) -> None:
        self.name, self.description = name, f"BLOCK_M={name}, OTHER=3, num_warps=4"

    def hash_key(self) -> str:
        return self.name


def test_times_of_choices_are_kept_for_each_cell(tmp_path) -> None:
    timed: list[str] = []

    def tune(cell: str, *choices: str) -> None:
        """As Inductor does; a new process each."""
        keeper, some = tuning.Keeper(tmp_path / "out" / "tuning.json"), [_Choice(c) for c in choices]

        def benchmark(choices: list[_Choice]) -> dict[_Choice, float]:
            timed.append(cell)
            return {choice: 1.0 / int(choice.name) for choice in choices}

        with keeper.cell(cell):
            found = PersistentCache().lookup(some, "product", "f32[8, 8]", benchmark)
            for feedback in select_algorithm.get_algorithm_selector_cache().feedback_saver_fns:
                feedback(found, "product", [], some, None)
        assert keeper.winners == [("forward", f"BLOCK_M={choices[-1]} num_warps=4", 1.0 / int(choices[-1]))]

    tune("a", "128", "256")
    tune("b", "128", "256")
    assert timed == ["a", "b"]  # never another cell's
    tune("a", "128", "256")
    assert timed == ["a", "b"]
    tune("a", "128", "256", "512")
    assert timed == ["a", "b", "a"]
    assert not list((tmp_path / "out").glob("*.new"))


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


def test_a_worker_is_told_when_to_end(rows, measured) -> None:
    """Not how long to run: it takes seconds to start."""
    assert cli.run([*SMOKE, "--end", str(time.monotonic() - 1)]) == 0
    assert not measured
    told: list[float] = []

    def make(arguments: Sequence[str]) -> list[str]:
        told.append(float(options.parse(arguments).end_))
        return [sys.executable, "-c", ""]

    assert supervisor.supervise([], 2, make) == 0
    assert told == [pytest.approx(time.monotonic() + 120, abs=30)]


def test_supervisor_ends_in_time(tmp_path: Path, capsys) -> None:
    """A cell that runs when time is over is ended; that is no failure, but is told."""

    def make(arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(100)"]

    start = time.monotonic()
    assert supervisor.supervise([], 1 / 60, make, grace=0) == supervisor.CUT
    assert time.monotonic() - start < 10
    assert "time was over within a cell" in capsys.readouterr().out


def test_death_of_a_worker_is_recorded_by_the_next(rows) -> None:
    assert cli.run([*SMOKE, "--from", "2", "--died", "mst:killed by SIGSEGV"]) == 1
    row = rows()[0]
    assert row["note"] == "failed: killed by SIGSEGV"
    assert row["case"] == _cells(*SMOKE)[1].case


def test_package_is_found_in_a_bare_checkout(tmp_path) -> None:
    """In a process that no installation helps; a script is run there too."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import importlib.metadata as m; m.entry_points = lambda **_: m.EntryPoints()\n"
        "import benchmarks.gpu.options, mst_compile.lowering, mst_compile.kernels.cpu.build as b; print(b.__file__)\n"
        "from benchmarks.gpu import checkout; checkout.run_script(sys.argv[1:])"
    )
    (tmp_path / "beside.py").write_text("name = 'beside'")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, beside; print(beside.name, *sys.argv[1:], torch._dynamo.lookup_backend('mst'))"
    )
    command = [sys.executable, "-c", code, str(script), "--an", "option"]
    done = subprocess.run(command, cwd=checkout.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, printed = done.stdout.splitlines()
    assert Path(found) == checkout.ROOT / "kernels" / "cpu" / "build.py"
    assert printed.startswith("beside --an option <function mst")
