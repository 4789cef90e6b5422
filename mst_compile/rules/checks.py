"""Checks of arguments, shared by all public functions.

Each returns the argument as a plain Python value, or raises an error that names the argument, what it was, and what it
should be. Whole numbers are ints, NumPy's and torch's integer scalars too; a float is none, even if its value is whole,
because lengths tell shares (float) from steps (int) by their type. A bool is never a number.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mst_compile.errors import ArgumentError, ModelError, MSTError, ScheduleError

LARGEST = 2**63 - 1
_SHOWN = 300  # characters of a value in a message


def shown(value: object) -> str:
    """``repr(value)``, cut where it is long; also of values that have none. Of a module its class."""
    if isinstance(value, nn.Module):
        return type(value).__name__
    try:
        text = repr(value)
    except Exception as problem:  # somebody else's __repr__, or an int of thousands of digits: not what was asked about
        text = f"<{type(value).__name__} whose repr raises {type(problem).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({type(value).__name__})"


def as_whole(value: object) -> int | None:
    """A whole number as an int; None of anything else."""
    if isinstance(value, Tensor):
        whole = value.dim() == 0 and not value.is_meta and not value.dtype.is_floating_point
        return int(value.item()) if whole and not value.dtype.is_complex and value.dtype != torch.bool else None
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def as_number(value: object) -> int | float | None:
    """A real number as an int if it is whole by its type, else as a float, NaN included; None of anything else."""
    whole = as_whole(value)
    if whole is not None:
        return whole
    if isinstance(value, Tensor):
        return float(value.item()) if value.dim() == 0 and not value.is_meta and value.is_floating_point() else None
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # a fraction beyond all floats, of whatever sign: no argument may be infinite
        return math.inf


def check_whole(
    name: str,
    value: object,
    *,
    least: int = 1,
    most: int = LARGEST,
    of: str = "",
    error: type[MSTError] = ScheduleError,
) -> int:
    """The whole number ``value``, from ``least`` to ``most``; ``of`` says of what it is the number.

    Raises:
        MSTError: of the class ``error``, if it is none.
    """
    found = as_whole(value)
    if found is None or not least <= found <= most:
        limits = f"at least {least}" if most == LARGEST else f"from {least} to {most}"
        if found is not None and found > most:
            limits = f"at most {most}"
        raise error(f"{name} must be a whole number{of and ' of ' + of}, {limits}, got {shown(value)}")
    return found


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    positive: bool = False,
    error: type[MSTError] = ArgumentError,
) -> float:
    """The finite number ``value``, at least ``least``, and more than 0 if ``positive``.

    Raises:
        MSTError: of the class ``error``, if it is none.
    """
    found = as_number(value)
    # An int may be too large for a float: compared, not converted.
    if found is None or not -_FLOAT_MAX <= found <= _FLOAT_MAX or not found >= least or (positive and found <= 0):
        kind = "positive number" if positive else "finite number"
        limits = "" if least == -math.inf else f", at least {least:g}"
        raise error(f"{name} must be a {kind}{limits}, got {shown(value)}")
    return float(found)


_FLOAT_MAX = torch.finfo(torch.float64).max


def check_flag(name: str, value: object, error: type[MSTError] = ArgumentError) -> bool:
    """``value`` if it is True or False.

    Raises:
        MSTError: of the class ``error``, if it is something else, be it 0 or 1.
    """
    numpys = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")  # not imported here
    if not isinstance(value, bool) and not numpys:
        raise error(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_instance(name: str, value: object, kinds: Any, should: str, error: type[MSTError] = ArgumentError) -> None:
    """Raise ``error`` unless ``value`` is an instance of ``kinds``; ``should`` says in words what it must be."""
    if not isinstance(value, kinds):
        raise error(f"{name} must be {should}, got {shown(value)}")


def check_model(function: str, model: object) -> None:
    """Raise :class:`ModelError` unless the first argument of ``function`` is a module."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{function} takes an nn.Module, got {shown(model)} ({type(model).__name__}); pass the model itself"
        )


def check_choice(name: str, value: object, choices: Iterable[str], error: type[MSTError] = ScheduleError) -> str:
    """``value`` if it is one of ``choices``; else ``error`` is raised."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise error(f"{name} must be one of {', '.join(map(repr, known))}, got {shown(value)}")
    return value


def check_seed(name: str, value: object, error: type[MSTError]) -> int:
    """The seed ``value``, which must fit into 64 bits with its sign; else ``error`` is raised."""
    return check_whole(name, value, least=-(2**63), of="at most 64 bits", error=error)


# -- of schedules ------------------------------------------------------------------------------------------------------


def check_sparsity(name: str, value: object) -> float:
    """``value`` if it is a share of zeros, below 1; else :class:`ScheduleError` is raised."""
    found = as_number(value)
    if found is None or not 0.0 <= found < 1.0:
        raise ScheduleError(
            f"{name} must lie in [0, 1), got {shown(value)}: it is the share of zeros, 0.9 keeps one in ten"
        )
    return found


def check_share(name: str, value: object) -> float:
    """``value`` if it lies in [0, 1]; else :class:`ScheduleError` is raised."""
    found = as_number(value)
    if found is None or not 0.0 <= found <= 1.0:
        raise ScheduleError(f"{name} must be a number in [0, 1], got {shown(value)}")
    return found


def check_steps(name: str, value: object) -> int:
    """``value`` if it is a positive whole number; else :class:`ScheduleError` is raised."""
    return check_whole(name, value, of="optimizer steps")


def check_step(value: object) -> int:
    """The step that a schedule is asked about. Before step 0 all is as at step 0, and nothing happens.

    Raises:
        ScheduleError: it is no whole number.
    """
    if type(value) is int:  # asked of every step of a run
        return value
    return check_whole("step", value, least=-LARGEST, of="optimizer steps")


def check_positions(name: str, value: object) -> int:
    """``value`` if it is a positive whole number; else :class:`ScheduleError` is raised."""
    return check_whole(name, value, of="positions")


def check_length(name: str, value: object) -> float | int:
    """``value`` if it is a share of the run (float) or a number of steps (int); else :class:`ScheduleError` is
    raised."""
    found = as_number(value)
    if found is None or not 0 <= found <= LARGEST:
        raise ScheduleError(
            f"{name} must be a share of total_steps (float) or a number of steps (int), got {shown(value)}"
        )
    if isinstance(found, float) and found > 1:
        raise ScheduleError(f"{name}={shown(value)} is a share above 1; pass an int for a number of steps")
    return found


def as_moment(value: object) -> float | int | None:
    """A share of the run (float in [0, 1]) or a number of steps (int); None of anything else."""
    found = as_number(value)
    return found if found is not None and 0 <= found <= (1 if isinstance(found, float) else LARGEST) else None
