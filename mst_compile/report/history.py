"""A recorded run, as it is read again: what figures and reports are made of."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mst_compile.errors import RecordError
from mst_compile.rules.checks import shown
from mst_compile.rules.schedule import Schedule

from . import files
from .course import Changes, Course, Row, drawable

ABOUT, SCALARS, TABLE, EVENTS, MASKS = "run.json", "scalars.jsonl", "scalars.csv", "events.jsonl", "masks.jsonl"
SAMPLE = "sample.txt"
FORMAT = 1
_MOST_MASKS = 5  # weights whose masks are kept and drawn
_MOMENTS = 6  # at which masks are drawn


@dataclass(frozen=True)
class Snapshot:
    """Masks of a few weights, bool ``[block rows, block columns]``, after ``step`` steps."""

    step: int
    phase: str
    masks: dict[str, Tensor]

    @property
    def title(self) -> str:
        return f"{self.phase + ', ' if self.phase else ''}step {self.step}"


@dataclass
class History:
    """One run.

    Attributes:
        label: what figures call it.
        rows: a dict of scalars a record, by step; ``loss`` and others, ``nan`` where one is not finite.
        phases: name, first step and end of each phase.
        sparse: whether it has sparse weights.
        about: what ``run.json`` says.
        events: what ``events.jsonl`` says.
        sample: text that the trained model wrote.
        colour: for figures, as matplotlib has it; None: one is chosen.
        course: of a run that :func:`overview` has read and that is too long to be kept whole; ``rows`` are then some.
        all_events: what was counted over all events, where ``events`` are the first ones.
    """

    label: str
    rows: list[dict[str, Any]]
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    sparse: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    sample: str = ""
    colour: str | None = None
    course: Course | None = None
    all_events: Changes | None = None

    def column(self, name: str, rows: Sequence[Mapping[str, Any]] | None = None) -> list[float]:
        """A scalar of all records, ``nan`` where it is missing."""
        return [
            math.nan if row.get(name) is None else float(row[name]) for row in (self.rows if rows is None else rows)
        ]

    def last(self, name: str) -> float | None:
        """The last value of a scalar that was recorded."""
        return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)

    def speed(self) -> float | None:
        """The median of tokens a second, the upper one of an even number of records; None without any."""
        if self.course is not None:
            return self.course.speeds.median()
        speeds = sorted(v for v in self.column("tokens_per_s") if math.isfinite(v))
        return speeds[len(speeds) // 2] if speeds else None

    def changes(self) -> Changes:
        """What was counted over all events."""
        return Changes(self.events) if self.all_events is None else self.all_events

    # -- what figures draw ---------------------------------------------------------------------------------------------

    def losses(self) -> list[tuple[Row, float, int]]:
        """Records, losses, and how many a loss is the mean of."""
        if self.course is not None:
            return self.course.losses()
        rows = [row for row in self.rows if row.get("loss") is not None]
        return [(row, value, 1) for row, value in zip(rows, self.column("loss", rows), strict=True)]

    def not_finite(self) -> int:
        """How many losses have no place on an axis."""
        if self.course is not None:
            return sum(stretch.bads for stretch in self.course.series["loss"].stretches)
        return sum(not drawable(value) for _, value, _ in self.losses())

    def curve(self, name: str, most: int | None = None) -> list[Row]:
        """The records by which a scalar of :data:`~mst_compile.report.course.DRAWN` is drawn: all or every so many, so
        that they are fewer than twice ``most``; of a long run those that have extremes."""
        if self.course is not None:
            return [kept.row for kept in self.course.series[name].kept()]
        return self.rows if most is None else self.rows[:: max(1, len(self.rows) // most)]

    def settled(self) -> list[float]:
        """Losses without those of the first twentieth of the records."""
        if self.course is not None:
            begin = self.course.records // 20
            return [kept.value for kept in self.course.series["loss"].kept() if kept.number >= begin]
        return self.column("loss")[len(self.rows) // 20 :]


def read(folder: str | Path) -> History:
    """The run that a :class:`~mst_compile.report.Recorder` wrote to ``folder``, also while it is under way.

    All records are held in memory: about .9 GB of a million. A report and figures do with :func:`overview`.

    Raises:
        RecordError: there is none, or its files were damaged.
    """
    folder = Path(folder)
    found = _begun(folder)
    with _damaged(folder / SCALARS):
        found.rows = [_numbers(row) for row in files.each(folder / SCALARS)]
    with _damaged(folder / EVENTS):
        found.events = [_event(record) for record in files.each(folder / EVENTS)]
    with _damaged(folder / MASKS):
        found.snapshots = [unpack(record) for record in files.each(folder / MASKS)]
    return found


def overview(folder: str | Path) -> History:
    """As :func:`read`, what figures and a report show of it: memory is bounded by that, not by the number of records.

    A run of up to :data:`~mst_compile.report.course.WHOLE` records has all of them. Of a longer one ``rows`` are those
    that have the last value of each scalar or are the last of a phase, and of each of up to a thousand stretches of the
    scalars that are drawn the first, the last, those with extremes and one that is not finite. All events are counted
    and the first kept; ``snapshots`` are those that are drawn.

    Raises:
        RecordError: there is no run, or its files were damaged.
    """
    folder = Path(folder)
    found = _begun(folder)
    course, changes = Course(found.phases), Changes()
    with _damaged(folder / SCALARS):
        for row in files.each(folder / SCALARS):
            course.add(_numbers(row))
    found.rows, found.course = course.rows(), None if course.whole else course
    with _damaged(folder / EVENTS):
        for record in files.each(folder / EVENTS):
            changes.add(_event(record))
    found.events, found.all_events = changes.first, changes
    with _damaged(folder / MASKS):
        count = sum(1 for _ in files.each(folder / MASKS))
        drawn = set(moments(count))
        masks = itertools.islice(files.each(folder / MASKS), count)  # a run under way may have more by now
        found.snapshots = [each for i, each in enumerate(map(unpack, masks)) if i in drawn]
    return found


def moments(count: int) -> list[int]:
    """Which of so many snapshots are drawn, the first and the last among them."""
    if count <= _MOMENTS:
        return list(range(count))
    return [round(i * (count - 1) / (_MOMENTS - 1)) for i in range(_MOMENTS)]


def _begun(folder: Path) -> History:
    """The run without its records."""
    about = about_of(folder)
    sample = folder / SAMPLE
    with _damaged(folder / ABOUT):
        return History(
            label=_printable(str(about.get("label") or folder.resolve().name)),
            rows=[],
            phases=[(str(name), int(first), int(end)) for name, first, end in about.get("phases", [])],
            sparse=bool(_sparse(about)),
            about=about,
            sample=sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else "",
        )


def about_of(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says.

    Raises:
        RecordError: there is none, or it was damaged.
    """
    file = folder / ABOUT
    if not file.is_file():
        inside = sorted(str(found.parent) for found in folder.glob(f"*/{ABOUT}"))
        advice = f"Runs are in {', '.join(inside[:5])}" if inside else "Name a folder that a Recorder wrote"
        raise RecordError(f"there is no recorded run in {str(folder)!r}: it has no {ABOUT}. {advice}")
    return _about(file)


