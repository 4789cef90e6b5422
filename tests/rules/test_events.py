"""When topology events happen, said at once: the same steps as those that are asked for one by one."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mst_compile import Constant, MixedSparsity
from mst_compile.errors import ScheduleError
from mst_compile.rules.events import Events
from mst_compile.rules.schedule import Schedule, as_schedule, events_of
from mst_compile.schedule import GradualPruning

GROWTHS = st.sampled_from(["none", "random", "mixed"])
SHARES = st.one_of(st.integers(0, 40), st.floats(0, 0.6))
INTERVALS = st.one_of(st.none(), st.integers(1, 9))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total, growth = draw(st.integers(1, 130)), draw(GROWTHS)
    kind = draw(st.sampled_from(["mixed", "constant", "events", "gradual"]))
    if kind == "mixed":
        lengths = {name: draw(SHARES) for name in ("warmup", "restoration", "settle")}
        intervals = {name: draw(INTERVALS) for name in ("interval", "ramp_interval")}
        return MixedSparsity(total, 0.8, growth=growth, **lengths, **intervals)  # type: ignore[arg-type]
    if kind == "gradual":
        ends = {"start": draw(SHARES), "end": draw(SHARES)}
        return GradualPruning(total, 0.8, growth=growth, interval=draw(INTERVALS), **ends)  # type: ignore[arg-type]
    until = draw(st.floats(0.1, 1))
    if kind == "constant":
        known = draw(st.booleans())
        more = {"total_steps": total, "until": until} if known else {}
        return Constant(0.8, growth=growth, interval=draw(st.integers(1, 9)), **more)  # type: ignore[arg-type]
    return Constant(0.8, growth=growth, total_steps=total, until=until, events=draw(st.integers(1, 30)))


@given(st.data(), st.integers(0, 150))
def test_events_said_at_once_are_those_asked_for(data: st.DataObject, end: int) -> None:
    try:
        schedule = data.draw(schedules())
    except ScheduleError:
        return  # phases that do not fit
    expected = [t for t in range(1, end + 1) if schedule.is_topology_event(t)]
    found = events_of(schedule, end)
    assert list(found) == expected
    assert len(found) == len(expected)
    assert [found.until(t) for t in range(end + 2)] == [sum(e <= t for e in expected) for t in range(end + 2)]


class Own(MixedSparsity):
    """Events of its own, and nothing said of them at once."""

    def is_topology_event(self, step: int) -> bool:
        return step in (3, 5)


class Foreign:
    max_sparsity = 0.5

    def sparsity_at(self, step: int) -> float:
        return 0.5

    def is_topology_event(self, step: int) -> bool:
        return step in (2, 7)


def test_what_a_class_inherits_is_not_of_events_of_its_own() -> None:
    assert list(events_of(Own(100), 100)) == [3, 5]
    assert list(events_of(as_schedule(Foreign()), 9)) == [2, 7]


@pytest.mark.parametrize("schedule", [MixedSparsity.published(10**9), Constant(0.8), GradualPruning(10**9, 0.8)])
def test_a_billion_steps_are_no_more_work(schedule: Schedule) -> None:
    found = events_of(schedule, 10**9)
    assert len(found) > 10**6
    assert found.until(found[12345]) == 12346
    assert schedule.is_topology_event(found[len(found) // 2])


def test_steps_in_ranges() -> None:
    found = Events([range(3, 3), range(2, 9, 3), range(10, 11)])
    assert list(found) == [2, 5, 8, 10]
    assert found[-1] == 10
    assert found[1:3] == [5, 8]
    with pytest.raises(IndexError):
        found[4]
