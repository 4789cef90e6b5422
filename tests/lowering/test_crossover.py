"""Where dense products take over: measured by Inductor's tuning, kept on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from helpers import compiled, static
from mst_compile.kernels.triton.table import dense_from
from mst_compile.lowering import crossover, device, inductor  # noqa: F401  (inductor listens to the tuner)
from pretend_gpu import pretend_h100
from torch import nn
from torch._inductor.select_algorithm import get_algorithm_selector_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

import mst_compile
from mst_compile.blocks.grid import BlockGrid


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No crossover measured yet, on a pretend GPU; yields the folder where measurements are kept."""
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(crossover._kept, "own", {})
    crossover._folder.cache_clear()
    with pretend_h100():
        yield tmp_path
    crossover._folder.cache_clear()


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
    crossover._kept.own.clear()
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
    half = torch.bfloat16
    layers = [device.Layer(grid, False, 64, half, half, bias=True, trained=True) for grid in (small, large)]
    found = [times.crossover for layer in device.of("cuda").times(layers, False) for times in layer.values()]
    assert found == [pytest.approx((0.5 + 3 * 0.2) / 4)] * 6


@pytest.mark.parametrize("text", ["[0.1, ", "", "5", '["a", 1, 2]', "[0.1, -1, 2]", "[0, 1, 1]", "[NaN, 1, 1]", "{}"])
def test_a_broken_record_is_no_error(text: str, fresh: Path) -> None:
    crossover.record(GRID, "forward", 0.1, dense=1.0, sparse=1.0)
    crossover._kept.own.clear()
    (broken,) = crossover._folder().iterdir()
    broken.write_text(text)
    estimate = crossover.of_grid(GRID)
    assert estimate == dense_from(GRID)
    crossover.record(GRID, "forward", 0.1, dense=2.0, sparse=1.0)
    assert crossover.of_grid(GRID) == pytest.approx(0.2) != estimate
    assert [json.loads(p.read_text()) for p in crossover._folder().iterdir()] == [[0.1, 2.0, 1.0]], "and no drafts stay"


def test_a_cache_that_cannot_be_written_costs_no_more_than_measuring_again(fresh: Path) -> None:
    crossover._folder().parent.joinpath(crossover._folder().name).write_text("in the way of the folder")
    crossover.record(GRID, "forward", 0.1, dense=2.0, sparse=1.0)
    assert crossover.of_grid(GRID) == pytest.approx(0.2)