def check(folder: Path) -> None:
    """Raise as :func:`read` does if the records of a run were damaged; none of them is kept."""
    for name, made in ((SCALARS, _numbers), (EVENTS, _event), (MASKS, unpack)):
        with _damaged(folder / name):
            for record in files.each(folder / name):
                made(record)


@contextlib.contextmanager
def _damaged(file: Path) -> Iterator[None]:
    """Within it, what a record lacks or should not hold raises :class:`RecordError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RecordError):
            raise
        missing = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise RecordError(
            f"{file} has a record that no Recorder wrote ({missing}); was it written by another program?"
        ) from error


def _printable(text: str) -> str:
    """A text without what no file can hold, as parts of names are that the system could not read."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def _sparse(about: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The sparse weights: name, rows, columns, block."""
    return [(str(w["name"]), *map(int, w["shape"]), int(w["block"])) for w in about.get("sparse", [])]


def _event(record: dict[str, Any]) -> dict[str, Any]:
    """A record of ``events.jsonl`` as a Recorder writes it; raises if it is none."""
    skipped: Any = record["skipped"]
    counts = {name: int(record[name]) for name in ("step", "dropped", "grown")}
    weights = {
        str(name): {"density": float(w["density"])} | {key: int(w[key]) for key in ("dropped", "grown", "block")}
        for name, w in record["weights"].items()
    }
    found = {"phase": str(record["phase"]), "density": float(record["density"]), "skipped": skipped}
    return record | counts | found | {"weights": weights}


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what ``run.json`` says with what it shall.

    Raises:
        RecordError: the run in the folder is another model's, to whose FLOPs those of this one would be added.
    """
    sizes = [found.get("parameters") for found in (before, now)]
    if sizes[0] != sizes[1]:
        raise RecordError(
            f"{str(folder)!r} holds a run of a model of {shown(sizes[0])} parameters, and this one has "
            f"{shown(sizes[1])}: name another folder"
        )


def _about(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{file} is no JSON ({error}); was it written by another program?") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        version = about.get("format") if isinstance(about, dict) else None
        raise RecordError(f"{file} is of format {version!r}, and this version of mst_compile reads {FORMAT}")
    return about


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record of ``scalars.jsonl``, with numbers that are not finite as such; raises if it is none."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        number = files.number(value)
        if number is None and value is not None and name != "phase":
            raise ValueError(f"{name} is {shown(value)}")
        # Names and phases are the same in a million records, and held once.
        value = sys.intern(value) if type(value) is str and number is None else value
        found[sys.intern(name)] = value if number is None or name == "step" else number
    step = found["step"]
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step is {shown(step)}")
    return found


def described(schedule: Schedule) -> str:
    """The schedule as a call, without arguments that have their defaults."""
    if not is_dataclass(schedule):
        return shown(schedule)
    chosen = [f for f in fields(schedule) if getattr(schedule, f.name) != f.default]
    return f"{type(schedule).__name__}({', '.join(f'{f.name}={shown(getattr(schedule, f.name))}' for f in chosen)})"


# -- masks -------------------------------------------------------------------------------------------------------------


def telling(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Names of one weight of each kind, from the middle of the stack: of a kind are those of one shape whose names
    differ in numbers alone."""
    by_kind: dict[tuple[str, ...], list[str]] = {}
    for name, shape in shapes.items():
        by_kind.setdefault((re.sub(r"\d+", "#", name), str(tuple(shape))), []).append(name)
    chosen = [same[math.ceil(len(same) / 2) - 1] for same in by_kind.values()]
    return chosen[-_MOST_MASKS:]


def pack(snapshot: Snapshot) -> dict[str, Any]:
    """A record of masks: eight blocks a byte, the first in the lowest bit, in base64."""
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device="cpu")
    masks = {}
    for name, mask in snapshot.masks.items():
        bits = torch.nn.functional.pad(mask.flatten().long(), (0, -mask.numel() % 8)).view(-1, 8)
        packed = base64.b64encode(bytes((bits * powers).sum(1).tolist()))
        masks[name] = {"shape": list(mask.shape), "bits": packed.decode()}
    return {"step": snapshot.step, "phase": snapshot.phase, "masks": masks}


def unpack(record: Mapping[str, Any]) -> Snapshot:
    """The masks of a record."""
    masks = {}
    for name, found in record["masks"].items():
        rows, cols = found["shape"]
        data = torch.tensor(list(base64.b64decode(found["bits"])), dtype=torch.long, device="cpu")
        bits = (data[:, None] >> torch.arange(8, device="cpu")) & 1
        masks[name] = bits.flatten()[: rows * cols].view(rows, cols).bool()
    return Snapshot(int(record["step"]), str(record["phase"]), masks)
