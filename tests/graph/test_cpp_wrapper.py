"""Inductor's ``cpp_wrapper``, whose generated code is C++ that knows nothing of our functions in Python."""

from __future__ import annotations

import pytest
import torch
from helpers import static
from oracles import assert_all_as_good_as
from torch import nn
from torch._inductor import config as inductor_config

from mst_compile import export, sparsify


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_are_called_through_their_operators(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MST_COMPILE_DENSE_THRESHOLD", "1.0")
    model = sparsify(nn.Linear(64, 48), static(0.8), block=8)
    x = torch.randn(32, 64)
    eager = {"output": model(x).detach()}
    truth = {"output": nn.functional.linear(x.double(), model.weight.double(), model.bias.double()).detach()}
    run = torch.compile(export.packed(model) if packed else model, backend="inductor" if packed else "mst")
    with inductor_config.patch(cpp_wrapper=True), torch.no_grad():
        fast = {"output": run(x)}
    assert_all_as_good_as(fast, eager, truth, torch.float32)
