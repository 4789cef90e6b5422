"""Python threads that run one compiled graph, each for weights of its own."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from helpers import compiled, static
from oracles import assert_reordered
from torch import nn
from torch._dynamo.utils import counters

import mst_compile
from mst_compile.graph import dispatch
from mst_compile.graph.compiler import Compiler


class Layer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def layers() -> list[nn.Module]:
    """Two with masks of their own."""
    return [mst_compile.sparsify(Layer(seed), static(), block=8, masks="random", seed=seed) for seed in range(2)]


class Interrupted:
    """The count of mask changes; whoever reads it is interrupted by another thread once."""

    def __init__(self, value: int) -> None:
        self._value = value
        self.other: Any = None

    @property
    def value(self) -> int:
        other, self.other = self.other, None
        if other is not None:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return self._value


@pytest.mark.parametrize("same_length", [True, False])
def test_a_call_is_not_handed_what_another_threads_chose(same_length: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    models = layers()
    fast = [compiled(m, "eager", dynamic=True) for m in models]
    inputs = [torch.randn(4 if same_length or i else 6, 32) for i in range(2)]
    want = [m(x).detach() for m, x in zip(models, inputs, strict=True)]
    epoch = Interrupted(dispatch.epoch.value)
    monkeypatch.setattr(dispatch, "epoch", epoch)
    with torch.no_grad():
        for _ in range(3):
            for run, x in zip(fast, inputs, strict=True):
                run(x)
        assert counters["stats"]["unique_graphs"] == 1
        for i in range(2):
            fast[i](inputs[i])  # so that nothing is to be chosen anew
            epoch.other = torch.no_grad()(lambda i=i: fast[1 - i](inputs[1 - i]))
            assert_reordered(fast[i](inputs[i]), want[i], 64)
            assert epoch.other is None


def test_threads_that_need_a_variant_at_once_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()[0]
    fast, x, compilations = compiled(model, "eager"), torch.randn(4, 32), []
    with torch.no_grad():
        model.fc.weight.add_(1.0)  # type: ignore[union-attr, operator]
        fast(x)  # the dense variant, as values stand outside of the mask
        mst_compile.sparsifier(model).weights["fc.weight"].zero_inactive_(model.fc.weight)  # type: ignore[arg-type, union-attr]
    compile_one = Compiler._compile

    def slowly(self: Compiler, *args: Any) -> Any:
        compilations.append(args)
        time.sleep(0.3)
        return compile_one(self, *args)

    monkeypatch.setattr(Compiler, "_compile", slowly)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=torch.no_grad()(lambda: results.append(fast(x)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilations) == 1
    for got in results:
        assert_reordered(got, model(x).detach(), 64)
    assert len(results) == 3


@pytest.mark.skipif(
    not hasattr(torch.compiler, "_compile_session_context"), reason="this PyTorch refuses the call under any backend"
)
def test_a_thread_may_call_while_another_compiles_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """What traces a variant says so for the whole process, and a compiled function must not be traced."""
    models = layers()
    fast, x = [compiled(model, "eager") for model in models], torch.randn(4, 32)
    found: list[Any] = []

    def call() -> None:
        with torch.no_grad():
            try:
                found.append(fast[1](x))
            except RuntimeError as error:
                found.append(error)

    class Tracer(torch.fx.Tracer):
        def create_arg(self, a: Any) -> Any:
            thread = threading.Thread(target=call)  # in the middle of a trace
            thread.start()
            thread.join()
            return super().create_arg(a)

    def traced(self: Compiler, *args: Any) -> Any:
        compile_fn = self._compile_fn
        monkeypatch.setattr(self, "_compile_fn", lambda *given: (Tracer().trace(nn.Identity()), compile_fn(*given))[1])
        return compile_one(self, *args)

    compile_one = Compiler._compile
    with torch.no_grad():
        for run in fast:
            run(x)
        want = models[1](x)
        monkeypatch.setattr(Compiler, "_compile", traced)
        models[0].fc.weight.add_(1.0)  # type: ignore[union-attr, operator]
        fast[0](x)  # the dense variant
    assert found
    for got in found:
        assert isinstance(got, torch.Tensor), got
        assert_reordered(got, want, 64)
