"""Every bad argument of every public function is refused by name and value, and nothing has changed; what looks odd
and is right is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from argument_cases import BAD, NAN, SPARSE, Bench, Call, Derived, Own, grow
from helpers import Blocks, unchanged
from torch import nn

import mst_compile
from mst_compile import Constant, MixedSparsity, Override, sparsifier, sparsify
from mst_compile.errors import MSTError
from mst_compile.flops import Meter, attention_saving
from mst_compile.schedule import SET, Attention, Mixed, Parts, RigL


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = sparsify(Blocks(), Constant(0.7, interval=3, gradient_steps=2), block=4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
    return Bench(Blocks(), model, optimizer)


def _said(value: Any) -> str | None:
    """What a message must contain of a value; None of tensors in checkpoints, where it says shape, dtype or the number
    that is wrong, and of what is too long to show."""
    if isinstance(value, torch.Tensor | Own) or (isinstance(value, int) and abs(value) > 10**299):
        return None
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)[:200]


def _refused(bench: Bench, what: str, call: Call, value: Any) -> str:
    """What is wrong with how a call is refused; empty if nothing is."""
    try:
        call(bench, value)
    except MSTError as error:
        message, said = str(error), _said(value)
        lacks = [words for words in (what, said) if words is not None and words not in message]
        return f"{type(error).__name__} does not say {lacks}: {message}" if lacks else ""
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(("what", "call", "values"), BAD, ids=[f"{i} {what}" for i, (what, *_) in enumerate(BAD)])
def test_bad_arguments_are_refused_and_nothing_has_changed(
    bench: Bench, what: str, call: Call, values: list[Any]
) -> None:
    optimizer = str(bench.optimizer.state_dict())
    with unchanged(bench.plain, bench.model):
        found = {repr(value)[:80]: _refused(bench, what, call, value) for value in values}
    assert {value: problem for value, problem in found.items() if problem} == {}
    assert str(bench.optimizer.state_dict()) == optimizer


def test_the_table_is_long() -> None:
    assert sum(len(values) for _, _, values in BAD) >= 200


# -- what looks odd and is right ---------------------------------------------------------------------------------------

GOOD: dict[str, Callable[[], Any]] = {
    "int of numpy": lambda: MixedSparsity(np.int64(100)) == MixedSparsity(100),
    "int of torch": lambda: MixedSparsity(torch.tensor(100)) == MixedSparsity(100),
    "hash of torch": lambda: (
        hash(MixedSparsity(torch.tensor(100), interval=np.uint8(4))) == hash(MixedSparsity(100, interval=4))
    ),
    "float of numpy": lambda: MixedSparsity(100, np.float32(0.5)) == MixedSparsity(100, 0.5),
    "float of torch": lambda: MixedSparsity(100, torch.tensor(0.5)) == MixedSparsity(100, 0.5),
    "fraction": lambda: MixedSparsity(100, Fraction(1, 2)) == MixedSparsity(100, 0.5),
    "steps as int of numpy": lambda: MixedSparsity(100, settle=np.int32(20)).settle_steps == 20,
    "share as float of numpy": lambda: MixedSparsity(100, settle=np.float64(0.5)).settle_steps == 50,
    "one step": lambda: MixedSparsity(1, settle=0, restoration=0).total_steps == 1,
    "no sparsity": lambda: MixedSparsity(100, 0).sparsity == 0,
    "negative zero": lambda: Constant(-0.0).sparsity == 0,
    "nearly all": lambda: Constant(math.nextafter(1.0, 0.0)).sparsity < 1,
    "nothing dropped": lambda: Constant(0.5, drop_fraction=0).drop_fraction == 0,
    "all dropped": lambda: Constant(0.5, drop_fraction=1).drop_fraction == 1,
    "window as list": lambda: hash(Constant(0.5, attention="local", attention_window=[3, 5])) != 0,
    "window of numpy": lambda: (
        Constant(0.5, attention="local", attention_window=(np.int64(3), 5)).attention_steps() == (3, 5)
    ),
    "window of one step": lambda: (
        MixedSparsity(100, attention="local", attention_window=(3, 4)).attention_at(3) == "local"
    ),
    "window to the end": lambda: (
        MixedSparsity(100, attention="local", attention_window=(0.5, 1.0)).attention_at(99) == "local"
    ),
    "window past the end": lambda: (
        MixedSparsity(100, attention="local", attention_window=(0, 10**6)).attention_at(9) == "local"
    ),
    "stride beyond any sequence": lambda: Attention("strided", stride=2**63 - 1).parts.step == 2**63 - 1,
    "parts of numpy": lambda: Parts(np.int64(4)) == Parts(4),
    "step of numpy": lambda: MixedSparsity(100).sparsity_at(np.int64(3)) == 0.8,
    "step of torch": lambda: not Constant(0.5).is_topology_event(torch.tensor(3)),
    "before the run": lambda: MixedSparsity(100, warmup=10).sparsity_at(-1) == 0,
    "grow none": lambda: not grow(SET(), count=0).any(),
    "grow all": lambda: bool(grow(RigL(), count=np.int64(6)).all()),
    "grow without gradient": lambda: int(grow(Mixed(), gradient=None).sum()) == 2,
    "override of nothing": lambda: Override() == Override(None, None),
    "override dense": lambda: Override(0).sparsity == 0,
    "override of numpy": lambda: Override(np.float32(0.5), np.int64(4)) == Override(0.5, 4),
    "shape": lambda: attention_saving(torch.Size([2, 4, 8]), Parts(4)) == 0,
    "shape of numpy": lambda: attention_saving([np.int64(2), 4, 8], Parts(4)) == 0,
    "empty batch": lambda: attention_saving((0, 4, 8), Parts(1)) == 0,
    "own schedule": lambda: bool(sparsify(Blocks(), Own())),
    "own schedule in torch": lambda: bool(sparsify(Blocks(), Own(first=torch.tensor(0.5), event=np.bool_(False)))),
    "own schedule below its highest": lambda: bool(sparsify(Blocks(), Derived(first=0.25))),
    "smallest seed": lambda: sparsifier(sparsify(Blocks(), SPARSE, seed=-(2**63))).seed == -(2**63),
    "largest seed": lambda: sparsifier(sparsify(Blocks(), SPARSE, seed=2**63 - 1)).seed == 2**63 - 1,
    "seed of numpy": lambda: type(sparsifier(sparsify(Blocks(), SPARSE, seed=np.int64(7))).seed) is int,
    "seed of torch": lambda: sparsifier(sparsify(Blocks(), SPARSE, seed=torch.tensor(7))).seed == 7,
    "block of numpy": lambda: bool(sparsify(Blocks(), SPARSE, block=np.int64(4))),
    "finest block": lambda: bool(sparsify(Blocks(), SPARSE, block=1)),
    "patterns from an iterator": lambda: bool(sparsify(Blocks(), SPARSE, include=iter(["layers.0.*"]))),
    "patterns as a set": lambda: bool(sparsify(Blocks(), SPARSE, exclude={"layers.0.*"})),
    "no overrides": lambda: bool(sparsify(Blocks(), SPARSE, overrides={})),
    "flag of numpy": lambda: bool(sparsify(Blocks(), SPARSE, rescale=np.bool_(False))),
    "no rate": lambda: mst_compile.param_groups(sparsify(Blocks(), SPARSE), density_rate=0)[0]["density_rate"] == 0,
    "rates of numpy": lambda: bool(mst_compile.param_groups(sparsify(Blocks(), SPARSE), weight_decay=np.float32(0.1))),
    "groups of a plain model": lambda: len(mst_compile.param_groups(Blocks())) == 2,
    "meter of a plain model": lambda: Meter(Blocks(), 8).rest > 0,
    "meter with floats": lambda: Meter(Blocks(), 8e3, rest=0).tokens_per_step == 8000,
    "meter with numpy": lambda: Meter(Blocks(), np.int64(8), rest=np.float32(2)).rest == 2,
    "part of a step": lambda: len(mst_compile.forecast(Blocks(), SPARSE, tokens=0.5, tokens_per_step=8).phases) == 1,
    "forecast of numpy": lambda: bool(
        mst_compile.forecast(Blocks(), SPARSE, tokens=np.float64(80), tokens_per_step=np.int64(8))
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_looks_odd_and_is_right_is_taken(name: str) -> None:
    assert GOOD[name]()


@pytest.mark.parametrize("rate", [NAN, -1.0, "1", True])
def test_a_rate_in_a_group_of_ones_own_is_checked_before_the_step(rate: Any) -> None:
    model = sparsify(Blocks(), SPARSE)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "density_rate": rate}], 0.1)
    model(torch.randn(2, 32)).sum().backward()
    with unchanged(model), pytest.raises(MSTError, match="density_rate"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_a_state_with_numbers_of_other_kinds_loads(kind: Any) -> None:
    own = sparsifier(sparsify(Blocks(), SPARSE, seed=3))
    state = own.state_dict()
    own.load_state_dict({**state, "step": kind(5), "seed": kind(-4)})
    assert (own.step_count, own.seed) == (5, -4)
    assert {type(own.step_count), type(own.seed)} == {int}
