"""Hybrid sparse attention as a value: which pattern, and when (arXiv 2408.11746, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from mst_compile.errors import ScheduleError

from .checks import check_positions, is_moment
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
        check_positions("stride", self.stride)
        if self.window is not None:
            check_positions("window", self.window)
        start, end = self.start, self.end
        if not all(edge is None or is_moment(edge) for edge in (start, end)):
            raise _not_moments((start, end))
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
        return as_pattern(self.pattern).parts(self.window or self.stride, self.stride)


def as_attention(attention: str | Pattern | Attention, window: object, stride: int, span: int | None) -> Attention:
    """The attention of a schedule's single arguments, or the value that was given whole.

    Args:
        window: a schedule's ``attention_window``, a pair of moments or None.
        stride, span: see :class:`Attention`, where ``span`` is called ``window``.

    Raises:
        ScheduleError: a value is out of range, or something is said twice.
    """
    if isinstance(attention, Attention):
        if window is not None or stride != Attention.stride or span is not None:
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
    if len(edges) != 2 or not all(map(is_moment, edges)):
        raise _not_moments(window)
    return Attention(attention, span, stride, *edges)


def _not_moments(window: object) -> ScheduleError:
    return ScheduleError(
        "attention_window must be the first sparse step and the first full step after it, shares of the run as floats "
        f"in [0, 1] or numbers of steps, got {window!r}"
    )
