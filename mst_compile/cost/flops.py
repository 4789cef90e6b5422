"""Count floating-point operations; a multiply-add counts as two.

The operators of this package are known to ``torch.utils.flop_counter.FlopCounterMode``, which then counts what the
kernels compute: active blocks, and the pairs that an attention pattern allows. Mind what that counter sees: under it
Dynamo leaves functions as they are, so a compiled model runs, and counts, its dense products; and PyTorch goes on to
run it so afterwards, slowly, until ``torch._dynamo.reset()``. :class:`CompiledFlopCounter` counts a compiled model,
:class:`Meter` a whole run at no cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    _FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import DENSE_GRAD, read_mask
from mst_compile.blocks.packed import packed_mask
from mst_compile.errors import ArgumentError, ForecastError
from mst_compile.ops import attention as _attention_op  # noqa: F401  (defines the operators)
from mst_compile.ops import linear as _linear_op  # noqa: F401
from mst_compile.ops import watching
from mst_compile.ops.grouped import groups
from mst_compile.rules.checks import (
    LARGEST,
    as_number,
    check_flag,
    check_instance,
    check_model,
    check_number,
    check_whole,
    shown,
)
from mst_compile.rules.patterns import FULL, Parts, pairs
from mst_compile.state.selection import is_linear
from mst_compile.state.sparsifier import Sparsifier, parts_of
from mst_compile.state.weight import SparseWeight


def linear_training(weight: SparseWeight, *, dense_grad: bool = False) -> int:
    """FLOPs per token of forward, grad-input and grad-weight of one sparse weight; of a stack of matrices those of the
    ``visits`` matrices that a token goes to.

    Args:
        dense_grad: grad-weight on all blocks, as on the steps before a topology event that grows by gradient.

    Raises:
        ArgumentError: ``weight`` is no :class:`SparseWeight`, or ``dense_grad`` no bool.
    """
    check_instance("weight", weight, SparseWeight, "a SparseWeight, as in sparsifier(model).weights")
    check_flag("dense_grad", dense_grad)
    return round((4 * weight.active + 2 * (weight.numel if dense_grad else weight.active)) * weight.per_token)


def elements_per_token(own: Sparsifier) -> float:
    """How many elements of the sparse weights a token is multiplied with at density 1: all, but of a stack of matrices
    those of the ones that it goes to."""
    return float(sum(weight.numel * weight.per_token for weight in own.weights.values()))


def dense_linear_training(model: nn.Module) -> int:
    """FLOPs per token of forward, grad-input and grad-weight of the linear layers that are not sparse: of all, if
    ``model`` is a plain one. A frozen weight has no grad-weight. A weight used by several layers counts once.

    Raises:
        ModelError: ``model`` is no module.
    """
    check_model("dense_linear_training", model)
    sparse = {id(parameter) for part in parts_of(model) for _, parameter in part.sparsifier.parameters()}
    weights = (m.weight for m in model.modules() if is_linear(m))
    linear = {id(w): w for w in weights if isinstance(w, Tensor)}
    return sum((6 if w.requires_grad else 4) * w.numel() for i, w in linear.items() if i not in sparse)


def attention_saving(query: Sequence[int], parts: Parts) -> float:
    """FLOPs that a pattern saves in one attention, forward and backward.

    Full attention counts as PyTorch's own counter does it, six products over all pairs of queries and keys; the pattern
    as the share of them that it keeps of the causal pairs.

    Args:
        query: shape of the queries, ``[..., length, head size]``.
        parts: what queries see.

    Raises:
        ArgumentError: ``query`` is no shape of two or more dimensions with a length of at least 1, or ``parts`` no
            :class:`~mst_compile.schedule.Parts`.
    """
    check_instance("query", query, Sequence, "a shape [..., length, head size]")
    if len(query) < 2:
        raise ArgumentError(f"query must be a shape [..., length, head size], got {shown(query)}")
    sizes = [check_whole(f"query {shown(query)}: each size", n, least=0, error=ArgumentError) for n in query]
    length = check_whole(f"query {shown(query)}: the length", sizes[-2], error=ArgumentError)
    check_instance("parts", parts, Parts, "a mst_compile.schedule.Parts")
    kept = 2 * pairs(parts, length) / (length * (length + 1))
    return 12 * math.prod(sizes) * length * (1 - kept)


def check_tokens(name: str, value: object) -> int:
    """The number of tokens ``value``; a float may say a whole number too, such as ``2e9``.

    Raises:
        ForecastError: it is not a positive whole number.
    """
    found = as_number(value)
    whole = int(found) if isinstance(found, float) and found.is_integer() else found
    if not isinstance(whole, int) or not 0 < whole <= LARGEST:
        raise ForecastError(f"{name} must be a positive number, got {shown(value)}; it counts whole tokens")
    return whole


class Meter:
    """Adds up the training FLOPs of a run, step by step, from the masks as they are.

    What lies outside the masks does not count, also where the backend runs a dense product because little does.
    Attention counts as in :func:`mst_compile.forecast`.

    Call :meth:`step` once before each training step's forward pass::

        meter = Meter(model, 8 * 1024, rest=forecast.rest, attention_saved=forecast.attention_saved)
        for batch in loader:
            meter.step()
            ...
        print(meter.flops)

    Args:
        model: a sparsified model, or a plain one to compare with; modules that were sparsified separately are added up.
        tokens_per_step: tokens of one optimizer step.
        rest: FLOPs of a step in everything but the products with sparse weights; default the other linear layers'
            (:func:`dense_linear_training`), which leaves attention out.
        attention_saved: FLOPs that a step saves while the schedule gives attention a pattern.

    Attributes:
        flops: so far; may be set, as when a run is resumed.
        steps: number of calls of :meth:`step`.

    Raises:
        ModelError: ``model`` is no module.
        ForecastError: a number is negative or not finite, or ``tokens_per_step`` no whole one.
    """

    def __init__(
        self, model: nn.Module, tokens_per_step: int, rest: float | None = None, attention_saved: float = 0.0
    ) -> None:
        check_model("Meter", model)
        self.tokens_per_step = check_tokens("tokens_per_step", tokens_per_step)
        if rest is None:
            self.rest = float(self.tokens_per_step * dense_linear_training(model))
        else:
            self.rest = check_number("rest", rest, least=0, error=ForecastError)
        self.attention_saved = check_number("attention_saved", attention_saved, least=0, error=ForecastError)
        self._sparsifiers = [part.sparsifier for part in parts_of(model)]
        if self.attention_saved and len(self._sparsifiers) > 1:
            raise ForecastError(
                f"attention_saved={attention_saved!r} is of one schedule, and {len(self._sparsifiers)} modules of the "
                "model were sparsified separately: make a meter of each of them"
            )
        self.flops = 0.0
        self.steps = 0

    def step(self) -> None:
        """Count the step that comes."""
        self.flops += self.coming
        self.steps += 1

    @property
    def coming(self) -> float:
        """FLOPs of the step that comes."""
        weights = [weight for own in self._sparsifiers for weight in own.weights.values()]
        products = self.tokens_per_step * sum(linear_training(w, dense_grad=w.dense_grad) for w in weights)
        patterned = any(own.attention.pattern != "full" for own in self._sparsifiers)
        return products + self.rest - (self.attention_saved if patterned else 0.0)

    @property
    def dense(self) -> float:
        """FLOPs of a step of the dense model."""
        return 6.0 * self.tokens_per_step * sum(map(elements_per_token, self._sparsifiers)) + self.rest


class _ThroughCompiled(_FlopCounterMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles under this mode instead of standing back; the mode rests while it does."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Another variant of a graph is compiled when it is first needed, long after Dynamo: tracing it is no work.
        if any(issubclass(t, FakeTensor | FunctionalTensor) for t in types):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class CompiledFlopCounter(FlopCounterMode):
    """PyTorch's ``FlopCounterMode`` for what runs in a compiled model, forward and backward::

        compiled = torch.compile(model, backend="mst")
        with CompiledFlopCounter(display=False) as counter:
            compiled(x).sum().backward()
        print(counter.get_total_flops())

    On a CPU under Inductor, too, also of a plain model under ``backend="inductor"``; on a GPU Inductor launches most
    kernels past any counter: there ``options={"mst.inner": "aot_eager"}`` counts the same graph. Counts are not split
    by module (PyTorch's way to do so stops Dynamo).

    Args:
        mods: ignored, as by PyTorch.
        depth: ignored: there are no modules.
        display: print the table at the end.
        custom_mapping: operator -> formula of its FLOPs, as PyTorch's counter takes it.

    Raises:
        ArgumentError: one of them is of the wrong type.
    """

    def __init__(
        self, mods: Any = None, depth: int = 2, display: bool = True, custom_mapping: dict[Any, Any] | None = None
    ) -> None:
        if custom_mapping is not None:
            check_instance("custom_mapping", custom_mapping, dict, "a dict of operators and formulas")
        depth = check_whole("depth", depth, least=0, error=ArgumentError)
        mapping = not_in_pytorch() | (custom_mapping or {})
        super().__init__(mods, depth, check_flag("display", display), mapping)

    def __enter__(self) -> CompiledFlopCounter:
        self.flop_counts.clear()
        self.mode = _ThroughCompiled(self)
        self.mode.__enter__()
        watching.counters.append(self._count)
        return self

    def __exit__(self, *args: Any) -> None:
        assert self.mode is not None
        watching.counters.remove(self._count)
        self.mode.__exit__(*args)
        self.mode = None
        if self.display:
            print(self.get_table(self.depth))

    def _count(self, operator: Any, flops: int) -> None:
        self.flop_counts["Global"][operator] += flops

    def get_table(self, depth: int | None = None) -> str:
        """Operators by their FLOPs, most first, and the total, as text."""
        total = self.get_total_flops()
        counts = sorted(self.get_flop_counts().get("Global", {}).items(), key=lambda item: -item[1])
        rows = [(str(operator), count) for operator, count in counts] + [("total", total)]
        wide = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{wide}}  {count:>20,} FLOPs  {count / max(1, total):6.1%}" for name, count in rows)


def not_in_pytorch() -> dict[Any, Any]:
    """Formulas that PyTorch's counter lacks, as its ``custom_mapping`` takes them: of its attention on a CPU, as it
    counts other devices', and of grouped products, its own and those of transformers."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    found = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        **_of_grouped_products(),
    }
    return {operator: formula for operator, formula in found.items() if operator not in flop_registry}


