"""Compilations are told of when they begin, those of Dynamo and those of the backend's own."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from mst_compile import MixedSparsity, sparsifier, sparsify
from mst_compile.report.clock import Clock, compilations


def test_a_variant_that_is_compiled_late_is_told_of() -> None:
    """Dynamo compiles once; the variant for a model that is dense again is made when it is first needed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    steps = 10
    sparsify(model, MixedSparsity(steps, ramp_interval=1))
    compiled = torch.compile(model, backend="mst", options={"mst.inner": "eager", "mst.dense_threshold": 0.9})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    told: list[tuple[int, float]] = []
    for step in range(steps + 2):
        with compilations(lambda step=step: told.append((step, sparsifier(model).density))):  # type: ignore[misc]
            compiled(torch.randn(32, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [density == 1 for _, density in told] == [False, True]
    assert told[0][0] == 0
    assert 0 < told[1][0] < steps


def test_nobody_is_told_afterwards() -> None:
    told: list[str] = []
    with compilations(lambda: told.append("within")):
        torch.compile(nn.Linear(4, 4), backend="eager")(torch.randn(2, 4))
    assert told == ["within"]
    torch._dynamo.reset()
    torch.compile(nn.Linear(4, 5), backend="eager")(torch.randn(2, 4))
    assert told == ["within"]
    with compilations(lambda: told.append("reset")):
        torch._dynamo.reset()


def test_an_interrupt_leaves_a_step_counted_whole_or_not_at_all() -> None:
    """Ctrl-C at every line of what ends a step, with a compilation owed and without."""
    for owed in (0, 2):
        line, interrupted = 0, True
        while interrupted:
            line, interrupted = line + 1, False
            clock = Clock()
            clock.seconds, clock._owed = 1.0, owed
            before, left = vars(clock).copy(), line

            def trace(frame: FrameType, event: str, _: Any) -> Any:
                nonlocal left
                if frame.f_code is not Clock.stop.__code__:
                    return None
                left -= event == "line"
                if event == "line" and not left:
                    raise KeyboardInterrupt
                return trace

            outer = sys.gettrace()
            sys.settrace(trace)
            try:
                clock.stop()
            except KeyboardInterrupt:
                interrupted = True
            finally:
                sys.settrace(outer)
            after = vars(clock)
            if after["seconds"] == 1.0:
                assert after == before
            else:
                assert after["_owed"] == 0
                assert after["compile_seconds"] == pytest.approx((1.0 - after["seconds"]) / (1 + owed) * owed)
        assert line > 5
