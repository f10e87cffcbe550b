"""Clocks of a run, by phase, and of a command, by stage."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

# Of a CPU's clock in seconds, or in a GPU's stream.
Mark = float | torch.cuda.Event

# Intervals that wait to be added up: enough to keep a GPU busy, at some thirty launches each.
MARKS = 256


class Clock:
    """Wall seconds by phase: `with clock("gram")`. An inner phase interrupts the outer one.

    On a GPU they are measured between events in its stream, without waiting: a phase begins when
    the GPU starts its work, not when the host queues it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stack: list[str] = []
        self._since: Mark = 0.0
        self._passed: deque[tuple[str, Mark, Mark]] = deque()  # not added up yet
        self._seconds: dict[str, float] = {}
        self.failed = ""  # the phase in which an error came up

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._settle()
        self._stack.append(phase)
        try:
            yield
        except BaseException:
            self.failed = self.failed or phase
            raise
        finally:
            self._settle()
            self._stack.pop()

    @property
    def phase(self) -> str:
        """The current phase; "" outside of any."""
        return self._stack[-1] if self._stack else ""

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each phase so far."""
        self._add_up(0)
        return dict(self._seconds)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Adds the seconds of an earlier run."""
        for phase, passed in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + passed

    def _settle(self) -> None:
        now = self._mark()
        if self._stack:
            self._passed.append((self._stack[-1], self._since, now))
        self._since = now
        if len(self._passed) > MARKS:
            self._add_up(MARKS // 2)

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add_up(self, left: int) -> None:
        """Adds up the oldest intervals, all but `left` of them."""
        while len(self._passed) > left:
            phase, start, end = self._passed.popleft()
            self.add({phase: _between(start, end)})


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


class Stages:
    """Wall seconds of a command by stage: `with stages("loading")`. Repeated stages add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + passed
