"""Names of sparse weights for profiler ranges: by where their index is, which is each weight's own."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mst_compile.ops import watching

from .binding import bound, of
from .weight import epoch


class _Names:
    """Names by the address of the index, made anew when it may be elsewhere."""

    epoch = -1
    by_address: ClassVar[dict[int, str]] = {}


def _name_of_index(index: Tensor) -> str | None:
    if _Names.epoch != epoch.value:
        own = [weight for _, p in bound() if (weight := of(p)) is not None and weight.index is not None]
        _Names.by_address = {weight.index.data_ptr(): weight.name for weight in own}  # type: ignore[union-attr]
        _Names.epoch = epoch.value
    return _Names.by_address.get(index.data_ptr())


watching.finders.append(_name_of_index)
