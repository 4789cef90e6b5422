"""The density above which a dense product is faster than ours.

It is measured: when Inductor tunes a product, it times our tiles and the dense product side by side on the
user's machine, at the density that training will mostly run at (:mod:`mst_compile.lowering.tuning`). The time of a
sparse product is at most proportional to its density, so ``density * dense time / sparse time`` is a density up to
which sparse is certain to win. What was measured is kept on disk, since compiled code that comes out of Inductor's
cache is not tuned again. Where nothing has been measured yet an estimate from arithmetic intensity serves; it decides
no more than when the sparse kernels are compiled, and so measured, first.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from mst_compile.kernels.cpu.build import cache_dir

from mst_compile.blocks.grid import BlockGrid

_ESTIMATE = {128: 0.6, 64: 0.5, 32: 0.35}

# (rows, cols, block) -> product, dtype and tokens -> (density, seconds dense, seconds of the fastest sparse tile)
_Times = dict[str, dict[str, tuple[float, float, float]]]


def record(grid: BlockGrid, product: str, density: float, dense: float, sparse: float) -> None:
    """Keep the times (any unit) of one product at ``density``; later ones of the same ``product`` replace it."""
    if not all(math.isfinite(t) and t > 0 for t in (dense, sparse)):
        return
    times = _load()
    times.setdefault(_key(grid), {})[product] = (density, dense, sparse)
    with contextlib.suppress(OSError):  # a read-only cache costs no more than measuring again
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(times))
        draft.replace(path)


def of_grid(grid: BlockGrid) -> float:
    """Crossover density of the three products of weights on ``grid`` on this machine's GPU, in (0, 1]."""
    products = _load().get(_key(grid), {}).values()
    if not products:
        return _ESTIMATE.get(grid.block, min(_ESTIMATE.values()))
    at_one = sum(sparse / density for density, _, sparse in products)
    return min(1.0, sum(dense for _, dense, _ in products) / at_one)


def of_weights(grids: Iterable[BlockGrid]) -> float:
    """Crossover density of a graph with weights on ``grids``, by their sizes."""
    sizes = [(g.rows * g.cols, of_grid(g)) for g in grids]
    return sum(n * d for n, d in sizes) / max(1, sum(n for n, _ in sizes))


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
    return f"{grid.rows}x{grid.cols}/{grid.block}"


@functools.cache
def _load() -> _Times:
    try:
        return json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def _path() -> Path:
    """One file a GPU model, PyTorch version and version of the kernels: another one's times would mislead."""
    digest = hashlib.sha256(f"{torch.cuda.get_device_name()} {torch.__version__}".encode())
    for folder in (Path(__file__).parent, Path(__file__).parent.parent / "kernels" / "triton"):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return cache_dir() / f"crossover-{digest.hexdigest()[:16]}.json"
