"""Shared parts of the Triton Gram kernels: the walk over tiles, products of parts, launches."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grail_kernels import tuning
from grail_kernels.backend import interpreting
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_plan import Plan
from grail_kernels.tiles import STRIP_ROWS

# Edge of the tiles in which splits are added up: a few dozen programs at the least.
_ADDED_EDGE = 64

# Multiprocessors that a launch has to fill in the interpreter.
_INTERPRETER_PROCESSORS = 4


@triton.jit
def _triangle_row(index):
    """The row of element `index` of a row-major lower triangle."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int64)
    # The root of a large number may round across an integer.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def tile_of(program, tile_rows, GROUP: tl.constexpr):
    """The (row, column) of the tile that a program owns.

    Groups of GROUP tile rows follow one another. Within a group the columns to the left of its
    own triangle come first, each from top to bottom, then that triangle.
    """
    first_row = _triangle_row(program) // GROUP * GROUP
    within = program - first_row * (first_row + 1) // 2
    rows = tl.minimum(GROUP, tile_rows - first_row)
    beyond = within - rows * first_row
    in_triangle = beyond >= 0
    beyond = tl.maximum(beyond, 0)
    triangle_row = _triangle_row(beyond)
    triangle_column = beyond - triangle_row * (triangle_row + 1) // 2
    row = tl.where(in_triangle, triangle_row, within % rows)
    column = tl.where(in_triangle, first_row + triangle_column, within // rows)
    return first_row + row, column


@triton.jit
def program_of(H, COLLECTS: tl.constexpr, BLOCK_H: tl.constexpr):
    """The matrix of a program, its number among that one's, how many of those collect; tile rows.

    With sums or counts to collect, the first programs of a matrix do that, a block of channels
    each: inside the loop of products it would cost every tile its registers.
    """
    program = tl.program_id(0).to(tl.int64)
    # A width of 1 comes as a constant, whose quotient would have no `to`.
    tile_rows = tl.cdiv(tl.zeros([], tl.int64) + H, BLOCK_H)
    collectors = tile_rows if COLLECTS else tile_rows * 0
    # The matrices share the first axis of the grid: the others end at 65,535.
    programs = collectors + tile_rows * (tile_rows + 1) // 2
    matrix = program // programs
    return matrix, program - matrix * programs, collectors, tile_rows


@triton.jit
def _tile_at(packed_ptr, tile_row, tile_column, H, STRIP: tl.constexpr, BLOCK_H: tl.constexpr):
    """The pointers to a tile of a packed matrix, and where it is inside of the matrix."""
    # The whole tile is ours: above the diagonal of its strip lies scratch. Offsets inside a tile
    # fit 32 bits, and 64-bit ones would take half of the registers.
    strip = tile_row * BLOCK_H // STRIP
    row_stride = tl.minimum((strip + 1) * STRIP, H)
    tile_ptr = packed_ptr + STRIP * STRIP * strip * (strip + 1) // 2
    tile_ptr += (tile_row * BLOCK_H - strip * STRIP) * row_stride + tile_column * BLOCK_H
    within = tl.arange(0, BLOCK_H)
    offsets = within[:, None] * row_stride.to(tl.int32) + within[None, :]
    fits_rows = tile_row * BLOCK_H + within < H
    fits_columns = tile_column * BLOCK_H + within < H
    return tile_ptr + offsets, fits_rows[:, None] & fits_columns[None, :]


@triton.jit
def add_tile(
    packed_ptr,
    total,
    tile_row,
    tile_column,
    H,
    STRIP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STORES: tl.constexpr,
):
    """Adds `total` [BLOCK_H, BLOCK_H] to a tile of a packed matrix, which nobody else writes.

    STORES: the tile has no content yet, and gets that one.
    """
    places, mask = _tile_at(packed_ptr, tile_row, tile_column, H, STRIP, BLOCK_H)
    if not STORES:
        total += tl.load(places, mask=mask, other=0.0)
    tl.store(places, total, mask=mask)


@triton.jit
def add_collected(
    sums_ptr, nonfinite_ptr, first, sums, counts, rows, row_mask, STORES: tl.constexpr
):
    """Adds sums and counts of channels [BLOCK_H] to those that begin at `first`, if collected."""
    if sums_ptr is not None:
        sums_ptr += first
        if not STORES:
            sums += tl.load(sums_ptr + rows, mask=row_mask, other=0.0)
        tl.store(sums_ptr + rows, sums, mask=row_mask)
    if nonfinite_ptr is not None:
        nonfinite_ptr += first
        counts = counts.to(tl.int64)
        if not STORES:
            counts += tl.load(nonfinite_ptr + rows, mask=row_mask, other=0)
        tl.store(nonfinite_ptr + rows, counts, mask=row_mask)


@triton.jit(do_not_specialize=["matrices", "splits"])
def _add_splits_kernel(
    out_ptr,  # [matrices, P]
    sums_ptr,  # [matrices, H], or None
    nonfinite_ptr,  # [matrices, H], or None
    out_parts_ptr,  # each with a leading dimension [splits]
    sums_parts_ptr,
    nonfinite_parts_ptr,
    H,
    matrices,
    splits,
    out_stride,
    STRIP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Adds what splits of the tokens have left, one after another, to a tile or some channels."""
    collects: tl.constexpr = sums_ptr is not None or nonfinite_ptr is not None
    matrix, program, collectors, tile_rows = program_of(H, collects, BLOCK_H)
    if program < collectors:
        rows = program * BLOCK_H + tl.arange(0, BLOCK_H)
        row_mask = rows < H
        sums = tl.zeros([BLOCK_H], tl.float32)
        counts = tl.zeros([BLOCK_H], tl.int64)
        for split in range(splits):
            first = ((tl.zeros([], tl.int64) + split) * matrices + matrix) * H
            if sums_ptr is not None:
                sums += tl.load(sums_parts_ptr + first + rows, mask=row_mask, other=0.0)
            if nonfinite_ptr is not None:
                counts += tl.load(nonfinite_parts_ptr + first + rows, mask=row_mask, other=0)
        add_collected(sums_ptr, nonfinite_ptr, matrix * H, sums, counts, rows, row_mask, False)
    else:
        tile_row, tile_column = tile_of(program - collectors, tile_rows, 1)
        total = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
        for split in range(splits):
            part_ptr = (
                out_parts_ptr + ((tl.zeros([], tl.int64) + split) * matrices + matrix) * out_stride
            )
            places, mask = _tile_at(part_ptr, tile_row, tile_column, H, STRIP, BLOCK_H)
            total += tl.load(places, mask=mask, other=0.0)
        out_ptr += matrix * out_stride
        add_tile(out_ptr, total, tile_row, tile_column, H, STRIP, BLOCK_H, False)


@triton.jit
def products_of_parts(rows, cols, OPERAND: tl.constexpr):
    """Rows [R, T] @ cols [T, C] in fp32, each the sum of three bf16."""
    row_high = rows.to(tl.bfloat16)
    col_high = cols.to(tl.bfloat16)
    rows -= row_high.to(tl.float32)
    cols -= col_high.to(tl.float32)
    row_middle = rows.to(tl.bfloat16)
    col_middle = cols.to(tl.bfloat16)
    row_low = (rows - row_middle.to(tl.float32)).to(tl.bfloat16).to(OPERAND)
    col_low = (cols - col_middle.to(tl.float32)).to(tl.bfloat16).to(OPERAND)
    row_high = row_high.to(OPERAND)
    col_high = col_high.to(OPERAND)
    row_middle = row_middle.to(OPERAND)
    col_middle = col_middle.to(OPERAND)
    return six_products(row_high, row_middle, row_low, col_high, col_middle, col_low)


@triton.jit
def products_of_rows(rows, cols, OPERAND: tl.constexpr):
    """Rows [R, T] in fp32, as the sum of three bf16, @ cols [T, C], which are bf16 as they are."""
    high = rows.to(tl.bfloat16)
    rows -= high.to(tl.float32)
    middle = rows.to(tl.bfloat16)
    low = (rows - middle.to(tl.float32)).to(tl.bfloat16)
    product = tl.dot(low.to(OPERAND), cols, input_precision="ieee")
    product = tl.dot(middle.to(OPERAND), cols, product, input_precision="ieee")
    return tl.dot(high.to(OPERAND), cols, product, input_precision="ieee")


@triton.jit
def six_products(row_high, row_middle, row_low, col_high, col_middle, col_low):
    """The products of parts of rows and cols above 2⁻²⁴ in fp32, small ones first."""
    product = tl.dot(row_low, col_high, input_precision="ieee")
    product = tl.dot(row_high, col_low, product, input_precision="ieee")
    product = tl.dot(row_middle, col_middle, product, input_precision="ieee")
    product = tl.dot(row_middle, col_high, product, input_precision="ieee")
    product = tl.dot(row_high, col_middle, product, input_precision="ieee")
    return tl.dot(row_high, col_high, product, input_precision="ieee")


@triton.jit
def three_products(row_high, row_low, col_high, col_low):
    """The products of two fp16 parts of rows and cols above 2⁻²⁴, small ones first."""
    product = tl.dot(row_low, col_high, input_precision="ieee")
    product = tl.dot(row_high, col_low, product, input_precision="ieee")
    return tl.dot(row_high, col_high, product, input_precision="ieee")


def tiles_of(channels: int, edge: int) -> int:
    """The number of square tiles of that edge in the lower triangle."""
    tile_rows = math.ceil(channels / edge)
    return tile_rows * (tile_rows + 1) // 2


@functools.cache
def processors_of(device: torch.device) -> int:
    """The multiprocessors of a GPU, asked once: the driver takes its time to answer."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Launch:
    """The launch of a kernel for one call: chosen once, used for each part of its tokens.

    Attributes:
        plan: gets the launches.
        kernel: the jitted function.
        config: tiles, warps and stages.
        constants: the compile-time arguments.
        batch: the checked call, with a dimension for its matrices.
        splits_tokens: whether programs share the tokens of a tile where tiles are too few for the
            GPU. Each writes a scratch of its own; those are added up in a fixed order.
    """

    plan: Plan
    kernel: Any
    config: tuning.GramConfig
    constants: Mapping[str, Any]
    batch: GramCall
    splits_tokens: bool = True

    def add(self, count: int, steps: int, **read: Any) -> None:
        """Launches a program for each tile of each matrix, and each block of channels to collect.

        Each matrix has `count` tokens, in `steps` steps; `read` describes them to the kernel.
        """
        matrices, channels = self.batch.out.shape[0], self.batch.x.shape[-1]
        targets = {f"{name}_ptr": target for name, target in self.batch.targets.items()}
        splits = 1
        if self.splits_tokens:
            processors = processors_of(self.batch.out.device)
            tiles = tiles_of(channels, self.config.block_channels)
            splits = tuning.token_splits(matrices * tiles, count, processors)
        written = targets if splits == 1 else self._parts(splits)
        self.plan.launch(
            self.kernel,
            (matrices * self._programs(self.config.block_channels), splits),
            **written,
            **read,
            H=channels,
            matrices=matrices,
            span=math.ceil(steps / splits),
            out_stride=self.batch.out.shape[-1],
            **self.constants,
            STORES=splits > 1,
            num_warps=self.config.warps,
            num_stages=self.config.stages,
        )
        if splits == 1:
            return
        self.plan.launch(
            _add_splits_kernel,
            (matrices * self._programs(_ADDED_EDGE),),
            **targets,
            **{name.replace("_ptr", "_parts_ptr"): part for name, part in written.items()},
            H=channels,
            matrices=matrices,
            splits=splits,
            out_stride=self.batch.out.shape[-1],
            STRIP=STRIP_ROWS,
            BLOCK_H=_ADDED_EDGE,
        )

    def _programs(self, edge: int) -> int:
        """The programs of one matrix with tiles of that edge."""
        channels = self.batch.x.shape[-1]
        collects = self.batch.sums is not None or self.batch.nonfinite is not None
        return tiles_of(channels, edge) + collects * math.ceil(channels / edge)

    def _parts(self, splits: int) -> dict[str, Tensor | None]:
        """Returns the targets of a split launch: for each split a copy in the scratch."""
        return {
            f"{name}_ptr": None
            if target is None
            else self.plan.scratch(name, (splits, *target.shape), target.dtype)
            for name, target in self.batch.targets.items()
        }


def constants(config: tuning.GramConfig, parts: int, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of both kernels but STORES, with products of 1 to 3 `parts`.

    `bench/tools/aot.py` compiles with the same.
    """
    operand = tl.float16 if parts < 3 and dtype == torch.float16 else tl.bfloat16
    return {
        "STRIP": STRIP_ROWS,
        "BLOCK_T": config.block_tokens,
        "BLOCK_H": config.block_channels,
        "GROUP": config.group,
        "CHAIN": max(1, tuning.CHAIN_TOKENS // config.block_tokens),
        "PARTS": parts,
        # The interpreter gets products of bf16 wrong.
        "OPERAND": tl.float32 if interpreting() else operand,
    }
