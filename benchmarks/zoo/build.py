"""A small random model of a type, with inputs that it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.zoo import inputs, shrink, types

MOST_ELEMENTS = 30_000_000
# What is tried in turn: how much shrinks, and how rotary embeddings of images share a head out.
_WAYS: tuple[tuple[int, tuple[int, ...]], ...] = ((0, ()), (0, (4, 6, 6)), (0, (2, 3, 3)), (1, ()))


class Built(NamedTuple):
    """A model in training mode without dropout, and keyword arguments that it has run with."""

    model: nn.Module
    inputs: dict[str, Any]


def build(name: str) -> Built | str:
    """The model of a type, or in words why there is none: what the first class said to the first way."""
    import transformers

    found = types.classes(name)
    if not found:
        return "has no model class of its own"
    reasons: list[str] = []
    for level, sections in _WAYS:
        for model_class in found:
            made = _try(transformers.CONFIG_MAPPING[name], model_class, level, sections)
            if isinstance(made, Built):
                return made
            reasons.append(made)
    return next((r for r in reasons if r.startswith(_NO_INPUTS)), reasons[0])


_TOO_LARGE, _NOT_MADE, _NO_INPUTS = "stays too large", "cannot be made small", "takes other inputs"
REASONS = (_TOO_LARGE, _NOT_MADE, _NO_INPUTS)


def _try(config_class: Any, model_class: Any, level: int, sections: tuple[int, ...]) -> Built | str:
    try:
        config = shrink.small(config_class(), level=level, sections=sections)
        with torch.device("meta"):
            size = _size(model_class, config)
        if size > MOST_ELEMENTS:
            return f"{_TOO_LARGE}: {size:,} elements"
        torch.manual_seed(0)
        model = model_class(config).train()
    except TimeoutError:
        raise
    except Exception as error:
        return f"{_NOT_MADE}: {type(error).__name__}: {error}"
    first = ""
    for given in inputs.Made(model).candidates():
        try:
            model(**given)
        except TimeoutError:
            raise
        except Exception as error:
            first = first or f"{type(error).__name__}: {error}"
        else:
            return Built(model, given)
    return f"{_NO_INPUTS}: {first}"


def _size(model_class: Any, config: Any) -> int:
    """How many elements a model would have; 0 if it cannot be made without values."""
    try:
        return sum(p.numel() for p in model_class(config).parameters())
    except TimeoutError:
        raise
    except Exception:
        return 0
