"""Laws of the density: what they come to, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import of_rounding

from mst_compile.errors import ArgumentError
from mst_compile.rules.laws import check_law, factor, graphcore

DENSITIES = st.floats(1e-4, 1.0)


def at(law: Any, density: float, *, positive: bool = True) -> float:
    return factor("a law", check_law("a law", law), density, positive=positive)


@given(DENSITIES, st.floats(-3, 3))
def test_a_number_is_a_power(density: float, r: float) -> None:
    exact = math.exp(-r * math.log(density))
    assert at(r, density) == pytest.approx(exact, rel=64 * of_rounding(torch.float64))


@given(DENSITIES)
def test_graphcores_is_its_fit_relative_to_the_dense_model(density: float) -> None:
    """Equation 8 of the appendix, log of the rate, without its constant: the dense model's rate."""
    s = 1 - density
    best, dense = (1.969 * x**2 + 0.2905 * x - 8.175 for x in (s, 0.0))
    assert math.log(at("graphcore", density)) == pytest.approx(best - dense, abs=64 * of_rounding(torch.float64))


@pytest.mark.parametrize("law", [0, 0.5, 1, -1, "graphcore", "none"])
def test_a_dense_weight_is_as_in_the_dense_model(law: Any) -> None:
    assert at(law, 1.0) == 1.0


def test_graphcores_lies_between_no_law_and_the_inverse() -> None:
    assert graphcore(0.2) == pytest.approx(4.45, abs=0.01)
    assert graphcore(0.1) == pytest.approx(6.40, abs=0.01)
    assert all(1 < graphcore(d) < 1 / d for d in (0.5, 0.2, 0.1, 0.02))


@given(DENSITIES)
def test_none_is_none(density: float) -> None:
    assert at("none", density) == at(0, density) == 1.0


@given(DENSITIES)
def test_a_function_is_asked(density: float) -> None:
    assert at(lambda d: 2 * d + 1, density) == 2 * density + 1
    assert at(lambda d: np.float32(0.5), density) == 0.5
    assert at(lambda d: torch.tensor(0.25), density) == 0.25


@pytest.mark.parametrize("found", [math.nan, math.inf, -1.0, 0.0, None, "1", True, torch.ones(2)])
def test_what_is_no_factor_is_refused(found: Any) -> None:
    with pytest.raises(ArgumentError, match=r"what a law returns at density 0.5"):
        at(lambda d: found, 0.5)


def test_a_decay_may_be_none() -> None:
    assert at(lambda d: 0.0, 0.5, positive=False) == 0.0


@pytest.mark.parametrize("r", [1e3, 1e308])
def test_a_power_beyond_all_floats_is_refused(r: float) -> None:
    with pytest.raises(ArgumentError, match="what a law returns"):
        at(r, 0.1)
    assert at(-r, 0.1, positive=False) == 0.0


@pytest.mark.parametrize("law", ["SµPar", "", None, [1.0], True, math.nan, -math.inf, torch.tensor([1.0])])
def test_what_is_no_law_is_refused(law: Any) -> None:
    with pytest.raises(ArgumentError, match="a law"):
        check_law("a law", law)
