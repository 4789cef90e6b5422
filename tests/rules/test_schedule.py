"""Schedules are pure functions of the step: their shape, their events, and every way to get them wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst_compile import Constant, MixedSparsity
from mst_compile.errors import MSTError, ScheduleError
from mst_compile.rules.attention import Attention
from mst_compile.rules.density import DISTRIBUTIONS
from mst_compile.rules.growth import RULES
from mst_compile.rules.mixed_sparsity import RAMPS
from mst_compile.rules.schedule import Schedule, as_schedule

GROWTHS = tuple(RULES)
TINY = 1e-12  # a few roundings of float64 on values up to 1


@st.composite
def mixed(draw: st.DrawFn) -> MixedSparsity:
    total = draw(st.integers(1, 300))
    settle = draw(st.integers(0, total - 1))
    restoration = draw(st.integers(0, total - settle))
    warmup = draw(st.integers(0, total - settle - restoration))
    sparsity = draw(st.floats(0, 0.999))
    return MixedSparsity.published(
        total,
        sparsity=sparsity,
        warmup=warmup,
        restoration=restoration,
        settle=settle,
        interval=draw(st.none() | st.integers(1, 50)),
        ramp_interval=draw(st.none() | st.integers(1, 20)),
        drop_fraction=draw(st.floats(0, 1, allow_subnormal=False)),
        growth=draw(st.sampled_from(GROWTHS)),
        initial_sparsity=draw(st.just(0.0) | st.floats(0, sparsity)) if warmup else None,
        restoration_ramp=draw(st.sampled_from(RAMPS)),
    )


@given(mixed())
def test_mixed_sparsity_rises_stays_and_falls(s: MixedSparsity) -> None:
    curve = [s.sparsity_at(t) for t in range(s.total_steps + 3)]
    start, end = s.restoration_start, s.restoration_end
    assert 0 <= s.warmup_steps <= start <= end <= s.total_steps
    assert all(-TINY <= v <= s.max_sparsity + TINY for v in curve)
    for t in range(s.warmup_steps):
        assert curve[t] <= curve[t + 1] + TINY or t + 1 >= end
    assert all(curve[t] == s.sparsity for t in range(s.warmup_steps, min(start + 1, end)))
    for t in range(start, s.total_steps):
        assert curve[t + 1] <= curve[t] + TINY
    assert all(v == 0.0 for v in curve[end:])
    assert s.min_sparsity == 0.0
    if s.warmup_steps and end > 0:
        assert curve[0] == pytest.approx(s.initial_sparsity, abs=TINY)


@given(mixed())
def test_mixed_sparsity_is_continuous(s: MixedSparsity) -> None:
    """A cubic over n steps moves by at most 3 / n of its height a step."""
    for t in range(s.restoration_end):
        length = s.warmup_steps if t < s.warmup_steps else s.restoration_steps
        last_of_none = (t + 1 == s.restoration_end and not s.restoration_steps) or not length
        if not last_of_none:
            assert abs(s.sparsity_at(t + 1) - s.sparsity_at(t)) <= 3 * s.sparsity / length + TINY


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_restoration_mirrors_the_warmup(length: int, sparsity: float) -> None:
    s = MixedSparsity.published(4 * length, sparsity=sparsity, warmup=length, restoration=length, settle=length)
    for k in range(length + 1):
        assert s.sparsity_at(s.restoration_end - k) == pytest.approx(s.sparsity_at(k), abs=1e-9)
    early = dataclasses.replace(s, restoration_ramp="early")
    inside = range(s.restoration_start + 1, s.restoration_end)
    assert all(early.sparsity_at(t) <= s.sparsity_at(t) + TINY for t in inside)


def test_the_papers_cubic_by_hand() -> None:
    s = MixedSparsity.published(100, 0.8, warmup=10, restoration=20, settle=10, initial_sparsity=0.4)
    assert s.sparsity_at(0) == pytest.approx(0.4)
    assert s.sparsity_at(5) == pytest.approx(0.8 - 0.4 * 0.5**3)
    assert s.sparsity_at(10) == s.sparsity_at(70) == 0.8
    assert s.sparsity_at(80) == pytest.approx(0.8 * (1 - 0.5**3))
    assert s.sparsity_at(90) == s.sparsity_at(100) == s.sparsity_at(10**9) == 0.0


@given(mixed())
def test_the_last_event_lands_on_zero(s: MixedSparsity) -> None:
    events = [t for t in range(-2, s.total_steps + 200) if s.is_topology_event(t)]
    assert events, "restoration itself is an event"
    assert events[0] >= 1
    assert events[-1] == s.restoration_end
    assert s.sparsity_at(events[-1]) == 0.0


@given(mixed())
def test_staircases(s: MixedSparsity) -> None:
    """Sparsity moves in stairs at events: their spacing is bounded, and the warm-up's last one is on the plateau."""
    events = [t for t in range(1, s.total_steps + 1) if s.is_topology_event(t)]
    if 1 <= s.warmup_steps < s.restoration_end:
        assert s.warmup_steps in events
        assert s.sparsity_at(s.warmup_steps) == s.sparsity
    for low, high in zip([0, *events], events, strict=False):
        if high <= s.warmup_steps or low >= s.restoration_start:
            assert high - low <= s.ramp_interval_steps
        elif low >= s.warmup_steps and high <= s.restoration_start and high < s.restoration_end:
            assert high - low == s.plateau_interval
            assert s.growth != "none"


