"""Growth rules: each picks what it says, and one from outside is as good as ours."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from helpers import Blocks
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import element_masks
from torch import Tensor

from mst_compile import Constant, MixedSparsity, Schedule, sparsifier, sparsify
from mst_compile.errors import ScheduleError
from mst_compile.rules.growth import RULES, SET, Growth, Mixed, NoGrowth, RigL, as_growth, largest
from mst_compile.rules.masks import generator, update_mask


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """Blocks to choose from, how many, and distinct gradient scores."""
    rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    inactive = torch.rand(rows, cols, generator=gen) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    count = draw(st.integers(0, int(inactive.sum())))
    return inactive, count, torch.randperm(rows * cols, generator=gen).view(rows, cols).float()


@given(
    choices(), st.sampled_from([NoGrowth(), SET(), RigL(), Mixed(), Mixed(0.3), Mixed(0.0), Mixed(1.0)]), st.booleans()
)
def test_a_rule_chooses_among_the_inactive(given_: tuple[Tensor, int, Tensor], rule: Growth, reads: bool) -> None:
    inactive, count, gradient = given_
    chosen = rule.grow(inactive, count, gradient if reads else None, generator(0, 1, "w"))
    assert chosen.dtype == torch.bool
    assert int(chosen.sum()) == count
    assert not (chosen & ~inactive).any()
    again = rule.grow(inactive, count, gradient if reads else None, generator(0, 1, "w"))
    assert torch.equal(chosen, again), "a rule draws from its generator alone"


@given(choices(), st.floats(0, 1))
def test_mixed_takes_its_share_by_gradient(given_: tuple[Tensor, int, Tensor], share: float) -> None:
    inactive, count, gradient = given_
    chosen = Mixed(share).grow(inactive, count, gradient, generator(0, 1, "w"))
    best = sorted(gradient[inactive].tolist(), reverse=True)[: round(count * share)]
    assert set(best) <= set(gradient[chosen].tolist())


@pytest.mark.parametrize("share", [1e-5, 0.01, 0.1, 0.45, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["normal", "few levels", "rising", "masked", "constant", "not a number"])
def test_the_largest_of_very_many(kind: str, share: float) -> None:
    """A shortlist is drawn up first: it must hold all that count, whatever their order."""
    score = torch.randn(700, 700, generator=torch.Generator().manual_seed(1))
    if kind == "few levels":
        score = score.round()
    elif kind == "rising":
        score = score.flatten().sort().values.view(700, 700)
    elif kind == "masked":
        score = score.masked_fill(score < 1.5, -torch.inf).masked_fill(score > 2.5, torch.inf)
    elif kind == "constant":
        score = torch.zeros_like(score)
    elif kind == "not a number":
        score[5, 5:9] = torch.nan
    count = max(1, round(share * score.numel()))
    chosen = largest(score, count)
    assert int(chosen.sum()) == count
    want = score.flatten().topk(count).values.sort().values
    torch.testing.assert_close(score[chosen].sort().values, want, rtol=0, atol=0, equal_nan=True)


def test_rigl_is_all_by_gradient_and_set_is_none() -> None:
    inactive, gradient = torch.ones(4, 4, dtype=torch.bool), torch.arange(16.0).view(4, 4)
    assert gradient[RigL().grow(inactive, 5, gradient, generator(0, 0, "w"))].tolist() == [11, 12, 13, 14, 15]
    seen = torch.zeros(4, 4)
    for step in range(200):
        seen += SET().grow(inactive, 4, gradient, generator(0, step, "w"))
    assert 20 < seen.min() <= seen.max() < 85  # 50 each, deviation 6


def test_names_stand_for_rules() -> None:
    assert {name: as_growth(name) for name in RULES} == {
        "mixed": Mixed(), "gradient": RigL(), "random": SET(), "none": NoGrowth(),
    }  # fmt: skip
    assert as_growth("mixed", 0.5, 3) == Mixed(0.5, 3)
    assert as_growth("gradient", 0.5, 3) == RigL(gradient_steps=3)
    assert (
        MixedSparsity(100, growth=RigL(2)).growth_rule
        == MixedSparsity(100, growth="gradient", gradient_steps=2).growth_rule
    )


@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_does_what_its_name_does(name: str) -> None:
    """The same masks, given by name and as a value."""
    masks = []
    for growth in (name, as_growth(name)):
        torch.manual_seed(0)
        model = sparsify(Blocks(), Constant(0.6, growth=growth, interval=2))
        train(model, 9)
        masks.append(sparsifier(model).masks)
    assert all(torch.equal(mask, masks[1][n]) for n, mask in masks[0].items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"growth": "fast"}, ["growth", "'fast'", "'mixed'"]),
        ({"growth": RigL}, ["RigL(...)"]),
        ({"growth": 3}, ["growth", "3"]),
        ({"growth": RigL(), "gradient_share": 0.5}, ["gradient_share=0.5"]),
        ({"growth": RigL(), "gradient_steps": 2}, ["gradient_steps=2"]),
        ({"growth": RigL(101)}, ["gradient_steps=101", "100"]),
    ],
)
def test_bad_growth(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ScheduleError) as caught:
        Constant(0.5, **arguments)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(("share", "steps"), [(-0.1, 1), (1.5, 1), (0.5, 0), (0.5, 1.5)])
def test_bad_rules(share: Any, steps: Any) -> None:
    with pytest.raises(ScheduleError):
        Mixed(share, steps)


# -- a rule from outside ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LeftFirst(Growth):
    """Grows the leftmost blocks; a toy that reads gradients only to show that it gets them."""

    gradient_steps: int = 2
    seen: list[bool] = dataclasses.field(default_factory=list, compare=False)

    def grow(self, inactive: Tensor, count: int, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        self.seen.append(gradient is not None)
        order = torch.arange(inactive.numel()).view(inactive.t().shape).t()  # column by column
        chosen = torch.zeros_like(inactive)
        places = order.masked_fill(~inactive, inactive.numel()).flatten().argsort()[:count]
        chosen.view(-1)[places] = True
        return chosen


def train(model: torch.nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gen = torch.Generator().manual_seed(0)
    for _ in range(steps):
        model(torch.randn(8, 32, generator=gen)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_rule_from_outside() -> None:
    """Passed to a schedule, it decides what grows, gets its gradients, and masks hold."""
    rule = LeftFirst()
    model = sparsify(Blocks(), Constant(0.6, growth=rule, interval=3))
    own = sparsifier(model)
    before = own.masks
    train(model, 2)
    assert all(torch.equal(mask, before[n]) for n, mask in own.masks.items())
    train(model, 1)
    assert rule.seen
    assert all(rule.seen)
    for name, mask in own.masks.items():
        grown = mask & ~before[name]
        left = before[name] | mask
        for col in range(1, mask.shape[1]):  # nothing grew to the right of a block that stayed inactive
            if grown[:, col].any():
                assert left[:, :col].all()
    for name, mask in element_masks(model).items():
        assert not dict(model.named_parameters())[name][~mask].any()
    assert pickle.loads(pickle.dumps(rule)) == rule


class TooMany(Growth):
    def grow(self, inactive: Tensor, count: int, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        return inactive.clone()


class NotAMask(Growth):
    def grow(self, inactive: Tensor, count: int, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        return inactive.nonzero()


@pytest.mark.parametrize("rule", [TooMany(), NotAMask()])
def test_a_rule_that_chooses_something_else_is_told_so(rule: Growth) -> None:
    mask = torch.eye(4, dtype=torch.bool)
    with pytest.raises(ScheduleError, match=f"{type(rule).__name__}.* must choose 2 inactive blocks"):
        update_mask(mask, mask, torch.ones(4, 4), None, 6, 0.0, rule, generator(0, 0, "w"))
    model = sparsify(Blocks(), Constant(0.6, growth=rule, interval=1))
    before = sparsifier(model).masks
    with pytest.raises(ScheduleError):
        train(model, 1)
    assert all(torch.equal(m, before[n]) for n, m in sparsifier(model).masks.items()), "nothing has changed"


# -- a schedule from outside -----------------------------------------------------------------------------------------


class Stairs(Schedule):
    """What a user writes: only what it must say, and one thing more."""

    max_sparsity = 0.75
    growth = "random"

    def sparsity_at(self, step: int) -> float:
        return 0.75 if step < 5 else 0.25

    def is_topology_event(self, step: int) -> bool:
        return step in (2, 5)

    def drop_fraction_at(self, step: int) -> float:
        return 0.5


class Duck:
    """The same, of no class of ours."""

    max_sparsity = 0.75
    growth = "random"
    sparsity_at, is_topology_event, drop_fraction_at = (
        Stairs.sparsity_at, Stairs.is_topology_event, Stairs.drop_fraction_at,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", [Stairs(), Duck()])
def test_a_schedule_from_outside(schedule: Any) -> None:
    torch.manual_seed(0)
    model = sparsify(Blocks(), schedule)
    own = sparsifier(model)
    assert own.density == pytest.approx(0.25, abs=0.02)
    train(model, 6)
    assert own.step_count == 6
    assert own.density == pytest.approx(0.75, abs=0.02)
    assert own.attention.pattern == "full"
    assert own.schedule.growth_rule == SET()
    assert own.schedule.phases(10) == [("training", 0, 10)]


class Silent(Schedule):
    max_sparsity = 0.5


class Wrong(Stairs):
    max_sparsity = 1.5


class Odd(Stairs):
    growth = "quick"


@pytest.mark.parametrize(("schedule", "word"), [(Silent(), "sparsity_at"), (Wrong(), "1.5"), (Odd(), "'quick'")])
def test_schedules_that_say_too_little_or_nonsense(schedule: Schedule, word: str) -> None:
    model = Blocks()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ScheduleError, match=word):
        sparsify(model, schedule)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
