"""When a training step is complete: by hand, and against a model of it written the other way round."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mst_compile.state.clock import StepClock

A, B, ALL = {"a"}, {"b"}, {"a", "b"}


def test_one_optimizer_completes_every_step() -> None:
    clock = StepClock()
    for _ in range(3):
        assert clock.turn(ALL, ALL, nested=False) == set()
        assert not clock.missed
        assert clock.is_complete(ALL)
        assert clock.complete(ALL) == set()


def test_the_last_of_two_completes() -> None:
    clock = StepClock()
    clock.turn(A, ALL, nested=False)
    assert not clock.is_complete(ALL)
    assert clock.waiting(ALL) == B
    clock.turn(B, ALL, nested=False)
    assert clock.is_complete(ALL)


def test_one_without_gradients_is_not_waited_for() -> None:
    clock = StepClock()
    clock.turn(A, A, nested=False)
    assert clock.is_complete(A)


def test_one_that_never_steps_is_waited_for_once() -> None:
    clock = StepClock()
    clock.turn(A, ALL, nested=False)
    assert not clock.is_complete(ALL)
    clock.turn(A, ALL, nested=False)
    assert clock.missed, "the training step before is over, unnoticed"
    assert clock.is_complete(ALL)


def test_a_step_counted_early_leaves_the_other_late() -> None:
    clock = StepClock()
    clock.turn(A, ALL, nested=False)
    assert clock.complete(ALL) == B
    assert clock.turn(B, ALL, nested=False) == B, "of the training step before"
    assert not clock.is_complete(ALL), "it did not begin another one"


def test_optimizers_of_frozen_weights_complete_one_step_together() -> None:
    clock = StepClock()
    for _ in range(3):
        clock.turn(A, set(), nested=False)
        assert clock.is_complete(set())
        clock.complete(set())
        clock.turn(B, set(), nested=False)
        assert not clock.is_complete(set()), "counted with the other's"
    clock.turn(A, ALL, nested=False)
    assert not clock.is_complete(ALL), "they train again"
    clock.turn(B, ALL, nested=False)
    assert clock.is_complete(ALL)


def test_a_nested_step_is_no_second_turn() -> None:
    clock = StepClock()
    clock.turn(ALL, ALL, nested=False)
    clock.turn(ALL, ALL, nested=True)
    assert not clock.missed
    assert clock.is_complete(ALL)


def test_a_failed_step_was_none() -> None:
    clock = StepClock()
    late = clock.turn(A, A, nested=False)
    clock.failed(A, late)
    assert not clock.is_complete(A)
    clock.turn(A, A, nested=False)
    assert not clock.missed
    assert clock.is_complete(A)


@given(st.lists(st.permutations(["a", "b", "c"]), min_size=1, max_size=6), st.data())
def test_order_and_failures_do_not_matter(rounds: list[list[str]], data: st.DataObject) -> None:
    """Three optimizers in any order, some of whose steps raise and are tried again: one training step a round."""
    clock, everyone, count = StepClock(), {"a", "b", "c"}, 0
    for order in rounds:
        for name in order:
            for _ in range(data.draw(st.integers(0, 2))):
                clock.failed({name}, clock.turn({name}, everyone, nested=False))
                assert not clock.missed
            assert clock.turn({name}, everyone, nested=False) == set()
            assert not clock.missed
            assert clock.is_complete(everyone) == (name == order[-1])
        assert clock.complete(everyone) == set()
        count += 1
    assert count == len(rounds)
