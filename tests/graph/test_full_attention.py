"""Full causal attention on the device's kernel where it is faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import compiled, static
from mst_compile.lowering import device
from oracles import assert_as_good_as
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import mst_compile
from mst_compile.cost.flops import CompiledFlopCounter

HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE


class Block(nn.Module):
    """A layer whose queries, keys and values go through ``attend``."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.attend = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), attend

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(*x.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(*parts).transpose(1, 2).reshape(x.shape))


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """As where our kernel was measured to be faster; what was asked. Products are all faster sparse."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.delenv("MST_COMPILE_DENSE_THRESHOLD")
    record = device.of("cpu")
    replaced = {
        "attention_pays": lambda *shape: asked.append(shape) or True,
        "times": lambda layers, _: [{}] * len(layers),
    }
    monkeypatch.setitem(device._records, "cpu", dataclasses.replace(record, **replaced))
    return asked


def count(run: Callable[[], Any]) -> int:
    """How many times our attention ran."""
    with torch.profiler.profile() as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == "mst::attention")


def results(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[list-item, union-attr]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, scale=0.3)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[-2]
    return sdpa(q, k, v, attn_mask=torch.ones(length, length, dtype=torch.bool).tril())


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(causal, q, k, v, use_reentrant=False)


@pytest.mark.parametrize("attend", [causal, scaled, masked, checkpointed])
@pytest.mark.parametrize("sparsity", [0.7, 0.0])
def test_causal_attention_runs_on_the_faster_kernel(
    attend: Callable[..., Tensor], sparsity: float, faster: list[tuple[Any, ...]]
) -> None:
    """Forward and backward are as near to float64 as PyTorch's, with sparse products and with dense ones."""
    model = mst_compile.sparsify(Block(attend), static(sparsity), block=8)
    x = torch.randn(2, 37, WIDTH)
    fast = compiled(model)
    assert count(lambda: results(fast, model, x)) >= 1
    assert faster == [(2 * HEADS, 37, SIZE, SIZE, torch.float32, True)]
    got, usual = results(fast, model, x), results(model, model, x)
    exact = results(model.double(), model, x.double())
    for one, other, right in zip(got, usual, exact, strict=True):
        assert_as_good_as(one, other, right, torch.float32)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, dropout_p=0.1, is_causal=True)


def seeing_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k[..., :-1, :], v[..., :-1, :], is_causal=True)


def of_fewer_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True)


def with_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril() & (q[:, :1, :1, :1] > -9.0)
    return sdpa(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("attend", [dropping, seeing_all, cross, of_fewer_keys, with_padding])
def test_other_attention_stays_as_the_model_wrote_it(
    attend: Callable[..., Tensor], faster: list[tuple[Any, ...]]
) -> None:
    model = mst_compile.sparsify(Block(attend), static(), block=8)
    assert count(lambda: compiled(model)(torch.randn(2, 37, WIDTH)).sum().backward()) == 0


def test_where_it_is_slower_attention_stays(faster: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    records = device._records
    monkeypatch.setitem(records, "cpu", dataclasses.replace(records["cpu"], attention_pays=lambda *_: False))
    model = mst_compile.sparsify(Block(causal), static(), block=8)
    assert count(lambda: compiled(model)(torch.randn(2, 37, WIDTH)).sum().backward()) == 0


def test_with_a_threshold_attention_stays(faster: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MST_COMPILE_DENSE_THRESHOLD", "0.9")
    model = mst_compile.sparsify(Block(causal), static(), block=8)
    assert count(lambda: compiled(model)(torch.randn(2, 37, WIDTH)).sum().backward()) == 0
    assert faster == []


def test_lengths_may_vary(faster: list[tuple[Any, ...]]) -> None:
    model = mst_compile.sparsify(Block(causal), static(), block=8)
    fast = compiled(model, dynamic=True)
    for length in (16, 33, 7):
        x = torch.randn(2, length, WIDTH)
        torch.testing.assert_close(fast(x), model(x))
        assert count(lambda x=x: fast(x)) == 1


def test_its_flops_are_those_of_pytorchs_attention(faster: list[tuple[Any, ...]]) -> None:
    """All pairs of queries and keys count: two products forward, five backward."""
    model, x = mst_compile.sparsify(Block(causal), static(0.0), block=8), torch.randn(2, 32, WIDTH)
    fast = compiled(model)
    fast(x).sum().backward()
    with CompiledFlopCounter(display=False) as counter:
        fast(x).sum().backward()
    linear = 2 * 64 * WIDTH * WIDTH * (3 * 2 + 3)  # the input of the first layer wants no gradient
    assert counter.get_total_flops() == linear + 7 * 2 * 2 * WIDTH * 32 * 32
