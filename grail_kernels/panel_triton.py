"""The panel of pivots on a GPU: one program a matrix, with V and D on chip.

The formulas are those of `grail_kernels.panel`. A program holds V and D [n, p] in registers, 64 KB
for n = 64 and p = 128, and reads one row of S and of B a choice. A column of V is what a mask
leaves of its rows, summed. Everything is a sum over one axis of [n, p], so a choice takes seven
passes over 8192 numbers, and n choices no contact with the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class PanelConfig(NamedTuple):
    """A launch of the panel."""

    warps: int
    stages: int


# Eight warps hold V and D without a spill, four spill up to 120 bytes (compiled ahead of time).
CONFIG = PanelConfig(warps=8, stages=1)


@triton.jit
def _panel_kernel(
    places_ptr,  # [E, N] int64
    triangle_ptr,  # [E, N, N]
    schur_ptr,  # [E, P, P]
    products_ptr,  # [E, P, P]
    floor_ptr,  # [E, P]
    limits_ptr,  # [E] int64
    N,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LEAST: tl.constexpr,
):
    """All choices of one matrix."""
    matrix = tl.program_id(0).to(tl.int64)
    schur_ptr += matrix * P * P
    products_ptr += matrix * P * P
    places_ptr += matrix * N
    triangle_ptr += matrix * N * N
    steps = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_P)
    col_mask = cols < P
    left = tl.load(schur_ptr + cols * (P + 1), mask=col_mask, other=0.0)
    squares = tl.load(products_ptr + cols * (P + 1), mask=col_mask, other=0.0)
    floor = tl.load(floor_ptr + matrix * P + cols, mask=col_mask, other=float("inf"))
    limit = tl.load(limits_ptr + matrix)
    v_rows = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    d_rows = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for n in range(N):
        possible = left > floor
        if not LEAST:
            possible = possible & (squares > 0)
        ratios = squares / tl.where(possible, left, 1.0)
        if LEAST:
            ratios = -ratios
        ratios = tl.where(possible, ratios, float("-inf"))
        best = tl.argmax(ratios, axis=0)
        chosen = cols == best
        found = (tl.max(possible.to(tl.int32), axis=0) > 0) & (n < limit)
        pivot = tl.sum(tl.where(chosen, left, 0.0), axis=0)
        root = tl.sqrt_rn(tl.where(found, pivot, 1.0))

        s = tl.load(schur_ptr + best * P + cols, mask=col_mask & found, other=0.0)
        b = tl.load(products_ptr + best * P + cols, mask=col_mask & found, other=0.0)
        of_v = tl.sum(tl.where(chosen[None, :] & found, v_rows, 0.0), axis=1)
        of_d = tl.sum(tl.where(chosen[None, :] & found, d_rows, 0.0), axis=1)
        v = (s - tl.sum(of_v[:, None] * v_rows, axis=0)) / root
        d = b - tl.sum(of_v[:, None] * d_rows + of_d[:, None] * v_rows, axis=0)
        d = d / root
        own = tl.sum(tl.where(chosen, d, 0.0), axis=0)
        d -= v * (own / (2 * root))

        is_row = (steps == n)[:, None]
        v_rows = tl.where(is_row, v[None, :], v_rows)
        d_rows = tl.where(is_row, d[None, :], d_rows)
        left -= v * v
        squares = tl.maximum(squares - 2 * v * d, 0.0)
        floor = tl.where(chosen & found, float("inf"), floor)
        tl.store(places_ptr + n, tl.where(found, best, -1).to(tl.int64))
        row = tl.where(steps == n, root, of_v)
        tl.store(triangle_ptr + n * N + steps, row, mask=steps < N)


def launch_panel(
    schur: Tensor, products: Tensor, floor: Tensor, limits: Tensor, count: int, least: bool
) -> tuple[Tensor, Tensor]:
    """Returns the places and triangles of the checked arguments of `choose_panel`."""
    matrices, candidates = floor.shape
    places = limits.new_empty(matrices, count)
    triangle = schur.new_empty(matrices, count, count)
    with torch.cuda.device_of(schur):
        _panel_kernel[(matrices,)](
            *(places, triangle, schur.contiguous(), products.contiguous()),
            *(floor.contiguous(), limits.contiguous(), count, candidates),
            **constants(count, candidates, least),
            num_warps=CONFIG.warps,
            num_stages=CONFIG.stages,
        )
    return places, triangle


def constants(count: int, candidates: int, least: bool) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel; `bench/tools/aot.py` compiles with the same."""
    return {
        "BLOCK_N": triton.next_power_of_2(count),
        "BLOCK_P": triton.next_power_of_2(candidates),
        "LEAST": least,
    }
