"""Small sparse models on a device: are their results right, and is a layer faster than dense?"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mst_compile.api import sparsify
from mst_compile.graph.backend import mst
from mst_compile.lowering import inductor  # noqa: F401  (registers the lowerings)
from mst_compile.rules.constant import Constant
from mst_compile.rules.patterns import Sparse, allowed
from mst_compile.state.sparsifier import sparsifier

_SPARSITY = 0.8
_SEED = 0
_TOKENS, _IN, _HIDDEN, _OUT = 96, 192, 320, 128
_HEADS, _LENGTH, _SIZE, _WINDOW = 2, 160, 32, 32
# An error is judged by that of PyTorch's own kernels on the same operands: times it, and roundings besides.
_AS_GOOD, _ROUNDINGS = 4.0, 8.0
_ROUNDS = 7
_ALWAYS: dict[str, Any] = {"mst.dense_threshold": 1.0}  # such small products would be left to the library


@dataclass(frozen=True)
class Verdict:
    """Whether one computation is right: its error and what PyTorch's own kernels give, both in roundings."""

    what: str
    error: float
    usual: float

    @property
    def right(self) -> bool:
        return self.error <= _AS_GOOD * self.usual + _ROUNDINGS


@dataclass(frozen=True)
class Speed:
    """Median seconds of forward and backward of one layer, dense under Inductor and sparse under ``"mst"``."""

    what: str
    dense: float
    sparse: float

    @property
    def ratio(self) -> float:
        return self.dense / self.sparse


# -- right? ------------------------------------------------------------------------------------------------------------


def linear(device: torch.device, dtype: torch.dtype) -> list[Verdict]:
    """A compiled sparse MLP, forward and gradients of input and weights, against float64.

    Raises:
        RuntimeError: the backend left a product dense.
    """
    model, x = _mlp(device, dtype), _randn(_TOKENS, _IN).to(device, dtype)
    plain, wide = _plain(model), _plain(model).double()
    exact, usual = _gradients(wide, x.double(), _matrices(wide)), _gradients(plain, x, _matrices(plain))
    ours = _gradients(torch.compile(model, backend=mst, dynamic=False, options=_ALWAYS), x, _matrices(model))
    weights = sparsifier(model).weights
    left = [name for name, w in weights.items() if not w.uses.served]
    if left:
        raise RuntimeError(f"the products of {', '.join(left)} stayed dense: mst_compile.explain(model) says why")
    names, keep = ["forward", "grad-input"], [torch.ones((), device=device)] * 2
    for name, weight in weights.items():  # gradients of inactive weights are not computed
        names.append(f"grad-weight of {name}")
        keep.append(weight.grid.expand(weight.mask).to(device))
    return [
        Verdict(name, error(mine * kept, right * kept), error(theirs * kept, right * kept))
        for name, mine, theirs, right, kept in zip(names, ours, usual, exact, keep, strict=True)
    ]


def attention(device: torch.device, dtype: torch.dtype) -> list[Verdict]:
    """Compiled sparse attention, forward and gradients, against float64 under a dense mask."""
    parts = Sparse().parts(_WINDOW, _WINDOW)
    mask = allowed(parts, _LENGTH, device)
    q, k, v, grad = (_randn(4, 1, _HEADS, _LENGTH, _SIZE)).to(device, dtype)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.mst.attention(q, k, v, None, parts.numbers, _SIZE**-0.5)[0]

    def run(attend: Callable[..., Tensor], *qkv: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in qkv]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact, usual = run(masked, q.double(), k.double(), v.double()), run(masked, q, k, v)
    ours = run(torch.compile(sparse, fullgraph=True, dynamic=False), q, k, v)
    names = ("forward", "grad-query", "grad-key", "grad-value")
    return [
        Verdict(name, error(mine, right), error(theirs, right))
        for name, mine, theirs, right in zip(names, ours, usual, exact, strict=True)
    ]


def _mlp(device: torch.device, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = nn.Sequential(nn.Linear(_IN, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _OUT))
    return sparsify(model.to(device, dtype), Constant(_SPARSITY, growth="none"), auto_step=False)


def _plain(model: nn.Module) -> nn.Module:
    """The same weights, zeros included, in a model that nobody calls sparse."""
    twin = nn.Sequential(nn.Linear(_IN, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _OUT))
    first = next(model.parameters())
    twin.to(first.device, first.dtype).load_state_dict({k: v.detach().clone() for k, v in model.state_dict().items()})
    return twin


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


# -- fast? -------------------------------------------------------------------------------------------------------------


def speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Forward and backward of one layer at a fifth of its weights, dense and sparse in turn."""
    tokens, features, outputs = (16384, 4096, 4096) if device.type == "cuda" else (1024, 1024, 2048)
    x = _randn(tokens, features).to(device, dtype).requires_grad_()
    grad = _randn(tokens, outputs).to(device, dtype)
    dense = nn.Linear(features, outputs).to(device, dtype)
    sparse = sparsify(copy.deepcopy(dense), Constant(_SPARSITY, growth="none"), auto_step=False)
    block = next(iter(sparsifier(sparse).weights.values())).grid.block
    sides = {
        "dense": _step(torch.compile(dense, dynamic=False), x, grad),
        "sparse": _step(torch.compile(sparse, backend=mst, dynamic=False), x, grad),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(_ROUNDS + 2):
        for name, step in sides.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    what = f"{features} -> {outputs}, {tokens} tokens, {_short(dtype)}, density {1 - _SPARSITY:.1f}, block {block}"
    return Speed(what, *(statistics.median(times[name]) for name in sides))


def _step(model: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    parameters = list(model.parameters())  # type: ignore[attr-defined]
    return lambda: torch.autograd.grad(model(x), [x, *parameters], grad)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# -- numbers -----------------------------------------------------------------------------------------------------------


def _gradients(model: Callable[[Tensor], Tensor], x: Tensor, matrices: list[nn.Parameter]) -> list[Tensor]:
    """The result, and the gradients of the input and of the matrices."""
    x = x.clone().requires_grad_()
    y = model(x)
    grad = _randn(*y.shape).to(y.device, torch.bfloat16)  # the same numbers in every precision
    return [y.detach(), *torch.autograd.grad(y, [x, *matrices], grad.to(y.dtype))]


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(_SEED))


def error(result: Tensor, exact: Tensor) -> float:
    """The largest difference in roundings of ``result``'s dtype at the size of ``exact``, infinite if not a number.

    The root mean square counts towards the size: sums that cancel carry the rounding of their parts.
    """
    exact = exact.double()
    size = exact.abs() + exact.square().mean().sqrt()
    worst = float(((result.double() - exact).abs() / size.clamp_min(1e-30)).max()) / torch.finfo(result.dtype).eps
    return math.inf if math.isnan(worst) else worst


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
