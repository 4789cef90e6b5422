"""``recommend``: what it chooses, that it changes nothing, and what it says it does not know."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import mst_compile
from mst_compile.cost.fitted import FIT
from mst_compile.cost.recommend import SPARSITIES, Task
from mst_compile.errors import ForecastError, ModelError


def model(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Linear(width, 32))


SIZES = {"tokens": 4e6, "tokens_per_step": 4096, "exclude": "3"}


def test_it_recommends_a_schedule_that_sparsify_takes() -> None:
    own = model()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    found = mst_compile.recommend(own, **SIZES)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert found.forecast is not None
    assert isinstance(found.schedule, mst_compile.MixedSparsity)
    assert found.schedule.total_steps == math.ceil(4e6 / 4096)
    mst_compile.sparsify(own, found.schedule, exclude="3")
    assert sorted({w.grid.block for w in mst_compile.sparsifier(own).weights.values()}) == found.blocks


def test_shares_are_those_of_the_forecast() -> None:
    found = mst_compile.recommend(model(), **SIZES)
    assert found.forecast is not None
    # Densities are rounded to blocks, and masks follow the falling sparsity at events alone.
    assert found.option.share == pytest.approx(found.forecast.flops / found.forecast.dense_flops, abs=0.02)
    assert [o.share for o in found.options] == sorted(o.share for o in found.options)
    assert len(found.options) == len(SPARSITIES) + 1


@pytest.mark.parametrize("end", ["dense", "sparse"])
def test_one_copy_does(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its forecast is that of the schedule, asked for by itself, in the blocks that the schedule's density has."""
    copies: list[int] = []
    deepcopy = copy.deepcopy

    def counted(value: Any, *rest: Any) -> Any:
        copies.extend([1] * isinstance(value, nn.Sequential))
        return deepcopy(value, *rest)

    monkeypatch.setattr(copy, "deepcopy", counted)
    own, x = model(), torch.randn(4096, 64)
    asked = {**SIZES, "block": 32, "loss": lambda: own(x).square().mean()}
    found = mst_compile.recommend(own, end=end, **asked)
    assert len(copies) == 1
    assert found.schedule is not None
    alone = mst_compile.forecast(own, found.schedule, **asked)
    assert found.forecast == alone
    for schedule, right in ((found.schedule, True), (mst_compile.Constant(0.5), False)):  # blocks shrink with density
        weights = mst_compile.sparsifier(
            mst_compile.sparsify(model(), schedule, block=32, exclude="3")
        ).weights.values()
        assert (sorted({w.grid.block for w in weights}) == found.blocks) == right
    assert all("_mst_sparsifier" not in vars(m) for m in own.modules())


def test_the_largest_lead_without_a_budget_and_the_lowest_loss_within_one() -> None:
    free = mst_compile.recommend(model(), **SIZES)
    assert free.option.lead == min(o.lead for o in free.options if o.schedule is not None)
    dense = free.forecast.dense_flops  # type: ignore[union-attr]
    some = mst_compile.recommend(model(), budget=0.7 * dense, **SIZES)
    affordable = [o for o in some.options if o.share <= 0.7]
    assert some.option == min(affordable, key=lambda o: o.behind) != some.options[-1]
    all_of_it = mst_compile.recommend(model(), budget=1.01 * dense, **SIZES)
    assert all_of_it.schedule is None
    assert all_of_it.forecast is None
    assert "dense" in str(all_of_it).splitlines()[0]


def test_a_model_that_stays_sparse() -> None:
    found = mst_compile.recommend(model(), end="sparse", **SIZES)
    assert isinstance(found.schedule, mst_compile.Constant)
    ends_dense = mst_compile.recommend(model(), **SIZES)
    assert found.options[0].share < ends_dense.options[0].share


def test_repeated_text_is_worth_less_to_every_option_and_its_rival() -> None:
    task = Task(1e6, 0.0, 1e7, 1e6)
    plenty = Task(1e6, 0.0, 1e7, math.inf)
    assert task.loss(2e5) > plenty.loss(2e5)
    loss, width, tokens = plenty.rival(0.3)
    assert tokens == pytest.approx(
        0.3 / width**2
    )  # nothing beside hidden weights: FLOPs are width squared times tokens
    assert loss == min(
        FIT.law.above_floor(1e6 * w * w, 1e6 * w * w, 0.3e7 / (w * w)) for w in (p / 100 for p in range(5, 101))
    )


