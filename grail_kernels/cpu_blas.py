"""Gram products on a CPU by NumPy's OpenBLAS, single-threaded, on threads of our own.

torch's x86 builds multiply with MKL, which on AMD chips runs at half of OpenBLAS's rate. But
OpenBLAS's own threads wait for work by spinning, which takes the cores from torch's in a model's
forward (measured: twice its time); ours sleep. So OpenBLAS is held to one thread here, and panels
of the packed triangle, the longest first, go to as many threads as torch uses.

It is called by its C interface, which adds to what is there, reads activations where they lie, and
has a product of half the FLOPs for the diagonal. A NumPy built on another library, or on one that
does not have these calls, is left alone.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grail_kernels.tiles import BLOCK, Strip, strips

# Tokens of one product. No OpenBLAS kernel cuts a sum this short, and so a sum does not depend on
# how many tokens follow; longer ones are 1% faster.
CHUNK_TOKENS = 256

# Tokens that are summed before they are added to the accumulator: in one chain of chunks, an error
# of 15 eps at 200k tokens, against 3.
FLUSH_TOKENS = 8192

# Columns of one panel: enough for OpenBLAS's full rate, and 1 MB of sums, which stay in the cache.
_WIDTH = 1024

# OpenBLAS sums in another order in products of at most so many multiplications, and in what is left
# of the tokens after whole steps of a kernel's loop: zeros lift a shorter chunk above both.
_SMALL_PRODUCT = 10**6
_STEP = 32

_SQUARE = 128

_CALLS = (
    "cblas_sgemm",
    "cblas_ssyrk",
    "openblas_get_config",
    "openblas_get_num_threads",
    "openblas_set_num_threads",
)

# One caller at a time: a second would take the first one's thread count for OpenBLAS's own.
_held = threading.Lock()

# CBLAS's names for row-major matrices, their lower triangle, and an operand as it is or transposed.
_ROW_MAJOR, _LOWER, _AS_IS, _TRANSPOSED = 101, 122, 111, 112


class _OpenBlas(NamedTuple):
    gemm: Callable[..., None]
    syrk: Callable[..., None]
    get_threads: Callable[[], int]
    set_threads: Callable[[int], None]


class _Panel(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of the matrix, all of them in one strip."""

    strip: Strip
    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


class _Chunk(NamedTuple):
    """The first `tokens` of `values` [t, H] are tokens of an operand, the others are zeros."""

    values: Tensor
    tokens: int

    @property
    def by_rows(self) -> bool:
        return self.values.stride(1) == 1 and self.values.stride(0) >= self.values.shape[1]

    def at(self, channel: int) -> tuple[int, int]:
        """The address of a channel's first token, and BLAS's leading dimension."""
        stride = self.values.stride(1)
        address = self.values.data_ptr() + self.values.element_size() * channel * stride
        return address, self.values.stride(0) if self.by_rows else stride


def takes(tokens: Tensor) -> bool:
    """Whether `add_gram` is possible for tokens [T, H], of which there are any."""
    return tokens.device.type == "cpu" and tokens.shape[0] > 0 and _openblas() is not None


