"""Forecasts as decisions: dense against sparse, other machines, ranks, money, and what does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Blocks
from torch import nn
from training import STEPS, batches, fresh, loss_of

import mst_compile
from benchmarks import hardware as derived
from benchmarks.ledger import LEDGER
from mst_compile import Constant, Forecast, MixedSparsity, sparsifier
from mst_compile.communication import ActiveBlocks
from mst_compile.cost import hardware_table
from mst_compile.cost.decision import disagreement, eaten
from mst_compile.cost.forecast import GRADIENT, MOVE, MOVE_REST
from mst_compile.cost.forecast import STEPS as COUNT
from mst_compile.cost.rates import Rates
from mst_compile.errors import ForecastError

ROOT = Path(__file__).resolve().parents[2]
ROWS = 16


def wide(layers: int = 2, width: int = 1024) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])


def text(found: Forecast) -> str:
    return " ".join(str(found).split())


# -- the table of machines ---------------------------------------------------------------------------------------------


def test_the_table_is_what_the_ledger_says() -> None:
    assert LEDGER.exists()
    assert {name: derived.derive(name) for name in derived.CARDS} == hardware_table.MEASURED
    assert set(hardware_table.BANDWIDTH) <= set(hardware_table.MEASURED)


class Shapes(nn.Module):
    """The linear layers of GPT-2 small."""

    def __init__(self, width: int = 768, depth: int = 12, vocabulary: int = 50304) -> None:
        super().__init__()
        sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        self.layers = nn.ModuleList(nn.Linear(*size, bias=False) for _ in range(depth) for size in sizes)
        self.head = nn.Linear(width, vocabulary, bias=False)


def test_the_step_that_was_measured_comes_out_of_its_estimate() -> None:
    """GPT-2 small on an H100, .90x: nothing but the products is fitted to it, and these come from single layers."""
    step = hardware_table.MEASURED["H100"]["step"]
    with torch.device("cpu"):
        model = Shapes()
    tokens = step["tokens"]
    found = mst_compile.forecast(
        model, Constant(0.9, growth="none"), block=32, tokens=tokens, tokens_per_step=tokens, hardware="H100"
    )
    assert found.dense_seconds == pytest.approx(step["dense_s"], rel=0.05)
    assert found.decision.speedup == pytest.approx(step["dense_s"] / step["sparse_s"], rel=0.05)
    assert "sparse training would take longer" in text(found)
    assert "estimate, not measured here: rates of other models on H100" in text(found)


def test_wide_layers_are_faster_there_and_denser_ones_less_so() -> None:
    def speedup(sparsity: float, **options: Any) -> float:
        schedule = Constant(sparsity, growth="none")
        found = mst_compile.forecast(
            wide(1, 4096), schedule, tokens=2**24, tokens_per_step=2**16, hardware="H100", **options
        )
        assert found.decision.speedup is not None
        return found.decision.speedup

    assert speedup(0.9, block=128) > speedup(0.9) > speedup(0.8) > 1
    assert speedup(0.5) < speedup(0.8)


def test_blocks_without_rates_are_refused() -> None:
    with pytest.raises(ForecastError, match=r"blocks of 32, 64, 128, and 0.weight has blocks of 8: pass block=64"):
        mst_compile.forecast(wide(1), Constant(0.5), block=8, tokens=80, tokens_per_step=8, hardware="H100")


def test_an_unknown_machine_is_told_which_there_are() -> None:
    with pytest.raises(ForecastError, match=r"hardware='A100' has no measured rates; there are some of 'H100'"):
        mst_compile.forecast(Blocks(), Constant(0.5), tokens=80, tokens_per_step=8, hardware="A100")


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_move_what_the_hook_moves() -> None:
    """Bytes of a step, by the blocks that :class:`ActiveBlocks` would read; a ring moves them 2 (n - 1) / n times."""
    schedule = MixedSparsity(STEPS)
    model = mst_compile.sparsify(wide(), schedule)
    options: dict[str, Any] = {"tokens": STEPS * 64, "tokens_per_step": 64, "hardware": "H100"}
    plain = mst_compile.sparsify(wide(), schedule, block=64)
    one = mst_compile.forecast(plain, **options)
    four = mst_compile.forecast(plain, **options, ranks=4, bandwidth=1e6)
    moved = [w for w, p in sparsifier(plain).parameters() if ActiveBlocks()._blocks_of(p) is not None]
    assert len(moved) == 2
    phase = four.phases[0]
    assert phase.values[MOVE] == pytest.approx(2 * 3 / 4 * 4 / 1e6)
    assert phase.values[MOVE_REST] == 0
    assert one.phases[0].values[MOVE] == 0
    active = sum(w.active for w, _ in sparsifier(plain).parameters())
    assert phase.values[GRADIENT] >= active
    assert four.seconds is not None
    assert four.dense_seconds is not None
    spent = sum(p.values[COUNT] * p.values[GRADIENT] * p.values[MOVE] for p in four.phases)
    assert four.seconds > spent > 0.9 * four.seconds  # at a megabyte a second
    assert four.dense_seconds > STEPS * 6e-6 * 2 * 1024**2 > spent
    assert "estimate: 4 ranks" in text(four)
    assert "(as given)" in text(four)
    assert four.flops == one.flops
    with pytest.raises(ForecastError, match="ranks=2 need bandwidth="):
        mst_compile.forecast(model, tokens=80, tokens_per_step=8, ranks=2)


def test_ranks_without_a_bandwidth_take_the_data_sheets_and_say_so() -> None:
    found = mst_compile.forecast(wide(), Constant(0.8), tokens=80, tokens_per_step=8, hardware="H100", ranks=8)
    assert "450 GB/s (NVIDIA's data sheet" in text(found)


# -- what is said ------------------------------------------------------------------------------------------------------


def with_rates(rates: Rates, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Forecast:
    monkeypatch.setattr("mst_compile.cost.forecast.measure", lambda *_, **__: rates)
    model, x = fresh(MixedSparsity(STEPS)), next(batches())
    given = {"tokens": STEPS * ROWS, "tokens_per_step": ROWS, "loss": lambda: loss_of(model, x)} | options
    return mst_compile.forecast(model, **given)


def test_dense_against_sparse_in_seconds_and_money(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 60 s fixed, dense 3600 s, half a minute of optimizer."""
    rates = Rates(60.0, 1e-3, 0.0, 100.0, 3600.0, 1.0, 30.0, 0.0)
    found = with_rates(rates, monkeypatch, price_per_hour=2)
    decision = found.decision
    assert found.dense_seconds == pytest.approx(STEPS * 3630)
    assert decision.dense_cost == pytest.approx(STEPS * 3630 / 3600 * 2)
    assert found.seconds is not None
    assert decision.cost == pytest.approx(found.seconds / 3600 * 2)
    assert decision.limit == pytest.approx(3630 / 90)
    assert decision.limit_in_seconds
    assert decision.notes == ()
    assert f"cost: dense {decision.dense_cost:.2f}, sparse {decision.cost:.2f}" in text(found)
    assert "seconds are: measured here" in text(found)
    assert "estimate" not in text(found)
    assert max(map(len, str(found).splitlines())) <= 100


