"""What is kept of the records of a run while they are read, however many there are: those that figures and tables show,
and what is counted over all of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
DRAWN = ("loss", "val_loss", "density", "sparsity", "lr")  # scalars of which there are curves
WHOLE = 4096  # records of a run that is kept as it is
MOST_EVENTS = 100  # that are kept; all are counted
_STRETCHES = 1000  # of a curve: more cannot be seen
_SPEEDS = 8192  # different ones; at least 4200, which one binary digit of all floats needs
_UNDRAWABLE = 1e100  # what is larger has no place on an axis


def drawable(value: float) -> bool:
    """Whether a number has a place on an axis: it is finite, and so are its sums with others, as an axis forms them."""
    return abs(value) < _UNDRAWABLE  # not of NaN


class Kept(NamedTuple):
    """A record that is kept for a scalar of it; ``number`` of them came before."""

    number: int
    value: float
    row: Row


class Stretch:
    """Records one behind the other that have a scalar.

    Attributes:
        first, last: of them.
        low, high, sound: of those that are drawable the least, the greatest and the last; None if there is none.
        bad: the first that is not drawable; None if all are.
        records, bads: how many there are, and how many are not drawable.
        total: sum of the drawable ones.
    """

    __slots__ = ("bad", "bads", "first", "high", "last", "low", "records", "sound", "total")

    def __init__(self, kept: Kept) -> None:
        good = drawable(kept.value)
        self.first = self.last = kept
        self.low = self.high = self.sound = kept if good else None
        self.bad = None if good else kept
        self.records, self.bads, self.total = 1, int(not good), kept.value if good else 0.0

    def join(self, later: Stretch) -> None:
        """Take up the stretch that comes next."""
        self.last = later.last
        if later.low is not None and (self.low is None or later.low.value < self.low.value):
            self.low = later.low
        if later.high is not None and (self.high is None or later.high.value > self.high.value):
            self.high = later.high
        self.sound = later.sound or self.sound
        self.bad = self.bad or later.bad
        self.records += later.records
        self.bads += later.bads
        self.total += later.total

    def kept(self) -> list[Kept]:
        """The records that show it, in their order."""
        found = (self.first, self.low, self.high, self.sound, self.bad, self.last)
        return list({kept.number: kept for kept in sorted(filter(None, found), key=lambda k: k.number)}.values())


class Series:
    """A scalar's values, in at most a thousand stretches of equal numbers of records. The numbers double, and
    neighbours are joined, when there are more."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self._size = 1

    def add(self, kept: Kept) -> None:
        new = Stretch(kept)
        if self.stretches and self.stretches[-1].records < self._size:
            self.stretches[-1].join(new)
            return
        self.stretches.append(new)
        if len(self.stretches) > _STRETCHES:
            self._size *= 2
            for one, other in zip(self.stretches[::2], self.stretches[1::2], strict=False):
                one.join(other)
            self.stretches = self.stretches[::2]

    def kept(self) -> Iterator[Kept]:
        """The records that show it, in their order."""
        for stretch in self.stretches:
            yield from stretch.kept()


class Speeds:
    """The median of any number of finite values, from counts of values that are equal. When more differ than are kept,
    they are cut to fewer binary digits: of values within a factor of two at least 12 remain, .05 %."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()
        self._digits = 53

    def add(self, value: float) -> None:
        self._counts[self._cut(value)] += 1
        while len(self._counts) > _SPEEDS:
            self._digits -= 1
            coarser: Counter[float] = Counter()
            for each, count in self._counts.items():
                coarser[self._cut(each)] += count
            self._counts = coarser

    def _cut(self, value: float) -> float:
        mantissa, exponent = math.frexp(value)
        return math.ldexp(math.trunc(math.ldexp(mantissa, self._digits)), exponent - self._digits)

    def median(self) -> float | None:
        """The upper one of an even number; None of none."""
        middle = self._counts.total() // 2
        for value in sorted(self._counts):
            middle -= self._counts[value]
            if middle < 0:
                return value
        return None


class Course:
    """The records of a run.

    Args:
        phases: name, first step and end of each; the last record within each is kept.

    Attributes:
        records: how many there were.
        series: of each scalar that is drawn.
        speeds: tokens a second.
    """

    def __init__(self, phases: Sequence[tuple[str, int, int]] = ()) -> None:
        self.records = 0
        self.series = {name: Series() for name in DRAWN}
        self.speeds = Speeds()
        self._phases = [(first, end) for _, first, end in phases]
        self._whole: list[Row] = []
        self._ends: dict[int, tuple[int, Row]] = {}  # by the phase's place
        self._lasts: dict[str, tuple[int, Row]] = {}  # by the scalar's name

    @property
    def whole(self) -> bool:
        """Whether all records were kept."""
        return self.records <= WHOLE

    def add(self, row: Row) -> None:
        """Take up the next record."""
        number, step = self.records, row["step"]
        self.records += 1
        if self.whole:
            self._whole.append(row)
        else:
            self._whole.clear()
        for name, series in self.series.items():
            if (value := row.get(name)) is not None:
                series.add(Kept(number, float(value), row))
        speed = row.get("tokens_per_s")
        if speed is not None and math.isfinite(speed):
            self.speeds.add(float(speed))
        self._lasts.update(dict.fromkeys((name for name, value in row.items() if value is not None), (number, row)))
        for i, (first, end) in enumerate(self._phases):
            if first < step <= end:
                self._ends[i] = number, row

    def rows(self) -> list[Row]:
        """All records; of more than :data:`WHOLE` those that show the series, the last of each phase and those that
        have the last value of each scalar, in their order."""
        if self.whole:
            return self._whole
        found = {kept.number: kept.row for series in self.series.values() for kept in series.kept()}
        found |= dict(self._ends.values()) | dict(self._lasts.values())
        return [found[number] for number in sorted(found)]

    def losses(self) -> list[tuple[Row, float, int]]:
        """The mean loss of each stretch, with its last record and how many it is of. Before a stretch in which losses
        are not drawable, and were in the one before, comes one of NaN, a gap in a curve."""
        found: list[tuple[Row, float, int]] = []
        before = 0
        for stretch in self.series["loss"].stretches:
            good = stretch.records - stretch.bads
            if stretch.bad is not None and (not good or not before):
                found.append((stretch.bad.row, math.nan, stretch.bads))
            if good:
                found.append((stretch.last.row, stretch.total / good, good))
            before = stretch.bads
        return found


class Change(NamedTuple):
    """A weight over all events: how many, blocks dropped and grown, density after the last."""

    events: int = 0
    dropped: int = 0
    grown: int = 0
    density: float = 0.0


class Changes:
    """All topology events of a run.

    Attributes:
        first: the first ones, :data:`MOST_EVENTS` at most.
        count: how many there were.
        weights: each weight, by name.
    """

    def __init__(self, events: Sequence[Mapping[str, Any]] = ()) -> None:
        self.first: list[Any] = []
        self.count = 0
        self.weights: dict[str, Change] = {}
        for event in events:
            self.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take up the next event."""
        self.count += 1
        if len(self.first) < MOST_EVENTS:
            self.first.append(event)
        for name, new in event["weights"].items():
            old = self.weights.get(name, Change())
            self.weights[name] = Change(
                old.events + 1, old.dropped + new["dropped"], old.grown + new["grown"], new["density"]
            )
