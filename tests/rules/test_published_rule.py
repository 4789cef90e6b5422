"""With blocks of one element a topology event is the published rule (arXiv 2408.11746), told here again in lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.rules import masks
from mst_compile.rules.density import erdos_renyi, layer_densities
from mst_compile.rules.growth import Mixed

ROUNDS = 4


def published_event(
    weight: list[float], gradient: list[float], active: set[int], target: int, fraction: float, by_gradient: float
) -> tuple[set[int], set[int], int]:
    """Which active elements stay, which are grown by gradient, and how many are grown at random."""
    dropped = max(round(fraction * len(active)), len(active) - target)
    kept = set(sorted(active, key=lambda i: -abs(weight[i]))[: len(active) - dropped])
    grow = target - len(kept)
    first = round(by_gradient * grow)
    others = [i for i in range(len(weight)) if i not in kept]
    return kept, set(sorted(others, key=lambda i: -abs(gradient[i]))[:first]), grow - first


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(4, 24),
    cols=st.integers(4, 24),
    sparsity=st.sampled_from([0.3, 0.5, 0.8, 0.9]),
    fraction=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    growth=st.sampled_from(["mixed", "gradient", "random", "none"]),
    seed=st.integers(0, 2**31),
)
def test_an_event_picks_what_the_published_rule_picks(
    rows: int, cols: int, sparsity: float, fraction: float, growth: Any, seed: int
) -> None:
    schedule = Constant(sparsity, growth=growth, interval=1, drop_fraction=fraction)
    model = nn.Sequential(nn.Linear(cols, rows), nn.Linear(rows, 4))
    sparsify(model, schedule, block=1, guard="none", seed=seed)
    own, generator = sparsifier(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # weights stay as given
    share = {"mixed": 0.75, "gradient": 1.0, "random": 0.0, "none": 0.0}[growth]
    for _ in range(ROUNDS):
        expected = {}
        for weight, parameter in own.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * weight.mask)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            active, target = elements(weight.mask), int(weight.mask.sum())
            values, slopes = parameter.detach().flatten().tolist(), parameter.grad.flatten().tolist()
            expected[weight.name] = published_event(
                values, slopes, active, target, 0.0 if growth == "none" else fraction, share
            )
        before = own.masks
        optimizer.step()
        for name, (kept, by_gradient, at_random) in expected.items():
            now = elements(own.masks[name])
            if growth == "none":
                assert now == elements(before[name])
                continue
            assert kept <= now
            assert by_gradient <= now
            assert len(now - kept - by_gradient) == at_random
            assert len(now) == len(elements(before[name]))


def elements(mask: Tensor) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist())


def test_random_growth_is_uniform() -> None:
    """Each element that is neither kept nor grown by gradient has the same chance."""
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[0, :10] = True
    magnitude, spine = torch.arange(40.0).view(1, -1), torch.zeros_like(mask)
    counts, rounds = torch.zeros(40), 3000
    for step in range(rounds):
        new = masks.update_mask(mask, spine, magnitude, None, 10, 0.5, Mixed(), masks.generator(0, step, "a weight"))
        counts += new[0]
    assert (counts[5:10] == rounds).all()  # the five of largest magnitude
    others = torch.cat([counts[:5], counts[10:]])
    chance = 5 / 35
    allowed = 5 * (chance * (1 - chance) / rounds) ** 0.5  # five standard deviations
    assert ((others / rounds - chance).abs() < allowed).all()


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(4, 4096), st.integers(4, 4096)), min_size=1, max_size=12),
    sparsity=st.floats(0.0, 0.99),
)
def test_densities_are_erdos_renyis(shapes: list[tuple[int, int]], sparsity: float) -> None:
    """``min(1, e (rows + cols) / (rows cols))`` for the one ``e`` that meets the whole density; found by bisection."""

    def at(e: float) -> list[float]:
        return [min(1.0, e * (r + c) / (r * c)) for r, c in shapes]

    def elements_at(e: float) -> float:
        return sum(d * r * c for d, (r, c) in zip(at(e), shapes, strict=True))

    wanted = (1 - sparsity) * sum(r * c for r, c in shapes)
    low, high = 0.0, float(max(r * c for r, c in shapes))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if elements_at(middle) < wanted else (low, middle)
    assert erdos_renyi(shapes, sparsity) == pytest.approx(at(high), abs=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.45, 0.9])
def test_overrides_leave_the_distribution_to_the_others(sparsity: float) -> None:
    shapes = [(64, 64), (64, 256), (256, 64), (512, 64)]
    densities = layer_densities(shapes, sparsity, "erdos-renyi", [None, 0.5, None, 0.0], 0.9)
    assert densities[1] == pytest.approx(1 - 0.5 * sparsity / 0.9)
    assert densities[3] == 1.0
    free = erdos_renyi([shapes[0], shapes[2]], sparsity)
    assert [densities[0], densities[2]] == pytest.approx(free)
