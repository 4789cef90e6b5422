"""Find out what an attention's mask does by executing it.

The mask's own slice of the graph is run, see :mod:`.evaluate`, at several paddings and sizes. Scores of an attention
that is written out are replaced by a probe: what comes out of it must be the probe, scaled, on the keys up to the
query, and nothing elsewhere.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mst_compile.graph.attention.evaluate import MAX_ELEMENTS, Evaluator, UnknownError
from mst_compile.graph.attention.found import Product
from mst_compile.graph.fx import value

# Scores of either sign are taken to be smaller: float16 holds none that are larger, and the scores of runs that are
# about to diverge have been seen to come near it.
_LARGEST_SCORE = 2.0**16
_EXP_IS_ZERO = -746.0  # exp() of this is exactly 0, in float64 too


def hides_below(dtype: torch.dtype) -> float:
    """The number up to which a mask's entries hide their keys, in scores of ``dtype``.

    A hidden key's weight has to be exactly 0 beside the diagonal's, which is finite, whether the entry is added to the
    score or takes its place. That is what -inf, the dtype's lowest number and -1e9 do. A -1e4, which models of the days
    of float16 use, does it only as long as scores stay below 5e3; such masks count as biases, and are left alone. In
    float16, where the lowest number is -65504, scores are taken to be below a quarter of that.
    """
    return _EXP_IS_ZERO - 2 * _largest_score(dtype)


def _largest_score(dtype: torch.dtype) -> float:
    """What scores are taken to be smaller than, of either sign."""
    return min(_LARGEST_SCORE, -torch.finfo(dtype).min / 4)


def is_causal(mask: Tensor) -> bool:
    """Whether ``mask`` (bool "keep", or added to the scores) keeps exactly the keys up to the query, in every batch and
    head."""
    try:
        _check_causal(_read(mask, None, mask.dtype)[0], None)
    except UnknownError:
        return False
    return True


@dataclass(frozen=True)
class Finding:
    """What a mask does. ``reason`` is None if it is causal, on keys for which the input ``padding`` is
    not 0, or is 0 if it ``hides``."""

    reason: str | None
    padding: fx.Node | None = None
    scale: float = 1.0
    hides: bool = False


def find(evaluator: Evaluator, node: fx.Node, at: fx.Node, product: Product | None = None) -> Finding:
    """Whether ``node``, as ``at`` reads it, is causal.

    Args:
        node: an attention's mask, or the input of a softmax that ``product`` enters.
    """
    relied = dict(evaluator.relied)
    try:
        padding = evaluator.padding(node, product, at)
        if len(padding) > 1:
            return Finding("its mask depends on several inputs")
        pad = next(iter(padding), None)
        try:
            return Finding(None, pad, _scale(evaluator, node, at, product, pad, False))
        except UnknownError:
            if pad is None:
                raise
            first = sys.exception()
        try:  # some say what to hide, others what to keep
            return Finding(None, pad, _scale(evaluator, node, at, product, pad, True), True)
        except UnknownError:
            raise first from None  # type: ignore[misc]
    except UnknownError as unknown:
        evaluator.relied = relied
        return Finding(str(unknown))
    finally:
        evaluator.use(evaluator.hints)


def _scale(
    evaluator: Evaluator, node: fx.Node, at: fx.Node, product: Product | None, pad: fx.Node | None, hides: bool
) -> float:
    """Try a mask out at all sizes and paddings; returns the scale of the scores or raises UnknownError."""
    scales: list[float] = []
    for sizes in evaluator.assignments(node, {} if product is None else {product.node: None}, at):
        evaluator.use(sizes)
        tries = ["all"] if product is None else ["all", "large scores"]
        for kind in tries if pad is None else (*tries, "zero or one", "zero or one", "any"):
            generator = torch.Generator("cpu").manual_seed(len(scales))
            given, keys = _draw(evaluator, pad, hides, kind, generator)
            scores = None
            if product is not None:
                assert product.alpha is not None
                large = max(1.0, abs(scales[0])) if kind == "large scores" else None
                scores = _probe(evaluator, product, generator, large)
                given[product.node] = product.alpha * scores
                if product.extra is not None and product.beta:
                    extra = evaluator.evaluate(product.extra, given, product.node)
                    given[product.node] = given[product.node] + product.beta * extra
            mask = evaluator.evaluate(node, given, at)
            try:
                keep, scale = _read(mask, scores, value(node).dtype)
            except UnknownError:
                if kind == "any":
                    continue  # arithmetic that takes its input for 0 or 1, and so it is
                raise
            if keys is not None and keep.dim() != value(at).dim():
                raise UnknownError("its mask and its padding differ in shape")  # its first dimension is no batch
            _check_causal(keep, keys)
            scales.append(scale)
    if max(scales) - min(scales) > 1e-6 * abs(scales[0]):
        raise UnknownError("the scale of its scores is no constant")
    return scales[0]


def _draw(
    evaluator: Evaluator, pad: fx.Node | None, hides: bool, kind: str, generator: torch.Generator
) -> tuple[dict[fx.Node, Any], Tensor | None]:
    """A value of the padding, and the keys that it lets be seen."""
    if pad is None:
        return {}, None
    example = value(pad)
    shape = evaluator.concrete(tuple(example.shape))
    seen = kind in ("all", "large scores")
    drawn = torch.full(shape, int(not hides), device="cpu") if seen else _whole(0, 2, shape, generator)
    if kind == "any":
        drawn = _whole(1, 1000, shape, generator) * drawn
    drawn = drawn.to(example.dtype)
    return {pad: drawn}, drawn.bool() != hides


def _whole(least: int, end: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Whole numbers below ``end``, on the CPU."""
    return torch.randint(least, end, shape, generator=generator, device="cpu")


