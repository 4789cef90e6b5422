"""Published recipes, told here again in lists: when their events are, how much they drop, and which blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mst_compile import Constant, MixedSparsity, recipes, sparsifier, sparsify
from mst_compile.errors import ScheduleError
from mst_compile.rules.schedule import Schedule
from mst_compile.schedule import GradualPruning


def events_of(schedule: Schedule, steps: int) -> list[int]:
    return [step for step in range(-1, steps + 2) if schedule.is_topology_event(step)]


# -- when, and how much ------------------------------------------------------------------------------------------------


def test_set_drops_the_same_share_to_the_end() -> None:
    schedule = recipes.sparse_evolutionary(0.8, interval=7)
    assert events_of(schedule, 50) == [7, 14, 21, 28, 35, 42, 49]
    assert {schedule.drop_fraction_at(step) for step in range(1000)} == {0.3}
    assert (schedule.distribution, schedule.growth, schedule.sparsity_at(10**9)) == ("erdos-renyi", "random", 0.8)
    assert recipes.sparse_evolutionary(drop_fraction=0.1).drop_fraction_at(500) == 0.1


@given(st.integers(1, 5000))
def test_rigl_rests_after_three_quarters(steps: int) -> None:
    schedule = recipes.rigl(steps)
    end = 3 * steps // 4
    assert events_of(schedule, steps) == list(range(100, end + 1, 100))
    for step in events_of(schedule, steps):
        assert schedule.drop_fraction_at(step) == pytest.approx(0.15 * (1 + math.cos(math.pi * step / end)))
    assert schedule.growth == "gradient"


@given(st.data())
def test_dynsparse_divides_the_run(data: st.DataObject) -> None:
    """An event after each of n equal parts; after the last, nothing is left to be trained, and its share is 0."""
    steps = data.draw(st.integers(1, 3000))
    count = data.draw(st.integers(1, min(steps, 320)))
    schedule = recipes.dynsparse(steps, 0.9, count)
    assert events_of(schedule, steps) == [k * steps // count for k in range(1, count)]
    for step in range(0, steps, 1 + steps // 50):
        assert schedule.drop_fraction_at(step) == pytest.approx(0.25 * (1 + math.cos(math.pi * step / steps)))
    assert (schedule.distribution, schedule.growth, schedule.magnitude) == ("uniform", "random", "l1")


@given(st.data())
def test_a_number_of_events_in_any_share_of_a_run(data: st.DataObject) -> None:
    steps, until = data.draw(st.integers(4, 2000)), data.draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    last = int(steps * until)
    count = data.draw(st.integers(1, last))
    anneal = data.draw(st.sampled_from(["cosine", "none"]))
    schedule = Constant(0.5, total_steps=steps, events=count, until=until, anneal=anneal, drop_fraction=0.1)
    expected = [k * last // count for k in range(1, count + 1)]
    assert events_of(schedule, steps) == [step for step in expected if step < steps]
    if anneal == "none":
        assert {schedule.drop_fraction_at(step) for step in range(steps)} == {0.1}


@given(st.data())
def test_granet_prunes_along_the_cubic_and_regrows_to_the_end(data: st.DataObject) -> None:
    steps = data.draw(st.integers(10, 2000))
    interval = data.draw(st.integers(1, 50))
    first = data.draw(st.sampled_from([0.0, 0.5]))
    schedule = recipes.granet(steps, 0.9, initial_sparsity=first, interval=interval)
    end = round(0.3 * steps)
    expected = {*range(interval, steps, interval), end}
    assert events_of(schedule, steps) == sorted(expected)
    for step in range(steps + 1):
        done = min(1.0, step / end)
        assert schedule.sparsity_at(step) == pytest.approx(0.9 + (first - 0.9) * (1 - done) ** 3)
        assert schedule.drop_fraction_at(step) == pytest.approx(0.25 * (1 + math.cos(math.pi * step / steps)))
    assert schedule.sparsity_at(end) == 0.9
    assert schedule.growth == "gradient"


def test_gradual_pruning_alone_rests_once_it_is_sparse() -> None:
    schedule = GradualPruning(100, 0.8, start=10, end=40, interval=10, growth="none")
    assert events_of(schedule, 100) == [10, 20, 30, 40]
    assert [schedule.sparsity_at(step) for step in (0, 10, 40, 100)] == [0.0, 0.0, 0.8, 0.8]
    assert {schedule.drop_fraction_at(step) for step in range(100)} == {0.0}
    assert schedule.phases(100) == [("before pruning", 0, 10), ("pruning", 10, 40), ("after pruning", 40, 100)]
    assert schedule.phases(20) == [("before pruning", 0, 10), ("pruning", 10, 20)]


@given(st.integers(2, 2000), st.sampled_from([0.5, 0.75]))
def test_sparse_then_dense_changes_once(steps: int, sparsity: float) -> None:
    schedule = recipes.sparse_then_dense(steps, sparsity, dense=0.25)
    turn = steps - round(0.25 * steps)
    assert events_of(schedule, steps) == [turn]
    assert [schedule.sparsity_at(step) for step in range(steps + 1)] == [
        sparsity if step < turn else 0.0 for step in range(steps + 1)
    ]
    assert schedule.distribution == "uniform"


def test_mixed_sparsity_training_is_the_published_schedule() -> None:
    assert recipes.mixed_sparsity_training(1000) == MixedSparsity.published(1000)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Constant(0.5, events=10),
        lambda: Constant(0.5, until=0.5),
        lambda: Constant(0.5, anneal="none"),
        lambda: Constant(0.5, total_steps=100, events=76),
        lambda: Constant(0.5, total_steps=100, events=10, interval=5),
        lambda: Constant(0.5, total_steps=100, anneal="linear"),
        lambda: Constant(0.5, total_steps=100, until=1.5),
        lambda: Constant(0.5, total_steps=100, events=50, gradient_steps=2),
        lambda: Constant(0.5, magnitude="l3"),
        lambda: MixedSparsity(100, magnitude="linf"),
        lambda: GradualPruning(100, 0.5, initial_sparsity=0.6),
        lambda: GradualPruning(100, start=40, end=40),
        lambda: GradualPruning(100, end=101),
        lambda: GradualPruning(100, interval=0),
        lambda: GradualPruning(100, 1.0),
        lambda: GradualPruning(100, drop_after_pruning=1),  # type: ignore[arg-type]
    ],
)
def test_contradictions_are_refused(wrong: Any) -> None:
    with pytest.raises(ScheduleError):
        wrong()


# -- which blocks ------------------------------------------------------------------------------------------------------


def norms(values: Tensor, block: int, power: int) -> list[float]:
    """The L1 or L2 norm of each block, row by row."""
    rows, cols = values.shape
    return [
        math.fsum(abs(values[i, j].item()) ** power for i in range(r, r + block) for j in range(c, c + block))
        ** (1 / power)
        for r in range(0, rows, block)
        for c in range(0, cols, block)
    ]


def smallest(scores: list[float], among: set[int], count: int) -> set[int]:
    return set(sorted(among, key=lambda i: scores[i])[:count])


def chosen(mask: Tensor) -> set[int]:
    return set(mask.flatten().nonzero()[:, 0].tolist())


class OneLayer:
    """A weight under a schedule whose values and gradients are given, and that an optimizer leaves as they are."""

    def __init__(self, schedule: Schedule, block: int, grid: tuple[int, int], seed: int) -> None:
        self.layer = sparsify(
            nn.Linear(grid[1] * block, grid[0] * block, bias=False), schedule, block=block, guard="none", seed=seed
        )
        self.own = sparsifier(self.layer)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.0)
        self.generator = torch.Generator().manual_seed(seed)
        (self.weight,) = self.own.weights.values()

    def step(self) -> tuple[Tensor, Tensor, set[int], set[int]]:
        """One step; returns values and gradient that it was taken with, and the active blocks before and after."""
        before, parameter = self.weight.mask.clone(), self.layer.weight
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=self.generator))
            self.weight.zero_inactive_(parameter)
        self.weight.note_clean(parameter)
        parameter.grad = torch.randn(parameter.shape, generator=self.generator)
        values, gradient = parameter.detach().clone(), parameter.grad.clone()
        self.optimizer.step()
        return values, gradient, chosen(before), chosen(self.weight.mask)


grids = st.tuples(st.integers(4, 8), st.integers(4, 8))


@settings(max_examples=25, deadline=None)
@given(
    grid=grids,
    block=st.sampled_from([1, 2, 4]),
    power=st.sampled_from([1, 2]),
    fraction=st.sampled_from([0.1, 0.3, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_set_drops_the_blocks_of_smallest_norm_and_grows_at_random(
    grid: tuple[int, int], block: int, power: int, fraction: float, seed: int
) -> None:
    schedule = recipes.sparse_evolutionary(
        0.5, interval=1, drop_fraction=fraction, magnitude=f"l{power}", distribution="uniform"
    )
    run = OneLayer(schedule, block, grid, seed)
    for _ in range(4):
        values, _, before, after = run.step()
        dropped = smallest(norms(values, block, power), before, round(fraction * len(before)))
        assert before - dropped <= after
        assert len(after) == len(before)


def test_l1_and_l2_drop_other_blocks() -> None:
    """One large element, or four of middling size: which block is the smaller one is what they differ about."""
    for magnitude, stays in (("l1", 1), ("l2", 0)):
        schedule = Constant(0.75, growth="gradient", interval=1, drop_fraction=0.5, magnitude=magnitude)
        layer = sparsify(nn.Linear(8, 4, bias=False), schedule, block=2, guard="none")
        own = sparsifier(layer)
        own.apply_mask("weight", torch.tensor([[True, True, False, False], [False] * 4]))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        with torch.no_grad():
            layer.weight.zero_()
            layer.weight[0, 0] = 3.0
            layer.weight[:2, 2:4] = 1.0
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad[2:, 6:] = 1.0  # there it grows
        optimizer.step()
        assert chosen(own.weights["weight"].mask) == {stays, 7}
        assert layer.weight.detach()[:2, 2 * stays : 2 * stays + 2].any()
        assert not layer.weight.detach()[:2, 2 - 2 * stays : 4 - 2 * stays].any()


@settings(max_examples=25, deadline=None)
@given(
    grid=grids,
    block=st.sampled_from([1, 2]),
    power=st.sampled_from([1, 2]),
    first=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_granet_prunes_then_drops_of_what_is_left_then_grows_by_gradient(
    grid: tuple[int, int], block: int, power: int, first: float, seed: int
) -> None:
    steps, blocks = 10, grid[0] * grid[1]
    schedule = recipes.granet(
        steps, 0.8, initial_sparsity=first, end=6, interval=1, distribution="uniform", magnitude=f"l{power}"
    )
    run = OneLayer(schedule, block, grid, seed)
    for step in range(1, steps):
        values, gradient, before, after = run.step()
        left = (1 - min(step / 6, 1.0)) ** 3
        count = min(len(before), round(blocks * (1 - (0.8 + (first - 0.8) * left))))
        share = 0.25 * (1 + math.cos(math.pi * step / steps)) * count
        assume(abs(share % 1 - 0.5) > 1e-3)  # what is halfway may be rounded either way
        scores = norms(values, block, power)
        pruned = before - smallest(scores, before, len(before) - count)
        kept = pruned - smallest(scores, pruned, round(share))
        slopes = [-s for s in norms(gradient, block, 2)]
        grown = smallest(slopes, set(range(blocks)) - kept, round(share))
        assert after == kept | grown
        assert len(after) == count


@pytest.mark.parametrize("recipe", [recipes.granet, recipes.dynsparse, recipes.rigl, recipes.sparse_then_dense])
def test_recipes_train(recipe: Any) -> None:
    """A run to the end, on its densities at every step."""
    torch.manual_seed(0)
    extra = {"events": 10} if recipe is recipes.dynsparse else {"interval": 5} if recipe is recipes.rigl else {}
    schedule = recipe(40, 0.75, **extra)
    model = sparsify(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), schedule, block=4)
    own, optimizer = sparsifier(model), torch.optim.AdamW(model.parameters(), 1e-2)
    wanted = schedule.sparsity_at(0)
    for step in range(1, 41):
        x = torch.randn(16, 32)
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
        wanted = schedule.sparsity_at(step) if schedule.is_topology_event(step) else wanted
        assert own.density == pytest.approx(1 - wanted, abs=0.02)
        assert all(not p[~w.grid.expand(w.mask)].any() for w, p in own.parameters())
