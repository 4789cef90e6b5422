"""What :func:`mst_compile.forecast` and :func:`mst_compile.recommend` are given, and what of it is refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable

from torch.optim import Optimizer

from mst_compile.api import sparsify
from mst_compile.errors import ForecastError
from mst_compile.rules.checks import check_instance, check_number, shown

MOST_STEPS = 10**7  # of a run: it is gone through step by step, a second for a million
_OPTIONS = tuple(inspect.signature(sparsify).parameters)[2:]  # behind model and schedule


def steps_of(tokens: float, tokens_per_step: int) -> int:
    """Optimizer steps of a run.

    Raises:
        ForecastError: they are none, or too many.
    """
    steps = math.ceil(check_number("tokens", tokens, positive=True, error=ForecastError) / tokens_per_step)
    if steps > MOST_STEPS:
        raise ForecastError(
            f"tokens={shown(tokens)} at tokens_per_step={tokens_per_step!r} are {float(steps):g} optimizer steps, more "
            f"than {MOST_STEPS}; are these the numbers of the whole run and of one step?"
        )
    return steps


def check_loss(loss: object) -> None:
    """Raise :class:`ForecastError` unless ``loss`` is a function that needs no arguments, or None."""
    if loss is None:
        return
    what = "a function without arguments that returns the loss"
    check_instance("loss", loss, Callable, what, ForecastError)
    if not _needs_nothing(loss):  # type: ignore[arg-type]
        raise ForecastError(f"loss must be {what}, and takes some: pass lambda: model(x, y)")


def check_options(caller: str, options: Iterable[str]) -> None:
    """Raise :class:`ForecastError` unless all are options of :func:`mst_compile.sparsify`."""
    wrong = next((name for name in options if name not in _OPTIONS), None)
    if wrong is not None:
        raise ForecastError(
            f"{caller} has no {wrong!r}: beside its own arguments it takes options of sparsify, {', '.join(_OPTIONS)}"
        )


def check_optimizer(optimizer: object) -> None:
    """Raise :class:`ForecastError` unless it is an optimizer whose step can be timed, or None."""
    if optimizer is None:
        return
    check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer", ForecastError)
    if not _needs_nothing(optimizer.step):  # type: ignore[attr-defined]
        raise ForecastError(
            f"a step of {type(optimizer).__name__} runs the model by itself, through the closure that it needs, and "
            "cannot be timed apart from that: leave optimizer out"
        )


def _needs_nothing(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # nobody knows its arguments
        return True
    return True
