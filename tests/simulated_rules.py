"""What docs/guide.md says of schedules, densities over layers, events and laws of the rate, written down once more.

Nothing of the library is imported; :mod:`simulation` says what that is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from oracles import block_sums, of_sum
from torch import Tensor

Law = float | str | Callable[[float], float]


# -- schedules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """A schedule, by its numbers: ``"constant"``, ``"mixed"`` (warm-up, plateau, restoration) or ``"pruning"``.

    Attributes:
        total: steps of the run; of a constant one None, or three quarters of it have events.
        first, last: steps at which pruning begins and ends.
        pattern, stride, span, window: of causal attention: which keys it sees, and from which step to which.
    """

    kind: str = "constant"
    sparsity: float = 0.6
    interval: int = 3
    growth: str = "mixed"
    gradient_steps: int = 1
    drop: float = 0.3
    total: int | None = None
    warmup: int = 0
    restoration: int = 0
    settle: int = 0
    ramp: int = 1
    initial: float = 0.0
    first: int = 0
    last: int = 1
    distribution: str = "erdos-renyi"
    magnitude: str = "l2"
    regrown: str = "first estimate"
    regrown_warmup: int = 0
    pattern: str = "full"
    stride: int = 2
    span: int | None = None
    window: tuple[int, int] | None = None

    @property
    def moves(self) -> bool:
        return self.growth != "none"

    @property
    def share(self) -> float:
        """Of growth by gradient."""
        return {"mixed": 0.75, "gradient": 1.0}.get(self.growth, 0.0)

    def sparsity_at(self, step: int) -> float:
        if self.kind == "constant":
            return self.sparsity
        assert self.total is not None
        if self.kind == "pruning":
            left = min(1.0, max(0.0, 1 - (step - self.first) / (self.last - self.first)))
            return self.sparsity - (self.sparsity - self.initial) * left**3
        end = self.total - self.settle
        if step >= end:
            return 0.0
        if step > end - self.restoration:
            return self.sparsity * (1 - ((step - end + self.restoration) / self.restoration) ** 3)
        if step >= self.warmup:
            return self.sparsity
        return self.sparsity - (self.sparsity - self.initial) * (1 - step / self.warmup) ** 3

    def is_event(self, step: int) -> bool:
        if step < 1:
            return False
        if self.kind == "constant":
            until = math.inf if self.total is None else int(0.75 * self.total)
            return self.moves and step <= until and step % self.interval == 0
        assert self.total is not None
        if self.kind == "pruning":
            regular = step >= self.first and (step - self.first) % self.interval == 0
            if step > self.last:
                return self.moves and regular and step < self.total
            return step == self.last or regular
        end = self.total - self.settle
        if step > end or step in (self.warmup, end):
            return step <= end
        if step < self.warmup:
            return step % self.ramp == 0
        if step > end - self.restoration:
            return (end - step) % self.ramp == 0
        return self.moves and (step - self.warmup) % self.interval == 0

    def drop_at(self, step: int) -> float:
        if not self.moves:
            return 0.0
        if self.kind == "constant":
            end = None if self.total is None else int(0.75 * self.total)
        else:
            assert self.total is not None
            end = self.total if self.kind == "pruning" else self.total - self.settle - self.restoration
        if end is None:
            return self.drop
        return 0.0 if step >= end else self.drop * math.cos(math.pi * step / max(1, end) / 2) ** 2

    def dense_after(self, step: int) -> bool:
        """Whether the step that follows ``step`` others computes gradients that an event will grow by."""
        if self.share == 0.0:
            return False
        ahead = range(step + 1, step + 1 + self.gradient_steps)
        return any(self.is_event(s) and self.sparsity_at(s) > 0 for s in ahead)

    def seen_after(self, step: int) -> Callable[[int], Tensor] | None:
        """The keys that queries see in the step that follows ``step`` others, given the length; None for all."""
        start, end = self.window or (0, math.inf)
        if self.window is None and self.kind == "mixed":
            assert self.total is not None
            start, end = self.warmup, self.total - self.settle - self.restoration
        return self._seen if self.pattern != "full" and start <= step < end else None

    def _seen(self, length: int) -> Tensor:
        query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
        distance = query - key
        local, strided = distance < (self.span or self.stride), distance % self.stride == 0
        own, last = query // self.stride == key // self.stride, key % self.stride == self.stride - 1
        found = {"local": local, "strided": strided, "sparse": local | strided, "fixed": own | last}
        return found[self.pattern] & (distance >= 0)

    def densities(self, step: int, weights: Mapping[str, Fact]) -> dict[str, float]:
        """Of each weight: the schedule's over those without a sparsity of their own, by their elements."""
        sparsity = self.sparsity_at(step)
        highest = self.sparsity
        found = {
            n: 1 - w.sparsity * (sparsity / highest if highest else 0.0)
            for n, w in weights.items()
            if w.sparsity is not None
        }
        free = {n: w for n, w in weights.items() if n not in found}
        if self.distribution == "uniform":
            return found | dict.fromkeys(free, 1 - sparsity)
        raw = {n: (w.rows + w.cols) / (w.rows * w.cols) for n, w in free.items()}
        size = {n: w.count * w.rows * w.cols for n, w in free.items()}

        def spent(scale: float) -> float:
            return sum(min(1.0, scale * raw[n]) * size[n] for n in free)

        low, high, wanted = 0.0, 1 / min(raw.values(), default=1.0), (1 - sparsity) * sum(size.values())
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) < wanted else (low, middle)
        return found | {n: min(1.0, high * raw[n]) for n in free}


