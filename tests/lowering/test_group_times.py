"""Products with the matrices of a stack are timed together, beside what the program itself runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mst_compile.lowering import cpu_choice, cpu_group_times, cpu_times, device
from mst_compile.lowering.cpu_times import COLS, ROWS, Product
from mst_compile.lowering.device import Layer, Times

from mst_compile.blocks.grid import BlockGrid
from mst_compile.graph import gain

F32, BF16 = torch.float32, torch.bfloat16
PRODUCT = Product(ROWS, 64, 96, 8, 32, F32, F32)


def test_groups_are_timed_together_at_their_mean_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack is one operator: what that costs beside its products does not grow with the groups, but zeros in the
    gradient of each of its matrices do."""
    asked: list[tuple[Product, int, str]] = []
    calls = {cpu_times.ROWS: 2.0, cpu_times.COLS: 2.0, cpu_times.GRAD_WEIGHT: 5.0}
    together = Times(7.0, 1.0, 4.0, falls_back=False)
    monkeypatch.setattr(cpu_choice, "of_groups", lambda *groups: asked.append(groups) or together)
    monkeypatch.setattr(cpu_choice, "of_product", lambda product: Times(9.0, 1.0, 4.0))
    monkeypatch.setattr(cpu_choice, "of_call", lambda product: calls[product.kind])
    grid, dtype = BlockGrid(64, 32, 8), torch.float32
    layer = Layer(grid, False, 8 * 64, dtype, dtype, False, True, groups=8, dense=device.LOOP)
    (times,) = cpu_choice.times([layer], True)
    assert [(product.tokens, groups, dense) for product, groups, dense in asked] == 3 * [(64, 8, device.LOOP)]
    assert times["forward"] == times["grad-input"] == Times(8 * 7.0, 8 * 1.0, 8 * 4.0, 2.0, False)
    assert times["grad-weight"] == Times(8 * 7.0, 8 * 1.0, 8 * 4.0, 2.0 + 8 * (5.0 - 2.0), False)
    (one,) = cpu_choice.times([dataclasses.replace(layer, tokens=64, groups=1, dense="")], True)
    assert one["grad-weight"] == Times(9.0, 1.0, 4.0, 5.0)


@pytest.mark.parametrize("dense", [device.GROUPED, device.LOOP, device.BATCH, device.COPIES])
@pytest.mark.parametrize("kind", [ROWS, COLS, cpu_times.GRAD_WEIGHT])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)])
def test_groups_are_measured(kind: str, dense: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    product = Product(kind, 64, 96, 8, 32, dtype, weight_dtype)
    asked = cpu_group_times.asked(product, 5, dense)
    assert asked.groups == 5
    sides = cpu_group_times._sides(asked, BlockGrid(64, 96, 8), 32)
    assert len(sides) == 3
    found = cpu_group_times.measure(asked)
    assert all(0 < seconds < 0.1 for seconds in found[:3])


def test_copies_are_timed_with_one_token_for_each_matrix() -> None:
    x, stack = torch.randn(12, 16), torch.randn(3, 16, 8)
    found = cpu_group_times._dense_products(device.COPIES, x, stack, torch.empty(12, 8))()
    torch.testing.assert_close(found, x[:3, None] @ stack)
    a, b, out = torch.randn(12, 16), torch.randn(12, 8), torch.empty(3, 16, 8)
    found = cpu_group_times._dense_gradients(device.COPIES, a, b, 3, out)()
    torch.testing.assert_close(found, a[:3, :, None] @ b[:3, None])


def test_a_few_groups_stand_for_many() -> None:
    asked = cpu_group_times.asked
    assert asked(PRODUCT, 3, device.BATCH).groups == 3
    assert asked(PRODUCT, 128, device.BATCH).groups == cpu_group_times._MOST_GROUPS
    large = PRODUCT._replace(rows=4096, cols=4096)
    assert asked(large, 128, device.BATCH).groups == 2, "beside which no memory is taken"


@pytest.mark.parametrize("dense", [device.GROUPED, device.LOOP, device.BATCH])
def test_what_stands_for_the_dense_model_computes_what_it_does(dense: str) -> None:
    """The sides that are timed do the same work."""
    x, stack, y = torch.randn(12, 16), torch.randn(3, 16, 8), torch.empty(12, 8)
    found = cpu_group_times._dense_products(dense, x, stack, y)()
    found = y if dense == device.LOOP else found
    torch.testing.assert_close(found.reshape(3, 4, 8), x.view(3, 4, 16) @ stack)
    a, b, out = torch.randn(12, 16), torch.randn(12, 8), torch.empty(3, 16, 8)
    found = cpu_group_times._dense_gradients(dense, a, b, 3, out)()
    found = out if dense == device.LOOP else found
    torch.testing.assert_close(found, a.view(3, 4, 16).mT @ b.view(3, 4, 8))


def test_a_stack_runs_no_dense_product_of_its_own_accord() -> None:
    """Where the library multiplies all matrices faster together, that counts against the graph."""
    slow = Times(1.0, 2.0, 0.5, falls_back=False)
    good = Times(1.0, 0.1, 0.5)
    assert gain.saves([[{"forward": good}]], [0.2], True)
    assert not gain.saves([[{"forward": good}], [{"forward": slow}]], [0.2, 0.2], True)
    assert gain.saves([[{"forward": good}], [{"forward": slow._replace(falls_back=True)}]], [0.2, 0.2], True)


def test_seconds_are_of_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line through two densities, and the dense products, of which three were timed at once."""
    low, high = cpu_times.DENSITIES
    seconds = [[6.0, 6.5], [3 * (0.1 + 2 * low)], [3 * (0.1 + 2 * high)]]
    monkeypatch.setattr(cpu_times, "interleaved_sides", lambda _: seconds)
    found = cpu_group_times.measure(cpu_group_times.asked(PRODUCT, 3, device.BATCH))
    tokens = cpu_times.tokens_of(PRODUCT, BlockGrid(64, 96, 8))
    assert found[:3] == pytest.approx([n * PRODUCT.tokens / tokens for n in (2.0, 0.1, 2.0)])
