"""Block-sparse products as the GPU would run them, held against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import mst_compile.lowering.inductor  # noqa: F401  (registers the lowerings)
import torch
from mask_cases import expand, index_of
from oracles import Exact, assert_within, of_rounding, of_sum, smallest
from oracles import product as exact_product
from torch import Tensor

BLOCKS = (32, 64, 128)
TUNED = {"max_autotune_gemm": True}  # Inductor's setting with which all tiles are offered
# Each epilogue with a bound on its first derivative; second derivatives stay below 1.
EPILOGUES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "none": (lambda y: y, 1.0),
    "gelu": (torch.nn.functional.gelu, 1.13),
    "silu": (torch.nn.functional.silu, 1.1),
    "tanh": (torch.tanh, 1.0),
    "scaled": (lambda y: 0.5 * y + 1, 0.5),
}


@dataclass
class Product:
    """``epilogue(mst::linear(x, weight, bias))``; the weight is stored ``[in, out]`` if ``transposed``. If ``rounded``
    the operator is given a copy in ``x``'s dtype too."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    block: int
    transposed: bool
    epilogue: str = "none"
    dense_grad: bool = False
    rounded: bool = False

    def to(self, device: torch.device) -> Product:
        """The same product with its operands there; the mask stays on the CPU."""
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, x=self.x.to(device), weight=self.weight.to(device), bias=bias)

    @property
    def index(self) -> Tensor:
        index = index_of(self.mask, *self.weight.shape, self.block, dense_grad=self.dense_grad)
        return index.to(self.weight.device)

    @property
    def keep(self) -> Tensor:
        """Where a gradient of the weight is wanted, bool like the weight."""
        if self.dense_grad:
            return torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        return expand(self.mask, *self.weight.shape, self.block).to(self.weight.device)

    def function(self) -> Callable[..., Tensor]:
        after, block, transposed = EPILOGUES[self.epilogue][0], self.block, self.transposed
        rounded = self.rounded

        def run(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
            x = x.view(x.shape)  # is the graph's first input, and its gradient the first output
            more = [0.2, False, weight.detach().to(x.dtype)] if rounded else []
            return after(torch.ops.mst.linear(x, weight, bias, index, block, transposed, *more))

        return run

    def arguments(self) -> list[Tensor | None]:
        leaves = [self.x, self.weight, self.bias]
        return [*(None if t is None else t.detach().requires_grad_() for t in leaves), self.index]


def product(
    m: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    mask: Tensor,
    block: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    transposed: bool = False,
    bias: bool = True,
    epilogue: str = "none",
    dense_grad: bool = False,
    seed: int = 0,
) -> Product:
    """A product of normal random operands. The weight is exactly 0 outside its active blocks, as ever."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lead = (m,) if isinstance(m, int) else m
    stored = (in_features, out_features) if transposed else (out_features, in_features)
    weight_dtype = weight_dtype or dtype
    weight = normal(*stored, dtype=weight_dtype) * expand(mask, *stored, block)
    x = normal(*lead, in_features, dtype=dtype)
    b = normal(out_features, dtype=weight_dtype) if bias else None
    return Product(x, weight, b, mask, block, transposed, epilogue, dense_grad)


def _error(terms: int, *dtypes: torch.dtype) -> float:
    """Relative error of a sum of ``terms`` products with an epilogue in float32, and of each rounding to a dtype,
    twice for a result that is rounded before and after something is added."""
    return of_sum(terms, beside=8) + of_rounding(*dtypes, times=2)


def check_forward(case: Product, outputs: list[Tensor | None], precision: float = 0.0) -> None:
    """Hold the first output against float64. ``precision`` is the relative error that operands are rounded with."""
    after, slope = EPILOGUES[case.epilogue]
    z, size = _preactivation(case)
    (y,) = [t for t in outputs[:1] if t is not None]
    assert y.dtype == case.x.dtype
    error = _error(case.x.shape[-1], case.x.dtype, case.weight.dtype) + 2 * precision
    exact = after(z).view(*case.x.shape[:-1], -1)
    allowed = slope * error * size + of_rounding(y.dtype, times=2) * after(z).abs() + smallest(y.dtype)
    assert_within(y, exact, allowed.view(exact.shape), "y")


def _preactivation(case: Product) -> Exact:
    """``x W + b`` as ``[M, out]``."""
    x, w = case.x.reshape(-1, case.x.shape[-1]), case.weight
    return exact_product(x, w if case.transposed else w.t(), case.bias)


def check_backward(case: Product, outputs: list[Tensor | None], upstream: Tensor, precision: float = 0.0) -> None:
    """Hold the three gradients against float64, and inactive blocks against exactly 0."""
    after, slope = EPILOGUES[case.epilogue]
    z, size = _preactivation(case)
    z.requires_grad_()
    g = upstream.reshape(z.shape).double()
    (dz,) = torch.autograd.grad(after(z), z, g)
    # The pre-activation was rounded when it was saved, and the incoming gradient is when it is passed on.
    dz_size = g.abs() * (slope + (size if case.epilogue not in ("none", "scaled") else 0))
    x, w = case.x.reshape(-1, case.x.shape[-1]).double(), case.weight.double()
    w = w if case.transposed else w.t()
    gradients = [t for t in outputs if isinstance(t, Tensor)]
    dtype, stored = case.x.dtype, case.weight.dtype
    exact = {"dx": (dz @ w.t(), dz_size @ w.t().abs(), _error(w.shape[1], dtype, stored, dtype), dtype)}
    dw, dw_size = x.t() @ dz, x.abs().t() @ dz_size
    if not case.transposed:
        dw, dw_size = dw.t(), dw_size.t()
    exact["dw"] = dw * case.keep, dw_size * case.keep, _error(len(x), dtype, stored, dtype), stored
    if case.bias is not None:
        exact["db"] = dz.sum(0), dz_size.sum(0), _error(len(x), dtype, case.bias.dtype, dtype), case.bias.dtype
    assert len(gradients) == len(exact)
    for (name, (value, magnitude, error, returned)), actual in zip(exact.items(), gradients, strict=True):
        assert actual.dtype == returned, name
        allowed = (error + 2 * precision) * magnitude + smallest(returned)
        assert_within(actual.reshape(value.shape), value, allowed, name)
    assert not gradients[1][~case.keep].any(), "inactive blocks have no gradient"
