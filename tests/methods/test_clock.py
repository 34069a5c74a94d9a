"""Epochs on the grid of optimizer steps."""

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.methods.clock import ExactClock, Phase, SparsemlClock, Timing


def events(clock, timing, steps):
    phase, found = Phase(), []
    for step in range(steps):
        event = clock.event(timing, phase, step)
        if event:
            found.append((step, event.starts, event.updates, event.ends))
            phase.started |= event.starts
            phase.last_update = step / clock.steps_per_epoch
            phase.ended = event.ends
    return found


def test_no_update_is_lost_to_rounding():
    timing = Timing(0.0, 2.0, 0.1)
    assert [step for step, *_ in events(ExactClock(10), timing, 30)] == list(range(21))
    assert [step for step, *_ in events(SparsemlClock(10), timing, 30)] != list(range(21))


def test_updates_between_steps_do_not_drift():
    steps = [step for step, *_ in events(ExactClock(10), Timing(0.0, 1.0, 0.25), 20)]
    assert steps == [0, 3, 5, 8, 10]


def test_an_end_right_after_the_last_step_comes_with_it():
    assert events(ExactClock(4, 8), Timing(0.0, 2.0, None, completes=True), 8)[-1] == (7, False, True, True)
    assert len(events(ExactClock(4, 8), Timing(0.0, 2.0, None), 8)) == 1
    assert len(events(ExactClock(4, 8), Timing(0.0, 3.0, None, completes=True), 8)) == 1


@pytest.mark.parametrize("clock", [ExactClock(7), SparsemlClock(7)])
def test_never_and_at_once(clock):
    assert events(clock, Timing(-1.0, -1.0, None), 20) == [(0, True, True, False)]


DECIMALS = st.integers(0, 400).map(lambda n: n / 40) | st.integers(0, 30).map(lambda n: n / 3)


@given(st.integers(1, 50), DECIMALS, DECIMALS, st.integers(1, 40).map(lambda n: n / 10))
def test_updates_are_the_first_steps_at_or_after_their_epochs(per_epoch, start, length, frequency):
    end = start + length
    clock = ExactClock(per_epoch)
    exact = Fraction(repr(start)), Fraction(repr(end)), Fraction(repr(frequency))
    due = {ceil(exact[0] * per_epoch), ceil(exact[1] * per_epoch)}
    epoch = exact[0]
    while epoch < exact[1]:
        due.add(ceil(epoch * per_epoch))
        epoch += exact[2]
    found = events(clock, Timing(start, end, frequency), max(due) + 3)
    assert {step for step, *_ in found} == due
    assert found[-1][3]
    progress = [clock.progress(Timing(start, end, frequency), step) for step in sorted(due)]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
