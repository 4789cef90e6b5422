"""From a Python function to the GPU code Inductor would write for it, and the numbers that code must give.

Dynamo and AOTAutograd see real CPU tensors. Each graph they hand on (forward, backward) is copied, moved to the pretend
device and taken through all of Inductor's code generation; the graph itself runs eagerly on the CPU, so that the next
graph gets true inputs and every graph's true outputs are known.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .. import compat
from ..device.h100 import pretend_h100
from .generated import Generated, GraphCode, Question, snapshot

Choose = Callable[[str, list[Any]], int]
InnerCompile = Callable[..., Callable[..., Any]]
Backend = Callable[[torch.fx.GraphModule, list[Any], InnerCompile], Callable[..., Any]]

CONFIG: dict[str, Any] = {
    "compile_threads": 1,  # no pool of processes that know nothing of the pretend device
    "fx_graph_cache": False,  # code of an earlier run proves nothing
    "triton.cudagraphs": False,
    # Fusion by benchmark runs kernels; without it the template is chosen first (by `choose`) and fused by rule.
    "benchmark_fusion": False,
    "benchmark_epilogue_fusion": False,
}


class _CapturedError(Exception):
    """Leaves Inductor once the text is there: what follows would load the module and want a GPU."""


def _to_pretend(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[torch.fx.GraphModule, list]:
    """Copy a graph traced on the CPU and move it: devices in its calls, its inputs, and the metadata of every node."""
    from torch._guards import detect_fake_mode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    cuda = torch.device("cuda", 0)

    def move_device(value: Any) -> Any:
        return cuda if isinstance(value, torch.device) and value.type == "cpu" else value

    moved = copy.deepcopy(graph_module)
    for node in moved.graph.nodes:
        if node.op == "call_function":
            node.args = tree_map(move_device, node.args)
            node.kwargs = tree_map(move_device, node.kwargs)
    moved.recompile()
    mode = detect_fake_mode(example_inputs) or torch._subclasses.FakeTensorMode()
    with mode:
        inputs = [
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=cuda) if isinstance(x, Tensor) else x
            for x in example_inputs
        ]
    FakeTensorProp(moved, mode).propagate_dont_convert_inputs(*inputs)
    return moved, inputs


def _wrapper_of(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> str:
    """The text of Inductor's wrapper for one ATen graph, written for the pretend device."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    texts: list[str] = []

    def capture(self: Any) -> Any:
        texts.append(compat.wrapper_text(self))
        raise _CapturedError

    with pretend_h100(), mock.patch.object(GraphLowering, "compile_to_module", capture):
        moved, inputs = _to_pretend(graph_module, example_inputs)
        try:
            compile_fx_inner(moved, inputs, **options)
        except Exception:
            if not texts:  # anything but our own way out, which Inductor wraps in an error of its own
                raise
    return texts[0]


@contextlib.contextmanager
def _answer_autotuning(choose: Choose, questions: list[Question]) -> Iterator[None]:
    """Put a policy where Inductor would benchmark on the GPU."""
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    def answer(
        self: Any, name: str, nodes: Any, layout: Any, gens: Any, key: Any, choices: list[Any], *a: Any, **k: Any
    ) -> dict[Any, float]:
        picked = choose(name, choices)
        if not 0 <= picked < len(choices):
            raise ValueError(f"choice {picked} of {name}: there are {len(choices)}")
        questions.append(Question(name, tuple(str(c) for c in choices), picked))
        return {choice: 1.0 if i == picked else 2.0 for i, choice in enumerate(choices)}

    def no_precompile(self: Any, *args: Any, **kwargs: Any) -> Callable[[], dict[Any, float]]:
        return dict

    with (
        mock.patch.object(AlgorithmSelectorCache, "do_autotuning", answer),
        mock.patch.object(AlgorithmSelectorCache, "make_precompile_fn", no_precompile),
    ):
        yield


def _inner_compiler(generated: Generated) -> InnerCompile:
    """An `inner_compile` for `compile_fx`: keeps each graph's GPU code and runs the graph itself eagerly."""

    def inner(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        name = "backward" if options.get("is_backward") else "forward"
        if name in generated.graphs:
            name = f"{name}{1 + sum(n.startswith(name) for n in generated.graphs)}"
        eager = copy.deepcopy(graph_module)
        code = GraphCode(name, _wrapper_of(graph_module, example_inputs, options))
        generated.graphs[name] = code

        def run(args: list[Any]) -> Any:
            live = list(args)
            args.clear()
            code.inputs = [snapshot(x) for x in live]
            outputs = torch.fx.Interpreter(eager).run(*live)
            code.outputs = [snapshot(x) for x in outputs]
            code.inputs_after = [snapshot(x) for x in live]
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return inner


def _default_backend(
    graph_module: torch.fx.GraphModule, example_inputs: list[Any], inner: InnerCompile
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, example_inputs, inner_compile=inner)  # type: ignore[arg-type, return-value]


def _backward_of(result: Any, seed: int) -> None:
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    if outputs:
        generator = torch.Generator().manual_seed(seed)
        upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
        torch.autograd.backward(outputs, upstream)


def generate(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    dynamic: bool | None = None,
    choose: Choose | None = None,
    config: dict[str, Any] | None = None,
    backend_wrapper: Backend | None = None,
    seed: int = 0,
) -> Generated:
    """Write the code Inductor would run on an H100 for a function and its gradient.

    Args:
        fn: A function or module without graph breaks.
        args: Real CPU tensors (and anything else it takes). Gradients are accumulated in their `.grad`. A dimension
            that was marked dynamic stays so.
        dynamic: As for `torch.compile`.
        choose: Answers autotuning questions: given the question's name and Inductor's list of choices, the index to
            take. The first is taken by default.
        config: Settings of Inductor on top of `CONFIG`.
        backend_wrapper: A Dynamo backend to go through instead of `compile_fx`; the function it is given as third
            argument must get to `compile_fx(..., inner_compile=)`.
        seed: Of the upstream gradients, which are normally distributed.

    Returns:
        The graphs with their code, inputs and reference outputs, and the autotuning questions.

    Raises:
        Exception: Whatever Dynamo or Inductor raise when they cannot compile the function.
        ValueError: `choose` picked an index that does not exist.
    """
    import torch._inductor.config as inductor_config

    generated = Generated()
    inner = _inner_compiler(generated)
    backend = backend_wrapper or _default_backend
    torch._dynamo.reset()
    with (
        inductor_config.patch(CONFIG | (config or {})),
        _answer_autotuning(choose or (lambda name, choices: 0), generated.questions),
    ):
        compiled = torch.compile(fn, backend=lambda g, e: backend(g, e, inner), fullgraph=True, dynamic=dynamic)
        generated.result = compiled(*args)
        # Inside the patches: with symbolic sizes the backward graph is compiled when it first runs.
        _backward_of(generated.result, seed)
    torch._dynamo.reset()
    return generated
