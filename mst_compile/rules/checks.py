"""Checks of the arguments of schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mst_compile.errors import ScheduleError


def check_sparsity(name: str, value: object) -> None:
    """Raise :class:`ScheduleError` unless ``value`` is a share of zeros."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ScheduleError(f"{name} must lie in [0, 1), got {value!r}: it is the share of zeros, 0.9 keeps one in ten")


def check_share(name: str, value: object) -> None:
    """Raise :class:`ScheduleError` unless ``value`` lies in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ScheduleError(f"{name} must lie in [0, 1], got {value!r}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise :class:`ScheduleError` unless ``value`` is one of ``choices``."""
    if value not in tuple(choices):
        raise ScheduleError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_steps(name: str, value: object) -> None:
    """Raise :class:`ScheduleError` unless ``value`` is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScheduleError(f"{name} must be a whole number of optimizer steps, at least 1, got {value!r}")


def check_positions(name: str, value: object) -> None:
    """Raise :class:`ScheduleError` unless ``value`` is a positive whole number of positions in a sequence."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScheduleError(f"{name} must be a whole number of positions, at least 1, got {value!r}")


def check_length(name: str, value: object) -> None:
    """Raise :class:`ScheduleError` unless ``value`` is a share of the run (float) or a number of steps (int)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ScheduleError(f"{name} must be a share of total_steps (float) or a number of steps (int), got {value!r}")
    if isinstance(value, float) and value > 1:
        raise ScheduleError(f"{name}={value!r} is a share above 1; pass an int for a number of steps")


def is_moment(value: object) -> bool:
    """Whether ``value`` is a share of the run (float in [0, 1]) or a number of steps (int)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= (1 if isinstance(value, float) else math.inf)
