"""Hugging Face's Trainer: :class:`MSTCallback`, and :class:`MSTTrainer` for learning rates that follow the density.

A callback is told of a model when the Trainer has been made, so before there is an optimizer or a checkpoint is read:
there it is sparsified. No callback is asked while the optimizer is made, and loggers have run before a user's callback
sees the logs; both are methods of the Trainer that are there to be overridden, so :class:`MSTTrainerMixin` does.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from mst_compile.api import sparsify
from mst_compile.cost.flops import Meter, dense_linear_training, elements_per_token
from mst_compile.errors import (
    AlreadySparseError,
    ArgumentError,
    CheckpointError,
    ModelError,
    MSTWarning,
    NotSparseError,
    ScheduleError,
)
from mst_compile.rules.checks import check_instance, shown
from mst_compile.rules.laws import Law
from mst_compile.rules.schedule import Schedule, as_schedule, sparsity_of
from mst_compile.state.learning_rates import DENSITY_DECAY, DENSITY_RATE, INDEPENDENT, param_groups
from mst_compile.state.listeners import TopologyEvent
from mst_compile.state.sparsifier import Sparsifier, parts_of

__all__ = ["MSTCallback", "MSTTrainer", "MSTTrainerMixin"]

_OWN = "mst/"
_NOTHING: dict[str, Any] = {"flops": 0.0, "steps": 0, "events": 0, "dropped": 0, "grown": 0, "schedules_at": []}
_FAR = 0.1  # share of a run by which the schedule may end earlier or later: epochs are rounded to whole batches


class MSTCallback(TrainerCallback, ExportableState):
    """Sparsifies and compiles the model of a Trainer, follows the run, and says when something does not fit::

        trainer = MSTTrainer(model, args, train_dataset=data, callbacks=[MSTCallback(MixedSparsity(total_steps=1000))])

    - When the Trainer is made the model becomes sparse, unless it is already, and is compiled in place, as by
      ``model.compile(backend="mst")``, unless it is already. So pass the callback to the Trainer's constructor, and
      give ``model_init`` a function that sparsifies.
    - The Trainer's logs get ``mst/density`` (share of the sparse weights' elements in active blocks), ``mst/sparsity``
      (what the schedule asks for), ``mst/flops_saved`` (share of the linear layers' training FLOPs saved so far, if all
      steps have equally many tokens), ``mst/events``, ``mst/dropped`` and ``mst/grown`` (topology events and elements
      so far), and ``mst/phase``. They are in ``trainer.state.log_history`` and on the console, and under
      :class:`MSTTrainer` wherever the Trainer reports to (of these ``mst/phase``, a word, is left out).
    - At the end a warning tells if the model is still sparse, or was when the best model was saved that is loaded then.

    Args:
        schedule: as for :func:`mst_compile.sparsify`; None if the model is sparse already.
        compile: False leaves the model as it is; keyword arguments of ``torch.compile`` other than ``backend``, like
            ``{"mode": "max-autotune"}``, are passed on.
        sparsify_arguments: further arguments of :func:`mst_compile.sparsify`.

    Raises:
        ScheduleError: ``schedule`` is none. When training begins, or earlier if ``max_steps`` is known: the schedule
            would not be over at the end of the run, or would end long before; as when the Trainer trains for a second
            time, or begins again with a smaller batch (``auto_find_batch_size``) after it has taken steps.
        CheckpointError: when training begins: the checkpoint to resume from has the schedule at another step than the
            model, as it holds no optimizer (``save_only_model``).
        ArgumentError: an argument is none of ``sparsify``'s, or no schedule goes with it. When the Trainer is made:
            ``TrainingArguments(torch_compile=True)`` would compile the model with another backend.
        ModelError: when the Trainer is made: its model is the wrapper that ``torch.compile`` returns.
        AlreadySparseError: when the Trainer is made: the model has another schedule.
        NotSparseError: the model is not sparse, and there is no schedule to make it so; or it is not when training
            begins, as the callback was added to a Trainer that was made before, or ``model_init`` made another one.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        compile: bool | Mapping[str, Any] = True,
        **sparsify_arguments: Any,
    ) -> None:
        self.schedule = None if schedule is None else as_schedule(schedule)
        check_instance("compile", compile, bool | Mapping, "True, False or keyword arguments of torch.compile")
        self.compile = compile
        if isinstance(compile, Mapping) and "backend" in compile:
            raise ArgumentError(f'the backend is "mst"; leave it out of compile={shown(compile)}')
        known = set(inspect.signature(sparsify).parameters) - {"model", "schedule", "auto_step"}
        unknown = set(sparsify_arguments) - known
        if unknown:
            raise ArgumentError(f"MSTCallback takes {', '.join(sorted(known))} of sparsify, got {sorted(unknown)}")
        if schedule is None and sparsify_arguments:
            raise ArgumentError(
                f"{sorted(sparsify_arguments)} are arguments of sparsify, which is not called without a schedule: pass "
                "one, or leave them out for a model that is sparse already"
            )
        self.sparsify_arguments = sparsify_arguments
        self._counts: dict[str, Any] = dict(_NOTHING)
        self._model: nn.Module | None = None
        self._meter: Meter | None = None
        self._handles: list[RemovableHandle] = []

    # -- what the Trainer tells ----------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the Trainer's model sparse, and compile it."""
        model = kwargs["model"]
        _check_plain(model, args)
        found = [part.sparsifier.schedule for part in parts_of(model)]
        if not found and self.schedule is None:
            raise NotSparseError(
                "the Trainer's model is not sparse and MSTCallback() has no schedule to make it so: pass one, "
                "MSTCallback(mst_compile.MixedSparsity(total_steps=...)), or call mst_compile.sparsify before"
            )
        if self.schedule is not None and model is not self._model:
            _check_same(found, self.schedule, self.sparsify_arguments)
        # What a model has trained before, a checkpoint may set back: that is known when training begins.
        begun = any(part.sparsifier.step_count for part in parts_of(model))
        if args.max_steps > 0 and not begun:
            for schedule in [*found, self.schedule]:
                _check_length(schedule, args.max_steps)
        if self.schedule is not None and not found:
            sparsify(model, self.schedule, **self.sparsify_arguments)
            self._model = model
        self._compile(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what does not change from here on, and begin to count."""
        model = kwargs["model"]
        _check_plain(model, args)
        own = [part.sparsifier for part in parts_of(model)]
        if not own:
            raise NotSparseError(
                "MSTCallback makes the model sparse when the Trainer is made, and this one is not sparse: pass the "
                "callback to the constructor, Trainer(..., callbacks=[...]); with model_init, which makes a new model "
                "for every training, call mst_compile.sparsify in that function, and pass MSTCallback()"
            )
        saved = self._saved(state)
        _check_resumed(own, state, saved.get("schedules_at"))
        for each in own:
            _check_length(each.schedule, state.max_steps - state.global_step, each.step_count, state.global_step)
        self._compile(model)  # that of model_init is another one
        _check_rates(model, kwargs["optimizer"])
        self._begin(model, own, saved)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the FLOPs of the step that comes."""
        if self._meter is None:  # the callback was added to a training that is under way
            self.on_train_begin(args, state, control, **kwargs)
        assert self._meter is not None
        self._meter.step()
        self._counts |= {"flops": self._meter.flops, "steps": self._counts["steps"] + 1}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note how far the schedules are: a checkpoint may be next."""
        self._counts["schedules_at"] = [part.sparsifier.step_count for part in parts_of(kwargs["model"])]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what is known to the logs: those who report have seen them, the history and the console are left."""
        model = kwargs["model"]
        more = self.metrics(model)
        phases = [part.sparsifier.phase for part in parts_of(model)]
        if more and any(phases):
            more[f"{_OWN}phase"] = ", ".join(dict.fromkeys(filter(None, phases)))
        kwargs["logs"].update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if the model is still sparse, or holds weights of a step at which it was."""
        self._leave()
        parts = parts_of(kwargs["model"])
        best = state.best_global_step if args.load_best_model_at_end else None
        sparsest = max((sparsity_of(part.sparsifier.schedule, best) for part in parts), default=0.0) if best else 0.0
        density = self.metrics(kwargs["model"]).get(f"{_OWN}density", 1.0)
        stored = 'Its zeros are stored like any other number, and save time under backend="mst" alone'
        if sparsest > 0 and best != state.global_step:
            problem = (
                f"load_best_model_at_end has loaded the weights of step {best}, when the model was still sparse: "
                f"sparsity {sparsest:.3g}. Masks are those of step {state.global_step}, the last one, with density "
                f"{density:.3f}, so that these zeros save no time. The weights of the last step are in the last "
                "checkpoint"
            )
        elif density < 1:
            problem = (
                f"training has ended at step {state.global_step} and the model is still sparse: density {density:.3f}. "
                f"{stored}. If it should have ended dense: MixedSparsity(total_steps=...) of the run's own number of "
                "steps"
            )
        else:
            return
        warnings.warn(problem, MSTWarning, stacklevel=2)

    # -- what is counted -----------------------------------------------------------------------------------------------

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """What the logs get, as numbers; empty of a model that is not sparse."""
        own = [part.sparsifier for part in parts_of(model)]
        if not own:
            return {}
        sizes = [sum(w.numel for w in each.weights.values()) for each in own]
        mean = {
            "density": [each.density for each in own],
            "sparsity": [sparsity_of(each.schedule, each.step_count) for each in own],
        }
        found = {n: sum(s * v for s, v in zip(sizes, vs, strict=True)) / sum(sizes) for n, vs in mean.items()}
        met = sum(map(elements_per_token, own))
        dense = self._counts["steps"] * (6 * met + dense_linear_training(model))
        found["flops_saved"] = 1 - self._counts["flops"] / dense if dense else 0.0
        found |= {name: self._counts[name] for name in ("events", "dropped", "grown")}
        return {f"{_OWN}{name}": value for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """What the Trainer's checkpoints hold of this callback: counts. Where the Trainer makes a new callback of it
        (``restore_callback_states_from_checkpoint``), this one has made the model sparse and compiled it before."""
        return {"args": {"compile": False}, "attributes": {"_counts": dict(self._counts)}}

    def _compile(self, model: nn.Module) -> None:
        if self.compile is not False and model._compiled_call_impl is None:
            model.compile(backend="mst", **({} if self.compile is True else self.compile))

    def _saved(self, state: TrainerState) -> dict[str, Any]:
        """The counts in the checkpoint that the Trainer resumes from; empty if there is none, or it has none."""
        known: Any = state.stateful_callbacks  # by name; at step 0 what this callback, made earlier, had counted
        saved = known.get(type(self).__name__) if state.global_step else None
        if isinstance(saved, list):  # of several such callbacks, which all count the same
            saved = saved[-1]
        return dict(saved["attributes"]["_counts"]) if saved else {}

    def _begin(self, model: nn.Module, own: list[Sparsifier], saved: dict[str, Any]) -> None:
        """Count on from where the checkpoint stood, or from 0."""
        self._counts = _NOTHING | saved
        self._meter = Meter(model, 1)
        self._meter.flops = self._counts["flops"]
        self._leave()
        self._handles = [each.on_event(self._count) for each in own]

    def _count(self, event: TopologyEvent) -> None:
        self._counts["events"] += not event.skipped
        self._counts["dropped"] += event.dropped
        self._counts["grown"] += event.grown

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class MSTTrainerMixin:
    """What no callback can do, for any class of Trainer: ``class Mine(MSTTrainerMixin, Seq2SeqTrainer): ...``

    The learning rate of sparse weights follows their density, as in :func:`mst_compile.param_groups`: whatever
    optimizer the Trainer makes (``TrainingArguments(optim=...)``) gets groups of its own for them. An optimizer that is
    passed to the Trainer stays as it is. The logs that :class:`MSTCallback` adds go to all whom the Trainer reports to.

    Attributes:
        density_rate, density_decay: the laws, as for :func:`mst_compile.param_groups`; set them in a subclass.
    """

    density_rate: Law = 1.0
    density_decay: Law = INDEPENDENT

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As the Trainer's, with groups for the sparse weights."""
        made = self.optimizer is None  # type: ignore[attr-defined]
        optimizer: Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if made:
            own = type(self)  # a law that is a function is no method
            used = self.model if model is None else model  # type: ignore[attr-defined]
            laws = {"density_rate": own.density_rate, "density_decay": own.density_decay}
            split_groups(optimizer, param_groups(used, **laws))  # type: ignore[arg-type]
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with what :class:`MSTCallback` knows."""
        for callback in self.callback_handler.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MSTCallback):
                logs.update(callback.metrics(self.model))  # type: ignore[attr-defined]
        super().log(logs, start_time)  # type: ignore[misc]


class MSTTrainer(MSTTrainerMixin, Trainer):
    """:class:`MSTTrainerMixin` for the plain Trainer."""


def split_groups(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Let sparse weights have groups of their own in an optimizer that has not stepped, with the options of the group
    that they were in.

    Args:
        groups: of :func:`mst_compile.param_groups`.
    """
    sparse = [group for group in groups if DENSITY_RATE in group]
    found = []
    for group in optimizer.param_groups:
        inside = {id(p) for p in group["params"]}
        taken: set[int] = set()
        for own in [] if DENSITY_RATE in group else sparse:
            part = {id(p) for p in own["params"]} & inside
            if part:
                laws = {key: own[key] for key in (DENSITY_RATE, DENSITY_DECAY)}
                found.append({**_members(group, part), **laws})
                taken |= part
        if not taken or inside - taken:
            found.append(_members(group, inside - taken))
    optimizer.param_groups[:] = found


def _members(group: dict[str, Any], wanted: set[int]) -> dict[str, Any]:
    """The parameter group with those Parameters alone whose ids are wanted, in its order."""
    of_each = [key for key in ("params", "param_names") if key in group]
    chosen = [id(p) in wanted for p in group["params"]]
    return {**group, **{key: list(itertools.compress(group[key], chosen)) for key in of_each}}


# -- what does not fit -------------------------------------------------------------------------------------------------


def _check_plain(model: nn.Module, args: TrainingArguments) -> None:
    """Raise if the model is compiled, or will be, in a way that the Trainer or the callback cannot do with."""
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "the Trainer was given what torch.compile returns, whose forward takes any argument, so that it can tell "
            "neither the columns of the data set that are used (remove_unused_columns) nor the labels: pass the model "
            "itself, MSTCallback compiles it in place"
        )
    if args.torch_compile:
        raise ArgumentError(
            f"TrainingArguments(torch_compile=True, torch_compile_backend={shown(args.torch_compile_backend)}) would "
            "compile the model with that backend; leave both out, MSTCallback compiles it in place"
        )