def test_a_rival_pays_for_the_rest_of_its_step_too() -> None:
    task = Task(1e6, 3e6, 1e7, math.inf)
    _, width, tokens = task.rival(0.4)
    assert tokens * (6e6 * width**2 + 3e6 * width) == pytest.approx(0.4 * (6e6 + 3e6))


@pytest.mark.parametrize("end", ["dense", "sparse"])
@pytest.mark.parametrize("width", [16, 64, 512])
def test_no_difference_is_more_than_can_be_learnt(width: int, end: str) -> None:
    """Of the shortest runs that are taken, and of few steps: no loss is above that of a model that has learnt nothing,
    to which all bytes are alike. The rival is a model that the law knows."""
    least = math.ceil(FIT.tokens[0] / 10)
    for per_step in (least, least // 100):
        found = mst_compile.recommend(model(width), tokens=least, tokens_per_step=per_step, end=end, exclude="3")
        assert all(abs(d) < math.log(256) for o in found.options for d in (o.behind, o.lead))
        for option in found.options:
            task = Task(8 * width**2, 0.0, least, math.inf)
            rival = 8 * width**2 * task.rival(option.share)[1] ** 2
            assert rival >= min(FIT.active[0], 8 * width**2)


def test_what_is_outside_of_the_study_is_said() -> None:
    text = str(mst_compile.recommend(model(16), tokens=1e12, tokens_per_step=10**8, unique_tokens=1e6, block=4))
    said = ("hidden weights: the study has", "1e+06 M tokens", "text seen 1e+06 times", "attention and other work")
    assert [part for part in said if part not in text] == []


def test_the_rest_of_the_step_counts_where_it_is_known() -> None:
    own, x = model(), torch.randn(16, 64)
    wide = nn.Sequential(own, nn.Linear(32, 4096))
    for frozen in wide[1].parameters():
        frozen.requires_grad_(True)
    sizes = SIZES | {"exclude": ["0.3", "1"], "tokens_per_step": 16, "tokens": 4e5}
    with_rest = mst_compile.recommend(wide, loss=lambda: wide(x).square().mean(), **sizes)
    assert with_rest.options[0].share > mst_compile.recommend(own, **SIZES).options[0].share
    assert not any("attention" in gap for gap in with_rest.unknown)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 0}, "tokens"),
        ({"tokens": 1e5}, "1.02e.05 tokens is too short.* 1.23e.06 to"),
        ({"tokens": 4096}, "too short"),
        ({"tokens_per_step": -1}, "tokens_per_step"),
        ({"unique_tokens": 0}, "unique_tokens"),
        ({"budget": -1.0}, "budget"),
        ({"budget": 1.0}, "budget=1 FLOPs is less than the cheapest option"),
        ({"end": "soft"}, "end"),
    ],
)
def test_mistakes_are_told(changes: dict[str, object], said: str) -> None:
    own = model()
    with pytest.raises(ForecastError, match=said):
        mst_compile.recommend(own, **(SIZES | changes))  # type: ignore[arg-type]
    mst_compile.sparsify(own, mst_compile.Constant(0.5))  # nothing had changed


def test_a_sparse_model_or_none_is_refused() -> None:
    with pytest.raises(ForecastError, match="sparse already"):
        mst_compile.recommend(mst_compile.sparsify(model(), mst_compile.Constant(0.5)), **SIZES)
    with pytest.raises(ModelError):
        mst_compile.recommend("model", **SIZES)  # type: ignore[arg-type]


def test_auto_is_what_is_recommended() -> None:
    own = model()
    found = mst_compile.MixedSparsity.auto(own, **SIZES)
    assert found == mst_compile.recommend(own, **SIZES).schedule
    with pytest.raises(ForecastError, match="stays sparse"):
        mst_compile.MixedSparsity.auto(own, end="sparse", **SIZES)
    with pytest.raises(ForecastError, match="needs no schedule"):
        mst_compile.MixedSparsity.auto(own, budget=1e30, **SIZES)
