"""Peak memory of a call by torch's allocations: exact, and the same on every machine."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most memory that torch held at once on `device` for `call`, beyond what was there.

    On a CPU without what one operation allocates and frees itself: how much that is depends on the
    processor, since oneDNN packs the operands for some and not for others.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return max(itertools.accumulate(_changes(profiler.profiler.kineto_results.events())))


def _changes(events: Iterable[Any]) -> list[int]:
    """Returns the bytes that are allocated, and less than 0 what is freed, in order."""
    changes: list[int] = []
    end = -1  # of the outermost operation that runs
    allocated: dict[int, list[int]] = defaultdict(list)  # in it, by size: places in `changes`
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        start, inside = event.start_ns(), event.start_ns() <= end
        if event.name() != "[memory]":
            if not inside and event.name().startswith("aten::"):
                end = start + event.duration_ns()
                allocated.clear()
            continue
        size = event.nbytes()
        if inside and size > 0:
            allocated[size].append(len(changes))
        elif inside and allocated[-size]:
            changes[allocated[-size].pop()] = 0
            continue
        changes.append(size)
    return changes