def _check_same(found: list[Schedule], schedule: Schedule, arguments: Mapping[str, Any]) -> None:
    """Raise :class:`AlreadySparseError` if a model that has the schedules in ``found`` may not be what is asked for."""
    others = [other for other in found if other != schedule]
    given = "".join(f", {name}={shown(value)}" for name, value in arguments.items())
    if others:
        problem = f"with {shown(others[0])}, and MSTCallback was given {shown(schedule)}{given}"
    elif found and arguments:
        problem = (
            "with the schedule that MSTCallback was given, by an earlier Trainer, a second callback or sparsify; "
            f"whether it was done with {given.removeprefix(', ')} cannot be seen"
        )
    else:
        return
    raise AlreadySparseError(
        f"the model is sparse already, {problem}; pass MSTCallback() to train it as it is, or densify it first"
    )


def _check_resumed(own: list[Sparsifier], state: TrainerState, expected: list[int] | None) -> None:
    """Raise :class:`CheckpointError` if the schedules are not at the steps that the checkpoint's were."""
    found = [each.step_count for each in own]
    if not expected or found == expected:
        return
    at = ", ".join(dict.fromkeys(map(str, expected)))
    raise CheckpointError(
        f"the Trainer resumes at step {state.global_step}, where the schedule was at step {at}, and the model's is at "
        f"step {', '.join(dict.fromkeys(map(str, found)))}: masks and steps are in the optimizer's state, and the "
        "checkpoint has none (save_only_model), or it was not loaded. Resume from one that has; or load the weights "
        "with from_pretrained and begin a run of the steps that are left"
    )


