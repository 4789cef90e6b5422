"""Which optimizer steps complete a training step: bookkeeping of names, without a hook or a tensor.

Several optimizers may own the sparse weights of one model. A training step is complete when the last of those whose
weights have gradients has stepped, so that magnitudes are compared after the same update.
"""

from __future__ import annotations

from typing import NamedTuple


class _State(NamedTuple):
    """One value, replaced as a whole: no interrupt leaves a part of it as it was."""

    stepped: frozenset[str] = frozenset()  # since the last complete training step
    late: frozenset[str] = frozenset()  # not stepped, though the training step was counted
    idle: frozenset[str] = frozenset()  # stepped in an iteration that was counted with no gradient anywhere
    unowned: frozenset[str] = frozenset()  # with gradients that no optimizer steps, as far as is known
    missed: bool = False
    completed: tuple[frozenset[str], int] | None = None


class StepClock:
    """Knows of each sparse weight, by name, whether its optimizer has stepped in this iteration."""

    def __init__(self) -> None:
        self._state = _State()

    @property
    def missed(self) -> bool:
        """Whether the last :meth:`turn` began a new iteration while the one before was still incomplete."""
        return self._state.missed

    @property
    def completed(self) -> tuple[frozenset[str], int] | None:
        """Of a training step that :meth:`complete` has counted, the weights whose optimizer has not stepped yet and the
        number that it was given, until :meth:`done`: what follows may be interrupted."""
        return self._state.completed

    def turn(self, names: set[str], pending: set[str], *, nested: bool) -> set[str]:
        """An optimizer with the weights ``names`` begins to step; returns those of them whose training step was
        counted before.

        Args:
            pending: all weights that have gradients.
            nested: the step is part of another one.
        """
        now = self._state
        missed = not nested and bool(names & now.stepped)
        stepped, unowned, idle = now.stepped, now.unowned, now.idle
        if missed:  # a weight's second turn: whoever was waited for does not step in every iteration
            unowned |= self.waiting(pending)
            stepped = frozenset()
        late = now.late & names
        # Where all sparse weights are frozen nobody is waited for: the first optimizer's step was counted for all.
        if not pending and idle and bool(names & idle) == nested:
            idle |= names
        else:
            idle, stepped = frozenset(), stepped | (names - late)
        self._state = _State(stepped, now.late - late, idle, unowned - names, missed, now.completed)
        return set(late)

    def failed(self, names: set[str], late: set[str]) -> None:
        """The step that :meth:`turn` announced has raised."""
        now = self._state
        self._state = now._replace(stepped=now.stepped - names, idle=now.idle - names, late=now.late | late)

    def waiting(self, pending: set[str]) -> set[str]:
        """Weights with gradients whose optimizer is still to step in this iteration."""
        return pending - self._state.stepped - self._state.unowned

    def is_complete(self, pending: set[str]) -> bool:
        """Whether all optimizers of this iteration have stepped."""
        return bool(self._state.stepped) and not self.waiting(pending)

    def complete(self, pending: set[str], number: int = 0) -> set[str]:
        """The training step is counted, as ``number``; returns the weights whose optimizer has not stepped yet."""
        now = self._state
        found = frozenset(pending - now.stepped)
        idle = now.idle if pending else now.idle | now.stepped
        self._state = _State(frozenset(), now.late | found, idle, now.unowned, now.missed, (found, number))
        return set(found)

    def done(self) -> None:
        """All that follows from the training step has happened."""
        self._state = self._state._replace(completed=None)