def test_a_rest_that_eats_the_gain_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = sum(p.numel() for p in Blocks().parameters() if p.dim() == 2)
    slow = Rates(8.0, 2.0 / numbers, 0.0, 9.5, 10.0, 1.0, 0.0, 0.0)
    found = with_rates(slow, monkeypatch).decision
    assert found.limit == pytest.approx(10 / 8)
    assert found.notes[0].startswith("the rest of a step eats the gain")
    slower = Rates(11.0, 2.0 / numbers, 0.0, 9.5, 10.0, 1.0, 0.0, 0.0)
    assert "would take longer than dense" in with_rates(slower, monkeypatch).decision.notes[0]


def test_flops_alone_say_what_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 512, bias=False))
    found = mst_compile.forecast(model, MixedSparsity(10), exclude="1.*", tokens=80, tokens_per_step=8)
    assert found.decision.limit == pytest.approx(9 / 8)
    assert not found.decision.limit_in_seconds
    assert found.decision.seconds is found.decision.cost is None
    assert "what stays dense limits a step to 1.12x" in text(found)


def test_where_nothing_stays_dense_no_limit_is_told() -> None:
    found = text(mst_compile.forecast(wide(), MixedSparsity(100), tokens=6400, tokens_per_step=64))
    assert "limit (Amdahl, by FLOPs): none, since nothing was counted beside" in found
    assert "infx" not in found


def test_tokens_that_are_another_number_of_steps_are_told() -> None:
    long = mst_compile.forecast(Blocks(), MixedSparsity(20_000), tokens=226_141 * 8, tokens_per_step=8)
    (note,) = long.decision.notes
    assert "226141 steps of 8 tokens, the schedule has 20000; 206141 steps (91%) run after" in note
    assert "Take total_steps=226141, or tokens=160000" in note
    assert f"NOTE: {note}" in text(long)
    short = mst_compile.forecast(Blocks(), MixedSparsity(20_000), tokens=10_000 * 8, tokens_per_step=8)
    assert "the run ends 10000 steps before the schedule does" in short.decision.notes[0]
    fits = mst_compile.forecast(Blocks(), MixedSparsity(20_000), tokens=20_000 * 8 - 3, tokens_per_step=8)
    assert fits.decision.notes == ()
    assert disagreement(5, None, 8) == []  # a schedule without an end


@pytest.mark.parametrize(
    ("ratio", "speedup", "said"), [(3, 2.5, None), (3, 1.5, "eats"), (3, 1.02, "next to no"), (3, 0.9, "longer")]
)
def test_the_gain_is_judged_by_what_flops_promise(ratio: float, speedup: float, said: str | None) -> None:
    found = eaten(ratio, speedup, 4.0)
    assert (not found) if said is None else said in found[0]


def test_a_price_needs_seconds() -> None:
    with pytest.raises(ForecastError, match="price_per_hour=3 needs seconds: pass loss"):
        mst_compile.forecast(Blocks(), Constant(0.5), tokens=80, tokens_per_step=8, price_per_hour=3)


def test_the_readmes_example_works_as_printed() -> None:
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", (ROOT / "README.md").read_text(), re.M | re.S)
    (example,) = [block.strip() for block in blocks if "forecast(" in block]
    printed: list[str] = []
    schedule = MixedSparsity(total_steps=20_000)  # as in the example before it
    names = {"mst_compile": mst_compile, "model": wide(), "schedule": schedule}
    exec(example, names | {"print": lambda found: printed.append(text(found))})
    assert "cost: dense" in printed[0]
    assert "plateau" in printed[0]
    assert "disagree" not in printed[0]
