"""Gram products on a CPU by NumPy's OpenBLAS, single-threaded, on threads of our own.

torch's x86 builds multiply with MKL, which on AMD chips runs at half of OpenBLAS's rate. But
OpenBLAS's own threads wait for work by spinning, which takes the cores from torch's in a model's
forward pass (measured: twice its time); ours sleep. So OpenBLAS is limited to one thread here.
Square tiles of the lower triangle, those on the diagonal last (half the work), go to as many
threads as torch uses.

It is called by its C interface, which reads activations and adds to sums in place, and has syrk for
a tile on the diagonal: T·H·(H + 1) FLOPs in all. A tile is wider than a strip of the accumulator
(the wider, the nearer to OpenBLAS's full rate), so the products of several chunks of tokens are
summed in memory of its own; that of one chunk is added to the strips at once. 16 bits, weighted
tokens and strides that BLAS does not know are copied in fp32, a block at a time, into memory that
is kept for the next call: fresh pages cost as much as the copy. A NumPy built on another library,
or on one without these calls, is not used.
"""

import ctypes
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grail_kernels.cpu_threads import SERIAL_ELEMENTS, own_memory, share
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
_STEP_TOKENS = 16

# Elements of fp32 copied at a time: 32 MB stay near the cache. The bounds limit the accumulator's
# traffic (4·H² bytes a block) and the number of products.
_BLOCK_ELEMENTS = 2**23
_FEWEST_TOKENS, _MOST_TOKENS = 1024, 8192

# Multiplications of a call, and elements of a copy, below which another thread comes too late.
_SHARED_PRODUCTS, _SHARED_COPY = 2**24, 2**19

_CALLS = (
    "cblas_sgemm",
    "cblas_ssyrk",
    "cblas_somatcopy",
    "openblas_get_config",
    "openblas_get_num_threads",
    "openblas_set_num_threads",
)

# One caller at a time: a second would take the first one's thread count for OpenBLAS's own, and
# write into its copies.
_held = threading.Lock()
_copies: dict[str, Tensor] = {}

# CBLAS's names for row-major matrices, their lower triangle, and an operand as it is or transposed.
ROW_MAJOR, _LOWER, _AS_IS, TRANSPOSED = 101, 122, 111, 112
_FLOAT = 4  # bytes


class OpenBlas(NamedTuple):
    """The calls into the library."""

    gemm: Callable[..., None]
    syrk: Callable[..., None]
    transpose: Callable[..., None]
    get_threads: Callable[[], int]
    set_threads: Callable[[int], None]


class _Area(NamedTuple):
    """Rows [top, bottom) and columns [left, right); a square where it lies on the diagonal."""

    top: int
    bottom: int
    left: int
    right: int


class _Part(NamedTuple):
    """The area of a tile in one strip, on its diagonal or beside that."""

    area: _Area
    offset: int  # elements into the accumulator
    stride: int  # elements from one row to the next


class _Tile(NamedTuple):
    """An area that one thread sums, and its parts."""

    area: _Area
    parts: tuple[_Part, ...]


class _Operand(NamedTuple):
    """One side of a product in memory: where it starts, and BLAS's leading dimension."""

    address: int
    stride: int
    by_rows: bool  # the channels of a token are neighbours; else the tokens of a channel are

    def at(self, token: int, channel: int) -> int:
        """The address of a value."""
        if self.by_rows:
            return self.address + _FLOAT * (token * self.stride + channel)
        return self.address + _FLOAT * (channel * self.stride + token)


class _Chunk(NamedTuple):
    """Tokens of one product: leftᵀ @ right. One operand makes it symmetric and half as long."""

    left: _Operand
    right: _Operand
    first: int
    tokens: int


def takes(tokens: Tensor) -> bool:
    """Returns whether `add_gram` can run on tokens [T, H], T > 0."""
    return tokens.device.type == "cpu" and tokens.shape[0] > 0 and openblas() is not None


def add_gram(out: Tensor, tokens: Tensor, scales: Tensor | None = None) -> None:
    """Adds tokensᵀ diag(scales) tokens to the packed `out`, whose scratch may change.

    Args:
        out: [packed_numel(H)] fp32, contiguous.
        tokens: [T, H] fp32, bf16 or fp16, any strides.
        scales: [T] fp32; all 1 if None.

    Numerics:
        Zero tokens at the end change no bit. Another number of threads cuts other tiles, which on
        some chips (Haswell's kernels) are rounded otherwise.
    """
    tokens, channels = tokens.detach(), tokens.shape[1]
    with _single_threaded():
        if scales is None and (operand := _operand(tokens)):
            _add_products(out, channels, _chunks_in_place(tokens, operand))
            return
        step = block_tokens(channels)
        for first in range(0, tokens.shape[0], step):
            block = slice(first, first + step)
            chunks = _chunks_of_copy(tokens[block], None if scales is None else scales[block])
            _add_products(out, channels, chunks)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> bool:
    """Adds leftᵀ @ right to `total`; returns False, and adds nothing, where it cannot.

    Args:
        total: [O, H] fp32, contiguous.
        left, right: [T, O] and [T, H]; fp32 on a CPU, rows or columns contiguous, of both the same,
            else it cannot.
    """
    if not (takes(left) and left.dtype == right.dtype == torch.float32):
        return False
    rows, columns = _operand(left.detach()), _operand(right.detach())
    if rows is None or columns is None or rows.by_rows != columns.by_rows:
        return False
    chunk, threads = _Chunk(rows, columns, 0, len(left)), torch.get_num_threads()
    outputs, channels = total.shape
    width = 16 * math.ceil(channels / threads / 16)
    areas = [
        _Area(0, outputs, low, min(low + width, channels)) for low in range(0, channels, width)
    ]

    def multiply(area: _Area) -> None:
        _multiply(chunk, area, total.data_ptr() + _FLOAT * area.left, channels)

    with _single_threaded():
        share(multiply, areas, threads)
    return True


