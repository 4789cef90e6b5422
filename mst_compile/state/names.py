"""Names of sparse weights for profiler ranges: by where their index is, which is each weight's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from mst_compile.ops import watching

from .binding import weights
from .indexes import epoch
from .weight import SparseWeight


class _Names:
    """Names by the address of the index and its dimensions, made anew when it may be elsewhere: that of a stack is
    where the index of its first matrix is."""

    epoch = -1
    by_address: ClassVar[dict[tuple[int, int], str]] = {}


def _name_of_index(index: Tensor) -> str | None:
    if _Names.epoch != epoch.value:
        own = [weight for weight in weights() if weight.index is not None]
        _Names.by_address = {_place(index): name for weight in own for index, name in _indices(weight)}
        _Names.epoch = epoch.value
    return _Names.by_address.get(_place(index))


def _indices(weight: SparseWeight) -> Iterator[tuple[Tensor, str]]:
    """The index of a weight, of each of a stack's matrices, and parts that is multiplied alone, with names."""
    assert weight.index is not None
    yield weight.index, weight.name
    for one in weight.ranges:
        part = one.part
        cols = f", {part.col}:{part.col + part.cols}" if part.cols < weight.grid.cols else ""
        yield one.index, f"{weight.name}[{part.row}:{part.row + part.rows}{cols}]"
    if weight.stacked:
        yield from zip(weight.index, weight.matrices, strict=False)  # of experts on other ranks none is here


def _place(index: Tensor) -> tuple[int, int]:
    return index.data_ptr(), index.dim()


watching.finders.append(_name_of_index)
