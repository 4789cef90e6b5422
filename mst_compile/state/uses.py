"""What compiled graphs do with a weight: written by the graph passes and the dispatch, read by ``explain``; which
Parameters they have taken; and whether they shall run as if nothing were sparse. Of weights that nobody drives any more
the user is told here."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from mst_compile.blocks.by_tensor import ByTensor
from mst_compile.errors import MSTWarning

_compiled = ByTensor()  # sparse Parameter that a graph takes -> True
_multiplied = ByTensor()  # other Parameter that a graph multiplies -> True
_graphs = 0

ORPHANED = (
    "its schedule has ended with it, and masks stay as they are. Keep that model as long as its parts train, sparsify "
    "the module that stays instead, or call densify on it and train it as an ordinary one"
)


def warn_orphaned(name: str) -> None:
    """Say that the weight ``name`` trains and its run is gone."""
    warnings.warn(
        f"{name} is trained, and the model that was given to sparsify, which it is of, is gone, as after "
        f"merge_and_unload of a model with adapters: {ORPHANED}",
        MSTWarning,
        stacklevel=3,
    )


def note_compiled(parameters: Iterable[Tensor]) -> None:
    """A graph is compiled that takes these Parameters with the masks that they have."""
    global _graphs
    _graphs += 1
    for parameter in parameters:
        _compiled[parameter] = True


def note_multiplied(parameters: Iterable[Tensor]) -> None:
    """A compiled graph with sparse weights multiplies these Parameters too, as they are."""
    _multiplied.update(dict.fromkeys(parameters, True))


def is_multiplied(parameter: Tensor) -> bool:
    """Whether a compiled graph with sparse weights multiplies this Parameter as it is."""
    return parameter in _multiplied


def is_compiled(parameter: Tensor) -> bool:
    """Whether a compiled graph takes this Parameter with the block grid that it had then."""
    return parameter in _compiled


def forget_compiled() -> None:
    """No graph is compiled any more."""
    _compiled.clear()


def compiled_graphs() -> int:
    """How many graphs the backend has compiled in this process."""
    return _graphs


@dataclass
class Baseline:
    """Somebody times a model as it would run if nothing of it were sparse; what its compiled graphs say of that.

    Attributes:
        seen: a graph that takes sparse weights has run so.
        differs: what ran was another graph than the backend's dense one.
    """

    seen: bool = False
    differs: bool = False


@dataclass
class Uses:
    """What the backend saw of a weight, over all graphs compiled so far.

    Attributes:
        places: places in the model's code whose product with the weight became sparse -> how many in one graph. The
            same code compiled again, for another batch size perhaps, adds none.
        dense_threshold: mean density from which the graph that last ran with the weight, perhaps one compiled for
            another layer of the same form, takes dense products, infinite if never; None: no graph could take sparse
            ones.
        seen: whether a compiled graph has taken the weight.
        dense_now: whether the graph that last ran with the weight took dense products.
        dense_products: those of ``"forward"``, ``"grad-input"`` and ``"grad-weight"`` that ran dense in a graph with
            sparse products, as they are faster.
        warned: the user was told that its products stay dense.
        written: the user was told that values stand outside the active blocks.
        unmatched: why uses stay dense.
    """

    places: dict[str, int] = field(default_factory=dict)
    dense_threshold: float | None = None
    seen: bool = False
    dense_now: bool = False
    dense_products: tuple[str, ...] = ()
    warned: bool = False
    written: bool = False
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
        self.seen = True
        for place, count in Counter(places).items():
            self.places[place] = max(count, self.places.get(place, 0))
        self.unmatched += [reason for reason in dict.fromkeys(reasons) if reason not in self.unmatched]
