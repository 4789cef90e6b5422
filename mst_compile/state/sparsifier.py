"""The sparse state of one model, as users see it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mst_compile.blocks.layout import as_matrix
from mst_compile.errors import NotSparseError, SelectionError, SeveralSparsifiersError
from mst_compile.rules.checks import check_choice, check_flag, check_instance, check_model, check_seed, shown
from mst_compile.rules.guard import GUARDS, Guard
from mst_compile.rules.schedule import Schedule, phase_of

from . import packing, resume
from .attention import AttentionState
from .binding import of
from .checkpoint_hooks import watch_checkpoints
from .checkpoints import OptimizerCheckpoints
from .event import Plan
from .first_masks import Masks
from .listeners import TopologyEvent
from .run import Run
from .selection import Candidate
from .stepping import Stepping
from .steps import watch_steps
from .swaps import watch_swaps
from .uses import ORPHANED
from .weight import SparseWeight
from .weights import Weights

_ATTRIBUTE = "_mst_sparsifier"
_WRAPPERS = {  # class of a module that wraps another -> what it calls it
    ("OptimizedModule", "_orig_mod"),
    ("DistributedDataParallel", "module"),
    ("DataParallel", "module"),
}


class Sparsifier:
    """The sparse state of one model; made by :func:`sparsify`, found by :func:`sparsifier`.

    Attributes:
        schedule, seed: as given to :func:`sparsify`; a checkpoint brings its own seed.
        step_count: training steps so far.
        attention: which pattern attention runs with now.
        auto_step: whether optimizer steps are counted by a hook.
        skipped: linear weights that stay dense -> why.
        first_masks: how the masks of step 0 were made, in words: ``"at random: weights look fresh"``.
    """

    def __init__(
        self,
        schedule: Schedule,
        candidates: list[Candidate],
        seed: int,
        auto_step: bool,
        skipped: dict[str, str],
        guard: Guard = "coverage",
    ) -> None:
        check_instance("schedule", schedule, Schedule, "a Schedule; call mst_compile.sparsify")
        check_instance("candidates", candidates, list, "a list of weights; call mst_compile.sparsify")
        for candidate in candidates:
            check_instance("candidates", candidate, Candidate, "a list of weights; call mst_compile.sparsify")
        if not candidates:
            raise SelectionError("candidates must be weights to make sparse, got []; call mst_compile.sparsify")
        seed = check_seed("seed", seed, SelectionError)
        check_choice("guard", guard, GUARDS, SelectionError)
        check_instance("skipped", skipped, dict, "a dict of names and reasons")
        self.auto_step = check_flag("auto_step", auto_step)
        self.skipped = skipped
        attention = AttentionState.create(schedule)
        self._run = Run(schedule, Weights(candidates, guard, attention), attention, seed)
        self._watch()

    @property
    def schedule(self) -> Schedule:
        return self._run.schedule

    @property
    def seed(self) -> int:
        return self._run.seed

    @property
    def attention(self) -> AttentionState:
        return self._run.attention

    @property
    def first_masks(self) -> str:
        """How the masks of step 0 were made, and why so."""
        return str(self._run.first_masks)

    @property
    def step_count(self) -> int:
        return self._run.step_count

    @property
    def _weights(self) -> Weights:
        """The weights, under the names that they have now."""
        self._run.weights.follow_exchanged()
        return self._run.weights

    @property
    def weights(self) -> dict[str, SparseWeight]:
        """Parameter name -> :class:`~mst_compile.SparseWeight`."""
        return dict(self._weights.by_name)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> block mask, bool ``[ceil(rows / block), ceil(cols / block)]`` on the CPU (copies); of a
        stack of matrices the masks of all, one below the other."""
        return {w.name: w.mask.clone() for w in self._weights}

    @property
    def density(self) -> float:
        """Share of the elements of all sparse weights that lie in active blocks."""
        return self._run.density

    @property
    def phase(self) -> str:
        """The schedule's phase of the next training step: ``"warm-up"``, ``"plateau"``, ...; empty after the last."""
        return phase_of(self.schedule, self.step_count)

    def __repr__(self) -> str:
        total: object = getattr(self.schedule, "total_steps", None)
        parts = [f"step {self.step_count}{f' of {total}' if isinstance(total, int) else ''}", self.phase]
        parts += [f"density {self.density:.2f}", f"{len(self._run.weights.by_name)} weights"]
        return f"<Sparsifier: {', '.join(filter(None, parts))}>"

    def on_event(self, callback: Callable[[TopologyEvent], Any]) -> RemovableHandle:
        """Call ``callback(event)`` after every topology event, when the step is complete and the next one prepared.

        The same goes to the log ``"mst_compile"``, level INFO: ``logging.basicConfig(level=logging.INFO)`` shows it.
        On several ranks each is told of the same events. A copy of the model has no callbacks.

        Args:
            callback: what it raises is raised by the optimizer's step, which has taken place.

        Returns:
            A handle; its ``remove()`` ends the calls.

        Raises:
            ArgumentError: ``callback`` cannot be called.
        """
        return self._run.listeners.add(callback)

    def parameters(self) -> Iterator[tuple[SparseWeight, nn.Parameter]]:
        """Each sparse weight with the Parameter that its module holds now."""
        return self._weights.parameters()

    def held(self) -> Iterator[tuple[SparseWeight, nn.Parameter | None, list[nn.Module]]]:
        """Each sparse weight, its Parameter, None if that is gone, and the modules that held it at first: the model
        may hold others in their place by now."""
        there = dict(self._weights.held())
        for name, weight in self._run.weights.by_name.items():
            yield weight, there.get(weight), self._run.weights.owners(name)

    def densities(self, sparsity: float) -> list[float]:
        """Target density of each of :attr:`weights` when the schedule is at ``sparsity``.

        Raises:
            ScheduleError: ``sparsity`` does not lie in [0, 1).
        """
        return self._run.weights.densities(self.schedule, sparsity)

    def plan_event(self) -> Plan:
        """What a topology event would do now, at the present step count and with the growth scores so far."""
        return self._run.plan_event()

    def step(self) -> None:
        """Count one optimizer step and change the topology if the schedule says so.

        Called by a hook after every step of the optimizer that owns the sparse weights; call it yourself, after
        ``optimizer.step()`` and before the next forward pass, only with ``sparsify(..., auto_step=False)``.
        """
        self._stepping.step()

    def draw_first_masks(self, rescale: bool, masks: Masks = None) -> None:
        """The masks of step 0, as :func:`sparsify` has ``masks``; with ``rescale`` what stays of freshly initialised
        weights grows by ``density ** -0.5``."""
        self._run.draw_first_masks(check_flag("rescale", rescale), masks)

    def apply_mask(self, name: str, mask: Tensor) -> None:
        """Give one weight other active blocks, outside of the schedule; call it between a step and the next forward.

        Dropped weights, their gradient and their optimizer state become exactly 0. Grown ones have no state either, and
        start at 0; values that the program has loaded there before stay, and so do those that it has written, with a
        warning. State of an optimizer that has not stepped since the model was made sparse, or a checkpoint loaded,
        becomes 0 when it does. The next topology event goes on from this mask.

        Args:
            name: a key of :attr:`masks`.
            mask: bool ``[ceil(rows / block), ceil(cols / block)]``; of a stack of matrices as in :attr:`masks`, or with
                one dimension more in front.

        Raises:
            SelectionError: no sparse weight has this name.
            MaskError: the mask has another shape or dtype. Nothing has changed.
            OptimizerError: state of an optimizer cannot be written. The mask has changed.
        """
        known = isinstance(name, str)
        found = next(((w, p) for w, p in self.parameters() if known and w.name == name), None)
        if found is None:
            raise SelectionError(f"no sparse weight is called {shown(name)}; there are {', '.join(self.weights)}")
        if found[0].stacked and isinstance(mask, Tensor) and mask.dim() == 3:
            mask = as_matrix(mask)
        packing.check_mask(name, mask, found[0])
        self._run.change_mask(*found, mask)

    def state_dict(self) -> dict[str, Any]:
        """Step count, seed, masks and what else the next step depends on; loads with ``torch.load(weights_only=True)``
        and through ``torch.distributed.checkpoint`` (this object is Stateful in its sense)."""
        run = self._run
        return resume.state_dict(self._weights, run.progress, run.keeps_scores, run.keeps_young)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Load the model's own state dict as well, before or after.

        Raises:
            CheckpointError: the state is of another format, or its masks do not fit this model. Nothing has changed.
        """
        self._run.go_on(*resume.from_state_dict(state, self._weights))

    def belongs_to(self, model: nn.Module) -> None:
        """The weights are those of ``model``."""
        self._run.root = weakref.ref(model)

    def release(self) -> None:
        """Detach from the model: it is an ordinary one again. Zeros stay zeros until an optimizer moves them."""
        self._run.weights.release()
        self._run.active = False

    def _watch(self) -> None:
        """Begin to watch optimizers, of which nothing is known."""
        self._stepping = Stepping(self._run, self.auto_step)
        self._checkpoints = OptimizerCheckpoints(self._run)
        watch_steps(self._stepping)
        watch_swaps()
        watch_checkpoints(self._checkpoints)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        # The Parameters themselves too: while a copy is being made its modules do not have them yet.
        parameters = {weight.name: parameter for weight, parameter in self.parameters()}
        return {"auto_step": self.auto_step, "skipped": self.skipped, "_run": self._run, "parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("parameters")
        self.__dict__.update(state)
        self._run.weights.bind(parameters)
        self._watch()


def attach(model: nn.Module, sparsifier: Sparsifier) -> None:
    """Let :func:`sparsifier_of` find the sparsifier of ``model``."""
    model.__dict__[_ATTRIBUTE] = sparsifier
    sparsifier.belongs_to(model)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`."""
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)


