"""When topology events happen, as arithmetic progressions: a run may be longer than what one can count through."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import overload


class Events(Sequence[int]):
    """Steps in ascending order, held as ranges.

    Args:
        ranges: each after the one before, with positive strides; those without steps are left out.
    """

    def __init__(self, ranges: Iterable[range]) -> None:
        self._ranges = [r for r in ranges if r]
        self._ends = list(itertools.accumulate(map(len, self._ranges)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        where = bisect.bisect_right(self._ends, index)
        return self._ranges[where][index - (self._ends[where - 1] if where else 0)]

    def until(self, step: int) -> int:
        """How many of them are at ``step`` or before it."""
        return sum(len(range(r.start, min(r.stop, step + 1), r.step)) for r in self._ranges)