def _of_grouped_products() -> dict[Any, Any]:
    """Formulas of dense products whose rows come in groups: those of no group do not count."""

    def own(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> int:
        (*stack, m, k), n = a.shape, b.shape[-1]
        if offsets is None:
            return 2 * math.prod(stack) * m * k * n
        if a.dim() == b.dim():  # a gradient of a stack: what is summed over is in groups
            return 2 * m * _grouped_rows(offsets, k) * n
        return 2 * k * (_grouped_rows(offsets, m) * n if b.dim() == 3 else m * _grouped_rows(offsets, n))

    def fallback(x: Tensor, weight: Tensor, offsets: Tensor, *_: Any, **__: Any) -> int:
        return 2 * _grouped_rows(offsets, x.shape[0]) * weight.shape[1] * weight.shape[2]

    def fallback_backward(*args: Any, **named: Any) -> int:
        return 2 * fallback(*args, **named)

    formulas: dict[Any, Any] = {torch.ops.aten._grouped_mm: own}
    library = torch.ops.transformers  # empty where the library is not imported, or an older one
    if hasattr(library, "grouped_mm_fallback"):
        formulas |= {
            library.grouped_mm_fallback: fallback,
            library.grouped_mm_fallback_backward: fallback_backward,
        }
    for formula in formulas.values():
        formula._get_raw = True  # they take tensors: what offsets say is no shape
    return formulas


def _grouped_rows(offsets: Tensor, rows: int) -> int:
    """How many of the rows are in groups; all where offsets have no data (while a graph is traced)."""
    if _without_data(offsets):
        return rows
    bounds = groups(offsets, rows)
    return bounds[-1][1] if bounds else 0


def _without_data(tensor: Tensor) -> bool:
    """Whether nothing can be read from ``tensor``, as while a graph is traced."""
    return isinstance(tensor, FakeTensor | FunctionalTensor) or tensor.is_meta


def _active(index: Tensor, rows: int, cols: int, block: int) -> int:
    """Elements in the active blocks of a packed index; all where the index has no data (while a graph is traced)."""
    if _without_data(index):
        return rows * cols
    grid = BlockGrid(rows, cols, block)
    return grid.count_elements(read_mask(index, grid))


def _tokens(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


@register_flop_formula(torch.ops.mst.linear, get_raw=True)
def _linear(x: Tensor, weight: Tensor, bias: Any, index: Tensor, block: int, *_: Any, **__: Any) -> int:
    return 2 * _tokens(x) * _active(index, weight.shape[0], weight.shape[1], block)


@register_flop_formula(torch.ops.mst.linear_grad_input, get_raw=True)
def _grad_input(grad: Tensor, weight: Tensor, index: Tensor, block: int, *_: Any, **__: Any) -> int:
    return 2 * _tokens(grad) * _active(index, weight.shape[0], weight.shape[1], block)


@register_flop_formula(torch.ops.mst.linear_grad_weight, get_raw=True)
def _grad_weight(grad: Tensor, x: Tensor, index: Tensor, block: int, transposed: bool, *_: Any, **__: Any) -> int:
    rows, cols = (x.shape[-1], grad.shape[-1]) if transposed else (grad.shape[-1], x.shape[-1])
    dense = not _without_data(index) and bool(index[DENSE_GRAD])
    return 2 * _tokens(grad) * (rows * cols if dense else _active(index, rows, cols, block))


def _grouped(x: Tensor, offsets: Tensor, index: Tensor, rows: int, cols: int, block: int, gradient: bool) -> int:
    """Of products of groups with the matrices ``[rows, cols]`` of a stack, each of its active blocks alone."""
    if _without_data(index) or _without_data(offsets):
        return 2 * x.shape[0] * rows * cols
    total = 0
    for own, (start, end) in zip(index, groups(offsets, x.shape[0]), strict=True):
        dense = gradient and bool(own[DENSE_GRAD])
        total += 2 * (end - start) * (rows * cols if dense else _active(own, rows, cols, block))
    return total


@register_flop_formula([torch.ops.mst.grouped_linear, torch.ops.mst.grouped_linear_grad_input], get_raw=True)
def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor, block: int, *_: Any, **__: Any) -> int:
    return _grouped(x, offsets, index, weight.shape[1], weight.shape[2], block, False)


@register_flop_formula(torch.ops.mst.grouped_linear_grad_weight, get_raw=True)
def _grouped_grad_weight(
    grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor, block: int, transposed: bool, *_: Any, **__: Any
) -> int:
    rows, cols = (x.shape[1], grad.shape[1]) if transposed else (grad.shape[1], x.shape[1])
    return _grouped(x, offsets, index, rows, cols, block, True)


@register_flop_formula(torch.ops.mst.packed_linear, get_raw=True)
def _packed_linear(
    x: Tensor, values: Tensor, index: Tensor, bias: Any, outputs: int, block: int, *_: Any, **__: Any
) -> int:
    """Of a packed weight that is traced the filled-up edges count too."""
    grid = BlockGrid(outputs, x.shape[-1], block)
    active = values.numel() if _without_data(index) else grid.count_elements(packed_mask(index, grid))
    return 2 * _tokens(x) * active


def _product(q: Tensor, parts: Sequence[int]) -> int:
    """One product over the pairs of queries and keys that the parts hold; padding is not looked at.

    Of full attention all pairs count, as they do in PyTorch's own kernels.
    """
    length, held = int(q.shape[2]), Parts(*parts)
    return 2 * q.shape[0] * q.shape[1] * q.shape[3] * (length**2 if held == FULL else pairs(held, length))


@register_flop_formula(torch.ops.mst.attention, get_raw=True)
def _attention(q: Tensor, k: Any, v: Any, key_mask: Any, parts: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products."""
    return 2 * _product(q, parts)


@register_flop_formula(torch.ops.mst.attention_backward, get_raw=True)
def _attention_backward(
    grad: Any, q: Tensor, k: Any, v: Any, out: Any, lse: Any, key_mask: Any, parts: Sequence[int], *_: Any, **__: Any
) -> int:
    """Five products: the scores anew, and the gradients of values, probabilities, queries and keys (as PyTorch counts
    its own ``scaled_dot_product`` kernels)."""
    return 5 * _product(q, parts)