@dataclass(frozen=True)
class Fact:
    """One sparse weight, as the run has it: its shape, the edge of its blocks, its own sparsity, what guards it.

    A stack ``[matrices, rows, cols]`` is that many weights, each of ``rows`` and ``cols``, with the same number of
    active blocks each: what masks say of their blocks, ``[R, C]`` of each, stands one below the other.

    Attributes:
        matrices: in the stack; 0 of a weight that is none.
    """

    rows: int
    cols: int
    block: int
    sparsity: float | None = None
    guard: str = "coverage"
    matrices: int = 0

    @staticmethod
    def of(shape: Sequence[int], block: int, sparsity: float | None = None, guard: str = "coverage") -> Fact:
        *stack, rows, cols = shape
        assert not stack or rows % block == 0, f"{shape}: blocks of {block} lie in two matrices"
        return Fact(rows, cols, block, sparsity, guard, *stack)

    @property
    def count(self) -> int:
        """Of matrices: 1 where it is no stack."""
        return self.matrices or 1

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (self.matrices, self.rows, self.cols) if self.matrices else (self.rows, self.cols)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks of a matrix."""
        return -(-self.rows // self.block), -(-self.cols // self.block)

    def full(self) -> Tensor:
        """The mask of all blocks."""
        rows, cols = self.shape
        return torch.ones(self.count * rows, cols, dtype=torch.bool)

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """What is said of the blocks of each matrix."""
        return blocks.split(self.shape[0])

    def backbone(self) -> Tensor:
        """The wrapped diagonal of a matrix."""
        rows, cols = self.shape
        i = torch.arange(max(rows, cols))
        found = torch.zeros(self.shape, dtype=torch.bool)
        found[i % rows, i % cols] = True
        return found

    def counts(self, density: float) -> set[int]:
        """Numbers of active blocks of a matrix; each row and column must have one where they are guarded."""
        blocks = self.shape[0] * self.shape[1]
        least = max(self.shape) if self.guard != "none" else 1
        return {min(blocks, max(least, n)) for n in rounded(density * blocks)}

    def expand(self, blocks: Tensor) -> Tensor:
        """Of blocks to elements."""
        ones = np.ones((self.block, self.block), dtype=blocks.numpy().dtype)
        parts = [np.kron(part.numpy(), ones)[: self.rows, : self.cols] for part in self.split(blocks)]
        return torch.from_numpy(np.stack(parts)).view(self.dims)

    def means(self, elements: Tensor) -> Tensor:
        """Mean of the elements of each block, float64."""
        size = block_sums(torch.ones(self.rows, self.cols), self.block)
        matrices = elements if self.matrices else elements[None]
        return torch.cat([block_sums(matrix, self.block) / size for matrix in matrices])

    def at(self, elements: Tensor, place: tuple[int, int]) -> Tensor:
        """The elements of one block, a view."""
        matrix, row = divmod(place[0], self.shape[0])
        r, c = (slice(i * self.block, (i + 1) * self.block) for i in (row, place[1]))
        return (elements[matrix] if self.matrices else elements)[r, c]

    @property
    def error(self) -> float:
        """Relative, of the sum over a block in float32."""
        return of_sum(self.block**2, beside=8)


# -- what an event may do ----------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """Scores of blocks, and how far others' may be from them."""

    least: Tensor
    most: Tensor

    def split(self, fact: Fact) -> list[Interval]:
        """Of the blocks of each matrix."""
        return [Interval(*both) for both in zip(*map(fact.split, self), strict=True)]