def _probe(evaluator: Evaluator, product: Product, generator: torch.Generator, scale: float | None = None) -> Tensor:
    """Scores of both signs and many sizes; powers of two, so that their quotients are exact.

    Given the scale that they enter the softmax with, or 1 if it is less, they go as far as scores are taken to: what is
    capped somewhere shows there alone.
    """
    shape = evaluator.concrete(tuple(value(product.node).shape))
    if product.pointwise:  # every batch and head is treated alike
        shape = torch.Size([1] * (len(shape) - 2) + list(shape[-2:]))
    if shape.numel() > MAX_ELEMENTS:
        raise UnknownError("its scores are too large to try out")
    sign = _whole(0, 2, shape, generator) * 2 - 1
    most = 3 if scale is None else max(3, int(math.log2(_largest_score(value(product.node).dtype) / scale)))
    probe = sign * torch.exp2(_whole(-2, most + 1, shape, generator).double())
    if scale is not None:  # of the shortest sequence too there is one of either sign, where every mask keeps it
        own = probe.diagonal(dim1=-2, dim2=-1)
        own.fill_(2.0**most)
        own[..., 1::2].neg_()
    return probe


def _read(mask: Tensor, scores: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Which entries a mask keeps and, where scores went into it, what it scales them by."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        raise UnknownError("its mask is not square")
    if mask.dtype == torch.bool and scores is None:
        return mask, 1.0
    if not mask.is_floating_point():
        raise UnknownError("its mask is neither bool nor floating point")
    if bool(mask.isnan().any()):
        raise UnknownError("its mask holds NaN")
    keep = mask > hides_below(dtype)
    if scores is None:
        if not bool((mask[keep] == 0).all()):
            raise UnknownError("its mask adds a bias to the scores")
        return keep, 1.0
    if scores.numel() == mask.numel():
        scores = scores.reshape(mask.shape)  # batch and heads side by side, then apart
    elif mask.dim() != scores.dim():
        raise UnknownError("its scores change their shape")
    quotients = (mask / scores)[keep]
    scale = float(quotients.median()) if quotients.numel() else 0.0
    if not scale or not bool((quotients - scale).abs().max() <= 1e-5 * abs(scale)):
        raise UnknownError("its scores are not just scaled and masked")
    return keep, scale


def _check_causal(keep: Tensor, keys: Tensor | None) -> None:
    """Raise unless ``keep`` is the causal mask on ``keys``; queries that see no key at all may see anything."""
    size = keep.shape[-1]
    want = torch.ones(size, size, dtype=torch.bool, device="cpu").tril()
    if keys is not None:
        if keys.shape[-1] != size or keep.shape[0] not in (1, keys.shape[0]):
            raise UnknownError("its mask and its padding differ in shape")
        want = want & keys.view(keys.shape[0], *[1] * (keep.dim() - 2), size)
    same = keep == want
    if not bool(same.all(-1)[want.any(-1).expand(same.shape[:-1])].all()):
        raise UnknownError(_describe(keep, keys))


def _describe(keep: Tensor, keys: Tensor | None) -> str:
    size = keep.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device="cpu").tril()
    if keys is not None and not bool(keys.all()):
        return "its mask is not a causal one and a padding"
    if bool((keep & ~causal).any()):
        return "it is not causal"
    return "it sees fewer keys than a causal one"
