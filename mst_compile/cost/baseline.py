"""The dense model that a sparse run is compared with: what ``loss`` would run if nothing of the model were sparse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from mst_compile.errors import ForecastError
from mst_compile.rules.checks import shown
from mst_compile.state.sparsifier import Sparsifier
from mst_compile.state.uses import Baseline as Told


class Baseline:
    """Has the graphs of a model run as Inductor compiles them where nothing is sparse, and says what came of it.

    Zeros cost a dense product as much as other numbers do, so the sparse model's own values serve. Graphs are compiled
    by the options that the user gave; the backend's dense one is not compiled a second time where it is the same.

    Args:
        own: of the model.
    """

    def __init__(self, own: Sparsifier) -> None:
        self._own, self._told = own, Told()
        self._failure: Exception | None = None

    def try_out(self, run: Callable[[], object]) -> None:
        """Compile what is needed, by one run; every block must be active.

        What Inductor cannot compile runs in eager mode from then on.

        Raises:
            ForecastError: whatever ``run`` raises of these.
        """
        try:
            with self.running():
                run()
        except ForecastError:
            raise
        except Exception as error:  # compilers fail in many ways, and a model that fails by itself will again
            self._failure = error

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model runs so within."""
        if self._failure is not None:
            with torch.compiler.set_stance("force_eager"):
                yield
            return
        weights = self._own.weights.values()
        for weight in weights:
            weight.baseline = self._told
        try:
            yield
        finally:
            for weight in weights:
                weight.baseline = None

    @property
    def differs(self) -> bool:
        """Whether it is another model than the one whose blocks are all active under this backend."""
        return self._told.differs or self._failure is not None

    def __str__(self) -> str:
        if self._failure is not None:
            return f"in eager mode, as Inductor does not compile it: {shown(self._failure)}"
        return "as torch.compile alone runs it" if self._told.seen else "as loss runs it, which this backend does not"