def _check_length(schedule: Schedule | None, left: int, taken: int = 0, resumed: int = 0) -> None:
    """Raise :class:`ScheduleError` if a schedule that says its own length is not over when the run is.

    Args:
        left: steps that the Trainer will take.
        taken: steps that the schedule has been moved on by before.
        resumed: steps that the Trainer has taken in the checkpoint that it resumes from.
    """
    total: object = getattr(schedule, "total_steps", None)
    if schedule is None or not isinstance(total, int):
        return
    steps = taken + left
    ends, last = sparsity_of(schedule, min(steps, total)), sparsity_of(schedule, total)
    if ends != last:
        problem = f"it would not be over, and the run end at sparsity {ends:.3g} in place of {last:.3g}"
    elif steps < (1 - _FAR) * total:
        problem = "its last steps would be missing"
    elif total < (1 - _FAR) * steps:
        problem = f"it would be over long before, and sparsity stay at {last:.3g} (settle makes a dense end longer)"
    else:
        return
    if taken:
        begun = f"is at step {taken} of total_steps={total}, as the model has trained before"
        advice = (
            "To go on with that run, resume_from_checkpoint. To begin another, mst_compile.densify(model) and make a "
            "new Trainer with a new MSTCallback, or without one to train the dense model. With auto_find_batch_size, "
            "which begins again where memory ran out, set the batch size that it has found"
        )
    elif resumed:
        begun = f"has total_steps={total} and would begin at step {resumed} of the Trainer: the checkpoint has none"
        advice = "Load its weights with from_pretrained, and begin a run of as many steps as the schedule has"
    else:
        begun = f"has total_steps={total}"
        advice = (
            f"Give it total_steps={left}; steps are the optimizer's, several batches where gradients are accumulated"
        )
    raise ScheduleError(f"the Trainer takes {left} optimizer steps, and the schedule {begun}: {problem}. {advice}")


def _check_rates(model: nn.Module, optimizer: Any) -> None:
    """Warn if the optimizer steps sparse weights with the dense model's learning rate, and nobody said so."""
    sparse = {id(p) for part in parts_of(model) for _, p in part.sparsifier.parameters()}
    groups = [group for group in optimizer.param_groups if DENSITY_RATE not in group]
    if any(id(p) in sparse for group in groups for p in group["params"]):
        warnings.warn(
            "the optimizer steps sparse weights with the learning rate of the dense model, which is too small for "
            "them: use MSTTrainer in place of Trainer (or MSTTrainerMixin), or pass Trainer(optimizers=(AdamW("
            "mst_compile.param_groups(model, ...), lr=...), None)). To keep one rate for all: density_rate = 0 there",
            MSTWarning,
            stacklevel=4,
        )
