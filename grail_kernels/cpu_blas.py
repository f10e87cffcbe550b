"""Gram products on a CPU by NumPy's OpenBLAS, single-threaded, a strip to a thread of our own.

torch's x86 builds multiply with MKL, which on AMD chips runs at half of OpenBLAS's rate. But
OpenBLAS's own threads wait for work by spinning, which takes the cores from torch's in a model's
forward (measured: twice its time); ours sleep. So OpenBLAS is held to one thread here, and strips
of `grail_kernels.tiles`, the longest first, go to as many threads as torch uses.

A NumPy built on another library, or none that can be told how many threads to use, is left alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grail_kernels.tiles import Strip, strips

# Tokens of one product, and the fewest that are worth one: a shorter block is filled up to it.
BLOCK_TOKENS = 1024

# With fewer rows than this a GEMM adds all tokens in one chain (MKL: an error of 35 eps at 4097
# tokens, 800 at 200k, against 3 and 13): such few rows are summed in fp64 instead.
GEMM_ROWS = 16

# One caller at a time: a second would take the first one's thread count for OpenBLAS's own.
_held = threading.Lock()

_PREFIXES = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")


def takes(tokens: Tensor) -> bool:
    """Whether `add_gram` is possible and worth it for a block of tokens [T, H]."""
    many = tokens.device.type == "cpu" and tokens.shape[0] >= BLOCK_TOKENS
    return many and _thread_calls() is not None


def add_gram(out: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add rows^T @ columns to the packed `out`, from fp32 [T, H] each, which may be one tensor.

    Whole blocks of BLOCK_TOKENS, the last filled up with zeros: OpenBLAS cuts a sum by its length,
    and so zero tokens at the end of `rows` change no bit, as long as `takes` says the same of both.
    """
    left = _blocks(rows)
    right = left if columns is rows else _blocks(columns)

    def add_strip(strip: Strip) -> None:
        target = strip.view(out).numpy()
        dtype = np.float32 if strip.high - strip.low >= GEMM_ROWS else np.float64
        # One result for all blocks: fresh memory costs as much as filling it.
        product = np.empty(target.shape, dtype)
        with np.errstate(all="ignore"):  # a NaN among activations is for the caller to refuse
            for block_rows, block in zip(left, right, strict=True):
                rows_part = block_rows[:, strip.low : strip.high].T.astype(dtype, copy=False)
                columns_part = block[:, : strip.high].astype(dtype, copy=False)
                target += np.matmul(rows_part, columns_part, out=product)

    longest_first = sorted(strips(rows.shape[1]), key=lambda s: -(s.high - s.low) * s.high)
    workers = min(torch.get_num_threads(), len(longest_first))
    with _single_threaded():
        if workers == 1:
            for strip in longest_first:
                add_strip(strip)
        else:
            jobs = [_pool(workers).submit(add_strip, strip) for strip in longest_first]
            wait(jobs)  # all, also where one fails: OpenBLAS gets its threads back afterwards
            for job in jobs:
                job.result()


def _blocks(tokens: Tensor) -> list[NDArray[np.float32]]:
    blocks = list(tokens.split(BLOCK_TOKENS))
    missing = BLOCK_TOKENS - blocks[-1].shape[0]
    blocks[-1] = torch.nn.functional.pad(blocks[-1], (0, 0, 0, missing)) if missing else blocks[-1]
    return [block.numpy() for block in blocks]


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="grail-gram")


def _forget_threads() -> None:
    global _held
    _held = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_forget_threads)


@functools.cache
def _thread_calls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """OpenBLAS's own get and set of its number of threads; None if NumPy has no OpenBLAS."""
    core = getattr(np, "_core", None) or np.core
    try:
        library = ctypes.CDLL(core._multiarray_umath.__file__)  # finds what it links to as well
    except (AttributeError, OSError):
        return None
    for prefix in _PREFIXES:
        get = getattr(library, prefix.format("get_num_threads"), None)
        put = getattr(library, prefix.format("set_num_threads"), None)
        if get is not None and put is not None:
            return get, put
    return None


@contextmanager
def _single_threaded() -> Iterator[None]:
    """OpenBLAS multiplies on the calling thread alone; put back afterwards."""
    calls = _thread_calls()
    assert calls is not None
    get, put = calls
    with _held:
        before = get()
        put(1)
        try:
            yield
        finally:
            put(before)