@given(mixed())
def test_drop_fraction_is_annealed(s: MixedSparsity) -> None:
    drops = [s.drop_fraction_at(t) for t in range(s.total_steps + 1)]
    assert all(0 <= d <= s.drop_fraction for d in drops)
    assert all(b <= a + TINY for a, b in itertools.pairwise(drops))
    assert all(d == 0 for d in drops[max(1, s.restoration_start) :])
    if s.growth == "none":
        assert not any(drops)
    elif s.restoration_start >= 1:
        assert drops[0] == pytest.approx(s.drop_fraction, abs=TINY)
        if s.restoration_start % 2 == 0:
            assert drops[s.restoration_start // 2] == pytest.approx(s.drop_fraction / 2, abs=TINY)


@given(st.integers(1, 10_000))
def test_default_intervals(total: int) -> None:
    s = MixedSparsity.published(total, settle=0.0)
    assert s.plateau_interval == min(100, max(1, total // 25))
    assert s.ramp_interval_steps == max(1, s.plateau_interval // 2)


def test_lengths_are_shares_or_steps() -> None:
    a = MixedSparsity.published(200, warmup=0.1, restoration=0.2, settle=0.05)
    b = MixedSparsity.published(200, warmup=20, restoration=40, settle=10)
    assert [a.sparsity_at(t) for t in range(201)] == [b.sparsity_at(t) for t in range(201)]
    assert MixedSparsity.published(200, warmup=1, restoration=0, settle=0).warmup_steps == 1
    assert MixedSparsity.published(200, warmup=1.0, restoration=0, settle=0).warmup_steps == 200


@given(st.floats(0, 0.99), st.integers(1, 20), st.none() | st.integers(1, 100), st.sampled_from(GROWTHS))
def test_constant(sparsity: float, interval: int, total: int | None, growth: Any) -> None:
    s = Constant(sparsity, growth=growth, interval=interval, total_steps=total)
    steps = range(-1, 130)
    assert {s.sparsity_at(t) for t in steps} == {sparsity} == {s.min_sparsity, s.max_sparsity}
    events = [t for t in steps if s.is_topology_event(t)]
    if growth == "none":
        assert not events
        assert not any(s.drop_fraction_at(t) for t in steps)
        return
    last = math.inf if total is None else total * 3 // 4
    assert events == [t for t in steps if t >= 1 and t % interval == 0 and t <= last]
    if total is None:
        assert {s.drop_fraction_at(t) for t in steps} == {s.drop_fraction}
    else:
        drops = [s.drop_fraction_at(t) for t in range(130)]
        assert drops == sorted(drops, reverse=True)
        assert all(d == 0 for d in drops[max(1, total * 3 // 4) :])


def test_schedules_are_values() -> None:
    for s in (MixedSparsity.published(50), Constant(0.5)):
        assert isinstance(s, Schedule)
        assert as_schedule(s) is s
        assert pickle.loads(pickle.dumps(s)) == s
        assert hash(s) == hash(dataclasses.replace(s))
        with pytest.raises(dataclasses.FrozenInstanceError):
            s.sparsity = 0.1  # type: ignore[misc]


MIXED_ERRORS = [
    *[({"total_steps": v}, repr(v)) for v in (0, -3, 2.5, True, "10", None)],
    *[({"sparsity": v}, repr(v)) for v in (1.0, -0.1, 90, "0.9", True, math.nan)],
    *[({"initial_sparsity": v}, repr(v)) for v in (1.0, -0.1)],
    ({"sparsity": 0.5, "initial_sparsity": 0.75}, "0.75"),
    *[({name: v}, repr(v)) for name in ("warmup", "restoration", "settle") for v in (-1, -0.1, 1.5, True, "x", None)],
    *[({name: v}, repr(v)) for name in ("interval", "ramp_interval") for v in (0, -1, 0.5, True)],
    *[({name: v}, repr(v)) for name in ("drop_fraction", "gradient_share") for v in (-0.1, 1.1, True, "x")],
    ({"growth": "fast"}, "'fast'"),
    ({"distribution": "even"}, "'even'"),
    ({"restoration_ramp": "late"}, "'late'"),
    ({"warmup": 0.5, "restoration": 0.4, "settle": 0.2}, "110"),
    ({"warmup": 101}, "101"),
    ({"warmup": 0, "restoration": 0, "settle": 100}, "100"),
]


@pytest.mark.parametrize(("arguments", "value"), MIXED_ERRORS)
def test_mixed_sparsity_errors(arguments: dict[str, Any], value: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        MixedSparsity.published(**{"total_steps": 100, **arguments})
    assert value in str(caught.value)
    assert list(arguments)[-1] in str(caught.value)
    assert isinstance(caught.value, MSTError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"sparsity": 1.0}, "1.0"),
        ({"sparsity": -0.5}, "-0.5"),
        ({"interval": 0}, "0"),
        ({"total_steps": 0}, "0"),
        ({"drop_fraction": 2}, "2"),
        ({"gradient_share": -1}, "-1"),
        ({"growth": "all"}, "'all'"),
        ({"distribution": "flat"}, "'flat'"),
    ],
)
def test_constant_errors(arguments: dict[str, Any], value: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Constant(**{"sparsity": 0.5, **arguments})
    assert value in str(caught.value)
    assert next(iter(arguments)) in str(caught.value)


@pytest.mark.parametrize("value", [0.9, None, "MixedSparsity", MixedSparsity, object()])
def test_not_a_schedule(value: object) -> None:
    with pytest.raises(ScheduleError, match="is not a schedule"):
        as_schedule(value)


def test_choices_are_complete() -> None:
    for growth in GROWTHS:
        for distribution in DISTRIBUTIONS:
            Constant(0.5, growth=growth, distribution=distribution)  # type: ignore[arg-type]


def test_defaults_start_sparse_and_keep_their_masks() -> None:
    s = MixedSparsity(1000)
    assert s.sparsity_at(0) == s.sparsity_at(s.restoration_start) == 0.8
    assert s.growth == "none"
    assert next(t for t in range(1, 1001) if s.is_topology_event(t)) > s.restoration_start
    assert s.sparsity_at(s.restoration_end) == 0.0


def test_a_warm_up_starts_dense_unless_told() -> None:
    assert MixedSparsity(100, warmup=10).sparsity_at(0) == 0.0
    assert MixedSparsity(100, warmup=10, initial_sparsity=0.3).sparsity_at(0) == pytest.approx(0.3)


def test_the_published_choices() -> None:
    s = MixedSparsity.published(1000)
    assert (s.sparsity, s.warmup_steps, s.growth, s.gradient_share) == (0.9, 100, "mixed", 0.75)
    assert MixedSparsity.published(1000, 0.7, growth="random", settle=5) == MixedSparsity(
        1000, sparsity=0.7, warmup=0.1, growth="random", settle=5
    )


# -- what is said is never ignored -------------------------------------------------------------------------------------


def test_a_start_without_a_warm_up_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"initial_sparsity=0\.2 .* warmup=0\.0"):
        MixedSparsity(100, initial_sparsity=0.2)
    with pytest.raises(ScheduleError, match="initial_sparsity"):
        MixedSparsity(100, warmup=0.001, initial_sparsity=0.2)  # rounds to no step
    assert MixedSparsity(100, initial_sparsity=0.8).sparsity_at(0) == 0.8


@pytest.mark.parametrize(
    ("make", "window"),
    [
        (lambda w: MixedSparsity(1000, attention="local", attention_window=w), (0.9, 100)),
        (lambda w: MixedSparsity(1000, attention="local", attention_window=w), (900, 0.1)),
        (lambda w: MixedSparsity(1000, attention="local", attention_window=w), (0.5001, 0.5004)),
        (lambda w: MixedSparsity(1000, attention="local", attention_window=w), (7, 7)),
        (lambda w: Constant(0.5, attention="local", attention_window=w), (9, 3)),
        (lambda w: MixedSparsity(1000, attention=Attention("local", start=w[0], end=w[1])), (0.9, 100)),
    ],
)
def test_an_attention_window_that_is_never_on_is_refused(make: Any, window: tuple[float, float]) -> None:
    with pytest.raises(ScheduleError, match=r"would never be on"):
        make(window)


@given(st.integers(2, 400), st.floats(0, 1) | st.integers(0, 500), st.floats(0, 1) | st.integers(0, 500))
def test_every_window_is_on_or_refused(total: int, start: float, end: float) -> None:
    try:
        s = MixedSparsity(total, attention="strided", attention_window=(start, end), settle=0)
    except ScheduleError:
        return
    assert any(s.attention_at(t) == "strided" for t in range(501))


def test_attention_is_a_value_too() -> None:
    flat = MixedSparsity(100, attention="sparse", attention_window=(0.2, 70), stride=16, span=8)
    nested = MixedSparsity(100, attention=Attention("sparse", window=8, stride=16, start=0.2, end=70))
    assert flat.attention_value == nested.attention_value
    assert [flat.attention_at(t) for t in range(101)] == [nested.attention_at(t) for t in range(101)]
    assert {nested.attention_at(t) for t in range(20, 70)} == {"sparse"}
    assert {nested.attention_at(t) for t in (0, 19, 70, 100)} == {"full"}


@pytest.mark.parametrize("more", [{"stride": 64}, {"span": 4}, {"attention_window": (0, 5)}])
def test_attention_is_said_once(more: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match=next(iter(more))):
        MixedSparsity(100, attention=Attention("local"), **more)


def test_gradient_steps_of_a_growth_that_reads_none() -> None:
    """It was refused as more than the one step between events, whatever the interval."""
    schedule = Constant(0.5, growth="random", gradient_steps=2, interval=2)
    assert as_schedule(schedule) is schedule
