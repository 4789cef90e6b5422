"""``Recorder``: follows any training loop and writes what happened to files, TensorBoard and Weights & Biases."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from mst_compile.cost.flops import Meter
from mst_compile.errors import ArgumentError, RecordError, WriteError
from mst_compile.rules.checks import as_number, check_flag, check_instance, check_model, check_whole, shown
from mst_compile.rules.schedule import sparsity_of
from mst_compile.state.listeners import TopologyEvent
from mst_compile.state.sparsifier import Part, parts_of

from . import files, history, sinks
from .about import about_run
from .claim import Claim
from .clock import Clock
from .history import Snapshot
from .writing import Records

_RESERVED = sinks.OWN | {"step", "phase"}
_OF_EVENTS = ("events", "dropped", "grown")
FILES = (history.ABOUT, history.SCALARS, history.TABLE, history.EVENTS, history.MASKS, history.SAMPLE)


class _Counts(NamedTuple):
    """So far, and of a dense model; one value, so that no interrupt parts them."""

    steps: int
    flops: float
    dense: float


class Recorder:
    """Records a run, whoever trains::

        recorder = mst_compile.report.Recorder(model, "runs/mine", tokens_per_step=8 * 1024, tensorboard=True)
        for batch in loader:
            ...
            optimizer.step()
            optimizer.zero_grad()
            recorder.log(loss=loss)
        recorder.close()

    Make it after the model was made sparse and, to resume, after the checkpoint was loaded: records of later steps are
    then cut off, and the run goes on behind the others. A dense model is recorded in the same way, to compare with.
    ``folder`` then holds

    - ``scalars.jsonl`` and ``scalars.csv``: a record a step. What :meth:`log` was given; ``density`` and ``phase`` of
      the step, ``sparsity`` (what the schedule asks for); so far: ``flops`` and ``flops_of_dense``, their share of a
      dense model's, ``seconds`` of training, ``compile_seconds``, ``wall_seconds`` (all, with what is not training),
      and of topology events ``events``, ``dropped`` and ``grown`` (elements); ``tokens_per_s``.
    - ``events.jsonl``: a record a topology event, with each weight that changed.
    - ``masks.jsonl``: masks of a few weights at telling moments. ``run.json``: what was trained, how and where.

    Each record is with the operating system when :meth:`log` returns. If it cannot be, as on a full disk, training
    goes on: that is said once, and the record is written when there is room again. ``python -m mst_compile report
    runs/mine`` makes a page of it, :meth:`draw` figures. On several ranks rank 0 alone writes, and the others'
    recorders do nothing; nor does that of a forked process write, whose training is not this run.

    Args:
        model: sparsified or plain; also what ``torch.compile`` or DDP made of it.
        folder: where to write; made if it does not exist.
        tokens_per_step: of an optimizer step, on all ranks; without it neither FLOPs nor tokens a second are known,
            only the share of FLOPs.
        total_steps: of the run, for its phases; default the schedule's.
        label: what reports call the run; default the folder's name.
        notes: anything that a report shall show, by name; values that JSON can hold.
        every: record each so many steps. Reading a loss waits for the device: on a GPU 10 costs less than 1. A
            checkpoint should then fall on such a step, or what came after the last record is not counted.
        step: training steps taken so far; default what the model's sparsifier says, 0 for a dense model.
        rest, attention_saved: as for :class:`mst_compile.flops.Meter`.
        tensorboard: write scalars to ``folder/tensorboard`` too.
        wandb: True, or arguments of ``wandb.init``, to send scalars to Weights & Biases.
        overwrite: at step 0, delete what was recorded in ``folder`` before.

    Raises:
        ArgumentError: an argument is of the wrong type or out of range.
        ForecastError: so is one for the meter.
        ModelError: ``model`` is no module.
        RecordError: ``folder`` holds a run, and this one is at step 0, or of a model of another size; or what is there
            cannot be read; or a Recorder of another process is writing there. One of this process that was not closed
            hands the folder over, and raises this error when it is used again.
        WriteError: the files that a run begins with cannot be written.
        MissingPackageError: ``tensorboard`` or ``wandb`` was asked for and is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        *,
        tokens_per_step: int | None = None,
        total_steps: int | None = None,
        label: str | None = None,
        notes: Mapping[str, Any] | None = None,
        every: int = 1,
        step: int | None = None,
        rest: float | None = None,
        attention_saved: float = 0.0,
        tensorboard: bool = False,
        wandb: bool | Mapping[str, Any] = False,
        overwrite: bool = False,
    ) -> None:
        check_model("Recorder", model)
        check_instance("folder", folder, str | Path, "a path")
        if not str(folder) or "\0" in str(folder):
            raise ArgumentError(f"folder must name a folder, got {str(folder)!r}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ArgumentError(f"folder must name a folder, and {str(folder)!r} is a file")
        self._every = check_whole("every", every, error=ArgumentError)
        self._counts_tokens = tokens_per_step is not None
        if not self._counts_tokens and (rest is not None or attention_saved):
            raise ArgumentError(
                f"rest={rest!r} and attention_saved={attention_saved!r} are FLOPs of a step: give tokens_per_step too"
            )
        if total_steps is not None:
            total_steps = check_whole("total_steps", total_steps, of="optimizer steps", error=ArgumentError)
        self._meter = Meter(model, 1 if tokens_per_step is None else tokens_per_step, rest, attention_saved)
        self._model = model
        parts = parts_of(model)
        count = max((part.sparsifier.step_count for part in parts), default=0)
        self.step = count if step is None else check_whole("step", step, least=0, error=ArgumentError)
        self._writes = not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)
        self._clock, self._born = Clock(), time.perf_counter()
        self._handles: list[Any] = []
        self._rows, self._recorded, self._wall = 0, self.step, 0.0
        self._counts = _Counts(self.step, 0.0, 0.0)
        self._events_so_far = dict.fromkeys(_OF_EVENTS, 0)
        self._last_masks: dict[str, Tensor] = {}
        self._closed = False
        check_instance("label", label, str | None, "a text")
        named, meter = label or self.folder.resolve().name, self._meter if self._counts_tokens else None
        about = about_run(model, parts, named, total_steps, meter, notes)
        self._moments = {edge for _, a, b in about["phases"] for edge in (a + (b - a) * 3 // 4, b)}
        self._telling = history.telling({each["name"]: [*each["shape"], each["block"]] for each in about["sparse"]})
        asked_for = (check_flag("tensorboard", tensorboard), wandb, check_flag("overwrite", overwrite))
        check_instance("wandb", wandb, bool | Mapping, "True, False or arguments of wandb.init")
        if self._writes:
            self._open(about, *asked_for)
            for part in parts:
                self._handles.append(part.sparsifier.on_event(functools.partial(self._event, part)))
        self.start()

    # -- what a loop calls ---------------------------------------------------------------------------------------------

    def log(self, loss: Any = None, *, step: int | None = None, **scalars: Any) -> dict[str, Any] | None:
        """Record a training step that has been taken; call it once after each.

        Args:
            loss, scalars: numbers or tensors of one; None is left out. ``val_loss`` is drawn beside the loss.
            step: how many steps have been taken, this one included; default one more than before, of a sparse model
                what its sparsifier says.

        Returns:
            The record, None of a step that none is made of (``every``).

        Raises:
            ArgumentError: a scalar is no number, or has the name of one that the recorder fills.
            RecordError: the recorder was closed or is another process's, or the number of steps has fallen.
        """
        if self._closed:
            raise RecordError("the recorder was closed; make a new one to go on")
        if self._writes:
            self._claim.check()
        taken = self._taken(step)
        recorded = taken // self._every > self.step // self._every or not self._rows
        given = {"loss": loss, **scalars} if recorded and self._writes else {}
        values = {name: _scalar(name, value) for name, value in given.items() if value is not None}
        self.step = taken
        if not recorded or not self._writes:
            self._count(taken)
            self._look()
            return None
        row = {"step": taken, **values, **self._own(taken)}
        self._records.add_row(row)
        if taken in self._moments or not self._rows:
            self._snapshot()
        self._rows += 1
        self._remember_identity()
        self.start()
        return row

    def start(self) -> None:
        """Count training time from here on, and not from the last :meth:`log`: to be called before a step, when
        something else has happened since, such as validation, or masks were changed by hand."""
        self._look()
        self._clock.start()
        self._elapsed: float | None = None

    def stop(self) -> None:
        """Count training time up to here, and not up to the next :meth:`log`: to be called after a step, when
        something else comes before it is logged."""
        self._elapsed = self._clock.stop()

    def sample(self, text: str) -> None:
        """Keep a text that the trained model wrote, for the report.

        Raises:
            ArgumentError: it is none.
            RecordError: the recorder is another process's.
            WriteError: it cannot be written.
        """
        check_instance("text", text, str, "a text")
        if self._writes:
            self._claim.check()
            files.replace(self.folder / history.SAMPLE, text)

    def draw(self) -> list[Path]:
        """Write PNG figures to the folder: ``loss.png``, ``density.png``, ``masks.png``; returns those that there are.

        Raises:
            MissingPackageError: matplotlib is not installed.
            WriteError: they cannot be written.
        """
        from .figures import draw

        return draw([history.overview(self.folder)], self.folder) if self._writes else []

    def close(self) -> None:
        """End the run: files are closed, and the model and its optimizers are not listened to any more."""
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        if self._writes and self._claim.is_ours:
            self._snapshot()
            self._records.close()
            self._claim.release()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # -- what is counted -----------------------------------------------------------------------------------------------

    def _taken(self, step: int | None) -> int:
        """The number of steps taken."""
        if step is not None:
            found = check_whole("step", step, least=0, error=ArgumentError)
        else:
            counts = [part.sparsifier.step_count for part in parts_of(self._model)]
            found = max(counts) if counts else self.step + 1
        if found < self.step:
            raise RecordError(
                f"step {self.step} has been recorded, and now {found} steps have been taken; after loading a "
                "checkpoint make a new Recorder, which cuts off what came after it"
            )
        return found

    def _count(self, taken: int) -> None:
        """Count the steps that have been taken since the last ones that were."""
        so_far = self._counts
        steps = taken - so_far.steps
        self._counts = _Counts(taken, so_far.flops + steps * self._coming, so_far.dense + steps * self._meter.dense)
        if steps:
            self._state = self._coming_state

    def _look(self) -> None:
        """See what the coming step will be: after it an event may have changed the masks that it had."""
        self._coming = self._meter.coming if parts_of(self._model) else self._meter.dense  # it may be dense again
        self._coming_state = self._describe()

    def _describe(self) -> dict[str, Any]:
        own = [part.sparsifier for part in parts_of(self._model)]
        if not own:
            return {"density": 1.0, "sparsity": 0.0, "phase": ""}
        sizes = [sum(w.numel for w in each.weights.values()) for each in own]
        density = sum(s * each.density for s, each in zip(sizes, own, strict=True)) / sum(sizes)
        wanted = [sparsity_of(each.schedule, each.step_count) for each in own]
        sparsity = sum(s * value for s, value in zip(sizes, wanted, strict=True)) / sum(sizes)
        phase = ", ".join(dict.fromkeys(filter(None, (each.phase for each in own))))
        return {"density": density, "sparsity": sparsity, "phase": phase}

    def _own(self, taken: int) -> dict[str, Any]:
        """What the recorder knows of the steps since the last record."""
        elapsed = self._clock.stop() if self._elapsed is None else self._elapsed
        self._count(taken)
        found = dict(self._state)
        if self._counts_tokens:
            found["flops"] = self._counts.flops
            steps = taken - self._recorded
            if steps and elapsed > 0:
                found["tokens_per_s"] = steps * self._meter.tokens_per_step / elapsed
        found["flops_of_dense"] = self._counts.flops / self._counts.dense if self._counts.dense else 1.0
        found |= {"seconds": self._clock.seconds, "compile_seconds": self._clock.compile_seconds}
        found["wall_seconds"] = self._wall + time.perf_counter() - self._born
        self._recorded = taken
        return found | self._events_so_far

    def _event(self, part: Part, event: TopologyEvent) -> None:
        """A topology event: counted, and written as it is."""
        if not self._claim.is_ours:
            return
        so_far, new = self._events_so_far, (not event.skipped, event.dropped, event.grown)
        self._events_so_far = {name: so_far[name] + n for name, n in zip(_OF_EVENTS, new, strict=True)}
        weights = {
            part.full(name): {"density": c.density, "dropped": c.dropped, "grown": c.grown, "block": c.block}
            for name, c in event.weights.items()
        }
        record = {"step": event.step, "phase": event.phase, "density": event.density, "skipped": event.skipped}
        self._records.add_event(record | {"dropped": event.dropped, "grown": event.grown, "weights": weights})
        self._records.tell(event.step, {f"mst_density/{name}": c["density"] for name, c in weights.items()})

    def _snapshot(self) -> None:
        """Keep masks of a few weights, unless they are those of the last time."""
        parts = parts_of(self._model)
        masks = {part.full(name): w.mask for part in parts for name, w in part.sparsifier.weights.items()}
        chosen = {name: masks[name].clone() for name in self._telling if name in masks}
        if not chosen or (self._last_masks.keys() == chosen.keys() and _equal(self._last_masks, chosen)):
            return
        phase = str(self._state["phase"])
        self._records.add_masks(history.pack(Snapshot(self.step, phase, chosen)))
        self._last_masks = chosen

    # -- beginning -----------------------------------------------------------------------------------------------------

    def _open(self, about: dict[str, Any], tensorboard: bool, wandb: bool | Mapping[str, Any], overwrite: bool) -> None:
        """Read what is there, refuse or cut it, and open all for writing."""
        last = None if overwrite or self.step else _last(files.each(self.folder / history.SCALARS))[0]
        if last is not None:
            raise RecordError(
                f"{str(self.folder)!r} holds a run of {last.get('step')} steps, and the model is at step 0: name "
                "another folder or pass overwrite=True. To go on with that run, load its checkpoint before the "
                "Recorder is made, and for a dense model pass step="
            )
        before: dict[str, Any] = {}
        if self.step:
            history.check(self.folder)
        rows, masks = _last(self._kept(history.SCALARS)), _last(self._kept(history.MASKS))
        if rows[0] is not None:
            before = history.about_of(self.folder)
            history.check_same(self.folder, before, about)
            about |= {"started": before["started"], "resumed": [*before["resumed"], self.step]}
        identity = str(before.get("wandb", ""))
        found: list[sinks.Sink] = []
        if tensorboard:
            found.append(sinks.TensorBoard(self.folder / "tensorboard", self.step + 1))
        self._wandb = None
        if wandb is not False:
            self._wandb = sinks.WeightsAndBiases(self.folder, identity, {} if wandb is True else wandb, about)
            found.append(self._wandb)
        self._take_up(*rows, masks[0])
        # Nothing has been written up to here.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"folder {str(self.folder)!r} cannot be made: {error.strerror or error}") from error
        try:
            self._claim = Claim(self.folder)
            self._begin(about | ({"wandb": identity} if identity else {}), found, anew=not before)
        except (RecordError, WriteError):
            for sink in found:
                sink.close()
            if hasattr(self, "_claim"):
                self._claim.release()
            raise

    def _begin(self, about: dict[str, Any], found: list[sinks.Sink], anew: bool) -> None:
        """Write all that a run begins with; of one that is gone on with what it had up to this step."""
        for name in (history.ABOUT, history.TABLE, history.SAMPLE) if anew else ():
            (self.folder / name).unlink(missing_ok=True)
        self._about_now = about
        self._write_about()
        kept = {name: self._kept(name) for name in (history.SCALARS, history.EVENTS, history.MASKS)}
        self._records = Records(self.folder, kept, found)

    def _kept(self, name: str) -> Iterator[files.Record]:
        """The records of a file up to the step that the run is at."""
        return (r for r in files.each(self.folder / name) if r["step"] <= self.step) if self.step else iter(())

    def _take_up(self, row: files.Record | None, count: int, masks: files.Record | None) -> None:
        """Go on counting from the last record, of so many."""
        last = row or {}
        self._rows = count
        flops, share = float(last.get("flops") or 0.0), last.get("flops_of_dense")
        # Dense FLOPs are not recorded: they are the same at every step.
        dense = int(last.get("step", 0)) * self._meter.dense
        if not self._counts_tokens and share is not None:
            flops = share * dense
        self._counts = _Counts(self.step, flops, dense)
        self._clock.seconds = float(last.get("seconds", 0.0))
        self._clock.compile_seconds = float(last.get("compile_seconds", 0.0))
        self._wall = float(last.get("wall_seconds", 0.0))
        self._events_so_far = {name: int(last.get(name, 0)) for name in _OF_EVENTS}
        self._last_masks = history.unpack(masks).masks if masks else {}
        self._state = self._describe()

    def _write_about(self) -> None:
        files.replace(self.folder / history.ABOUT, json.dumps(self._about_now, indent=2) + "\n")

    def _remember_identity(self) -> None:
        """Keep the identity of a run at Weights & Biases, so that it can be resumed."""
        if self._wandb is not None and self._about_now.get("wandb") != self._wandb.identity:
            self._about_now["wandb"] = self._wandb.identity
            with self._records.going_on():
                self._write_about()


def _last(records: Iterable[files.Record]) -> tuple[files.Record | None, int]:
    """The last record, None if there is none, and how many there are."""
    last, count = None, 0
    for record in records:
        last, count = record, count + 1
    return last, count


def _scalar(name: str, value: Any) -> float:
    """The number ``value``; raises :class:`ArgumentError` if it is none."""
    if name in _RESERVED:
        raise ArgumentError(f"{name} is filled by the recorder; give the scalar another name")
    found = as_number(value.detach() if isinstance(value, Tensor) else value)
    if found is None:
        raise ArgumentError(f"{name} must be a number or a tensor of one, got {shown(value)}")
    try:
        return float(found)
    except OverflowError as error:
        raise ArgumentError(f"{name} is beyond all floats: {shown(value)}") from error


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(one[name].equal(mask) for name, mask in other.items())
