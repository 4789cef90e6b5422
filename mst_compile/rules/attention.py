"""Hybrid sparse attention as a value: which pattern, and when (arXiv 2408.11746, section 3.3)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mst_compile.errors import ScheduleError

from .checks import as_moment, check_positions, shown
from .patterns import Parts, Pattern, as_pattern


@dataclass(frozen=True)
class Attention:
    """A pattern for causal self-attention, from one step to another; outside of them attention is full.

    Args:
        pattern: a name of :mod:`mst_compile.rules.patterns`, or a
            :class:`~mst_compile.rules.patterns.Pattern` of your own.
        window: number of last keys that ``"local"`` and ``"sparse"`` attend to, in positions; default ``stride``.
        stride: of the patterns, in positions.
        start, end: first step with the pattern, and first step without it again, each a share of the run if a float, a
            number of steps if an int; default the schedule's own choice, as the plateau.

    Raises:
        ScheduleError: a value is out of range.
    """

    pattern: str | Pattern = "full"
    window: int | None = None
    stride: int = 128
    start: float | int | None = None
    end: float | int | None = None

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # plain values, whatever kind of number was given
        put("stride", check_positions("stride", self.stride))
        if self.window is not None:
            put("window", check_positions("window", self.window))
        start, end = (None if edge is None else as_moment(edge) for edge in (self.start, self.end))
        if (start is None) != (self.start is None) or (end is None) != (self.end is None):
            raise _not_moments((self.start, self.end))
        put("start", start)
        put("end", end)
        if start is not None and end is not None and type(start) is type(end) and start >= end:
            raise ScheduleError(
                f"attention_window {(start, end)!r} is empty, the pattern would never be on: the first step must lie "
                "before the second"
            )
        _ = self.parts  # of a pattern that there is, and of numbers that it takes

    @property
    def name(self) -> str:
        """Name of the pattern."""
        return as_pattern(self.pattern).name

    @property
    def parts(self) -> Parts:
        """What queries see under the pattern."""
        pattern = as_pattern(self.pattern)
        found = pattern.parts(self.window or self.stride, self.stride)
        if not isinstance(found, Parts):
            raise ScheduleError(f"attention: {pattern!r}.parts(...) must return a Parts, got {shown(found)}")
        return found


def as_attention(attention: str | Pattern | Attention, window: object, stride: int, span: int | None) -> Attention:
    """The attention of a schedule's single arguments, or the value that was given whole.

    Args:
        window: a schedule's ``attention_window``, a pair of moments or None.
        stride, span: see :class:`Attention`, where ``span`` is called ``window``.

    Raises:
        ScheduleError: a value is out of range, or something is said twice.
    """
    if isinstance(attention, Attention):
        if window is not None or span is not None or check_positions("stride", stride) != Attention.stride:
            raise ScheduleError(
                f"{attention!r} says its own window, stride, start and end: leave attention_window={window!r}, "
                f"stride={stride!r} and span={span!r} out"
            )
        return attention
    if span is not None:
        check_positions("span", span)
    if window is None:
        return Attention(attention, span, stride)
    edges = tuple(window) if isinstance(window, tuple | list) else ()
    if len(edges) != 2 or any(as_moment(edge) is None for edge in edges):
        raise _not_moments(window)
    return Attention(attention, span, stride, *edges)


def _not_moments(window: object) -> ScheduleError:
    return ScheduleError(
        "attention_window must be the first sparse step and the first full step after it, shares of the run as floats "
        f"in [0, 1] or numbers of steps, got {shown(window)}"
    )
