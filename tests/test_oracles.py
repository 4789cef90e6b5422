"""The tolerances themselves: they let the truth through, and nothing that is further off than they say."""

from __future__ import annotations

import ast
from pathlib import Path

import oracles
import pytest
import torch
from oracles import of_rounding, of_sum

F32, BF16 = torch.float32, torch.bfloat16
TESTS = Path(__file__).parent


def test_a_sum_in_its_dtype_is_within_the_bound_and_a_missing_term_is_not() -> None:
    a, b = torch.randn(33, 70), torch.randn(70, 9)
    exact = oracles.product(a, b)
    allowed = of_sum(70) * exact.magnitude
    oracles.assert_within(a @ b, exact.value, allowed)
    wrong = a @ b
    wrong[3, 4] -= a[3, 0] * b[0, 4]
    with pytest.raises(AssertionError, match="sum: 1 elements beyond the bound"):
        oracles.assert_within(wrong, exact.value, allowed, "sum")


def test_rounding_is_bounded_and_a_rounding_to_less_is_found() -> None:
    exact = torch.rand(1000, dtype=torch.float64) + 1
    oracles.assert_within(exact.float(), exact, of_rounding(F32) * exact)
    oracles.assert_within(exact.bfloat16(), exact, of_rounding(BF16) * exact)
    with pytest.raises(AssertionError, match="beyond the bound"):
        oracles.assert_within(exact.half(), exact, of_rounding(F32) * exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_wrong_unless_it_is_the_truth(value: float) -> None:
    got, exact, allowed = torch.tensor([1.0, value]), torch.ones(2).double(), torch.full((2,), 1e30)
    with pytest.raises(AssertionError, match="1 elements beyond the bound"):
        oracles.assert_within(got, exact, allowed)
    infinite = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    oracles.assert_within(infinite.float(), infinite, allowed)


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        oracles.assert_within(torch.ones(3), torch.ones(1).double(), torch.ones(1))


def test_as_good_as_the_usual_way() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    oracles.assert_as_good_as(exact.float(), exact.float(), exact, F32)
    usual = exact.float() + 1e-3
    oracles.assert_as_good_as(exact.float() - 3e-3, usual, exact, F32)
    with pytest.raises(AssertionError, match=r"error 5\.00e-03, the usual way's 1\.00e-03, allowed 4\.00e-03"):
        oracles.assert_as_good_as(exact.float() - 5e-3, usual, exact, F32)
    with pytest.raises(AssertionError):
        oracles.assert_as_good_as(exact.bfloat16(), usual, exact, F32)


def test_another_order_of_summation() -> None:
    terms = torch.randn(64, 100)
    oracles.assert_reordered(terms.flip(0).cumsum(0)[-1], terms.sum(0), 64)
    with pytest.raises(AssertionError):
        oracles.assert_reordered(terms[1:].sum(0), terms.sum(0), 64)


def test_bits() -> None:
    zeros = torch.tensor([0.0, -0.0, torch.nan])
    oracles.assert_same_bits(zeros, zeros.clone())
    with pytest.raises(AssertionError):
        oracles.assert_same_bits(zeros, zeros.abs())


def test_sums_over_blocks() -> None:
    a = torch.arange(15.0).view(3, 5)
    assert oracles.block_sums(a, 2).tolist() == [[0 + 1 + 5 + 6, 2 + 3 + 7 + 8, 4 + 9], [10 + 11, 12 + 13, 14]]


def test_nobody_else_derives_a_tolerance() -> None:
    """And the module that does knows nothing of the code under test."""
    for file in sorted(TESTS.rglob("*.py")):
        tree = ast.parse(file.read_text())
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert file.name == "oracles.py" or "eps" not in attributes, file
    assert "mst_compile" not in (TESTS / "oracles.py").read_text()