def _count(a: Tensor, b: Tensor, among: Tensor, *, equal: bool = False) -> Tensor:
    """How many of ``b``'s blocks ``among`` are above each of ``a``'s, or ``equal`` to it."""
    compare = torch.ge if equal else torch.gt
    return compare(b[among][None, :], a.flatten()[:, None]).sum(1).view(a.shape)


def _largest_other(scores: Tensor, dim: int) -> Tensor:
    """For each block the largest of the others in its line."""
    top = scores.topk(min(2, scores.shape[dim]), dim).values
    first, second = top.select(dim, 0), top.select(dim, -1) if top.shape[dim] == 2 else top.select(dim, 0) - torch.inf
    is_first = torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, scores.argmax(dim, keepdim=True), True)
    return torch.where(is_first, second.unsqueeze(dim), first.unsqueeze(dim))


def _guarded(fact: Fact, mask: Tensor, scores: Interval) -> tuple[Tensor, Tensor]:
    """The blocks that may not be dropped, surely and possibly."""
    if fact.guard != "coverage":
        guarded = fact.backbone() & (fact.guard == "backbone")
        return guarded, guarded
    least, most = (score.masked_fill(~mask, -torch.inf) for score in scores)
    surely = (least > _largest_other(most, 0)) | (least > _largest_other(most, 1))
    possibly = (most >= _largest_other(least, 0)) | (most >= _largest_other(least, 1))
    return surely & mask, possibly & mask


def rounded(value: float) -> set[int]:
    """The nearest whole number; both, where they are equally near up to the roundings of how ``value`` was computed."""
    return {round(value * (1 - 1e-12)), round(value * (1 + 1e-12))}


@dataclass(frozen=True)
class Event:
    """What an event has to go by: the mask before it and after it, magnitudes, and growth scores if any were read; of
    one matrix."""

    step: int
    density: float
    old: Tensor
    new: Tensor
    weight: Interval
    gradient: Interval | None


def check_event(fact: Fact, course: Course, event: Event) -> None:
    """An event has turned one mask into another: by the numbers of the schedule, at the cost of the smallest blocks, in
    favour of those with the largest gradients. Matrices of a stack have events of their own."""
    scores = [None] * fact.count if event.gradient is None else event.gradient.split(fact)
    own = zip(fact.split(event.old), fact.split(event.new), event.weight.split(fact), scores, strict=True)
    for i, (old, new, weight, gradient) in enumerate(own):
        try:
            _check_matrix(fact, course, Event(event.step, event.density, old, new, weight, gradient))
        except AssertionError as error:
            raise AssertionError(f"matrix {i}: {error}" if fact.matrices else str(error)) from error


def _check_matrix(fact: Fact, course: Course, event: Event) -> None:
    active = int(event.old.sum())
    share = course.drop_at(event.step) if event.density < 1 else 0.0
    problems: list[AssertionError] = []
    for count in fact.counts(event.density):
        prunes = course.kind == "pruning" and count < active
        for leave in rounded(active - count + share * count if prunes else share * active):
            try:
                _check_numbers(fact, course, event, share, count, leave)
            except AssertionError as problem:
                problems.append(problem)
            else:
                return
    raise problems[0]


