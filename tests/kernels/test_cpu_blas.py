"""NumPy's BLAS behind the torch twin: as exact as torch's, and a guest in the process."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import grail_kernels as gk
from grail_kernels import cpu_blas

EPS = torch.finfo(torch.float32).eps

needs_openblas = pytest.mark.skipif(
    cpu_blas._thread_calls() is None, reason="NumPy has no OpenBLAS whose threads can be set"
)


def gram_of(x: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(gk.packed_numel(x.shape[-1]))
    gk.gram_(out, x, **options)
    return gk.unpack(out, x.shape[-1])


# One strip, two, and five of which the last is narrow.
@pytest.mark.parametrize("channels", [3, 300, 1029])
@pytest.mark.parametrize("openblas", [True, False], ids=["openblas", "torch"])
def test_each_library_is_within_16_eps_of_fp64(channels, openblas, monkeypatch):
    if not openblas:
        monkeypatch.setattr(cpu_blas, "_thread_calls", lambda: None)
    x = torch.randn(cpu_blas.BLOCK_TOKENS + 77, channels)
    error = (gram_of(x).double() - x.double().T @ x.double()).abs()
    assert (error <= 16 * EPS * (x.double().abs().T @ x.double().abs())).all()


@needs_openblas
def test_it_is_taken_from_a_whole_block_of_tokens_on(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_blas, "add_gram", lambda *arguments: calls.append(arguments))
    gram_of(torch.randn(cpu_blas.BLOCK_TOKENS - 1, 4))
    assert not calls
    gram_of(torch.randn(cpu_blas.BLOCK_TOKENS, 4))
    assert len(calls) == 1


@needs_openblas
def test_weights_multiply_one_side_only():
    x, weights = torch.randn(2000, 40), torch.rand(2000)
    expected = x.double().T @ (weights.double()[:, None] * x.double())
    torch.testing.assert_close(gram_of(x, weights=weights).double(), expected, rtol=1e-4, atol=1e-3)


@needs_openblas
def test_openblas_has_one_thread_inside_and_its_own_afterwards_even_on_an_error(monkeypatch):
    get, put = cpu_blas._thread_calls()
    before, seen = get(), []

    def fails(*_, **__):
        seen.append(get())
        raise RuntimeError

    monkeypatch.setattr(cpu_blas.np, "matmul", fails)
    try:
        put(2)
        with pytest.raises(RuntimeError):
            gram_of(torch.randn(cpu_blas.BLOCK_TOKENS, 600))
        assert set(seen) == {1}
        assert get() == 2
    finally:
        put(before)


@needs_openblas
@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_work_as_torch_has_and_change_no_bit(threads, monkeypatch):
    x, workers = torch.randn(1500, 600), set()
    real, before = cpu_blas.np.matmul, torch.get_num_threads()
    alone = gram_of(x)

    def noted(*arguments, **options):
        workers.add(threading.get_ident())
        return real(*arguments, **options)

    monkeypatch.setattr(cpu_blas.np, "matmul", noted)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(gram_of(x), alone)
    finally:
        torch.set_num_threads(before)
    assert len(workers) <= threads
    assert (threading.get_ident() in workers) == (threads == 1)


@needs_openblas
def test_a_nan_raises_no_warning_and_reaches_the_sums(recwarn):
    x = torch.randn(cpu_blas.BLOCK_TOKENS, 4)
    x[5, 2] = float("nan")
    nonfinite = torch.zeros(4, dtype=torch.int64)
    gram_of(x, nonfinite=nonfinite)
    assert nonfinite.tolist() == [0, 0, 1, 0]
    assert not recwarn.list


@needs_openblas
def test_concurrent_callers_leave_openblas_as_they_found_it():
    get, put = cpu_blas._thread_calls()
    before = get()
    try:
        put(2)
        x = torch.randn(cpu_blas.BLOCK_TOKENS, 700)
        alone = gram_of(x)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(g, alone) for g in pool.map(gram_of, [x] * 12))
        assert get() == 2
    finally:
        put(before)


@needs_openblas
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    x = torch.randn(cpu_blas.BLOCK_TOKENS, 700)
    expected, out = (torch.zeros(gk.packed_numel(700)) for _ in range(2))
    cpu_blas.add_gram(expected, x, x)
    child = os.fork()
    if child == 0:  # NumPy alone from here on: torch's own threads do not survive a fork
        signal.alarm(20)  # ends a child that waits for its parent's threads
        cpu_blas.add_gram(out, x, x)
        os._exit(0 if (out.numpy() == expected.numpy()).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
