"""Random models, schedules and training programs at once: a sparse run is its simulation, after every operation.

In eager mode every number of it is the simulation's bit for bit, but for blocks that have just regrown, which are known
by a bound. In compiled mode outputs and gradients, whose sums run in another order, are held against float64; from them
on, weights and optimizer state are again exact. ``HYPOTHESIS_PROFILE=explore`` draws ten times as many, and others each
time.
"""

from __future__ import annotations

from hypothesis import given, settings
from program_cases import Program, programs
from program_runs import check_program

_EXAMPLES = settings.default.max_examples if settings.default else 60


@settings(max_examples=2 * _EXAMPLES)
@given(programs(("plain",), least=10))
def test_programs_in_eager_mode(program: Program) -> None:
    check_program(program)


@settings(max_examples=_EXAMPLES // 15)
@given(programs(("eager",), most=10))
def test_programs_in_compiled_mode(program: Program) -> None:
    check_program(program)
