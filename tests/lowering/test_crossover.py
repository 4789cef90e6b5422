"""Where dense products take over: measured by Inductor's tuning, kept on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compiled, static
from mst_compile.lowering import crossover, device
from pretend_gpu import pretend_h100
from torch import nn
from torch._inductor.select_algorithm import get_algorithm_selector_cache

import mst_compile
from mst_compile.blocks.grid import BlockGrid


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No crossover measured yet, on a pretend GPU; yields the folder where measurements are kept."""
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path))
    caches = (crossover._load, crossover._path)
    for cache in caches:
        cache.cache_clear()
    with pretend_h100():
        yield tmp_path
    for cache in caches:
        cache.cache_clear()


GRID = BlockGrid(256, 512, 64)


def test_crossover_is_measured_by_tuning(fresh: Path) -> None:
    estimate = crossover.of_grid(GRID)
    assert 0 < estimate < 1

    class Choice:
        def __init__(self, product: str | None = None) -> None:
            if product:
                self.mst_product = GRID, product, 0.2

    # At density 0.2 sparse takes 1 + 2 against 2 + 4 dense: with twice the density they would be as fast.
    crossover.from_tuning({Choice("forward"): 1.0, Choice("forward"): 1.5, Choice(): 2.0}, "mst_linear")
    crossover.from_tuning({Choice("grad-weight"): 2.0, Choice(): 4.0}, "mst_grad_weight")
    assert crossover.of_grid(GRID) == pytest.approx(0.4)
    # A foreign question, and one where a side failed, change nothing.
    crossover.from_tuning({Choice(): 1.0}, "mm")
    crossover.from_tuning({Choice("forward"): float("inf"), Choice(): 2.0}, "mst_linear")
    assert crossover.of_grid(GRID) == pytest.approx(0.4)
    # Another process reads what this one has measured.
    crossover._load.cache_clear()
    assert crossover.of_grid(GRID) == pytest.approx(0.4)
    # Sparse so slow that dense always wins, sparse so fast that it never does.
    crossover.record(BlockGrid(64, 64, 32), "forward", 0.2, dense=1.0, sparse=100.0)
    assert crossover.of_grid(BlockGrid(64, 64, 32)) == pytest.approx(0.002)
    crossover.record(BlockGrid(64, 128, 32), "forward", 0.2, dense=100.0, sparse=1.0)
    assert crossover.of_grid(BlockGrid(64, 128, 32)) == 1.0


def test_crossover_of_several_weights_counts_their_sizes(fresh: Path) -> None:
    small, large = BlockGrid(64, 64, 32), BlockGrid(64, 192, 32)
    crossover.record(small, "forward", 0.5, dense=1.0, sparse=1.0)
    crossover.record(large, "forward", 0.5, dense=1.0, sparse=2.5)
    assert device.of("cuda").crossover([small, large]) == pytest.approx((0.5 + 3 * 0.2) / 4)
    assert device.of("cpu").crossover([small, large]) == 0.8


def test_a_broken_record_is_no_error(fresh: Path) -> None:
    crossover._path().write_text('{"256x512/64": ')
    crossover._load.cache_clear()
    estimate = crossover.of_grid(GRID)
    crossover.record(GRID, "forward", 0.1, dense=2.0, sparse=1.0)
    assert crossover.of_grid(GRID) == pytest.approx(0.2) != estimate
    assert json.loads(crossover._path().read_text())
    assert [p.name for p in fresh.iterdir()] == [crossover._path().name], "no drafts stay behind"


def test_inductor_tells_us_what_it_has_tuned() -> None:
    assert crossover.from_tuning in get_algorithm_selector_cache().feedback_saver_fns


@pytest.mark.parametrize(("threshold", "sparse"), [(0.45, False), (0.55, True)])
def test_the_backend_asks_for_the_crossover(threshold: float, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[BlockGrid]] = []

    def of_weights(grids: Any) -> float:
        seen.append(list(grids))
        return threshold

    monkeypatch.setitem(device._records, "cpu", dataclasses.replace(device.of("cpu"), crossover=of_weights))
    model = mst_compile.sparsify(nn.Linear(128, 64), static(0.5), block=16)
    fast = compiled(model)
    fast(torch.randn(2, 128))  # while it compiles both kinds are seen
    with torch.profiler.profile() as profile:
        fast(torch.randn(2, 128))
    ran = [event.key for event in profile.key_averages()]
    assert any("mst::linear" in key for key in ran) == sparse
    assert [BlockGrid(64, 128, 16)] in seen
