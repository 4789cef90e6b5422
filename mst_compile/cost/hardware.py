"""Estimate how fast a model would train on a machine that is not at hand, from rates measured there on other models."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mst_compile.cost.hardware_table import BANDWIDTH, MEASURED
from mst_compile.cost.rates import Rates
from mst_compile.errors import ForecastError
from mst_compile.rules.checks import shown
from mst_compile.rules.density import active_count
from mst_compile.state.selection import is_linear
from mst_compile.state.sparsifier import Sparsifier
from mst_compile.state.weight import SparseWeight

_DEFAULT_BLOCK = 64  # of sparsify on NVIDIA GPUs
_GRID = 200  # densities that are tried for where dense products overtake


def table_of(hardware: object) -> dict[str, Any]:
    """What was measured on ``hardware``.

    Raises:
        ForecastError: there are no rates of that name.
    """
    if not isinstance(hardware, str) or hardware not in MEASURED:
        raise ForecastError(
            f"hardware={shown(hardware)} has no measured rates; there are some of {', '.join(map(repr, MEASURED))}. "
            "Leave it out and pass loss to have this machine measured"
        )
    found: dict[str, Any] = MEASURED[hardware]
    return found


def default_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``sparsify`` as they are by default on that hardware."""
    return {"block": _DEFAULT_BLOCK} | options


def bandwidth_of(hardware: str | None) -> tuple[float, str] | None:
    """Bytes a second that each rank sends, and who says so; None where the table has nothing."""
    return None if hardware is None else BANDWIDTH.get(hardware)


def estimate(model: nn.Module, own: Sparsifier, hardware: str, tokens: int) -> Rates:
    """Rates of ``model`` on ``hardware``, of ``tokens`` tokens a step and rank.

    Products by the nearest layer that was measured; what is not in products of linear layers as in the step that was
    measured, in proportion to tokens and to rows and columns of linear weights; and what a sparse step took besides, in
    proportion to the number of sparse weights.

    Raises:
        ForecastError: a block of the model was not measured there.
    """
    table = table_of(hardware)
    weights = list(own.weights.values())
    _check_stacks(hardware, weights)
    _check_blocks(hardware, table, weights)
    step = table["step"]
    beside = (step["dense_s"] - step["dense_products_s"]) / (step["tokens"] * step["features"])
    more = step["sparse_s"] - step["sparse_products_s"] - (step["dense_s"] - step["dense_products_s"])
    linear = [m.weight for m in model.modules() if is_linear(m) and isinstance(m.weight, Tensor)]
    shapes = [tuple(weight.shape) for weight in linear]
    sparse_shapes = {(w.grid.rows, w.grid.cols) for w in weights}
    shapes += [shape for shape in sparse_shapes if shape not in shapes]
    other = beside * tokens * sum(map(sum, shapes))
    dense = [_dense_seconds(table, (w.grid.rows, w.grid.cols), tokens) for w in weights]
    rest = sum(_dense_seconds(table, shape, tokens) for shape in shapes) - sum(dense)
    other += max(0.0, rest)
    extra = max(0.0, more) / step["weights"] * len(weights)

    def products(sparsity: float, grad_weight: bool = False) -> float:
        shares = (_share(table, w, d, grad_weight) for w, d in zip(weights, _densities(own, sparsity), strict=True))
        return sum(seconds * share for seconds, share in zip(dense, shares, strict=True))

    def active(sparsity: float) -> float:
        return sum(w.numel * d for w, d in zip(weights, _densities(own, sparsity), strict=True))

    threshold = _threshold(own, products, sum(dense))
    top = own.schedule.max_sparsity
    middle = min(top, 1 - 0.9 * threshold)
    span = active(middle) - active(top)
    per_element = max(0.0, (products(middle) - products(top)) / span) if span > 0 else 0.0
    whole = sum(w.numel for w in weights)
    all_gradients = sum(
        s * _layer(table, (w.grid.rows, w.grid.cols))["grad_weight"] for s, w in zip(dense, weights, strict=True)
    )
    more_gradient = max(0.0, all_gradients - products(top, True)) / max(1.0, whole - active(top))
    fixed = other + extra + products(top) - per_element * active(top)
    whole_step = other + sum(dense)  # both under Inductor, by the library's products
    by = "as Inductor runs it"
    return Rates(fixed, per_element, more_gradient, whole_step, whole_step, threshold, 0.0, 0.0, baseline_is=by)


def _check_stacks(hardware: str, weights: Sequence[SparseWeight]) -> None:
    stack = next((w for w in weights if w.stacked), None)
    if stack is not None:
        raise ForecastError(
            f"{hardware} has no measured rates for stacks of matrices, as of experts, and {stack.name} is one of shape "
            f"{stack.shape}: forecast on the machine itself (loss=...), or name the stacks in exclude"
        )


def _check_blocks(hardware: str, table: dict[str, Any], weights: Sequence[SparseWeight]) -> None:
    known = sorted(table["layers"][0]["sparse"])
    bad = next((w for w in weights if w.grid.block not in known and not _shrunk_here(w, known)), None)
    if bad is not None:
        raise ForecastError(
            f"{hardware} has measured rates for blocks of {', '.join(map(str, known))}, and {bad.name} has blocks of "
            f"{bad.grid.block}: pass block=64 ({_DEFAULT_BLOCK} is the default there); a layer too narrow for such "
            "blocks at this sparsity can be named in exclude"
        )


def _shrunk_here(weight: SparseWeight, known: Sequence[int]) -> bool:
    """Whether a block is finer because of the device that the weight is on: the other one shrinks no further than to
    the finest block that it has kernels for."""
    asked = re.match(r"block (\d+) -> ", weight.note)
    return asked is not None and int(asked[1]) in known and weight.grid.block < known[0]


def _layer(table: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The measured layer whose shorter side is nearest."""
    return min(table["layers"], key=lambda layer: abs(math.log(min(layer["shape"][1:]) / max(1, min(shape)))))


def _dense_seconds(table: dict[str, Any], shape: tuple[int, ...], tokens: int) -> float:
    layer = _layer(table, shape)
    return float(layer["dense_s"] * math.prod(shape) * tokens / math.prod(layer["shape"]))


def _share(table: dict[str, Any], weight: SparseWeight, density: float, grad_weight: bool) -> float:
    """Seconds at ``density``, as a share of the dense products', which run where they are faster; between measured
    densities on a line, below the lowest as there."""
    layer = _layer(table, (weight.grid.rows, weight.grid.cols))
    points = [
        (point[0], point[2 if grad_weight else 1])
        for point in layer["sparse"][max(weight.grid.block, min(layer["sparse"]))]
    ]
    limit = layer["grad_weight"] if grad_weight else 1.0
    if density <= points[0][0]:
        return float(min(limit, points[0][1]))
    (low, a), (high, b) = next(
        (pair for pair in itertools.pairwise(points) if density <= pair[1][0]), (points[-2], points[-1])
    )
    return float(min(limit, a + (b - a) * (density - low) / (high - low)))


def _densities(own: Sparsifier, sparsity: float) -> list[float]:
    """Of each weight, by whole blocks."""
    return [
        active_count(density, w.grid.matrix.blocks, w.blocks_at(0.0)) / w.grid.matrix.blocks
        for density, w in zip(own.densities(sparsity), own.weights.values(), strict=True)
    ]


def _threshold(own: Sparsifier, products: Any, dense: float) -> float:
    """Density from which sparse products take as long as dense ones; 1 where they never do."""
    for i in range(1, _GRID):
        if products(1 - i / _GRID) >= dense * (1 - 1e-9):
            return i / _GRID
    return 1.0
