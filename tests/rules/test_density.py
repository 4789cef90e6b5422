"""Densities of layers, against their definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst_compile.rules.density import active_count, erdos_renyi, uniform

shape_lists = st.lists(st.tuples(st.integers(4, 4096), st.integers(4, 4096)), min_size=1, max_size=12)


@given(shape_lists, st.floats(0, 0.999))
def test_erdos_renyi_is_exact_and_proportional(shapes: list[tuple[int, int]], sparsity: float) -> None:
    densities = erdos_renyi(shapes, sparsity)
    total = sum(r * c for r, c in shapes)
    kept = sum(d * r * c for d, (r, c) in zip(densities, shapes, strict=True))
    assert kept == pytest.approx((1 - sparsity) * total, rel=1e-6)
    assert all(0 < d <= 1 + 1e-12 for d in densities)
    raw = [(r + c) / (r * c) for r, c in shapes]
    factors = [d / q for d, q in zip(densities, raw, strict=True) if d < 1]
    if factors:
        assert max(factors) == pytest.approx(min(factors), rel=1e-9)
        # A layer is dense only where the common factor would make it so, or nearly: others were scaled up after it.
        assert all(factors[0] * q >= 1 - 1e-9 for d, q in zip(densities, raw, strict=True) if d >= 1)


@given(shape_lists, st.floats(0, 0.999))
def test_uniform_densities(shapes: list[tuple[int, int]], sparsity: float) -> None:
    assert uniform(shapes, sparsity) == [1 - sparsity] * len(shapes)


def test_small_layers_are_denser() -> None:
    small, large = erdos_renyi([(64, 64), (256, 256)], 0.9)
    assert small == pytest.approx(4 * large)
    assert erdos_renyi([(4, 4), (1024, 1024)], 0.9)[0] == 1.0


@given(st.floats(0, 1), st.integers(1, 500), st.data())
def test_active_count(density: float, blocks: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(0, blocks))
    count = active_count(density, blocks, least)
    assert least <= count <= blocks
    assert count == least or abs(count - density * blocks) <= 0.5
