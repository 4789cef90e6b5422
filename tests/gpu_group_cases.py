"""Products with stacks of block-sparse matrices as the GPU would run them, each group held against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mst_compile.lowering.inductor  # noqa: F401  (registers the lowerings)
import torch
from gpu_cases import EPILOGUES, Product, check_backward, check_forward
from mask_cases import expand, index_of
from torch import Tensor

BF16 = torch.bfloat16


@dataclass
class Groups:
    """``epilogue(mst::grouped_linear(x, weight, offsets, index))``; the matrices are stored ``[in, out]`` if
    ``transposed``.

    Attributes:
        sizes: rows of each group; ``x`` may have more, which belong to none.
        masks: of each matrix, block by block. dense_grad: whether its gradient is wanted on all of them.
        poisoned: whether the kernels find NaN outside the masks, where they must not read.
    """

    x: Tensor
    weight: Tensor
    sizes: list[int]
    masks: list[Tensor]
    block: int
    transposed: bool
    epilogue: str = "none"
    dense_grad: Sequence[bool] = ()
    offsets_dtype: torch.dtype = torch.int32
    poisoned: bool = False

    def to(self, device: torch.device) -> Groups:
        """The same product with its operands there; masks stay on the CPU."""
        return dataclasses.replace(self, x=self.x.to(device), weight=self.weight.to(device))

    @property
    def offsets(self) -> Tensor:
        return torch.tensor(self.sizes).cumsum(0).to(self.weight.device, self.offsets_dtype)

    @property
    def _wanted(self) -> list[bool]:
        return list(self.dense_grad) or [False] * len(self.masks)

    @property
    def index(self) -> Tensor:
        shape = self.weight.shape[1:]
        each = zip(self.masks, self._wanted, strict=True)
        return torch.stack([index_of(m, *shape, self.block, dense_grad=d) for m, d in each]).to(self.weight.device)

    def function(self) -> Callable[..., Tensor]:
        after, block, transposed = EPILOGUES[self.epilogue][0], self.block, self.transposed

        def run(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
            x = x.view(x.shape)  # is the graph's first input, and its gradient the first output
            return after(torch.ops.mst.grouped_linear(x, weight, offsets, index, block, transposed))

        return run

    def arguments(self) -> list[Tensor]:
        leaves = (self.x, self.stored)
        return [*(t.detach().requires_grad_() for t in leaves), self.offsets, self.index]

    @property
    def stored(self) -> Tensor:
        """The weight as kernels find it."""
        if not self.poisoned:
            return self.weight
        shape = self.weight.shape[1:]
        keep = torch.stack([expand(mask, *shape, self.block) for mask in self.masks]).to(self.weight.device)
        return self.weight.masked_fill(~keep, torch.nan)

    def parts(self) -> Iterator[tuple[int, slice, Product]]:
        """Each matrix with its rows, as a product of its own."""
        start = 0
        for e, (size, mask, dense) in enumerate(zip(self.sizes, self.masks, self._wanted, strict=True)):
            rows = slice(start, start + size)
            own = self.x[rows], self.weight[e], None, mask, self.block, self.transposed
            yield e, rows, Product(*own, self.epilogue, dense)
            start += size

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[2 if self.transposed else 1])


def groups(
    sizes: Sequence[int],
    in_features: int,
    out_features: int,
    masks: Sequence[Tensor],
    block: int,
    *,
    more: int = 0,
    dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype | None = None,
    transposed: bool = False,
    epilogue: str = "none",
    dense_grad: Sequence[bool] = (),
    offsets_dtype: torch.dtype = torch.int32,
    poisoned: bool = False,
    seed: int = 0,
) -> Groups:
    """A product of normal random operands, with ``more`` rows of no group."""
    generator = torch.Generator().manual_seed(seed)
    stored = (in_features, out_features) if transposed else (out_features, in_features)
    keep = torch.stack([expand(mask, *stored, block) for mask in masks])
    weight = torch.randn(keep.shape, generator=generator).to(weight_dtype or dtype) * keep
    x = torch.randn(sum(sizes) + more, in_features, generator=generator).to(dtype)
    told = epilogue, dense_grad, offsets_dtype, poisoned
    return Groups(x, weight, list(sizes), list(masks), block, transposed, *told)


def check_results(case: Groups, y: Tensor, precision: float = 0.0) -> None:
    """The result of every group, and that rows of none were multiplied with nothing."""
    assert y.shape == (case.x.shape[0], case.outputs)
    for _, rows, part in case.parts():
        if len(part.x):
            check_forward(part, [y[rows]], precision)
    rest = y[sum(case.sizes) :]
    nothing = EPILOGUES[case.epilogue][0](torch.zeros_like(rest))
    assert torch.equal(rest, nothing), "rows of no group"


def check_gradients(case: Groups, gx: Tensor, gw: Tensor, upstream: Tensor, precision: float = 0.0) -> None:
    """The gradients of every group and matrix, exact zeros where there are none."""
    assert (gx.shape, gw.shape) == (case.x.shape, case.weight.shape)
    for e, rows, part in case.parts():
        if len(part.x):
            check_backward(part, [gx[rows], gw[e]], upstream[rows], precision)
        else:
            assert not gw[e].any(), "of a matrix without rows"
    assert not gx[sum(case.sizes) :].any(), "rows of no group"