def block_tokens(channels: int) -> int:
    """The number of tokens that are copied at a time: whole chunks of a product."""
    most = max(_FEWEST_TOKENS, min(_BLOCK_ELEMENTS // channels, _MOST_TOKENS))
    return most - most % CHUNK_TOKENS


def _operand(tokens: Tensor) -> _Operand | None:
    """Tokens [T, H] as BLAS reads them; None where it cannot."""
    if tokens.dtype != torch.float32:
        return None
    (count, channels), (token_stride, channel_stride) = tokens.shape, tokens.stride()
    if channel_stride == 1 and token_stride >= channels:
        return _Operand(tokens.data_ptr(), token_stride, by_rows=True)
    if token_stride == 1 and channel_stride >= count:
        return _Operand(tokens.data_ptr(), channel_stride, by_rows=False)
    return None


def _chunks_in_place(tokens: Tensor, operand: _Operand) -> list[_Chunk]:
    """The chunks of tokens [T, H]; the last one is copied unless it consists of whole steps."""
    count = tokens.shape[0]
    chunks = [
        _Chunk(operand, operand, first, min(CHUNK_TOKENS, count - first))
        for first in range(0, count, CHUNK_TOKENS)
    ]
    if count % _STEP_TOKENS:
        chunks[-1:] = _chunks_of_copy(tokens[chunks[-1].first :], None)
    return chunks


def _chunks_of_copy(tokens: Tensor, scales: Tensor | None) -> list[_Chunk]:
    """The chunks of tokens [T, H] copied in fp32, with zeros up to whole steps.

    With `scales` [T] the left operand is a second copy, multiplied by them.
    """
    count, channels = tokens.shape
    padded = _STEP_TOKENS * math.ceil(count / _STEP_TOKENS)
    given = _operand(tokens)
    by_rows = (
        given is None or given.by_rows
    )  # the other way OpenBLAS rounds small products otherwise
    right, columns = _copy_of("right", padded, channels, by_rows)
    left, rows = (right, columns) if scales is None else _copy_of("left", padded, channels, by_rows)
    threads = torch.get_num_threads()
    step = count if threads == 1 else max(1, (SERIAL_ELEMENTS - 1) // channels)

    def copy(first: int) -> None:
        block = slice(first, min(first + step, count))
        right[block].copy_(tokens[block])
        if scales is not None:
            torch.mul(right[block], scales[block, None], out=left[block])

    share(copy, range(0, count, step), threads if count * channels > _SHARED_COPY else 1)
    for copied in (left, right):
        copied.numpy()[count:] = 0
    return [
        _Chunk(rows, columns, first, min(CHUNK_TOKENS, padded - first))
        for first in range(0, padded, CHUNK_TOKENS)
    ]


def _copy_of(name: str, tokens: int, channels: int, by_rows: bool) -> tuple[Tensor, _Operand]:
    """Returns kept memory [tokens, channels] fp32, for the caller that holds the library."""
    elements = tokens * channels
    if name not in _copies or _copies[name].numel() < elements:
        with torch.inference_mode(False):  # so that it can be written outside as well
            _copies[name] = torch.empty(elements, dtype=torch.float32, device="cpu")
    memory = _copies[name][:elements]
    if by_rows:
        return memory.view(tokens, channels), _Operand(memory.data_ptr(), channels, True)
    return memory.view(channels, tokens).T, _Operand(memory.data_ptr(), tokens, False)


def _add_products(out: Tensor, channels: int, chunks: list[_Chunk]) -> None:
    """Adds the products of all chunks to the packed `out`, tile by tile."""
    threads = torch.get_num_threads()
    work = functools.partial(_add_tile, out.numpy(), chunks)
    products = sum(chunk.tokens for chunk in chunks) * channels**2
    share(work, _tiles(channels, threads), threads if products > _SHARED_PRODUCTS else 1)


@functools.lru_cache(maxsize=256)
def _tiles(channels: int, threads: int) -> tuple[_Tile, ...]:
    """Squares that cover the lower triangle; those on its diagonal, half the work, come last."""
    width = _tile_width(channels, threads)
    sides = [(low, min(low + width, channels)) for low in range(0, channels, width)]
    below = [_Area(*rows, *columns) for columns, rows in itertools.combinations(sides, 2)]
    areas = below + [_Area(*side, *side) for side in sides]
    return tuple(_Tile(area, tuple(_parts(area, channels))) for area in areas)


def _tile_width(channels: int, threads: int) -> int:
    """As many tiles a side as threads, or a multiple: then all threads get the same work."""
    tiles = threads * math.ceil(channels / (threads * _WIDEST))
    tiles = max(1, min(tiles, channels // _NARROWEST))
    return 16 * math.ceil(channels / tiles / 16)  # OpenBLAS's kernels make 16 channels at a time


def _parts(tile: _Area, channels: int) -> Iterator[_Part]:
    for strip in strips(channels):
        top, bottom = max(tile.top, strip.low), min(tile.bottom, strip.high)
        if top >= bottom:
            continue
        for left, right in ((tile.left, min(tile.right, top)), (top, min(tile.right, bottom))):
            if left < right:
                offset = strip.offset + (top - strip.low) * strip.high + left
                yield _Part(_Area(top, bottom, left, right), offset, strip.high)


def _add_tile(out: NDArray[np.float32], chunks: list[_Chunk], tile: _Tile) -> None:
    """Adds the products of one chunk to a tile of `out`, or those of several by way of their sum.

    The first chunk is multiplied part by part either way, which gives the same bits.
    """
    if len(chunks) == 1:
        for area, offset, stride in tile.parts:
            _multiply(chunks[0], area, out.ctypes.data + _FLOAT * offset, stride)
        return
    (top, bottom, left, right), at_once = tile.area, _FLUSH_TOKENS // CHUNK_TOKENS
    width = right - left
    sums = own_memory((bottom - top) * width).reshape(-1, width)
    address = sums.ctypes.data
    for first in range(0, len(chunks), at_once):
        sums.fill(0)
        for chunk in chunks[first : first + at_once]:
            if chunk is not chunks[0]:
                _multiply(chunk, tile.area, address, width)
                continue
            for part in tile.parts:
                start = (part.area.top - top) * width + part.area.left - left
                _multiply(chunk, part.area, address + _FLOAT * start, width)
        for part in tile.parts:
            area = part.area
            _add_part(out, part, sums[area.top - top : area.bottom - top, area.left - left :])


def _add_part(out: NDArray[np.float32], part: _Part, sums: NDArray[np.float32]) -> None:
    """Adds sums, in the first columns, to a part of `out`."""
    rows, columns = part.area.bottom - part.area.top, part.area.right - part.area.left
    place = (_FLOAT * part.offset, (_FLOAT * part.stride, _FLOAT))
    target = np.ndarray((rows, columns), np.float32, out, *place)
    with np.errstate(all="ignore"):  # a NaN among activations is for the caller to refuse
        target += sums[:, :columns]


def _multiply(chunk: _Chunk, area: _Area, sums: int, stride: int) -> None:
    """Adds a chunk's product for an area to the matrix at address `sums`."""
    library, (left, right) = openblas(), chunk[:2]
    assert library is not None
    height, width = area.bottom - area.top, area.right - area.left
    rows = (left.at(chunk.first, area.top), left.stride)
    forms = (TRANSPOSED, _AS_IS) if left.by_rows else (_AS_IS, TRANSPOSED)
    if left is right and area.top == area.left:
        library.syrk(ROW_MAJOR, _LOWER, forms[0], width, chunk.tokens, 1, *rows, 1, sums, stride)
        return
    columns = (right.at(chunk.first, area.left), right.stride)
    sizes = (height, width, chunk.tokens)
    library.gemm(ROW_MAJOR, *forms, *sizes, 1, *rows, *columns, 1, sums, stride)


def _forget_threads() -> None:
    global _held
    _held = threading.Lock()


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
            gemm, syrk, transpose, get_config, get_threads, set_threads = (
                getattr(library, f"{prefix}{name}{suffix}") for name in _CALLS
            )
        except AttributeError:
            continue
        get_config.restype = ctypes.c_char_p
        size = ctypes.c_int64 if b"USE64BITINT" in get_config() else ctypes.c_int
        choice, scale, matrix = ctypes.c_int, ctypes.c_float, (ctypes.c_void_p, size)
        gemm.argtypes = [*[choice] * 3, *[size] * 3, scale, *matrix, *matrix, scale, *matrix]
        syrk.argtypes = [*[choice] * 3, *[size] * 2, scale, *matrix, scale, *matrix]
        transpose.argtypes = [*[choice] * 2, *[size] * 2, scale, *matrix, *matrix]
        for call in (gemm, syrk, transpose, set_threads):
            call.restype = None
        return OpenBlas(gemm, syrk, transpose, get_threads, set_threads)
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
