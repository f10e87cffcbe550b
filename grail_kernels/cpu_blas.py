"""fp32 products on a CPU by NumPy's OpenBLAS, where it can be held to torch's number of threads.

torch's x86 builds multiply with MKL, which on AMD chips runs at half of OpenBLAS's rate, and offer
no syrk; NumPy calls syrk for X^T X. It cannot add to a result, so products are temporaries.
A NumPy built on another library, or none that can be told how many threads to use, is left alone.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grail_kernels.tiles import BLOCK, strips

# Tokens of one product, and the fewest that are worth one: a shorter block is filled up to it.
BLOCK_TOKENS = 1024

# Up to so many channels one syrk and its dense result beat a GEMM a strip.
SYRK_CHANNELS = 1024

_PREFIXES = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")


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


def takes(tokens: Tensor) -> bool:
    """Whether `add_gram` is possible and worth it for a block of tokens [T, H]."""
    many = tokens.device.type == "cpu" and tokens.shape[0] >= BLOCK_TOKENS
    return many and _thread_calls() is not None


@contextmanager
def held_to_torch() -> Iterator[None]:
    """NumPy's BLAS uses as many threads as torch does, and no warnings; put back afterwards."""
    calls = _thread_calls()
    assert calls is not None
    get, put = calls
    before = get()
    put(torch.get_num_threads())
    try:
        with np.errstate(all="ignore"):  # a NaN among activations is for the caller to refuse
            yield
    finally:
        put(before)


def add_gram(out: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add rows^T @ columns to the packed `out`, from fp32 [T, H] each, which may be one tensor.

    Whole blocks of BLOCK_TOKENS, the last filled up with zeros: OpenBLAS cuts a sum by its length,
    and so zero tokens at the end of `rows` change no bit.
    """
    symmetric, channels = columns is rows, rows.shape[1]
    use_syrk = symmetric and channels <= SYRK_CHANNELS
    # One result for all products: fresh memory costs as much as filling it.
    result = np.empty((channels if use_syrk else BLOCK) * channels, np.float32)
    for start in range(0, rows.shape[0], BLOCK_TOKENS):
        left = _block(rows, start)
        right = left if symmetric else _block(columns, start)
        if use_syrk:
            dense = np.matmul(left.T, left, out=result.reshape(channels, channels))
        for low, high, target in ((s.low, s.high, s.view(out).numpy()) for s in strips(channels)):
            # Added by NumPy: torch's threads would spin on after an addition, in OpenBLAS's way.
            if use_syrk:
                target += dense[low:high, :high]
            else:
                product = result[: (high - low) * high].reshape(high - low, high)
                target += np.matmul(left[:, low:high].T, right[:, :high], out=product)


def _block(tokens: Tensor, start: int) -> NDArray[np.float32]:
    block = tokens[start : start + BLOCK_TOKENS]
    if block.shape[0] < BLOCK_TOKENS:
        filled = block.new_zeros(BLOCK_TOKENS, block.shape[1])
        filled[: block.shape[0]] = block
        block = filled
    return block.numpy()
