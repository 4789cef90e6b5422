"""What the host does in a training step on a GPU, counted and timed on a machine that has none.

    python -m benchmarks.gpu.host                           # GPT-2 small, 16 x 1024 tokens, dense and sparse
    python -m benchmarks.gpu.host --model llama             # a Llama of its size, needs transformers
    python -m benchmarks.gpu.host --model tiny --steps 5    # tests the program
    python -m benchmarks.gpu.host --json host.json          # and keep it

The models of ``python -m benchmarks.gpu`` are compiled as for an H100 and trained on a device that takes every launch
and does nothing (tests/pretend_gpu/host): Dynamo, AOTAutograd and Inductor, our dispatch, autograd with its thread for
the device, hooks, clipping, fused AdamW and the schedule run as on a card. Counted: launches, allocations, operators
outside of generated kernels, and every place where the host would wait for the device, in a step, in one of two
backward passes (gradient accumulation) and in one with a topology event. Timed: microseconds of this CPU, without what
a launch itself takes in Inductor's launcher and the driver, which is a few microseconds for each of those counted.
Needs a C++ compiler and a PyTorch without CUDA.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from . import plan
from .checkout import ROOT, make_importable

TESTS = ROOT / "tests"
_WARMUP = 6  # steps: the first look at values, and addresses repeat after a few
_EVENT = 20  # steps between topology events
AROUND = ("before an event", "event", "behind an event")
MODELS = {
    "small": plan.MODELS[0],
    "llama": plan.ModelCell("llama", 768, 12, 12, 32000, 16, 1024),
    "tiny": plan.ModelCell("tiny", 768, 1, 12, 768, 2, 64),
}


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=tuple(MODELS), default="small")
    p.add_argument("--block", type=int, default=64, help="as in python -m benchmarks.gpu --model-block")
    p.add_argument("--steps", type=int, default=30, help="that are timed, of each side in turn; 0: counts alone")
    p.add_argument("--mode", help="of torch.compile")
    p.add_argument("--no-event", action="store_true", help="leave the step with a topology event out")
    p.add_argument("--json", type=Path, help="a file for all that was counted")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p


# -- whose time it is --------------------------------------------------------------------------------------------------


class Sources:
    """Times calls, each without those of its own that are timed too.

    Args:
        clock: seconds of the host.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._inner = threading.local()  # seconds of timed calls within the one under way
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.on = False

    def timed(self, source: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed while :attr:`on`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            outer, self._inner.seconds = getattr(self._inner, "seconds", 0.0), 0.0
            start = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                whole = self._clock() - start
                self.seconds[source] = self.seconds.get(source, 0.0) + whole - self._inner.seconds
                self.calls[source] = self.calls.get(source, 0) + 1
                self._inner.seconds = outer + whole

        return call

    def watch(self, source: str, owner: Any, name: str) -> None:
        """Time ``owner.name`` from now on."""
        setattr(owner, name, self.timed(source, getattr(owner, name)))


def _watch_all(sources: Sources) -> None:
    """Everything of ours that a step runs, and the parts of PyTorch around it."""
    import torch
    from mst_compile.kernels.triton import zero
    from torch._inductor.output_code import CompiledFxGraph

    from mst_compile.graph.dispatch import Dispatch
    from mst_compile.state import binding, run, stepping

    sources.watch("dispatch", Dispatch, "__call__")
    sources.watch("dispatch: which variant, is anything written", Dispatch, "_indices")
    sources.watch("dispatch: what the backward pass will ask", Dispatch, "_guard_backward")
    sources.watch("gradient hooks", binding, "_mask_gradient")
    sources.watch("zeroing", zero, "zero_inactive_")
    sources.watch("before an optimizer step", stepping.Stepping, "before_step")
    sources.watch("after an optimizer step", stepping.Stepping, "after_step")
    sources.watch("schedule", run.Run, "complete_step")
    sources.watch("PyTorch: generated code", CompiledFxGraph, "__call__")
    sources.watch("PyTorch: clipping", torch.nn.utils, "clip_grad_norm_")
    sources.watch("PyTorch: optimizer", torch.optim.AdamW, "step")


# -- the two sides -----------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One model that trains on the idle device, and what was found.

    Attributes:
        step: a training step, of as many backward passes as it is told.
        trace: of a step; passes: of one with two backward passes.
        around: of the step before a topology event, of that with the event and of the one behind it.
        seconds: of the host, of each step that was timed.
    """

    step: Callable[..., object]
    trace: Any = None
    passes: Any = None
    around: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    sources: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def _llama(cell: plan.ModelCell) -> Any:
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=cell.vocab, hidden_size=cell.width, intermediate_size=8 * cell.width // 3,
        num_hidden_layers=cell.layers, num_attention_heads=cell.heads, max_position_embeddings=cell.context,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    whole = model.forward

    def forward(ids: Any) -> Any:
        logits = whole(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    model.forward = forward
    return model


def prepare(name: str, args: argparse.Namespace, idle: Any) -> Side:
    """A side that has compiled and is warm: ``"inductor"``, ``"mst"`` with one mask, or ``"event"`` with a schedule."""
    import torch
    from mst_compile.lowering import cuda

    import mst_compile

    from . import models

    cell = MODELS[args.model]
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = (_llama(cell) if args.model == "llama" else models.GPT(cell)).to("cuda")
    if name != "inductor":
        every = {"growth": "none"} if name == "mst" else {"growth": "gradient", "interval": _EVENT}
        with idle.computing(), mock.patch.object(cuda._Bulk, "takes", return_value=False):  # kernels would not zero
            mst_compile.sparsify(model, mst_compile.Constant(models.SPARSITY, **every), block=args.block)
    run = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    ids = torch.randint(0, cell.vocab, (cell.batch, cell.context + 1), device="cpu").to("cuda")
    backend = models.BACKENDS["inductor" if name == "inductor" else "mst"]
    side = Side(models._stepper(model, _in_mode(backend, args.mode), ids, run))
    for _ in range(_WARMUP):
        side.step()
    return side


def _in_mode(backend: Any, mode: str | None) -> Any:
    if mode is None:
        return backend
    if callable(backend):
        return functools.partial(backend, mode=mode)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    return functools.partial(compile_fx, config_patches=list_mode_options()[mode])


def _time(sides: dict[str, Side], args: argparse.Namespace, idle: Any, sources: Sources) -> None:
    """Steps of each side in turn, and once more with every source timed."""

    def clock() -> float:
        return time.perf_counter() - idle.seconds_inside()

    for on in (False, True):
        for _ in range(args.steps):
            for side in sides.values():
                sources.on, sources.seconds, sources.calls = on, side.sources, side.calls
                start = clock()
                side.step()
                if not on:
                    side.seconds.append(clock() - start)
    sources.on = False


def _traced(side: Side, idle: Any, passes: int) -> Any:
    """What a step of so many backward passes does, when addresses repeat."""
    for _ in range(_WARMUP):
        side.step(passes)
    with idle.tracing() as trace:
        side.step(passes)
    return trace


def _find_event(args: argparse.Namespace, idle: Any) -> Side:
    """A side of a schedule, with traces of the step whose masks change, of the one before, which computes gradients on
    all blocks, and of the one behind, the first of blocks that have grown."""
    side = prepare("event", args, idle)
    for _ in range(_WARMUP, _EVENT - 2):  # the first one: what the next ones find is no model, as nothing computes
        side.step()
    for name in AROUND:
        with idle.tracing() as side.around[name]:
            side.step()
    return side


# -- what is printed ---------------------------------------------------------------------------------------------------


def _print_counts(name: str, trace: Any) -> None:
    print(f"\n{name}: {trace.launches} launches, of them {trace.kernels.total()} of Triton kernels")
    print(f"  {trace.allocations} allocations, {trace.new_memory} of new memory, {len(trace.waits)} waits")
    for operator, count in trace.operators.most_common():
        print(f"  {count:5} {operator}")


def _print_waits(trace: Any) -> None:
    found: dict[tuple[str, str], int] = {}
    for wait in trace.waits:
        ours = [line for line in wait.stack if "site-packages" not in line and "pretend_gpu" not in line]
        where = " < ".join(Path(line.rsplit(":", 1)[0]).name + ":" + line.rsplit(":", 1)[1] for line in ours[:-4:-1])
        found[wait.what, where] = found.get((wait.what, where), 0) + 1
    for (what, where), count in sorted(found.items(), key=lambda item: -item[1]):
        print(f"  {count:5} wait {what}: {where}")


def _print_times(sides: dict[str, Side], steps: int) -> None:
    for name, side in sides.items():
        print(f"\n{name}: {statistics.median(side.seconds) * 1e6:.0f} us of the host a step (median of {steps})")
        for source, seconds in sorted(side.sources.items(), key=lambda item: -item[1]):
            print(f"  {seconds / steps * 1e6:7.0f} us in {side.calls[source] / steps:5.1f} calls: {source}")


def _account(side: Side, steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, trace in (("step", side.trace), ("two passes", side.passes), *side.around.items()):
        if trace is not None:
            found[name] = {
                "launches": trace.launches, "kernels": dict(trace.kernels), "operators": dict(trace.operators),
                "allocations": trace.allocations, "new memory": trace.new_memory,
                "waits": [[wait.what, *wait.stack] for wait in trace.waits],
            }  # fmt: skip
    if steps:
        found["microseconds"] = [1e6 * s for s in side.seconds]
        found["sources"] = {source: 1e6 * s / steps for source, s in side.sources.items()}
    return found


def work(args: argparse.Namespace) -> int:
    """Count and time, in a process that has the idle device."""
    make_importable()
    sys.path.insert(0, str(TESTS))
    from pretend_gpu.host.device import idle_h100

    with idle_h100() as idle:
        sources = Sources(lambda: time.perf_counter() - idle.seconds_inside())
        _watch_all(sources)
        sides = {name: prepare(name, args, idle) for name in ("inductor", "mst")}
        for name, side in sides.items():
            side.trace, side.passes = (_traced(side, idle, passes) for passes in (1, 2))
            _print_counts(f"{name}, a step", side.trace)
            _print_waits(side.trace)
            more = side.passes.launches - side.trace.launches
            print(f"  {more} launches more with a second backward pass, {len(side.passes.waits)} waits")
        if args.steps:
            _time(sides, args, idle, sources)
            _print_times(sides, args.steps)
        found = {name: _account(side, args.steps) for name, side in sides.items()}
        sides.clear()
        if not args.no_event:
            event = _find_event(args, idle)
            for name, trace in event.around.items():
                _print_counts(f"mst, step: {name}", trace)
                _print_waits(trace)
            found["event"] = _account(event, 0)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 if there can be no idle device here, else that of the process that has one."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    if args.worker:
        return work(args)
    sys.path.insert(0, str(TESTS))
    from pretend_gpu.host.library import environment

    try:
        surroundings = environment()
    except RuntimeError as error:
        print(error)
        return 2
    command = [sys.executable, "-m", "benchmarks.gpu.host", "--worker", *given]
    return subprocess.run(command, cwd=ROOT, env=surroundings).returncode


if __name__ == "__main__":
    raise SystemExit(main())
