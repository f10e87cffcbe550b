import weakref
from typing import ClassVar

import pytest
import torch

from grail.runtime.clock import MARKS, Clock, Stages


class Event:
    """A mark in the stream of a GPU that does everything at once.

    `waits`: how often one waited. `held`: those that are in use.
    """

    waits = 0
    held: ClassVar[weakref.WeakSet["Event"]] = weakref.WeakSet()

    def __init__(self, milliseconds: float):
        self.milliseconds = milliseconds
        Event.held.add(self)

    def record(self, stream: None) -> None:
        pass

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        return end.milliseconds - self.milliseconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Of a GPU where a second passes between two marks."""
    marks = iter(range(0, 10**7, 1000))
    monkeypatch.setattr(Event, "waits", 0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(next(marks)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return Clock(torch.device("cuda"))


def test_an_inner_phase_stops_the_one_around_it(clock):
    with clock("other"):
        with clock("forward"), clock("gram"):
            pass
        with clock("forward"):
            pass
    # Marks: other, forward, gram, its end, that of forward, forward, its end, that of other.
    assert clock.seconds == {"other": 3.0, "forward": 3.0, "gram": 1.0}


def test_nothing_waits_for_a_mark_until_seconds_are_asked_for(clock):
    for _ in range(MARKS):
        with clock("forward"):
            pass
    assert Event.waits == 0
    assert clock.seconds == {"forward": MARKS}
    assert Event.waits == MARKS


def test_only_so_many_marks_are_held(clock):
    most = 0
    for _ in range(10 * MARKS):
        with clock("forward"):
            pass
        most = max(most, len(Event.held))
    assert MARKS <= most <= 2 * MARKS + 1  # where an interval begins and ends, and the last one
    assert clock.seconds == {"forward": 10 * MARKS}


def test_seconds_that_an_earlier_run_took_are_added_to_those_of_this_one(clock):
    clock.add({"solve": 5.0})
    with clock("solve"):
        pass
    assert clock.seconds == {"solve": 6.0}


def test_a_stage_that_runs_again_or_fails_is_added_up(monkeypatch):
    times = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    stages = Stages()
    with stages("a"):
        pass
    with stages("b"):
        pass
    with pytest.raises(ZeroDivisionError), stages("a"):
        raise ZeroDivisionError
    assert stages.seconds == {"a": 6.0, "b": 3.0}
