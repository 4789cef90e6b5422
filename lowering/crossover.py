"""The density above which a dense product is faster than ours, measured.

When Inductor tunes a product, it times our tiles and the dense product side by side on the user's machine, at the
density that training will mostly run at. The time of a sparse product is at most proportional to its density, so
``density * dense time / sparse time`` is a density up to which sparse is certain to win. What was measured is kept on
disk, since compiled code that comes out of Inductor's cache is not tuned again. Where nothing has been measured yet an
estimate from arithmetic intensity serves; it decides no more than when the sparse kernels are compiled, and so
measured, first.

The ranks of one run agree: where one multiplied dense and another sparse, they would wait for each other at every step,
and compile at different times.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mst_compile.kernels.cpu.folder import open_cache_dir
from torch._inductor.custom_graph_pass import get_hash_for_files

from mst_compile.blocks.grid import BlockGrid

_ESTIMATE = {128: 0.6, 64: 0.5, 32: 0.35}

_Times = tuple[float, float, float]  # density, seconds dense, seconds of the fastest sparse tile
# What this process has measured, for a cache that cannot be written: name of its file -> times.
_measured: dict[str, _Times] = {}
_agreed: dict[str, float] = {}  # question -> what the ranks agreed on


def record(grid: BlockGrid, product: str, density: float, dense: float, sparse: float) -> None:
    """Keep the times (any unit) of one product at ``density``; later ones of the same ``product`` replace it."""
    if not all(math.isfinite(t) and t > 0 for t in (dense, sparse)):
        return
    # A file a product: processes that measure at the same time lose nothing of each other's, without a lock.
    name = f"{_key(grid)} {product}.json"
    _measured[name] = density, dense, sparse
    with contextlib.suppress(OSError):
        _folder().mkdir(mode=0o700, exist_ok=True)
        draft = _folder() / f"{name}.{os.getpid()}"
        draft.write_text(json.dumps(_measured[name]))
        draft.replace(_folder() / name)


def of_grid(grid: BlockGrid) -> float:
    """Crossover density of the three products of weights on ``grid`` on this machine's GPU, in (0, 1]."""
    products = _times(grid)
    if not products:
        return _estimate(grid)
    at_one = sum(sparse / density for density, _, sparse in products)
    return min(1.0, sum(dense for _, dense, _ in products) / at_one)


def of_weights(grids: Sequence[BlockGrid], tuned: bool = False) -> float:
    """Crossover density of a graph with weights on ``grids``, by their sizes; the same on all ranks.

    Args:
        tuned: whether a variant of the graph with sparse products has been compiled.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return _mean((g, of_grid(g)) for g in grids)
    # Times differ between ranks, and files between machines. The first rank to ask answers for all, through the group's
    # key-value store. Unlike a collective that waits for nobody, so it cannot block ranks that compile at different
    # times, or a graph that one rank alone runs. The answer stands for the whole run: whoever refreshed it would part
    # from those that asked before. Until tuning has had its chance (at the same call on each rank: all run the same
    # variants until then) the estimate serves, which is the same everywhere.
    estimate = _mean((g, _estimate(g)) for g in grids)
    question = ",".join(map(_key, grids))
    if tuned and question not in _agreed:
        store = dist.distributed_c10d._get_default_store()
        try:
            answer = store.compare_set(f"mst_compile/{question}", "", repr(_mean((g, of_grid(g)) for g in grids)))
        except RuntimeError:  # a store that cannot, as those that pretend ranks; then no rank's can
            return estimate
        _agreed[question] = float(answer)
    return _agreed.get(question, estimate)


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


def _estimate(grid: BlockGrid) -> float:
    return _ESTIMATE.get(grid.block, min(_ESTIMATE.values()))


def _mean(densities: Iterable[tuple[BlockGrid, float]]) -> float:
    sizes = [(grid.rows * grid.cols, density) for grid, density in densities]
    return sum(n * d for n, d in sizes) / max(1, sum(n for n, _ in sizes))


def _times(grid: BlockGrid) -> list[_Times]:
    """What this and other processes have measured, read anew: graphs are compiled rarely."""
    prefix = f"{_key(grid)} "
    found = {name: times for name, times in _measured.items() if name.startswith(prefix)}
    with contextlib.suppress(OSError):
        for file in sorted(_folder().glob(f"{prefix}*.json")):
            times = _read(file)
            if times is not None:
                found[file.name] = times
    return list(found.values())


def _read(file: Path) -> _Times | None:
    """The times in a file, or None if it holds anything else, as when it was cut off."""
    try:
        density, dense, sparse = json.loads(file.read_text())
        times = float(density), float(dense), float(sparse)
    except (OSError, ValueError, TypeError):
        return None
    return times if all(math.isfinite(number) and number > 0 for number in times) else None


@functools.cache
def _folder() -> Path:
    """One folder a GPU model, PyTorch version and version of the kernels: another one's times would mislead."""
    ours = (Path(__file__).parent, Path(__file__).parent.parent / "kernels" / "triton")
    files = sorted(str(f) for folder in ours for f in folder.rglob("*") if f.suffix in (".py", ".jinja"))
    digest = get_hash_for_files(tuple(files), f"{torch.cuda.get_device_name()} {torch.__version__}")
    return open_cache_dir() / f"crossover-{digest.hex()[:16]}"
