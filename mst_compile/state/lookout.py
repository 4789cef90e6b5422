"""Who looks for values that somebody has written outside the active blocks without leaving a trace.

A write through ``parameter.data`` or ``parameter.grad.data`` counts no version up: PyTorch gives what ``.data`` returns
a counter of its own. So a weight, or the gradient that an optimizer is about to use, may be something else than what
was last known of it. To look at all of both at every step would cost as much as masking them. Instead some rows of the
weights are looked at before each step, others at the next: who adds noise everywhere is seen at the next step, whoever
writes a single element when its turn comes, and what a written gradient did is seen in the weights that it has moved.
On a device that the host would have to wait for, all weights are looked at once in a while.

Of a weight that is spread over ranks each looks at rows of its own part, and needs no other for that: which values are
outside is said by the mask, which all have, and to cut one's own values and state is all that follows. The steps at
which a weight's turn comes are counted by the whole of it, so that ranks which hold another weight in common, or the
same part of this one, find what was written there at one step.

Of a copy that no optimizer trains, as for averages of the weights, nobody asks before a step. Compiled calls look at
some rows of it whenever something has been trained since they took it last: averages are written everywhere. On a
device that the host would have to wait for they look at the first, second, fourth, ... such call, and once in a while.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mst_compile.blocks.bulk import any_outside, outside_of_all, share_outside_here
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.layout import are_one_matrix, as_matrix
from mst_compile.blocks.shards import holder_of, is_sharded, local_part

from .indexes import activity
from .weight import SparseWeight

_ELEMENTS = 1 << 16  # that are looked at before a step, in whole rows: some hundredths of a millisecond
_SELDOM = 100  # steps between two looks where the host waits for a device

Own = Sequence[tuple[SparseWeight, Tensor]]


class Lookout:
    """Looks at some rows of a run's weights at every step."""

    def __init__(self) -> None:
        self._turn = 0
        self._weights: list[SparseWeight] = []  # that the plan is of
        self._ends: list[int] = []  # of each weight's turns in a cycle through all

    def sees(self, own: Own) -> bool:
        """Whether values stand outside the active blocks of a weight of which nothing was known to be written; or
        whether it is time to look at all of them."""
        self._turn += 1
        waits = [(weight, parameter) for weight, parameter in own if not parameter.is_cpu]
        if waits and self._turn % _SELDOM == 0:
            return any(_can_look(weight, parameter) for weight, parameter in waits)
        here = [pair for pair in own if pair[1].is_cpu] if waits else own
        weights = [weight for weight, _ in here]
        if weights != self._weights:
            self._weights, self._ends = (
                weights,
                list(itertools.accumulate(_steps_of(weight.grid) for weight in weights)),
            )
        if not weights:
            return False
        at = self._turn % self._ends[-1]
        i = bisect.bisect_right(self._ends, at)
        weight, parameter = here[i]
        at -= self._ends[i - 1] if i else 0
        return _can_look(weight, parameter) and not _are_zero(weight, parameter.detach(), at)


def look_at_copies(held: Own) -> bool:
    """Before a compiled call: whether values stand outside the active blocks of weights that nobody trains here. Of a
    weight in the host's memory some rows are looked at, of others all at once."""
    own = [(w, p) for w, p in held if not (w.is_dense or w.timed or isinstance(p, FakeTensor) or holder_of(p))]
    own = [(w, p) for w, p in own if not is_sharded(p) and w.is_clean(p) and _is_its_turn(w, p)]
    all_at_once = outside_of_all([(parameter, weight.grid, weight.mask) for weight, parameter in own])
    found = False
    for (weight, parameter), outside in zip(own, all_at_once, strict=True):
        if outside is None:
            outside = not _are_zero(weight, parameter.detach(), activity.value % _steps_of(weight.grid))
        if outside:
            found |= not weight.look_here(parameter)
    return found


def _is_its_turn(weight: SparseWeight, parameter: Tensor) -> bool:
    """Whether to look at a weight at this call: always, but where the host waits for the answer."""
    weight.looks += 1
    return parameter.is_cpu or weight.looks.bit_count() == 1 or weight.looks % _SELDOM == 0


def _can_look(weight: SparseWeight, parameter: Tensor) -> bool:
    """Whether it is worth it: others are looked at anyway."""
    return not weight.is_dense and parameter.requires_grad and weight.is_clean(parameter)


def _rows_of(grid: BlockGrid) -> int:
    """Rows that are looked at at once, in whole blocks."""
    return max(1, _ELEMENTS // max(1, grid.cols) // grid.block) * grid.block


def _steps_of(grid: BlockGrid) -> int:
    return -(-grid.rows // _rows_of(grid))


def _are_zero(weight: SparseWeight, tensor: Tensor, at: int) -> bool:
    """Whether some of the rows are 0 outside the active blocks."""
    grid = weight.grid
    if is_sharded(tensor):
        return not share_outside_here(tensor, grid, weight.mask, _own_rows(tensor, grid, at))
    if tensor.dim() == 3 and not are_one_matrix(tensor):
        return weight.look(tensor)
    first, rows = at * _rows_of(grid), _rows_of(grid)
    if rows >= grid.rows:
        whole = grid if not grid.matrices else replace(grid, matrices=0)
        return not any_outside(as_matrix(tensor), whole, weight.mask)
    some = as_matrix(tensor)[first : first + rows]
    blocks = weight.mask[first // grid.block : (first + rows) // grid.block]
    return not any_outside(some, replace(grid, rows=len(some), matrices=0), blocks)


def _own_rows(tensor: Tensor, grid: BlockGrid, at: int) -> slice:
    """Which rows of its part of a spread weight a rank looks at."""
    share = -(-local_part(tensor)[1].rows // _steps_of(grid))
    return slice(at * share, (at + 1) * share)