def add_gram(out: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add rows^T @ columns to the packed `out`, whose scratch may change.

    Args:
        out: [packed_numel(H)] fp32, contiguous.
        rows: [T, H] fp32, rows or columns contiguous.
        columns: like `rows`; the same tensor makes a symmetric product.

    Numerics:
        Zero tokens at the end of both change no bit, nor does the number of threads.
    """
    left = _chunks(rows)
    right = left if columns is rows else _chunks(columns)
    panels = deque(sorted(_panels(rows.shape[1]), key=lambda panel: -math.prod(panel.shape)))
    workers = min(torch.get_num_threads(), len(panels))

    def work() -> None:
        buffer = np.empty(BLOCK * _WIDTH, np.float32)
        while True:
            try:
                panel = panels.popleft()
            except IndexError:
                return
            _add_panel(out, panel, left, right, buffer)

    with _single_threaded():
        others = [_pool(workers - 1).submit(work) for _ in range(workers - 1)]
        try:
            work()
        finally:
            wait(others)  # also where one fails: OpenBLAS gets its threads back afterwards
    for other in others:
        other.result()


def _panels(channels: int) -> Iterator[_Panel]:
    """Panels that cover the lower triangle, each left of the diagonal or a square on it."""
    for strip in strips(channels):
        for left in range(0, strip.low, _WIDTH):
            yield _Panel(strip, strip.low, strip.high, left, min(left + _WIDTH, strip.low))
        for low in range(strip.low, strip.high, _SQUARE):
            high = min(low + _SQUARE, strip.high)
            yield _Panel(strip, low, high, low, high)
            if high < strip.high:
                yield _Panel(strip, high, strip.high, low, high)


def _chunks(tokens: Tensor) -> list[_Chunk]:
    """An operand [T, H] in chunks of CHUNK_TOKENS, the last one a copy that zeros fill up."""
    chunks = [_Chunk(part, part.shape[0]) for part in tokens.split(CHUNK_TOKENS)]
    last = chunks[-1]
    if last.tokens < CHUNK_TOKENS:
        size = (CHUNK_TOKENS, tokens.shape[1])
        filled = tokens.new_zeros(size) if last.by_rows else tokens.new_zeros(size[::-1]).T
        filled[: last.tokens] = last.values
        chunks[-1] = _Chunk(filled, last.tokens)
    return chunks


def _add_panel(
    out: Tensor, panel: _Panel, left: list[_Chunk], right: list[_Chunk], buffer: NDArray[np.float32]
) -> None:
    """Add the products of all chunks to one panel of `out`, by way of `buffer`."""
    strip, top = panel.strip, panel.top - panel.strip.low
    target = strip.view(out).numpy()[top : top + panel.shape[0], panel.left : panel.right]
    sums = buffer[: target.size].reshape(target.shape)
    at_once = FLUSH_TOKENS // CHUNK_TOKENS
    for first in range(0, len(left), at_once):
        sums.fill(0)
        for rows, columns in zip(
            left[first : first + at_once], right[first : first + at_once], strict=True
        ):
            _multiply(panel, rows, columns, sums.ctypes.data)
        with np.errstate(all="ignore"):  # a NaN among activations is for the caller to refuse
            target += sums


def _multiply(panel: _Panel, rows: _Chunk, columns: _Chunk, sums: int) -> None:
    """Add the product of a chunk to sums [R, C] fp32 at an address."""
    library = _openblas()
    assert library is not None
    height, width = panel.shape
    steps = math.ceil(max(rows.tokens, _SMALL_PRODUCT / (height * width) + 1) / _STEP)
    tokens = min(CHUNK_TOKENS, steps * _STEP)
    left, right = rows.at(panel.top), columns.at(panel.left)
    transposed, as_is = (_TRANSPOSED, _AS_IS) if rows.by_rows else (_AS_IS, _TRANSPOSED)
    if left == right:
        library.syrk(_ROW_MAJOR, _LOWER, transposed, width, tokens, 1.0, *left, 1.0, sums, width)
    else:
        library.gemm(
            _ROW_MAJOR,
            transposed,
            as_is,
            height,
            width,
            tokens,
            1.0,
            *left,
            *right,
            1.0,
            sums,
            width,
        )


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
def _openblas() -> _OpenBlas | None:
    """The calls into NumPy's OpenBLAS; None if NumPy has another library."""
    core = getattr(np, "_core", None) or np.core
    try:
        library = ctypes.CDLL(core._multiarray_umath.__file__)  # finds what it links to as well
    except (AttributeError, OSError):
        return None
    for prefix, suffix in itertools.product(("scipy_", ""), ("64_", "")):
        try:
            gemm, syrk, get_config, get_threads, set_threads = (
                getattr(library, f"{prefix}{name}{suffix}") for name in _CALLS
            )
        except AttributeError:
            continue
        get_config.restype = ctypes.c_char_p
        size = ctypes.c_int64 if b"USE64BITINT" in get_config() else ctypes.c_int
        choice, scale, matrix = ctypes.c_int, ctypes.c_float, (ctypes.c_void_p, size)
        gemm.argtypes = [*[choice] * 3, *[size] * 3, scale, *matrix, *matrix, scale, *matrix]
        syrk.argtypes = [*[choice] * 3, *[size] * 2, scale, *matrix, scale, *matrix]
        gemm.restype = syrk.restype = set_threads.restype = None
        return _OpenBlas(gemm, syrk, get_threads, set_threads)
    return None


@contextmanager
def _single_threaded() -> Iterator[None]:
    """OpenBLAS multiplies on the calling thread alone; put back afterwards."""
    library = _openblas()
    assert library is not None
    with _held:
        before = library.get_threads()
        library.set_threads(1)
        try:
            yield
        finally:
            library.set_threads(before)
