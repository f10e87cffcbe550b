"""Gram products on a CPU by NumPy's OpenBLAS, single-threaded, on threads of our own.

torch's x86 builds multiply with MKL, which on AMD chips runs at half of OpenBLAS's rate. But
OpenBLAS's own threads wait for work by spinning, which takes the cores from torch's in a model's
forward pass (measured: twice its time); ours sleep. So OpenBLAS is limited to one thread here.
Square tiles of the lower triangle, those on the diagonal last (half the work), go to as many
threads as torch uses.

It is called by its C interface, which reads activations and adds to sums in place, and has syrk for
a tile on the diagonal: T·H·(H + 1) FLOPs in all. A tile is wider than a strip of the accumulator
(the wider, the nearer to OpenBLAS's full rate), so it is summed in memory of its own. A NumPy built
on another library, or on one without these calls, is not used.
"""

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

from grail_kernels.tiles import strips

# Tokens of one product. No OpenBLAS kernel cuts a sum this short, and so a sum does not depend on
# how many tokens follow; longer ones are 1% faster.
CHUNK_TOKENS = 256

# Tokens whose chunks are summed before they are added to the accumulator: with all in one chain,
# 200k tokens have an error of 15 eps, against 3.
_FLUSH_TOKENS = 8192

# Channels of one side of a tile: products of 128 by 128 run at 0.8 of the rate of 1024 by 1024, and
# wider ones no faster.
_NARROWEST, _WIDEST = 128, 1024

# A kernel's loop takes at most so many tokens in one step, and some (Haswell's) sum what is left
# over in another order: the last chunk is filled up with zeros to whole steps.
_STEP_TOKENS = 32

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


class OpenBlas(NamedTuple):
    """The calls into the library."""

    gemm: Callable[..., None]
    syrk: Callable[..., None]
    get_threads: Callable[[], int]
    set_threads: Callable[[int], None]


class _Tile(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of the matrix."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


def takes(tokens: Tensor) -> bool:
    """Returns whether `add_gram` can run on tokens [T, H], T > 0."""
    return tokens.device.type == "cpu" and tokens.shape[0] > 0 and openblas() is not None


def add_gram(out: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Adds rowsᵀ @ columns to the packed `out`, whose scratch may change.

    Args:
        out: [packed_numel(H)] fp32, contiguous.
        rows: [T, H] fp32, rows or columns contiguous.
        columns: like `rows`; the same tensor makes the product symmetric and half as long.

    Numerics:
        Zero tokens at the end of both change no bit. Another number of threads cuts other tiles,
        which on some chips (Haswell's kernels) are rounded otherwise.
    """
    left = _chunks(rows)
    right = left if columns is rows else _chunks(columns)
    threads = torch.get_num_threads()
    width = _tile_width(rows.shape[1], threads)
    tiles = deque(_tiles(rows.shape[1], width))
    workers = min(threads, len(tiles))

    def work() -> None:
        memory = np.empty(width * width, np.float32)
        while True:
            try:
                tile = tiles.popleft()
            except IndexError:
                return
            _add_tile(out, tile, left, right, memory)

    with _single_threaded():
        pool = _pool(max(1, torch.get_num_threads() - 1))
        others = [pool.submit(work) for _ in range(workers - 1)]
        try:
            work()
        finally:
            wait(others)  # also where one fails: OpenBLAS gets its threads back afterwards
    for other in others:
        other.result()


def _tile_width(channels: int, threads: int) -> int:
    """As many tiles a side as threads, or a multiple: then all threads get the same work."""
    tiles = threads * math.ceil(channels / (threads * _WIDEST))
    tiles = max(1, min(tiles, channels // _NARROWEST))
    return 16 * math.ceil(channels / tiles / 16)  # OpenBLAS's kernels make 16 channels at a time


def _tiles(channels: int, width: int) -> list[_Tile]:
    """Squares that cover the lower triangle; those on its diagonal, half the work, come last."""
    sides = [(low, min(low + width, channels)) for low in range(0, channels, width)]
    below = [_Tile(*rows, *columns) for columns, rows in itertools.combinations(sides, 2)]
    return below + [_Tile(*side, *side) for side in sides]


def _chunks(tokens: Tensor) -> list[Tensor]:
    """An operand [T, H] in chunks of CHUNK_TOKENS, the last of them filled up to whole steps."""
    chunks = list(tokens.split(CHUNK_TOKENS))
    missing = -chunks[-1].shape[0] % _STEP_TOKENS
    if missing:
        chunks[-1] = torch.nn.functional.pad(chunks[-1], (0, 0, 0, missing))
    return chunks


def _add_tile(
    out: Tensor, tile: _Tile, left: list[Tensor], right: list[Tensor], memory: NDArray[np.float32]
) -> None:
    """Adds the products of all chunks to one tile of `out`, by way of `memory`."""
    sums = memory[: math.prod(tile.shape)].reshape(tile.shape)
    chunks = list(zip(left, right, strict=True))
    at_once = _FLUSH_TOKENS // CHUNK_TOKENS
    for first in range(0, len(chunks), at_once):
        sums.fill(0)
        for rows, columns in chunks[first : first + at_once]:
            _multiply(tile, rows, columns, sums.ctypes.data)
        _add_to_strips(out, left[0].shape[1], tile, sums)


def _add_to_strips(out: Tensor, channels: int, tile: _Tile, sums: NDArray[np.float32]) -> None:
    for strip in strips(channels):
        top, bottom = max(tile.top, strip.low), min(tile.bottom, strip.high)
        right = min(tile.right, strip.high)
        if top >= bottom:
            continue
        target = strip.view(out).numpy()[top - strip.low : bottom - strip.low, tile.left : right]
        with np.errstate(all="ignore"):  # a NaN among activations is for the caller to refuse
            target += sums[top - tile.top : bottom - tile.top, : right - tile.left]


def _multiply(tile: _Tile, rows: Tensor, columns: Tensor, sums: int) -> None:
    """Adds the product of a chunk to the sums of a tile [R, C] fp32, given by their address."""
    library = openblas()
    assert library is not None
    height, width = tile.shape
    tokens = rows.shape[0]
    left, right = _operand(rows, tile.top), _operand(columns, tile.left)
    forms = (_TRANSPOSED, _AS_IS) if _is_by_rows(rows) else (_AS_IS, _TRANSPOSED)
    if left == right:
        library.syrk(_ROW_MAJOR, _LOWER, forms[0], width, tokens, 1, *left, 1, sums, width)
    else:
        sizes = (height, width, tokens)
        library.gemm(_ROW_MAJOR, *forms, *sizes, 1, *left, *right, 1, sums, width)


def _operand(chunk: Tensor, channel: int) -> tuple[int, int]:
    """The address of a channel's first token, and BLAS's leading dimension."""
    token_stride, channel_stride = chunk.stride()
    address = chunk.data_ptr() + chunk.element_size() * channel * channel_stride
    return address, token_stride if _is_by_rows(chunk) else channel_stride


def _is_by_rows(chunk: Tensor) -> bool:
    """Returns whether the channels of a token are neighbours; else the tokens of a channel are."""
    return chunk.stride(1) == 1 and chunk.stride(0) >= chunk.shape[1]


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
def openblas() -> OpenBlas | None:
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
        return OpenBlas(gemm, syrk, get_threads, set_threads)
    return None


@contextmanager
def _single_threaded() -> Iterator[None]:
    """OpenBLAS multiplies on the calling thread alone; put back afterwards."""
    library = openblas()
    assert library is not None
    with _held:
        before = library.get_threads()
        library.set_threads(1)
        try:
            yield
        finally:
            library.set_threads(before)
