"""Work shared among threads that sleep."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from grail_kernels import cpu_threads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_unit_is_done_once(threads: int) -> None:
    done: list[int] = []
    cpu_threads.share(done.append, range(300), threads)
    assert sorted(done) == list(range(300))


def test_a_thread_that_has_not_begun_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    done: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        pool.submit(release.wait)
        monkeypatch.setattr(cpu_threads, "_pool", lambda workers: pool)
        caller = threading.Thread(target=cpu_threads.share, args=(done.append, range(9), 2))
        caller.start()
        caller.join(20)
        ended = not caller.is_alive()
        release.set()
    assert ended
    assert done == list(range(9))


def test_an_error_of_another_thread_is_raised() -> None:
    caller, began = threading.get_ident(), threading.Event()

    def work(unit: int) -> None:
        if threading.get_ident() == caller:
            assert began.wait(20)
            return
        began.set()
        raise ValueError("of a worker")

    with pytest.raises(ValueError, match="of a worker"):
        cpu_threads.share(work, range(2), 2)


def test_memory_of_a_thread_is_kept_until_more_is_needed() -> None:
    first = cpu_threads.own_memory(100)
    assert first.size == 100
    assert cpu_threads.own_memory(50).ctypes.data == first.ctypes.data
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cpu_threads.own_memory, 50).result().ctypes.data != first.ctypes.data
    assert cpu_threads.own_memory(10**6).size == 10**6
