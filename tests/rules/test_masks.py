"""Masks, drop and grow, against independent implementations on sets and loops."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import active_blocks, scores_without_ties
from torch import Tensor

from mst_compile.rules import masks
from mst_compile.rules.growth import Mixed
from mst_compile.rules.guard import backbone, coverage


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_first_masks(rows: int, cols: int, data: st.DataObject) -> None:
    spine = backbone((rows, cols))
    count = data.draw(st.integers(max(rows, cols), rows * cols))
    mask = masks.random_mask(spine, count, masks.generator(0, 0, "w"))
    assert int(mask.sum()) == count
    assert bool((mask | ~spine).all())
    magnitude = scores_without_ties(rows, cols, data)
    by_size = masks.magnitude_mask(spine, count, magnitude)
    expected = active_blocks(spine)
    others = sorted(active_blocks(~spine), key=lambda b: -magnitude[b].item())
    assert active_blocks(by_size) == expected | set(others[: count - len(expected)])


def test_random_masks_are_uniform() -> None:
    """Every block outside the backbone is as likely as another: 6 sigma of the binomial."""
    spine = backbone((6, 6))
    hits = sum(masks.random_mask(spine, 16, masks.generator(s, 0, "w")).int() for s in range(1000))
    p = 10 / 30
    assert bool(((hits[~spine] - 1000 * p).abs() < 6 * math.sqrt(1000 * p * (1 - p))).all())


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.data())
def test_update_mask(
    rows: int, cols: int, drop_fraction: float, share: float, with_gradient: bool, data: st.DataObject
) -> None:
    spine = backbone((rows, cols))
    least, most = max(rows, cols), rows * cols
    mask = masks.random_mask(spine, data.draw(st.integers(least, most)), masks.generator(1, 0, "w"))
    count = data.draw(st.integers(least, most))
    magnitude, gradient = scores_without_ties(rows, cols, data), scores_without_ties(rows, cols, data)
    safe = coverage(mask, magnitude) if data.draw(st.booleans()) else spine
    before = mask.clone(), safe.clone(), magnitude.clone(), gradient.clone()

    def event() -> Tensor:
        g = masks.generator(0, 7, "w")
        return masks.update_mask(
            mask, safe, magnitude, gradient if with_gradient else None, count, drop_fraction, Mixed(share), g
        )

    new = event()
    assert torch.equal(new, event())
    assert all(torch.equal(a, b) for a, b in zip(before, (mask, safe, magnitude, gradient), strict=True))
    assert int(new.sum()) == max(count, int(safe.sum()))
    if count == most:
        return

    active, unharmed = active_blocks(mask), active_blocks(safe)
    to_drop = max(round(drop_fraction * len(active)), len(active) - count)
    kept = active - set(sorted(active - unharmed, key=lambda b: magnitude[b].item())[:to_drop])
    grow = max(0, count - len(kept))
    by_gradient = round(grow * share) if with_gradient else 0
    free = {(r, c) for r in range(rows) for c in range(cols)} - kept
    best = set(sorted(free, key=lambda b: -gradient[b].item())[:by_gradient])

    grown = active_blocks(new) - kept
    assert unharmed <= kept <= active_blocks(new)
    assert best <= grown
    assert len(grown - best) == grow - by_gradient


def test_three_of_four_grow_by_gradient() -> None:
    spine = torch.eye(16, dtype=torch.bool)
    magnitude = torch.arange(1.0, 257).view(16, 16)
    gradient = torch.arange(256.0, 0, -1).view(16, 16)
    mask = masks.random_mask(spine, 116, masks.generator(0, 0, "w"))
    new = masks.update_mask(mask, spine, magnitude, gradient, 116, 40 / 116, Mixed(), masks.generator(0, 1, "w"))
    dropped = set(sorted(active_blocks(mask & ~spine), key=lambda b: magnitude[b].item())[:40])
    kept = active_blocks(mask) - dropped
    best = sorted(active_blocks(torch.ones_like(mask)) - kept, key=lambda b: -gradient[b].item())
    grown = active_blocks(new) - kept
    assert len(grown) == 40
    assert set(best[:30]) <= grown
    assert best[30] not in grown or set(best[30:40]) != grown - set(best[:30]), "the last ten are random"


def test_randomness_is_a_function_of_seed_step_and_name() -> None:
    def draw(seed: int, step: int, name: str) -> list[float]:
        return torch.rand(8, generator=masks.generator(seed, step, name)).tolist()

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(0, 1, "a")
    assert torch.equal(torch.get_rng_state(), state), "the user's generator is not touched"
    torch.manual_seed(2)
    assert draw(0, 1, "a") == first
    assert len({tuple(draw(*k)) for k in [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (1, 0, "a")]}) == 5


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.data())
def test_a_given_mask_may_lack_what_the_guard_keeps(
    rows: int, cols: int, drop_fraction: float, data: st.DataObject
) -> None:
    """What comes back of the backbone counts among the blocks that there shall be."""
    spine = backbone((rows, cols))
    least, most = max(rows, cols), rows * cols
    mask = masks.random_mask(torch.zeros_like(spine), data.draw(st.integers(0, most)), masks.generator(1, 0, "w"))
    count = data.draw(st.integers(least, most))
    magnitude = scores_without_ties(rows, cols, data)
    new = masks.update_mask(mask, spine, magnitude, None, count, drop_fraction, Mixed(), masks.generator(0, 7, "w"))
    assert int(new.sum()) == count
    assert bool((new | ~spine).all())
    if count < most:
        left = active_blocks(mask)
        dropped = max(round(drop_fraction * len(left)), len(left) + int((spine & ~mask).sum()) - count)
        weakest = sorted(left - active_blocks(spine), key=lambda b: magnitude[b].item())
        assert left - set(weakest[:dropped]) <= active_blocks(new)
