"""Attention in every pattern on the card, forward and backward, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_parts import COMBINATIONS, combine
from gpu_attention_cases import Case, case, check_numbers

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Take = Callable[[int], list[int]]
_FIRST = "window and distances"  # the hybrid sparse attention of MixedSparsity(attention="sparse")


def check(c: Case, precision: float = 0.0) -> None:
    arguments = c.arguments()
    leaves = [t for t in arguments[:3] if t is not None]
    out = torch.compile(c.function(), fullgraph=True, dynamic=False)(*arguments)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    check_numbers(c, [out.detach(), *torch.autograd.grad(out, leaves, upstream)], upstream, precision)


def every_pattern() -> list[Any]:
    """Parameters of a test for each pattern; one of each dtype ranks first, then each pattern in one dtype."""
    found: list[Any] = []
    dtypes = ((BF16, False), (F16, False), (F32, True), (F32, False))
    for choice, what, (dtype, tf32) in itertools.product(range(2), COMBINATIONS, dtypes):
        marks = []
        if choice == 0 and what == _FIRST:
            marks = [pytest.mark.rank(0)]
        elif choice == 0 and dtype == BF16:
            marks = [pytest.mark.rank(2)]
        name = f"{what}-{dtype}{'-tf32' * tf32}-{choice}".replace("torch.", "")
        found.append(pytest.param(what, dtype, tf32, choice, marks=marks, id=name))
    return found


@pytest.mark.parametrize(("what", "dtype", "tf32", "choice"), every_pattern(), indirect=["tf32"])
def test_every_pattern(
    what: str, dtype: torch.dtype, tf32: bool, choice: int, device: torch.device, take: Take
) -> None:
    take(choice)
    parts = combine(what, 40, 32, gap=3 * choice, times=1 + choice)
    c = case(parts, batch=2, group=1 + 2 * choice, length=150, size=64, dtype=dtype, padded=choice == 0)
    check(c.to(device), 2.0**-10 if tf32 else 0.0)


@pytest.mark.parametrize(("size", "value_size"), [(16, 16), (80, 80), (128, 128), (256, 256), (192, 128), (40, 72)])
@pytest.mark.parametrize("what", ["everything", "window and distances", "chunk and summaries"])
def test_sizes_of_heads(what: str, size: int, value_size: int, device: torch.device, take: Take) -> None:
    take(0)
    sizes = {"size": size, "value_size": value_size}
    check(case(combine(what, 128, 128), length=300, dtype=BF16, by_position=True, **sizes).to(device))


@pytest.mark.parametrize("what", COMBINATIONS)
def test_many_programs_at_once(what: str, device: torch.device) -> None:
    """As long as in training, tiles chosen by the autotuner."""
    check(case(combine(what, 128, 128), batch=2, heads=6, length=2048, size=64, dtype=BF16).to(device))


def test_queries_that_see_no_key_give_zero(device: torch.device, take: Take) -> None:
    take(0)
    c = case(combine("window and distances", 40, 32), padded=True).to(device)
    assert c.key_mask is not None
    c.key_mask[:, :50] = False
    check(c)
