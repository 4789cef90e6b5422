"""What compiled graphs do with a weight: written by the graph passes, read by ``explain``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Uses:
    """What the graph pass saw of a weight, over all graphs compiled so far.

    Attributes:
        matched: uses that became sparse products.
        served: a sparse graph, perhaps one compiled for another layer of the same form, has run with it.
        warned: the user was told that its products stay dense.
        unmatched: why uses stay dense.
    """

    matched: int = 0
    served: bool = False
    warned: bool = False
    unmatched: list[str] = field(default_factory=list)
