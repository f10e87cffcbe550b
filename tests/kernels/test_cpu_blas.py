"""NumPy's BLAS behind the torch twin: as exact as torch's, and a guest in the process."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grail_kernels as gk
from grail_kernels import cpu_blas
from tests.kernels.cases import positive

EPS = torch.finfo(torch.float32).eps

needs_openblas = pytest.mark.skipif(
    cpu_blas.openblas() is None, reason="NumPy has no OpenBLAS that can be called"
)


def gram_of(x: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(gk.packed_numel(x.shape[-1]))
    gk.gram_(out, x, **options)
    return gk.unpack(out, x.shape[-1])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_columns(x: torch.Tensor) -> torch.Tensor:
    return x.T.contiguous().T


# One tile, and several that end where no strip does.
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("channels", [3, 300, 1029, 1100])
@pytest.mark.parametrize("library", ["openblas", "torch"])
def test_each_library_is_within_16_eps_of_fp64(channels, library, monkeypatch):
    if library == "torch":
        monkeypatch.setattr(cpu_blas, "openblas", lambda: None)
    x = torch.randn(1101, channels)
    error = (gram_of(x).double() - x.double().T @ x.double()).abs()
    assert (error <= 16 * EPS * (x.double().abs().T @ x.double().abs())).all()


@needs_openblas
def test_a_million_tokens_are_within_16_eps_of_fp64():
    # Sums of 256 tokens added one after another, 3900 of them, would be off by 40 eps.
    x = positive(10**6, 20)
    exact = x.double().T @ x.double()
    assert ((gram_of(x).double() - exact).abs() <= 16 * EPS * exact).all()


@needs_openblas
@pytest.mark.parametrize("tokens", [1, 1023, 1024])
def test_any_number_of_tokens_takes_it(tokens, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_blas, "add_gram", lambda *arguments: calls.append(arguments))
    gram_of(torch.randn(tokens, 4))
    assert len(calls) == 1


# Channels in one tile, and in several, the last of them narrower: 117 of 144, 348 of 352. Sums of
# 8192 tokens are added to the accumulator, which 8100 and some zeros are more than.
@needs_openblas
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, in_columns], ids=["rows", "columns"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("channels", [3, 90, 261, 700])
@pytest.mark.parametrize("tokens", [1, 20, 255, 500, 8100])
def test_zero_tokens_at_the_end_change_no_bit(tokens, channels, weighted, layout):
    x, weights = torch.randn(tokens, channels), torch.rand(tokens)

    def gram_with(padding: int) -> torch.Tensor:
        padded = layout(torch.cat([x, torch.zeros(padding, channels)]))
        options = {"weights": torch.cat([weights, torch.ones(padding)])} if weighted else {}
        return gram_of(padded, **options)

    expected = gram_with(0)
    assert all(torch.equal(gram_with(padding), expected) for padding in (1, 50, 300))


@needs_openblas
@pytest.mark.parametrize("tokens", [70, 2000])
def test_weights_multiply_one_side_only(tokens):
    x, weights = torch.randn(tokens, 300), torch.rand(tokens)
    expected = x.double().T @ (weights.double()[:, None] * x.double())
    torch.testing.assert_close(gram_of(x, weights=weights).double(), expected, rtol=1e-4, atol=1e-3)


@needs_openblas
@pytest.mark.usefixtures("two_threads")
def test_openblas_has_one_thread_inside_and_its_own_afterwards_even_on_an_error(monkeypatch):
    library, caller, seen = cpu_blas.openblas(), threading.get_ident(), []
    before = library.get_threads()

    def fails(*_):
        if threading.get_ident() != caller:
            time.sleep(0.3)  # is still at work when the caller has failed
        seen.append(library.get_threads())
        raise RuntimeError

    failing = library._replace(gemm=fails, syrk=fails)
    monkeypatch.setattr(cpu_blas, "openblas", lambda: failing)
    try:
        library.set_threads(3)
        with pytest.raises(RuntimeError):
            gram_of(torch.randn(1024, 600))
        assert seen == [1, 1]
        assert library.get_threads() == 3
    finally:
        library.set_threads(before)


@needs_openblas
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_threads_work_as_torch_has(threads, monkeypatch):
    x, workers, started = torch.randn(1500, 600), set(), threading.Barrier(threads)
    library, before = cpu_blas.openblas(), torch.get_num_threads()

    def noted(multiply):
        def call(*arguments):
            if threading.get_ident() not in workers:
                workers.add(threading.get_ident())
                started.wait(timeout=20)  # for the others, which must come
            multiply(*arguments)

        return call

    noting = library._replace(gemm=noted(library.gemm), syrk=noted(library.syrk))
    monkeypatch.setattr(cpu_blas, "openblas", lambda: noting)
    try:
        torch.set_num_threads(threads)
        result = gram_of(x).double()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(result, x.double().T @ x.double(), rtol=1e-4, atol=1e-2)
    assert len(workers) == threads
    assert threading.get_ident() in workers


@needs_openblas
def test_what_is_not_finite_raises_no_warning_and_reaches_the_sums(recwarn):
    x = torch.randn(1024, 4)
    x[5, 2] = float("nan")
    x[6:8, 3] = float("inf")
    nonfinite, out = torch.zeros(4, dtype=torch.int64), torch.zeros(gk.packed_numel(4))
    for sign in (1, -1):  # infinities of both signs meet in the accumulator
        gk.gram_(out, x.abs() * torch.tensor([1, 1, 1, sign]), nonfinite=nonfinite)
    assert nonfinite.tolist() == [0, 0, 2, 4]
    assert not gk.unpack(out, 4)[2:].isfinite().any()
    assert not recwarn.list


@needs_openblas
@pytest.mark.usefixtures("two_threads")
def test_concurrent_callers_leave_openblas_as_they_found_it():
    library = cpu_blas.openblas()
    before = library.get_threads()
    try:
        library.set_threads(2)
        x = torch.randn(1024, 700)
        alone = gram_of(x)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(g, alone) for g in pool.map(gram_of, [x] * 12))
        assert library.get_threads() == 2
    finally:
        library.set_threads(before)


@needs_openblas
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("two_threads")
def test_a_forked_child_has_threads_of_its_own():
    x = torch.randn(1024, 700)
    expected, out = (torch.zeros(gk.packed_numel(700)) for _ in range(2))
    cpu_blas.add_gram(expected, x)
    child = os.fork()
    if child == 0:  # NumPy alone from here on: torch's own threads do not survive a fork
        signal.alarm(20)  # ends a child that waits for its parent's threads
        cpu_blas.add_gram(out, x)
        os._exit(0 if (out.numpy() == expected.numpy()).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_openblas
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_no_copy_is_so_long_that_torch_shares_it_among_its_threads(weighted, monkeypatch):
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("copy_", "mul"):
                sizes.append(args[0].numel())
            return function(*args, **kwargs or {})

    # A mode sees its own thread alone.
    monkeypatch.setattr(cpu_blas, "share", lambda work, units, _: [work(unit) for unit in units])
    out, x = torch.zeros(gk.packed_numel(300)), torch.randn(1000, 300).bfloat16()
    with Watch():
        cpu_blas.add_gram(out, x, torch.ones(1000) if weighted else None)
    assert len(sizes) >= 10
    assert max(sizes) < 32768
    torch.testing.assert_close(gk.unpack(out, 300), gram_of(x), rtol=1e-4, atol=1e-3)


@needs_openblas
def test_copies_stay_usable_after_a_call_in_inference_mode():
    cpu_blas._copies.clear()
    x = torch.randn(300, 90).bfloat16()
    with torch.inference_mode():
        expected = gram_of(x)
    assert torch.equal(gram_of(x), expected)


# As OpenBLAS's cblas.h names it; the first three compute.
C_INTERFACE = (
    "cblas_sgemm",
    "cblas_ssyrk",
    "cblas_somatcopy",
    "openblas_get_config",
    "openblas_get_num_threads",
    "openblas_set_num_threads",
)


def library_of(names: tuple[str, ...], config: bytes = b"OpenBLAS 0.3.26") -> SimpleNamespace:
    calls = {name: SimpleNamespace() for name in names}
    for name in names:
        if "get_config" in name:
            calls[name] = type("Call", (), {"__call__": lambda _: config})()
    return SimpleNamespace(**calls)


@pytest.mark.parametrize("name", ["scipy_{}64_", "scipy_{}", "{}64_", "{}"])
@pytest.mark.parametrize("wide", [True, False], ids=["64-bit sizes", "32-bit sizes"])
def test_openblas_is_found_under_each_of_its_names(name, wide, monkeypatch):
    names = tuple(name.format(call) for call in C_INTERFACE)
    library = library_of(names, b"OpenBLAS 0.3.26 USE64BITINT" if wide else b"OpenBLAS 0.3.26")
    monkeypatch.setattr(cpu_blas.ctypes, "CDLL", lambda _: library)
    found = cpu_blas.openblas.__wrapped__()
    assert found.gemm is getattr(library, names[0])
    size = ctypes.c_int64 if wide else ctypes.c_int
    assert found.gemm.argtypes[3:6] == [size] * 3


def unloadable(_: str) -> None:
    raise OSError


LIBRARIES = {
    "of another kind": lambda _: library_of(C_INTERFACE[:3]),
    "without its C interface": lambda _: library_of(C_INTERFACE[3:]),
    "that cannot be opened": unloadable,
}


@pytest.mark.parametrize("opened", LIBRARIES.values(), ids=LIBRARIES.keys())
def test_a_library_is_left_alone(opened, monkeypatch):
    monkeypatch.setattr(cpu_blas.ctypes, "CDLL", opened)
    monkeypatch.setattr(cpu_blas, "openblas", cpu_blas.openblas.__wrapped__)
    assert not cpu_blas.takes(torch.ones(2, 2))
    assert torch.equal(gram_of(torch.ones(2, 2)), torch.full((2, 2), 2.0))
