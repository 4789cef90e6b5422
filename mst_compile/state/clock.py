"""Which optimizer steps complete a training step: bookkeeping of names, without a hook or a tensor.

Several optimizers may own the sparse weights of one model. A training step is complete when the last of those whose
weights have gradients has stepped, so that magnitudes are compared after the same update.
"""

from __future__ import annotations


class StepClock:
    """Knows of each sparse weight, by name, whether its optimizer has stepped in this iteration.

    Attributes:
        missed: whether the last :meth:`turn` began a new iteration while the one before was still incomplete.
    """

    def __init__(self) -> None:
        self._stepped: set[str] = set()  # since the last complete training step
        self._late: set[str] = set()  # not stepped, though the training step was counted
        self._idle: set[str] = set()  # stepped in an iteration that was counted with no gradient anywhere
        self._unowned: set[str] = set()  # with gradients that no optimizer steps, as far as is known
        self.missed = False

    def turn(self, names: set[str], pending: set[str], *, nested: bool) -> set[str]:
        """An optimizer with the weights ``names`` begins to step; returns those of them whose training step was
        counted before.

        Args:
            pending: all weights that have gradients.
            nested: the step is part of another one.
        """
        self.missed = not nested and bool(names & self._stepped)
        if self.missed:  # a weight's second turn: whoever was waited for does not step in every iteration
            self._unowned |= self.waiting(pending)
            self._stepped.clear()
        self._unowned -= names
        late = self._late & names
        self._late -= late
        # Where all sparse weights are frozen nobody is waited for: the first optimizer's step was counted for all.
        if not pending and self._idle and bool(names & self._idle) == nested:
            self._idle |= names
            return late
        self._idle.clear()
        self._stepped |= names - late
        return late

    def failed(self, names: set[str], late: set[str]) -> None:
        """The step that :meth:`turn` announced has raised."""
        self._stepped -= names
        self._idle -= names
        self._late |= late

    def waiting(self, pending: set[str]) -> set[str]:
        """Weights with gradients whose optimizer is still to step in this iteration."""
        return pending - self._stepped - self._unowned

    def is_complete(self, pending: set[str]) -> bool:
        """Whether all optimizers of this iteration have stepped."""
        return bool(self._stepped) and not self.waiting(pending)

    def complete(self, pending: set[str]) -> set[str]:
        """The training step is counted; returns the weights whose optimizer has not stepped yet."""
        found = pending - self._stepped
        self._late |= found
        if not pending:
            self._idle |= self._stepped
        self._stepped.clear()
        return found
