"""Freshly initialised weights are told from trained ones, at the rate of false alarms that is stated."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracles import of_rounding
from torch import Tensor, nn

from mst_compile.rules.fresh import FALSE_ALARMS, form, lines, looks_trained

DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: nn.init.normal_(w, std=0.02),
    "normal around 3": lambda w: nn.init.normal_(w, 3.0),
    "uniform": lambda w: nn.init.uniform_(w, -0.1, 0.1),
    "uniform from 0": nn.init.uniform_,
    "xavier uniform": nn.init.xavier_uniform_,
    "kaiming normal": nn.init.kaiming_normal_,
    "cut at 1": lambda w: nn.init.trunc_normal_(w, a=-1.0, b=1.0),
    "cut at 2": lambda w: nn.init.trunc_normal_(w),
    "cut far out": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "orthogonal": nn.init.orthogonal_,
}
SHAPES = [(5, 9), (16, 64), (64, 16), (96, 96)]


@pytest.mark.parametrize("name", DRAWN)
def test_false_alarms_are_as_rare_as_stated(name: str) -> None:
    """At a level of one in twenty, where they can be counted, and at the real one, where there are none."""
    level, draws, alarms = 0.05, 0, 0
    torch.manual_seed(0)
    for shape in SHAPES:
        for _ in range(25):
            sample = DRAWN[name](torch.empty(shape)).double()
            alarms += looks_trained(sample, of_rounding(torch.float32), false_alarms=level)
            assert not looks_trained(sample, of_rounding(torch.float32))
            draws += 1
    expected = level * draws
    assert alarms <= expected + 4 * math.sqrt(expected * (1 - level)), f"{alarms} of {draws}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DRAWN)
def test_coarse_roundings_are_no_training(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for _ in range(5):
        sample = DRAWN[name](torch.empty(128, 128)).to(dtype).double()
        assert not looks_trained(sample, of_rounding(dtype), false_alarms=0.01)


def test_what_says_nothing_is_fresh() -> None:
    """Zeros, constants, rows of padding tokens, single rows and columns, nothing at all, and what is no number."""
    normal = torch.randn(64, 64, dtype=torch.float64)
    padded = normal.clone()
    padded[0] = 0
    for sample in (
        torch.zeros(8, 8), torch.ones(8, 8), torch.ones(1, 1), torch.empty(0, 5), padded, normal[:1], normal[:, :1],
        normal.masked_fill(torch.eye(64) > 0, torch.nan), torch.full((4, 4), torch.inf),
    ):  # fmt: skip
        assert not looks_trained(sample.double(), 0.0)


def test_each_sign_of_training_is_found() -> None:
    torch.manual_seed(2)
    normal = torch.randn(128, 128, dtype=torch.float64)
    rows = normal * torch.linspace(0.7, 1.3, 128, dtype=torch.float64)[:, None]
    heavy = torch.distributions.StudentT(3.0).sample((128, 128)).double()
    blocks = normal * torch.rand(16, 16).lt(0.3).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert min(lines(normal)) > FALSE_ALARMS
    assert form(normal.flatten()) > FALSE_ALARMS
    assert lines(rows)[0] < FALSE_ALARMS < lines(rows)[1]
    assert lines(rows.t())[1] < FALSE_ALARMS < lines(rows.t())[0]
    assert form(heavy.flatten()) < FALSE_ALARMS < min(lines(heavy))
    for sample in (rows, rows.t(), heavy, blocks):
        assert looks_trained(sample, 0.0, weights=1000)
