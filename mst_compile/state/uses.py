"""What compiled graphs do with a weight: written by the graph passes and the dispatch, read by ``explain``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Uses:
    """What the backend saw of a weight, over all graphs compiled so far.

    Attributes:
        places: places in the model's code whose product with the weight became sparse -> how many in one graph. The
            same code compiled again, for another batch size perhaps, adds none.
        dense_threshold: mean density from which the graph that last ran with the weight, perhaps one compiled for
            another layer of the same form, takes dense products; None: no graph could take sparse ones.
        warned: the user was told that its products stay dense.
        unmatched: why uses stay dense.
    """

    places: dict[str, int] = field(default_factory=dict)
    dense_threshold: float | None = None
    warned: bool = False
    unmatched: list[str] = field(default_factory=list)

    @property
    def matched(self) -> int:
        """Uses in the model that became sparse products."""
        return sum(self.places.values())

    @property
    def served(self) -> bool:
        """Whether a graph that can take sparse products has run with the weight."""
        return self.dense_threshold is not None

    def note(self, places: Iterable[str], reasons: Iterable[str]) -> None:
        """Note what one graph does with the weight: the place of each sparse product, and why others stay dense."""
        for place, count in Counter(places).items():
            self.places[place] = max(count, self.places.get(place, 0))
        self.unmatched += [reason for reason in dict.fromkeys(reasons) if reason not in self.unmatched]