def test_a_cache_in_which_others_write_is_left_alone(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MST_COMPILE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    crossover.record(GRID, "forward", 0.1, dense=2.0, sparse=1.0)
    crossover._kept.own.clear()
    assert crossover.of_grid(GRID) == pytest.approx(0.2)
    (tmp_path / "mst_compile").chmod(0o777)
    crossover._folder.cache_clear()
    assert crossover.of_grid(GRID) == dense_from(GRID)
    crossover.record(GRID, "forward", 0.1, dense=3.0, sparse=1.0)
    assert crossover.of_grid(GRID) == pytest.approx(0.3)


def test_processes_that_measure_at_the_same_time_lose_nothing_of_each_other(fresh: Path) -> None:
    """This one has looked before the other writes, and writes after it."""
    crossover.of_grid(GRID)
    mine = crossover._kept.own
    crossover._kept.own = {}
    crossover.record(GRID, "forward", 0.2, dense=2.0, sparse=1.0)  # the other
    crossover._kept.own = mine
    crossover.record(GRID, "grad-weight", 0.2, dense=4.0, sparse=2.0)
    assert crossover.of_grid(GRID) == pytest.approx(0.4)
    crossover._kept.own = {}
    assert sorted(crossover._kept.starting_with(f"{crossover._key(GRID)} ")) == [(0.2, 2.0, 1.0), (0.2, 4.0, 2.0)]


def test_times_of_one_grid_are_not_taken_for_anothers(fresh: Path) -> None:
    crossover.record(BlockGrid(256, 512, 64), "forward", 0.2, dense=1.0, sparse=1.0)
    for other in (BlockGrid(56, 512, 64), BlockGrid(256, 512, 6), BlockGrid(256, 51, 64)):
        assert not crossover._kept.starting_with(f"{crossover._key(other)} ")


# -- ranks -------------------------------------------------------------------------------------------------------------


def ranks_agree() -> None:
    """Each rank has a cache of its own, with other times in it, as on other machines."""
    rank = dist.get_rank()
    torch.cuda.get_device_name = lambda: "H100"  # type: ignore[assignment]
    small, large = BlockGrid(64, 64, 32), BlockGrid(64, 192, 32)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MST_COMPILE_CACHE_DIR"] = folder
        crossover.record(small, "forward", 0.5, dense=1.0, sparse=1.0 + rank)
        crossover.record(large, "forward", 0.5, dense=1.0, sparse=2.0 + rank)
        grids = [small, large]
        answers = [crossover.of_weights(grids)]  # nothing is tuned yet
        # One rank alone compiles a graph: nobody waits for the others.
        answers += [crossover.of_weights([large], tuned=True)] if rank == 1 else []
        alone = crossover.of_weights([large]) if rank == 1 else None
        answers = [answers[0], crossover.of_weights(grids, tuned=True)]
        # Times that come later, and a graph of the same weights that is compiled later.
        crossover.record(small, "forward", 0.5, dense=1.0, sparse=9.0 + rank)
        answers += [crossover.of_weights(grids, tuned=True), crossover.of_weights(grids)]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, answers)
    assert every[0] == every[1]
    estimate, agreed, *later = answers
    assert estimate == dense_from(small)
    own = [(1 / (1 + r) / 2 + 3 / (2 + r) / 2) / 4 for r in range(2)]
    assert agreed in [pytest.approx(x) for x in own], "what one of them has measured"
    assert later == [agreed, agreed]
    assert alone in (None, pytest.approx(1 / 3 / 2)), "its own: it has asked first"


def test_ranks_agree_and_none_waits_for_another(tmp_path: Path) -> None:
    assert ranks.run([ranks_agree], 2, tmp_path) == {"ranks_agree": ""}


def test_ranks_whose_store_keeps_nothing_take_the_estimate(fresh: Path) -> None:
    """As where ranks are pretended: what cannot be agreed on must not differ."""
    crossover.record(GRID, "forward", 0.2, dense=2.0, sparse=1.0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        assert crossover.of_weights([GRID], tuned=True) == dense_from(GRID)
    finally:
        dist.destroy_process_group()
    assert crossover.of_weights([GRID], tuned=True) == pytest.approx(0.4)


# -- the backend -------------------------------------------------------------------------------------------------------


def test_inductor_tells_us_what_it_has_tuned() -> None:
    assert crossover.from_tuning in get_algorithm_selector_cache().feedback_saver_fns


@pytest.mark.parametrize(("threshold", "sparse"), [(0.45, False), (0.55, True)])
def test_the_backend_asks_for_the_crossover(threshold: float, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[BlockGrid], bool]] = []

    def times(layers: Any, tuned: bool) -> list[device.LayerTimes]:
        seen.append(([layer.grid for layer in layers], tuned))
        return [device.at_crossover(layer, threshold) for layer in layers]

    monkeypatch.delenv("MST_COMPILE_DENSE_THRESHOLD")
    monkeypatch.setitem(device._records, "cpu", dataclasses.replace(device.of("cpu"), times=times, chooses=False))
    model = mst_compile.sparsify(nn.Linear(128, 64), static(0.5), block=16)
    fast = compiled(model)
    fast(torch.randn(2, 128))  # while it compiles both kinds are seen
    with torch.profiler.profile() as profile:
        fast(torch.randn(2, 128))
    ran = [event.key for event in profile.key_averages()]
    assert any("mst::linear" in key for key in ran) == sparse
    assert seen == [([BlockGrid(64, 128, 16)], False), ([BlockGrid(64, 128, 16)], sparse)]
