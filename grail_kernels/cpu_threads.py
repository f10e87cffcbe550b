"""Threads for work on a CPU that sleep while they wait.

torch's own threads wait for their next work by spinning, for milliseconds: so long they take a core
from whoever works after them. Work that is shared here calls only what runs on the calling thread:
NumPy, OpenBLAS with one thread, and torch on fewer than SERIAL_ELEMENTS.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

# torch shares elementwise work of as many elements or more among its threads (at::GRAIN_SIZE).
SERIAL_ELEMENTS = 32768

_Unit = TypeVar("_Unit")

_own = threading.local()


def share(work: Callable[[_Unit], None], units: Iterable[_Unit], threads: int) -> None:
    """Calls `work` on each of `units`, in order, from as many threads; the caller is one of them.

    An error is raised when all threads have ended.
    """
    todo = deque(units)
    workers = min(threads, len(todo))

    def run() -> None:
        while todo:
            try:
                unit = todo.popleft()
            except IndexError:  # another thread took the last one
                return
            work(unit)

    if workers <= 1:
        run()
        return
    pool = _pool(threads - 1)
    others = [pool.submit(run) for _ in range(workers - 1)]
    try:
        run()
        others = [other for other in others if not other.cancel()]  # nothing is left to begin with
    finally:
        wait(others)
    for other in others:
        other.result()


def own_memory(elements: int) -> NDArray[np.float32]:
    """Returns memory of the calling thread, which keeps it: fresh pages cost as much as a copy."""
    kept: NDArray[np.float32] | None = getattr(_own, "memory", None)
    if kept is None or kept.size < elements:
        kept = _own.memory = np.empty(elements, np.float32)
    return kept[:elements]


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="grail-cpu")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
