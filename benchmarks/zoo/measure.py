"""What of a model runs sparse: its products with weights are counted while it runs, by what they multiply."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mst_compile
from benchmarks.zoo.build import build

BLOCK = 4
# Products by the position of their first matrix; the second follows it.
_PRODUCTS = {
    "aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1, "aten::mv": 0, "aten::_grouped_mm": 0,
    "transformers::grouped_mm_fallback": 0,
}  # fmt: skip
_SPARSE = {"mst::linear", "mst::grouped_linear"}


@dataclass
class Found:
    """Of one model type.

    Attributes:
        name: of the type.
        why_not: why there is no model of it, in words; the rest is empty then.
        share: of the FLOPs of forward products with weights, the part that runs sparse.
        attention: what became of each attention -> how many.
        dense: why products with weights stay dense -> their share of the FLOPs.
    """

    name: str
    why_not: str = ""
    share: float = math.nan
    attention: dict[str, int] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)


class _Products(TorchDispatchMode):
    """Counts FLOPs of products with weights: sparse ones, and dense ones by the Parameter."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.sparse, self.dense = names, 0, Counter[str]()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled runs, in place of standing back for the mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        called = func._schema.name
        if called in _SPARSE:
            self.sparse += 2 * (args[0].numel() // args[0].shape[-1]) * args[1].shape[-2:].numel()
        first = _PRODUCTS.get(called)
        if first is not None:
            for operand in args[first : first + 2]:
                name = self.names.get(operand.untyped_storage().data_ptr())
                if name is not None:
                    self.dense[name] += 2 * out.numel() * args[first].shape[-1]
        return out


def measure(name: str) -> Found:
    """Make a model of the type, make it sparse, compile and run it, and say what its products are."""
    built = build(name)
    if isinstance(built, str):
        return Found(name, built)
    model, given = built
    schedule = mst_compile.Constant(0.5, growth="none", distribution="uniform", attention="local", stride=4)
    try:
        mst_compile.sparsify(model, schedule, block=BLOCK)
    except mst_compile.errors.SelectionError:
        return Found(name, "has no linear layer")
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="mst", options={"mst.inner": "eager", "mst.dense_threshold": 1})
    compiled(**given)
    names = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}
    with _Products(names) as products:
        compiled(**given)
    total = products.sparse + sum(products.dense.values())
    if not total:
        return Found(name, "has no linear layer that runs")
    rows = {row.name: row.status for row in mst_compile.explain(model)}
    dense: Counter[str] = Counter()
    for weight, flops in products.dense.items():
        dense[_why(rows.get(weight), model.get_parameter(weight))] += flops / total  # type: ignore[assignment]
    attention = Counter(_what(text) for text in mst_compile.explain(model).attention.values())
    return Found(name, "", products.sparse / total, dict(attention), dict(dense))


def _what(text: str) -> str:
    """What became of an attention, without the form that it was found in."""
    return text.removeprefix("full: ") if text.startswith("full: ") else "replaced"


def _why(status: str | None, weight: Tensor) -> str:
    """Why the products with a weight stay dense, without names and sizes."""
    if status is None or "that no linear layer holds" in status or "no matrix and no stack" in status:
        own = "which `include` can name" if weight.dim() == 2 else "of three dimensions"
        return f"a Parameter of the model's own, {own}"
    status = re.sub(r"; FLOPs of a token in .* matrices$", "", status)
    if "a stack of matrices" in status:
        return "a stack of matrices that `include` can name"
    if "dense products at the present density" in status:
        return "so few blocks that all stay"
    if "narrower than a block" in status:
        return f"narrower than {BLOCK}"
    if status.startswith("Dynamo skipped this frame"):
        return "in a frame that Dynamo skipped"
    found = re.sub(r"^not matched: |^skipped: |^matched \(\d+ uses?\); dense: |; tied$", "", status)
    return re.sub(r" in L\[[^,;]*", "", found).split(", ")[0]
