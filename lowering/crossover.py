"""The density above which a dense product is faster than ours, measured.

When Inductor tunes a product (``mode="max-autotune"``), it times our tiles and the dense product side by side on the
user's machine, at the density that training will mostly run at. The time of a sparse product is at most proportional to
its density, so ``density * dense time / sparse time`` is a density up to which sparse is certain to win. What was
measured is kept on disk, since compiled code that comes out of Inductor's cache is not tuned again. Where nothing has
been measured, what was on an H100 serves (:func:`mst_compile.kernels.triton.table.dense_from`).

The ranks of one run agree, see :mod:`mst_compile.lowering.agreement`.

Products with stacks of matrices are not timed beside dense ones: the library's grouped product takes bfloat16 alone,
and leaves rows of no group as they were. For them a bound by arithmetic serves
(:func:`mst_compile.kernels.triton.table.grouped_shares`), which is the same on all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from mst_compile.kernels.triton.table import dense_from
from torch._inductor.custom_graph_pass import get_hash_for_files

from mst_compile.blocks.grid import BlockGrid

from .agreement import first_answer, given_answer, several_ranks
from .measured import Measurements, cache_folder, say_not_kept


def record(grid: BlockGrid, product: str, density: float, dense: float, sparse: float) -> None:
    """Keep the times (any unit) of one product at ``density``; later ones of the same ``product`` replace it."""
    _kept.record(f"{_key(grid)} {product}", (density, dense, sparse))


def of_grid(grid: BlockGrid) -> float:
    """Crossover density of the three products of weights on ``grid`` on this machine's GPU, in (0, 1]."""
    products = _kept.starting_with(f"{_key(grid)} ")
    if not products:
        return dense_from(grid)
    at_one = sum(sparse / density for density, _, sparse in products)
    return min(1.0, sum(dense for _, dense, _ in products) / at_one)


def of_weights(grids: Sequence[BlockGrid], tuned: bool = False) -> float:
    """Crossover density of a graph with weights on ``grids``, by their sizes; the same on all ranks.

    Args:
        tuned: whether a variant of the graph with sparse products has been compiled.
    """
    if not several_ranks():
        return _mean((g, of_grid(g)) for g in grids)
    # Until tuning has had its chance (at the same call on each rank: all run the same variants until then) the estimate
    # serves, which is the same everywhere.
    question = ",".join(map(_key, grids))
    if tuned:
        answer = first_answer(question, lambda: repr(_mean((g, of_grid(g)) for g in grids)))
    else:
        answer = given_answer(question)
    return _mean((g, dense_from(g)) for g in grids) if answer is None else float(answer)


def from_tuning(timings: dict[Any, float], *_: Any) -> None:
    """Feedback function for Inductor's autotuner; picks out the products that the lowering has marked."""
    marked = next((c.mst_product for c in timings if hasattr(c, "mst_product")), None)
    if marked is None:
        return
    own = [t for c, t in timings.items() if hasattr(c, "mst_product")]
    dense = [t for c, t in timings.items() if not hasattr(c, "mst_product")]
    if own and dense:
        grid, product, density = marked
        record(grid, product, density, min(dense), min(own))


def _key(grid: BlockGrid) -> str:
    return f"{grid.rows}x{grid.cols}-{grid.block}"


def _mean(densities: Iterable[tuple[BlockGrid, float]]) -> float:
    sizes = [(grid.rows * grid.cols, density) for grid, density in densities]
    return sum(n * d for n, d in sizes) / max(1, sum(n for n, _ in sizes))


@functools.cache
def _folder() -> Path:
    """One folder a GPU model, PyTorch version and version of the kernels: another one's times would mislead."""
    ours = (Path(__file__).parent, Path(__file__).parent.parent / "kernels" / "triton")
    files = sorted(str(f) for folder in ours for f in folder.rglob("*") if f.suffix in (".py", ".jinja"))
    digest = get_hash_for_files(tuple(files), f"{torch.cuda.get_device_name()} {torch.__version__}")
    return cache_folder(f"crossover-{digest.hex()[:16]}")


# density, seconds dense, seconds of the fastest sparse tile
_kept = Measurements(lambda: _folder(), 3, say_not_kept)