@dataclass(frozen=True)
class Part:
    """A module that was sparsified, within a model.

    Attributes:
        name: of the module in the model, wrappers like ``torch.compile``'s left out; empty for the model itself.
    """

    name: str
    module: nn.Module
    sparsifier: Sparsifier

    def full(self, parameter: str) -> str:
        """Name in the whole model of a parameter of the part."""
        return f"{self.name}.{parameter}" if self.name else parameter


def parts_of(model: nn.Module) -> list[Part]:
    """The model if it was sparsified, or each of its modules that was, also through ``torch.compile``'s or DDP's
    wrapper."""
    return [
        Part(_plain_name(model, name), module, found)
        for name, module in model.named_modules()
        if (found := module.__dict__.get(_ATTRIBUTE)) is not None
    ]


def _plain_name(model: nn.Module, name: str) -> str:
    """The name of a module as it was before wrappers."""
    parts, module = [], model
    for part in name.split(".") if name else []:
        wrapped = (type(module).__name__, part) in _WRAPPERS
        parts += [] if wrapped else [part]
        module = getattr(module, part)
    return ".".join(parts)


def sparsifier_of(model: nn.Module) -> Sparsifier | None:
    """As :func:`sparsifier`, but None of a plain model."""
    parts = parts_of(model)
    if len(parts) > 1:
        names = ", ".join(repr(part.name) if part.name else "the model itself" for part in parts)
        raise SeveralSparsifiersError(
            f"{len(parts)} modules of the model were sparsified, each with a sparsifier of its own: {names}. Pass one "
            "of these modules, not the whole model"
        )
    return parts[0].sparsifier if parts else None


def some_parts_of(model: nn.Module) -> list[Part]:
    """As :func:`parts_of`.

    Raises:
        NotSparseError: there are none.
    """
    parts = parts_of(model)
    if parts:
        return parts
    inside = next((weight for p in model.parameters() if (weight := of(p)) is not None), None)
    if inside is not None:
        whole = f"the module is a part of one that was sparsified, where a weight of it is called {inside.name!r}"
        if inside.is_orphan:
            raise NotSparseError(f"{whole}, and that one is gone, as after merge_and_unload of adapters: {ORPHANED}")
        raise NotSparseError(f"{whole}; pass that module, the one given to mst_compile.sparsify")
    raise NotSparseError("the model is not sparse; call mst_compile.sparsify(model, schedule) first")


def sparsifier(model: nn.Module) -> Sparsifier:
    """The :class:`Sparsifier` of a model that was sparsified, also through ``torch.compile``'s or DDP's wrapper, or of
    the one module in it that was.

    Raises:
        NotSparseError: the model is not sparse.
        SeveralSparsifiersError: several modules of the model were sparsified separately; the message names them.
        ModelError: it is no model.
    """
    check_model("sparsifier", model)
    some_parts_of(model)
    found = sparsifier_of(model)
    assert found is not None
    return found