def _check_numbers(fact: Fact, course: Course, event: Event, share: float, count: int, leave: int) -> None:
    """As :func:`_check_matrix`, with ``count`` blocks after it, of which ``leave`` active ones make way at least."""
    old, new, weight, gradient = event.old, event.new, event.weight, event.gradient
    active = int(old.sum())
    if count == old.numel():
        assert new.all(), "everything grows"
        return
    lost = fact.backbone() & ~old if fact.guard == "backbone" else torch.zeros_like(old)
    if lost.any() and not torch.equal(old, new):  # to values that a mask has followed: it comes back beside all else
        assert not (lost & ~new).any(), "the backbone comes back"
        assert count <= int(new.sum()) <= max(count, active) + int(lost.sum())
        return
    if leave == 0 and count == active:
        assert torch.equal(old, new), "nothing moves"
        return
    surely, possibly = _guarded(fact, old, weight) if share > 0 or count < active else (old, old)
    if not torch.equal(surely, possibly):  # ties: which of two equal blocks stays is not said
        assert count <= int(new.sum()) <= max(count, active)
        return
    guarded = surely & old
    leave = min(max(leave, active - count), active - int(guarded.sum()))
    loose = old & ~guarded
    smaller = _count(-weight.least, -weight.most, loose)  # of loose blocks, surely smaller
    stays = guarded | (loose & (smaller >= leave))
    assert not (stays & ~new).any(), "a block was dropped of which others are smaller, or that is guarded"
    rivals = _count(-weight.most, -weight.least, loose, equal=True) - 1  # possibly as small, itself left out
    leaves = loose & (rivals < leave)
    wanted = max(0, count - (active - leave))
    assert int(new.sum()) == active - leave + wanted, f"{int(new.sum())} blocks, wanted {active - leave + wanted}"
    if int(leaves.sum()) != leave or gradient is None:
        return
    inactive = ~(old & ~leaves)
    by_gradient, grown = round(wanted * course.share), new & inactive
    rivals = _count(gradient.least, gradient.most, inactive, equal=True) - 1
    assert not (inactive & (rivals < by_gradient) & ~grown).any(), "growth has passed over a large gradient"
    if by_gradient == wanted:
        larger = _count(gradient.most, gradient.least, inactive)
        assert not (grown & (larger >= by_gradient)).any(), "growth has taken a small gradient"


def check_following(fact: Fact, old: Tensor, new: Tensor, values: Tensor) -> None:
    """A mask has followed values that came without theirs: as many blocks of each matrix are active as before, those
    that the guard would keep if all were, and the largest; or all that are not 0, and beside them some that were."""
    size = fact.means(values.double().square())
    for before, after, mean in zip(*map(fact.split, (old, new, size)), strict=True):
        count = int(before.sum())
        assert int(after.sum()) == count, f"{int(after.sum())} blocks follow, {count} were active"
        filled = mean > 0
        if int(filled.sum()) <= count:
            assert not (filled & ~after).any(), "a block that holds values is not active, though there is room for it"
            assert not (after & ~filled & ~before).any(), "an empty block is active that was not"
            continue
        least, most = mean * (1 - fact.error), mean * (1 + fact.error)
        safe = fact.backbone() & (fact.guard != "none")
        if fact.guard == "coverage":
            ones = torch.ones_like(before)
            surely, possibly = _guarded(fact, ones, Interval(least, most))
            if int(possibly.sum()) <= count:
                safe = possibly
                for dim in (0, 1):
                    assert (after & possibly).any(dim).all(), "a row or column of blocks has lost its largest"
            elif int(surely.sum()) <= count:
                continue  # whether the guard asks for more than there is room for is a matter of ties
        assert fact.guard == "coverage" or not (safe & ~after).any(), "a block of the backbone does not follow"
        left = ~safe & ~after
        kept = ~safe & after
        if left.any() and kept.any():
            assert most[kept].min() >= least[left].max(), "a block follows that is smaller than one that does not"


# -- laws --------------------------------------------------------------------------------------------------------------


def factor(law: Law, density: float) -> float:
    if callable(law):
        return law(density)
    if law == "graphcore":
        return math.exp(1.969 * (1 - density) ** 2 + 0.2905 * (1 - density))
    return 1.0 if law == "none" else density ** -float(law)
