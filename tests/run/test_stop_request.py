"""When a run stops before its end: by the clock, by the number of steps, by a request."""

import pytest

from nemotron.run.signals import StopRequest


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_minutes_count_from_the_start_and_are_due_from_their_end_on():
    clock = Clock()
    stop = StopRequest(after_minutes=1.5, clock=clock)
    assert not stop.begin(7)
    for seconds, due in ((0.0, False), (89.9, False), (90.0, True), (4000.0, True)):
        clock.now = 1000.0 + seconds
        assert stop.is_due(8) == due, seconds
    assert stop.reason(8) == "stop.after_minutes = 1.5"


def test_a_start_does_a_step_even_if_its_time_is_over_before():
    clock = Clock()
    stop = StopRequest(after_minutes=1, clock=clock)
    clock.now += 61
    assert not stop.begin(4)
    assert not stop.is_due(4)
    assert stop.is_due(5)


def test_every_so_many_steps_is_a_multiple_and_not_a_distance_from_the_start():
    stop = StopRequest(every_steps=5)
    assert not stop.begin(0)
    assert [step for step in range(1, 12) if stop.is_due(step)] == [5, 10]
    resumed = StopRequest(every_steps=5)
    assert not resumed.begin(5)  # else a resumed run would never go on
    assert [step for step in range(6, 12) if resumed.is_due(step)] == [10]
    late = StopRequest(every_steps=5)
    assert not late.begin(7)
    assert next(step for step in range(8, 20) if late.is_due(step)) == 10


@pytest.mark.parametrize(("start", "due"), [(2, False), (3, True), (9, True)])
def test_stop_at_is_due_even_before_the_first_step(start: int, due: bool):
    stop = StopRequest(3)
    assert stop.begin(start) == due
    assert stop.reason(start) == ("--stop-at 3" if due else None)


def test_a_signal_is_named_before_all_other_reasons():
    stop = StopRequest(3, every_steps=1)
    assert stop.reason(4) == "--stop-at 3"
    stop.signal = "SIGUSR1"
    assert stop.begin(0)
    assert stop.reason(4) == "SIGUSR1"


def test_without_a_request_nothing_is_due():
    stop = StopRequest()
    assert not stop.begin(0)
    assert not any(stop.is_due(step) for step in range(1, 100))
