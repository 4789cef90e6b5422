"""How many blocks of each layer are active: densities over the layers, and counts of blocks. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from .checks import check_sparsity


def uniform(shapes: Sequence[tuple[int, int]], sparsity: float, _: Sequence[int] | None = None) -> list[float]:
    """The same density, ``1 - sparsity``, for each layer."""
    return [1.0 - sparsity] * len(shapes)


def erdos_renyi(shapes: Sequence[tuple[int, int]], sparsity: float, counts: Sequence[int] | None = None) -> list[float]:
    """Density of each layer proportional to ``(rows + cols) / (rows * cols)``, ``1 - sparsity`` over all elements.

    Layers whose density would exceed 1 are kept dense and the others are scaled again (SET, arXiv 1707.04780;
    as in the reference implementation of Mixed Sparsity Training). There are ``counts`` matrices of each shape; one if
    None.
    """
    counts = counts or [1] * len(shapes)
    dense: set[int] = set()
    sizes = [n * r * c for n, (r, c) in zip(counts, shapes, strict=True)]
    total = sum(sizes)
    while True:
        budget = (1.0 - sparsity) * total - sum(sizes[i] for i in dense)
        rest = {i: (r + c) / (r * c) for i, (r, c) in enumerate(shapes) if i not in dense}
        if not rest:
            return [1.0] * len(shapes)
        scale = budget / sum(counts[i] * (shapes[i][0] + shapes[i][1]) for i in rest)
        if scale * max(rest.values()) <= 1.0:
            return [1.0 if i in dense else scale * rest[i] for i in range(len(shapes))]
        top = max(rest.values())
        dense |= {i for i, raw in rest.items() if raw == top}


# A linear layer is a convolution of 1 x 1: the kernel's variant (ERK, arXiv 1911.11134) is the same.
DISTRIBUTIONS = {"erdos-renyi": erdos_renyi, "erdos-renyi-kernel": erdos_renyi, "uniform": uniform}


def layer_densities(
    shapes: Sequence[tuple[int, int]],
    sparsity: float,
    distribution: str,
    overrides: Sequence[float | None],
    max_sparsity: float,
    counts: Sequence[int] | None = None,
) -> list[float]:
    """Target density of each layer, of which there are ``counts``, as of the matrices of a stack; one if None.

    Layers with an override have that sparsity when the schedule is at ``max_sparsity``, and the same share of it as
    the schedule has of its own at other times. The others meet ``sparsity`` among themselves.

    Raises:
        ScheduleError: ``sparsity`` is no share of zeros, below 1, as of a schedule that cannot be checked beforehand.
    """
    sparsity = check_sparsity("sparsity", sparsity)
    free = [i for i, override in enumerate(overrides) if override is None]
    counts = counts or [1] * len(shapes)
    of_free = DISTRIBUTIONS[distribution]([shapes[i] for i in free], sparsity, [counts[i] for i in free])
    found = dict(zip(free, of_free, strict=True))
    share = sparsity / max_sparsity if max_sparsity > 0 else 0.0
    return [found[i] if override is None else 1.0 - override * share for i, override in enumerate(overrides)]


def active_count(density: float, blocks: int, least: int) -> int:
    """Number of active blocks for a target density; never fewer than ``least`` (the size of the backbone)."""
    return min(blocks, max(least, round(density * blocks)))
