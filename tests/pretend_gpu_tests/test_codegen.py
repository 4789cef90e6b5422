"""Writing code: choices, backends, and what is kept of each graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretend_gpu import Interpreter, generate, kernels_of, snapshot
from torch import Tensor

from .cases import TRITON_MM, mm_bias_gelu, operands


def test_walking_the_choices(interpreter: Interpreter) -> None:
    config = TRITON_MM | {"max_autotune_gemm_backends": "ATEN,TRITON"}
    seen: dict[int, str] = {}
    for pick in (0, 1, 2):
        args = [torch.randn(48, 40), torch.randn(40, 24)]
        made = generate(torch.matmul, args, config=config, choose=lambda name, choices, pick=pick: pick)
        assert [(q.name, q.picked) for q in made.questions] == [("mm", pick)]
        assert len(made.questions[0].choices) > 3
        seen[pick] = made.forward.source
        torch.testing.assert_close(interpreter.run(made.forward)[0], made.result)
    assert "extern_kernels.mm(" in seen[0]
    assert not kernels_of(seen[0])
    notes = [kernels_of(seen[pick])[0].inductor_meta["config_args"] for pick in (1, 2)]
    assert notes[0] != notes[1]
    with pytest.raises(Exception, match="choice 1000 of mm: there are"):
        generate(torch.matmul, args, config=config, choose=lambda name, choices: 1000)


def test_a_backend_of_ones_own() -> None:
    from torch._inductor.compile_fx import compile_fx

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any], inner: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return compile_fx(graph, inputs, inner_compile=inner)

    made = generate(mm_bias_gelu, operands(4, 5, 6, torch.float32), backend_wrapper=backend)
    assert len(graphs) == 1
    assert list(made.graphs) == ["forward", "backward"]


def increment(x: Tensor, y: Tensor) -> Tensor:
    x.add_(y)
    return x * 2


def test_inputs_that_the_graph_mutates(interpreter: Interpreter) -> None:
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    before = x.clone()
    made = generate(increment, [x, y])
    assert list(made.graphs) == ["forward"]
    ran = interpreter.run_on(made.forward.source, made.forward.inputs)
    places = [i for i, value in enumerate(made.forward.inputs) if torch.equal(value, before)]
    assert len(places) == 1
    assert torch.equal(ran.inputs[places[0]], before + y)
    assert torch.equal(made.forward.inputs_after[places[0]], before + y)
    assert torch.equal(made.forward.inputs[places[0]], before)
    assert torch.equal(ran.outputs[0], (before + y) * 2)


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(3.0)[:, None].expand(3, 4),
        torch.arange(12.0)[3:9:2],
        torch.arange(8.0).as_strided((3, 4), (1, 1)),
        torch.empty(0, 3),
        torch.tensor(2.0),
    ],
)
def test_snapshots_keep_strides(view: Tensor) -> None:
    copy = snapshot(view)
    assert torch.equal(copy, view)
    assert copy.stride() == view.stride()
    if view.numel():
        view.as_strided((1,), (1,)).add_(1)
        assert not torch.equal(copy, view)
