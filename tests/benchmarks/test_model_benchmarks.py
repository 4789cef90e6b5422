"""The benchmark of whole models: its models can be built and made sparse, and its rows become a table."""

from __future__ import annotations

import pytest

import mst_compile
from benchmarks import tables
from benchmarks.models import MODELS, build
from benchmarks.never_slower_models import set_density


def _row(case: str, ratio: str, dtype: str = "float32", benchmark: str = "models") -> dict[str, str]:
    return {"benchmark": benchmark, "case": case, "side": "mst", "dtype": dtype, "ratio": ratio, "cpu": tables.MACHINE,
            "median_s": "2.0", "note": "what it is; rewriting 1.0 s, measuring 2.0 s"}  # fmt: skip


def test_the_table_of_models_takes_the_nearest_of_its_densities():
    rows = [_row("tiny train d=1.000", "1.1"), _row("tiny train d=0.062", "1.9"), _row("llama generate d=0.5", "1.3")]
    table = tables.architectures_table([*rows, _row("tiny train d=0.5", "9", benchmark="layers")]).splitlines()
    assert table[0] == "| model | what | dtype | d = 1 | d = 0.5 | d = 0.2 | d = 0.05 |"
    assert table[2] == "| tiny | train | float32 | 1.10x |  |  | 1.90x |"
    assert table[3] == "| llama | generate | float32 |  | 1.30x |  |  |"


def test_the_table_of_first_steps_joins_time_and_memory():
    first = _row("tiny d=0.2", "1.2", benchmark="first_step")
    memory = _row("tiny d=0.2 steps", "1.01", benchmark="memory")
    line = tables.first_step_table([first, memory]).splitlines()[2]
    assert line == (
        "| tiny d=0.2 | float32 | 1.20 of dense, 2 s | rewriting 1.0 s, measuring 2.0 s | 1.010 of dense, 2 MiB |"
    )
    assert len(tables.model_table([memory]).splitlines()) == 2  # stands in one table


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gets_the_densities_that_are_measured(name):
    case = build(name)
    mst_compile.sparsify(case.model, mst_compile.Constant(0.5, growth="none"))
    assert len(mst_compile.sparsifier(case.model).weights) >= 3
    assert set_density(case.model, 1.0) == 1.0
    assert 0.15 < set_density(case.model, 0.2) < 0.25
