"""What is known of a weight's gradient, so that none is masked that holds zeros already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from mst_compile.blocks.memory import address_of, lying


@dataclass(eq=False, kw_only=True)
class KnownGradient:
    """Whether a gradient is 0 outside the active blocks, as far as writes to it leave a trace.

    Attributes:
        changes: number of topology changes so far.
        dense_grad: whether gradients are wanted on all blocks, as growth reads them.
        masked: the gradient that was last masked, its version then, where its elements were, and ``changes`` then.
        computed: a gradient that a backward pass has just computed with zeros outside the active blocks: its memory,
            where and how it lies there, its version and ``changes`` then; until it has arrived.
        adding: the backward pass that is about to add such a gradient to one that was masked, and the version of the
            latter; until it has.
        doubted: somebody has written without a trace: the gradient may not be masked, though it was.
        suspect: somebody writes without a trace, again and again: nothing is known for longer than it takes to look.
    """

    changes: int = 0
    dense_grad: bool = False
    masked: tuple[TensorWeakRef, int, int, int] | None = None
    computed: tuple[StorageWeakRef, tuple[Any, ...], int, int] | None = None
    adding: tuple[int, int] | None = None
    doubted: bool = False
    suspect: bool = False

    def note_masked(self, gradient: Tensor) -> None:
        """The gradient is 0 outside the active blocks, as it is now."""
        known = self.masked
        same = known is not None and known[0]() is gradient
        reference = known[0] if same else TensorWeakRef(gradient)  # type: ignore[index]
        self.masked, self.doubted = (reference, gradient._version, address_of(gradient), self.changes), False

    def is_masked(self, gradient: Tensor) -> bool:
        """Whether nobody has written to the gradient since it was masked with the present mask."""
        return not (self.suspect or self.doubted) and self.was_masked(gradient)

    def was_masked(self, gradient: Tensor) -> bool:
        """As far as writes leave a trace: the same on all ranks of a spread weight, which must read scores together."""
        return self.masked is not None and self._was_masked(gradient, gradient._version)

    def _was_masked(self, gradient: Tensor, at: int) -> bool:
        reference, version, address, changes = self.masked  # type: ignore[misc]
        same = changes == self.changes and version == at and address == address_of(gradient)
        return same and reference() is gradient

    def note_computed(self, gradient: Tensor) -> None:
        """A backward pass has computed this of the gradient, with zeros outside the active blocks."""
        known = StorageWeakRef(gradient.untyped_storage()), lying(gradient), gradient._version, self.changes
        self.computed, self.adding = None if self.dense_grad else known, None

    def _is_computed(self, gradient: Tensor) -> bool:
        """Whether a gradient is the one that was computed with zeros, and nobody has added to it or written to it on
        its way. It will not be asked again.

        The same memory is meant, not the same address: what is referred to, if weakly, is not another's. And the same
        elements of it: a hook may have turned them about.
        """
        computed, self.computed = self.computed, None
        if computed is None:
            return False
        reference, lies, version, changes = computed
        same = reference.cdata == gradient.untyped_storage()._cdata and version == gradient._version
        return same and changes == self.changes and lies == lying(gradient)

    def take_computed(self, gradient: Tensor) -> bool:
        """A gradient has arrived: where it is the one that was computed, it is masked. Returns whether it is."""
        known = self._is_computed(gradient)
        if known:
            self.note_masked(gradient)
        return known

    def note_adding(self, gradient: Tensor, held: Tensor) -> None:
        """A gradient is about to be added, in this backward pass, to what has arrived before."""
        computed = self._is_computed(gradient)
        self.adding = (torch._C._current_graph_task_id(), held._version) if computed else None

    def take_sum(self, gradient: Tensor) -> bool:
        """It has been added: where both held zeros, and nothing else has been written, so does the sum. Returns whether
        it is known to."""
        adding, self.adding = self.adding, None
        if adding is None or self.masked is None or self.doubted:
            return False
        backward, version = adding
        alone = backward == torch._C._current_graph_task_id() and gradient._version == version + 1
        known = alone and self._was_masked(gradient, version)
        if known:
            self.note_masked(gradient)
        return known
