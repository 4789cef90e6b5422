"""What a run tells of its topology events: to callbacks, and to the log ``"mst_compile"``."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mst_compile.errors import ArgumentError
from mst_compile.rules.checks import shown

from .weight import SparseWeight

_logger = logging.getLogger("mst_compile")


@dataclass(frozen=True)
class WeightChange:
    """What an event did to one weight.

    Attributes:
        density: share of its elements in active blocks, afterwards.
        dropped, grown: blocks.
        block: edge of a block.
    """

    density: float
    dropped: int
    grown: int
    block: int


@dataclass(frozen=True)
class TopologyEvent:
    """What a topology event did, as :meth:`Sparsifier.on_event` callbacks are told.

    Attributes:
        step: training steps until then, the one that has just ended included.
        phase: of the schedule at the next step, ``"warm-up"``, ``"plateau"``, ...; empty if it has none there.
        density: of all sparse weights together, afterwards.
        skipped: why nothing was changed, else empty.
        weights: name -> what changed of each weight whose mask did.
    """

    step: int
    phase: str
    density: float
    skipped: str = ""
    weights: Mapping[str, WeightChange] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Elements of dropped blocks, those at ragged edges counted in full."""
        return sum(change.dropped * change.block**2 for change in self.weights.values())

    @property
    def grown(self) -> int:
        """Elements of grown blocks, likewise."""
        return sum(change.grown * change.block**2 for change in self.weights.values())

    def __str__(self) -> str:
        where = f"step {self.step}{f', {self.phase}' if self.phase else ''}"
        if self.skipped:
            return f"{where}: topology event skipped, {self.skipped}"
        dropped, grown = (sum(getattr(c, name) for c in self.weights.values()) for name in ("dropped", "grown"))
        return f"{where}: density {self.density:.3f}, {dropped} blocks dropped and {grown} grown"


Callback = Callable[[TopologyEvent], Any]


class Listeners:
    """The callbacks of one run, in the order in which they were added."""

    def __init__(self) -> None:
        self._callbacks: OrderedDict[int, Callback] = OrderedDict()

    @property
    def wanted(self) -> bool:
        """Whether anybody listens: else nothing is counted."""
        return bool(self._callbacks) or _logger.isEnabledFor(logging.INFO)

    def add(self, callback: Callback) -> RemovableHandle:
        """Call ``callback`` at every event until the handle's ``remove()``.

        Raises:
            ArgumentError: it cannot be called.
        """
        if not callable(callback):
            raise ArgumentError(f"on_event wants a function of a TopologyEvent, got {shown(callback)}")
        handle = RemovableHandle(self._callbacks)
        self._callbacks[handle.id] = callback
        return handle

    def tell(self, event: TopologyEvent) -> None:
        """Log an event, and tell all; what a callback raises goes to whoever steps."""
        _logger.info("%s", event)
        for callback in list(self._callbacks.values()):
            callback(event)


def changes(before: Mapping[str, Tensor], weights: Iterable[SparseWeight]) -> dict[str, WeightChange]:
    """What has changed of weights since their masks were ``before``, by name."""
    found = {}
    for weight in weights:
        mask = before.get(weight.name)
        if mask is not None and not mask.equal(weight.mask):
            dropped, grown = (int(x.count_nonzero()) for x in (mask & ~weight.mask, weight.mask & ~mask))
            found[weight.name] = WeightChange(weight.density, dropped, grown, weight.grid.block)
    return found
