"""Attention patterns: names against formulas written out, parts against sets of keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_parts import COMBINATIONS, combine
from hypothesis import assume, given
from hypothesis import strategies as st

from mst_compile.errors import ScheduleError
from mst_compile.rules.patterns import FULL, PATTERNS, UNBOUNDED, Parts, Pattern, allowed, as_pattern, pairs

Keys = Callable[[int, int, int], set[int]]

# The keys that query i sees under window w and stride s.
WRITTEN_OUT: dict[str, Keys] = {
    "full": lambda i, w, s: {*range(i + 1)},
    "local": lambda i, w, s: {j for j in range(i + 1) if i - j < w},
    "strided": lambda i, w, s: {j for j in range(i + 1) if (i - j) % s == 0},
    "sparse": lambda i, w, s: {j for j in range(i + 1) if i - j < w or (i - j) % s == 0},
    "fixed": lambda i, w, s: {j for j in range(i + 1) if i // s == j // s or j % s == s - 1},
}


def keys(parts: Parts, length: int) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in allowed(parts, length)]


@given(st.sampled_from(sorted(WRITTEN_OUT)), *[st.integers(1, 40)] * 3)
def test_names_mean_what_they_meant(name: str, length: int, window: int, stride: int) -> None:
    got = keys(PATTERNS[name].parts(window, stride), length)
    assert got == [WRITTEN_OUT[name](i, window, stride) for i in range(length)]
    assert set(WRITTEN_OUT) == set(PATTERNS)


SOME = st.one_of(st.integers(1, 50), st.sampled_from([2**31, 2**40, UNBOUNDED]))


@given(st.sampled_from(COMBINATIONS), st.integers(1, 40), SOME, SOME, st.integers(0, 9), st.integers(1, 3))
def test_pairs_are_counted_without_the_mask(
    what: str, length: int, window: int, stride: int, gap: int, times: int
) -> None:
    assume(max(window + gap, stride * times) <= UNBOUNDED)
    parts = combine(what, window, stride, gap, times)
    assert pairs(parts, length) == int(allowed(parts, length).sum())
    assert [sum(column) for column in zip(*(p.numbers for p in parts.alone()), strict=True)] == parts.numbers


def few(*more: int) -> st.SearchStrategy[int]:
    return st.sampled_from([0, 0, 1, 2, 3, 4, 6, 8, *more])


@given(few(UNBOUNDED), few(), few(), few(), few())
def test_parts_are_what_no_key_is_in_twice(window: int, chunk: int, first: int, step: int, summary: int) -> None:
    """They are refused exactly if some query would meet a key twice, there is none, or a number means nothing."""
    assume(step or not first)
    numbers = (window, chunk, first, step, summary)
    each = ({"window": window}, {"chunk": chunk}, {"first": first, "step": step}, {"summary": summary})
    single = [Parts(**part) for part in each if any(part.values())]
    seen = [keys(part, 40) for part in single]
    twice = any(len(set.union(*query)) < sum(map(len, query)) for query in zip(*seen, strict=True))
    if twice or not single:
        with pytest.raises(ScheduleError, match=r"attention: Parts\("):
            Parts(*numbers)
    else:
        assert keys(Parts(*numbers), 40) == [set.union(*query) for query in zip(*seen, strict=True)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "sees no key"),
        ({"window": -1}, "window must be a whole number.*-1"),
        ({"window": 1.5}, "1.5"),
        ({"chunk": True}, "chunk.*True"),
        ({"window": UNBOUNDED + 1}, "window"),
        ({"window": 4, "chunk": 4}, "two runs"),
        ({"window": 4, "first": 4}, "no step"),
        ({"window": 4, "first": 3, "step": 2}, "first be 4 or more"),
        ({"step": 4, "summary": 4}, "one of the two"),
        ({"window": 2, "summary": 4}, "within its window"),
        ({"chunk": 3, "summary": 4}, "divide"),
    ],
)
def test_parts_that_make_no_sense(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        Parts(**wrong)


class Diagonals(Pattern):
    name = "diagonals"

    def parts(self, window: int, stride: int) -> Parts:
        return Parts(step=stride)


def test_a_pattern_of_a_name_or_of_a_users_own() -> None:
    for name, pattern in PATTERNS.items():
        assert as_pattern(name) is pattern
        assert as_pattern(pattern) is pattern
        assert as_pattern(copy.deepcopy(pattern)).parts(3, 4) == pattern.parts(3, 4)
    assert as_pattern("full").parts(1, 1) == FULL
    own = Diagonals()
    assert as_pattern(own) is own

    class Taken(Diagonals):
        name = "full"

    with pytest.raises(ScheduleError, match="'full' is taken"):
        as_pattern(Taken())
    for wrong in ("diagonals", Diagonals, None, 3):
        with pytest.raises(ScheduleError, match=r"attention must be one of 'full', .* or a Pattern"):
            as_pattern(wrong)


def test_on_the_device_that_is_asked_for() -> None:
    assert allowed(FULL, 3, torch.device("meta")).device.type == "meta"
