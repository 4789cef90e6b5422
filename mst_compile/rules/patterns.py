"""Causal attention patterns: which keys a query attends to. Pure functions of positions.

A :class:`Pattern` is a rule with a name that says so in :class:`Parts`, given the two numbers of a schedule; whatever
computes attention, counts it or masks it sees the parts alone. The names are those of Mixed Sparsity Training's hybrid
sparse attention (arXiv 2408.11746, section 3.3; ``strided`` and ``fixed`` are those of Sparse Transformers, arXiv
1904.10509). To add one, subclass :class:`Pattern`; to offer it by name, put it into ``PATTERNS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from mst_compile.errors import ScheduleError

from .checks import check_positions, check_whole, shown

UNBOUNDED = torch.iinfo(torch.int64).max  # a window of every key up to the query


@dataclass(frozen=True)
class Parts:
    """Which keys a query at position ``i`` sees: a union of up to two parts that no key is in twice, cut at the query.

    Every number counts positions and may exceed the sequence; 0 stands for no such part (of ``first`` for itself).

    Args:
        window: a dense run, the last ``window`` keys, the query's own included; ``UNBOUNDED`` for all of them.
        chunk: a dense run, the keys up to the query in its own chunk of ``chunk`` positions.
        first, step: the keys at distances ``first``, ``first + step``, ``first + 2 step``, ... before the query.
        summary: the last position of every chunk of ``summary`` positions before the query's own such chunk.

    A run goes with distances that begin behind it (``first`` of at least ``window`` or ``chunk``), or with summaries
    that it never reaches (a chunk that divides ``summary``, or a window of 1); each part also stands alone.

    Raises:
        ScheduleError: a number is not a whole one or is negative, there is no part, or a key would be in two.
    """

    window: int = 0
    chunk: int = 0
    first: int = 0
    step: int = 0
    summary: int = 0

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, check_whole(f"attention: {name}", value, least=0, of="positions"))
        problem = self._problem()
        if problem is not None:
            raise ScheduleError(f"attention: {self} {problem}")

    def _problem(self) -> str | None:
        run = self.window or self.chunk
        if not (run or self.step or self.summary):
            return "sees no key; give it a window, a chunk, a step or a summary"
        if self.window and self.chunk:
            return "has two runs, which overlap; take the window or the chunk"
        if self.first and not self.step:
            return "has a first distance and no step to go on from it; give a step"
        if self.step and self.summary:
            return "has keys that are at one of its distances and a summary too; take one of the two"
        if self.step and self.first < run:
            return f"has distances within its run; let first be {run} or more"
        if self.window > 1 and self.summary:
            return "has summary keys within its window; take the chunk instead, or a window of 1"
        if self.chunk and self.summary % self.chunk:
            return "has summary keys within its chunk; let the chunk divide the summary"
        return None

    @property
    def numbers(self) -> list[int]:
        """The five numbers, in order: what ``mst::attention`` takes, and ``Parts(*numbers)`` reads."""
        return list(astuple(self))

    def alone(self) -> list[Parts]:
        """Each of the parts by itself."""
        run = [Parts(window=self.window, chunk=self.chunk)] if self.window or self.chunk else []
        distances = [Parts(first=self.first, step=self.step)] if self.step else []
        summaries = [Parts(summary=self.summary)] if self.summary else []
        return run + distances + summaries


FULL = Parts(window=UNBOUNDED)


def sees(parts: Parts, query: Tensor, key: Tensor) -> Tensor:
    """Whether queries see keys: bool, of their positions as integers of shapes that broadcast."""
    distance = query - key
    mask = distance < parts.window
    if parts.chunk:
        mask = mask | (query // parts.chunk == key // parts.chunk)
    if parts.step:
        mask = mask | ((distance >= parts.first) & ((distance - parts.first) % parts.step == 0))
    if parts.summary:
        summary = parts.summary
        mask = mask | ((key % summary == summary - 1) & (key // summary < query // summary))
    return mask & (distance >= 0)


def allowed(parts: Parts, length: int, device: str | torch.device = "cpu") -> Tensor:
    """The dense mask of the parts: bool ``[length, length]``, True where the query (row) sees the key (column)."""
    position = torch.arange(length, device=device)
    return sees(parts, position[:, None], position[None, :])


def pairs(parts: Parts, length: int) -> int:
    """Number of query-key pairs among ``length`` positions: the sum of :func:`allowed`, without forming it."""
    query = torch.arange(length, device="cpu")
    keys = (query + 1).clamp(max=parts.window)
    if parts.chunk:
        keys = keys + query % parts.chunk + 1
    if parts.step:
        keys = keys + ((query - parts.first).div(parts.step, rounding_mode="floor") + 1).clamp(min=0)
    if parts.summary:
        keys = keys + query // parts.summary
    return int(keys.sum())


class Pattern(ABC):
    """A rule for what queries see. A subclass has a name of its own, and :meth:`parts`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What schedules and reports call it; a plain class attribute will do."""

    @abstractmethod
    def parts(self, window: int, stride: int) -> Parts:
        """What queries see, given the numbers of positions of the schedule, both at least 1."""


def _numbers(window: int, stride: int) -> tuple[int, int]:
    """The two numbers of a pattern, which need not play a part in it."""
    return check_positions("window", window), check_positions("stride", stride)


class Full(Pattern):
    """Every key up to the query; the numbers play no part."""

    name = "full"

    def parts(self, window: int, stride: int) -> Parts:
        window, stride = _numbers(window, stride)
        return FULL


class Local(Pattern):
    """The last ``window`` keys, the query's own included."""

    name = "local"

    def parts(self, window: int, stride: int) -> Parts:
        window, stride = _numbers(window, stride)
        return Parts(window=window)


class Strided(Pattern):
    """Every key at a distance that ``stride`` divides, the query's own included."""

    name = "strided"

    def parts(self, window: int, stride: int) -> Parts:
        window, stride = _numbers(window, stride)
        return Parts(step=stride)


class Sparse(Pattern):
    """What ``local`` or ``strided`` sees."""

    name = "sparse"

    def parts(self, window: int, stride: int) -> Parts:
        window, stride = _numbers(window, stride)
        return Parts(window=window, first=min(-(-window // stride) * stride, UNBOUNDED), step=stride)


class Fixed(Pattern):
    """The query's own chunk of ``stride`` positions, and the last position of every earlier chunk."""

    name = "fixed"

    def parts(self, window: int, stride: int) -> Parts:
        window, stride = _numbers(window, stride)
        return Parts(chunk=stride, summary=stride)


PATTERNS: dict[str, Pattern] = {p.name: p for p in (Full(), Local(), Strided(), Sparse(), Fixed())}


def as_pattern(pattern: object) -> Pattern:
    """The pattern of a name, or the given one.

    Raises:
        ScheduleError: there is none of that name, it is no :class:`Pattern`, or its name is that of another.
    """
    if isinstance(pattern, str) and pattern in PATTERNS:
        return PATTERNS[pattern]
    if not isinstance(pattern, Pattern):
        names = ", ".join(map(repr, PATTERNS))
        raise ScheduleError(f"attention must be one of {names} or a Pattern, got {shown(pattern)}")
    name: object = pattern.name
    if not isinstance(name, str) or not name:
        raise ScheduleError(f"attention: the name of {pattern!r} must be a non-empty string, got {shown(name)}")
    if not isinstance(pattern, type(PATTERNS.get(pattern.name, pattern))):  # a copy of a known one will do
        raise ScheduleError(f"attention: {pattern!r} needs a name of its own, {pattern.name!r} is taken")
    return pattern
