"""The Gluon kernel for wide 16-bit activations on sm_90: asynchronous products, 128 × 256 tiles.

No launch of the shipped table names it: it is compiled and simulated, but no GPU has run it.

A tile is 128 × 256: copies from L2 to shared memory bound the square tiles of `gram_tma`, and this
shape brings 85 FLOPs a byte where 128 × 128 brings 64. Three groups of warps own a multiprocessor.
One lets the copy engine fill two rings of slots, for the rows and the columns of the tile. The two
others own 64 rows each. The sum of 64 × 256 in fp32 takes 128 registers a thread, so a chain is of
one half of the columns (64 registers): the chain of the left half, then that of the right half with
the same rows, which stay in shared memory. Inside a chain nothing waits for the tensor cores but
the release of the slots before, and one group adds its chain while the other multiplies.

As many programs run as there are multiprocessors, each over every tile that many further on. The
tiles that do not fill another wave are shared: every program takes an equal run of their chains.
The run that begins a tile is added to G, every other goes to a workspace, from where
`_add_shares_kernel` adds them in the order of the tokens. No element of G has two writers at once
and no order depends on time: the same bits every time.

G is added to by reductions in L2 (RED), which keep its old value out of registers. They take
numbers below 2⁻¹²⁶ as 0. NaN and infinite activations always show on the diagonal.

Bytes: 2·T·(128 + 256) from L2 for each tile; the matrix moves 4·H² a launch; shared tiles write and
read 128 KiB a program.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from grail_kernels import gram_tma, tuning
from grail_kernels.gram_blocks import add_collected, processors_of, tile_of
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_plan import Plan
from grail_kernels.tiles import STRIP_ROWS

# The tile, its rows of one group of warps, the columns of a chain, and the tokens of a step.
TILE_ROWS, TILE_COLUMNS = 128, 256
GROUP_ROWS, CHAIN_COLUMNS = 64, 128
STEP_TOKENS = 64
# Blocks of activations as copied: rows of one group of warps, columns of one chain.
ROW_BLOCK, COLUMN_BLOCK = [STEP_TOKENS, GROUP_ROWS], [STEP_TOKENS, CHAIN_COLUMNS]
# Warps and registers a thread: those that multiply keep 192 numbers, one that copies few.
OPTIONS = {"num_warps": 4, "maxnreg": 168}

# Widths that leave every row of G at a multiple of 16 elements: those of other matrices are written
# element by element, and spill.
_ALIGNED_CHANNELS = 16

# Rows of a shared tile that one program adds up; tokens and channels that one collects at a time.
SHARE_ROWS = 16
COLLECT_BLOCK = (64, 32)

# Chains that sharing has to save, and those of a share at least. 132 programs write and read 34 MB,
# which takes an H100's memory 10 µs; a chain takes 3 µs, by its copies from L2 (computed).
_LEAST_SAVED = 3

assert STRIP_ROWS == TILE_COLUMNS  # a pair of tiles is a square of a strip


# Slots of shared memory, 16 KiB each: `GramConfig.stages` hold a step's rows, the others half of a
# step's columns. A chain's rows stay for both halves, so more than its steps are needed.
SLOTS = 14


@dataclass(frozen=True)
class Schedule:
    """The division of a launch's work among programs.

    Attributes:
        programs: that run at once.
        chains: of a tile.
        whole: tiles that each program has for itself.
        shared: tiles that all programs share.
        share: chains of shared tiles that each program takes.
    """

    programs: int
    chains: int
    whole: int
    shared: int
    share: int

    @property
    def arguments(self) -> dict[str, int]:
        """The arguments of the kernel."""
        names = ("chains", "whole", "shared", "share")
        return {name: getattr(self, name) for name in names}

    @property
    def length(self) -> int:
        """Chains of the program with the most."""
        return self.whole * self.chains + (self.share if self.shared else 0)

    @property
    def is_split(self) -> bool:
        """Whether programs share tiles, so that there is a workspace."""
        return bool(self.shared) and self.share < self.chains


def schedule(channels: int, tokens: int, processors: int) -> Schedule:
    """The division of the tiles of [tokens, channels] activations among `processors`."""
    tiles = tiles_of(channels)
    chains = math.ceil(tokens / tuning.CHAIN_TOKENS)
    programs = min(processors, tiles * chains)
    whole, shared = divmod(tiles, programs)
    share = max(math.ceil(shared * chains / programs), min(_LEAST_SAVED, chains))
    if chains - share <= _LEAST_SAVED:
        share = chains
    return Schedule(programs, chains, whole, shared, share)


def tiles_of(channels: int) -> int:
    """The number of tiles of the lower triangle, two for each block of 256 × 256."""
    block_rows = math.ceil(channels / TILE_COLUMNS)
    return block_rows * (block_rows + 1)


@triton.jit
def place_of(tile, H, GROUP: tl.constexpr):
    """The strip of a tile as int64, its first row and its first column."""
    strip, block_column = tile_of(tile // 2, tl.cdiv(H, 256), GROUP)
    row = strip.to(tl.int32) * 256 + tile % 2 * 128
    return strip, row, block_column.to(tl.int32) * 256


@gluon.jit
def turn_of(turn, chains, whole, shared, share):
    """The tile of a program's turn, its first chain there, and how many it adds; 0 for no tile.

    After the whole tiles come the two turns that a share can touch, each of another tile.
    """
    program = gl.program_id(0)
    begin = program * share
    end = gl.minimum(begin + share, shared * chains)
    boundary = (begin // chains + 1) * chains
    first = gl.where(turn == whole, begin, boundary)
    count = gl.where(turn == whole, gl.minimum(end, boundary), end) - first
    is_whole = turn < whole
    tile = gl.where(is_whole, turn, whole) * gl.num_programs(0)
    tile += gl.where(is_whole, program, first // chains)
    return tile, gl.where(is_whole, 0, first % chains), gl.where(is_whole, chains, count)


@gluon.jit
def _copy(
    x_descs,
    H,
    work,
    rings,
    GROUP: gl.constexpr,
    STEPS: gl.constexpr,
    ROW_SLOTS: gl.constexpr,
    COLUMN_SLOTS: gl.constexpr,
):
    """Fills the slots, in the order in which `_multiply` takes them."""
    rows_desc, columns_desc = x_descs
    chains, whole, shared, share = work
    row_blocks, rows_full, rows_free, column_blocks, columns_full, columns_free = rings
    row_step = 0
    column_step = 0
    for turn in range(whole + 2):
        tile, first, count = turn_of(turn, chains, whole, shared, share)
        _, row, column = place_of(tile, H, GROUP)
        for chain in range(first, first + count):
            for half in gl.static_range(2):
                for step in gl.static_range(STEPS):
                    token = (chain * STEPS + step) * 64
                    if half == 0:
                        slot = row_step % ROW_SLOTS
                        mbarrier.wait(rows_free.index(slot), (row_step // ROW_SLOTS & 1) ^ 1)
                        full = rows_full.index(slot)
                        mbarrier.expect(full, 2 * rows_desc.block_type.nbytes)
                        for own in gl.static_range(2):
                            block = row_blocks.index(slot * 2 + own)
                            place = [token, row + own * 64]
                            tma.async_copy_global_to_shared(rows_desc, place, full, block)
                        row_step += 1
                    slot = column_step % COLUMN_SLOTS
                    mbarrier.wait(columns_free.index(slot), (column_step // COLUMN_SLOTS & 1) ^ 1)
                    full = columns_full.index(slot)
                    mbarrier.expect(full, columns_desc.block_type.nbytes)
                    place = [token, column + half * 128]
                    block = column_blocks.index(slot)
                    tma.async_copy_global_to_shared(columns_desc, place, full, block)
                    column_step += 1


@gluon.jit
def put(
    out_ptr,
    shares_ptr,
    total,
    place,
    first_row: gl.constexpr,
    first_column: gl.constexpr,
    H,
    is_first,
    layout: gl.constexpr,
):
    """Adds a part [64, columns] of a tile to G, or leaves it in the program's workspace.

    `place` is the strip, the row and the column of the tile, where the part has its own first ones.
    """
    strip, row, column = place
    row += first_row
    column += first_column
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    # Above the diagonal of its strip lies scratch, so the whole tile is ours. Offsets inside it fit
    # 32 bits, and are made of numbers of this turn: others would be computed once and spilled.
    narrow = strip.to(gl.int32)
    stride = gl.where(is_first, gl.minimum((narrow + 1) * 256, H), 256)
    offsets = rows * stride + columns
    if is_first:
        tile_ptr = out_ptr + strip * (strip + 1) * 32768 + (row - narrow * 256) * stride + column
        mask = (row + rows < H) & (column + columns < H)
        gl.atomic_add(tile_ptr + offsets, total, mask=mask, sem="relaxed")
    else:
        tile_ptr = shares_ptr + gl.program_id(0) * 32768 + first_row * 256 + first_column
        gl.store(tile_ptr + offsets, total)


@gluon.jit
def _multiply(
    out_ptr,
    shares_ptr,
    H,
    work,
    rings,
    OWN: gl.constexpr,
    GROUP: gl.constexpr,
    STEPS: gl.constexpr,
    ROW_SLOTS: gl.constexpr,
    COLUMN_SLOTS: gl.constexpr,
):
    """The sums of 64 rows of each tile of a program, by one group of warps."""
    chains, whole, shared, share = work
    row_blocks, rows_full, rows_free, column_blocks, columns_full, columns_free = rings
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row_step = 0  # of the chain's first rows
    column_step = 0
    for turn in range(whole + 2):
        _, _, count = turn_of(turn, chains, whole, shared, share)
        left = gl.zeros([64, 128], gl.float32, layout)
        right = gl.zeros([64, 128], gl.float32, layout)
        for _ in range(count):
            for half in gl.static_range(2):
                chain = gl.zeros([64, 128], gl.float32, layout)
                for step in gl.static_range(STEPS):
                    row_slot = (row_step + step) % ROW_SLOTS
                    column_slot = column_step % COLUMN_SLOTS
                    if half == 0:
                        full = rows_full.index(row_slot)
                        mbarrier.wait(full, (row_step + step) // ROW_SLOTS & 1)
                    mbarrier.wait(columns_full.index(column_slot), column_step // COLUMN_SLOTS & 1)
                    own_rows = row_blocks.index(row_slot * 2 + OWN).permute((1, 0))
                    chain = warpgroup_mma(
                        own_rows,
                        column_blocks.index(column_slot),
                        chain,
                        use_acc=step > 0,
                        is_async=True,
                    )
                    if step > 0:  # the products of the step before are done
                        chain = warpgroup_mma_wait(1, deps=(chain,))
                        mbarrier.arrive(columns_free.index((column_step - 1) % COLUMN_SLOTS))
                        if half == 1:
                            mbarrier.arrive(rows_free.index((row_step + step - 1) % ROW_SLOTS))
                    column_step += 1
                chain = warpgroup_mma_wait(0, deps=(chain,))
                mbarrier.arrive(columns_free.index((column_step - 1) % COLUMN_SLOTS))
                if half == 0:
                    left += chain
                else:
                    mbarrier.arrive(rows_free.index((row_step + STEPS - 1) % ROW_SLOTS))
                    right += chain
            row_step += STEPS
        if count > 0:
            # Found again: kept over the loop it would be spilled.
            tile, first, _ = turn_of(turn, chains, whole, shared, share)
            place = place_of(tile, H, GROUP)
            put(out_ptr, shares_ptr, left, place, OWN * 64, 0, H, first == 0, layout)
            put(out_ptr, shares_ptr, right, place, OWN * 64, 128, H, first == 0, layout)


@gluon.jit
def make_ring(blocks: gl.constexpr, desc, SLOTS: gl.constexpr):
    """Slots of so many blocks each, and the barriers that say which are full and which free.

    The copy engine fills a slot; the two groups that multiply free it.
    """
    block: gl.constexpr = desc.block_type.shape
    shape: gl.constexpr = [blocks * SLOTS, block[0], block[1]]
    slots = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    return slots, full, free


@gluon.jit(do_not_specialize=["chains", "whole", "shared", "share"])
def _gram_wide_kernel(
    out_ptr,  # [P]
    shares_ptr,  # [programs, 128, 256]; what is not split does not touch it
    x_rows_desc,  # [tokens, H] in blocks of rows
    x_columns_desc,  # the same in blocks of columns
    H,
    chains,
    whole,
    shared,
    share,
    GROUP: gl.constexpr,
    STEPS: gl.constexpr,
    ROW_SLOTS: gl.constexpr,
    COLUMN_SLOTS: gl.constexpr,
):
    """All tiles of one matrix; `Schedule` names the numbers."""
    row_blocks, rows_full, rows_free = make_ring(2, x_rows_desc, ROW_SLOTS)
    column_blocks, columns_full, columns_free = make_ring(1, x_columns_desc, COLUMN_SLOTS)
    rings = (row_blocks, rows_full, rows_free, column_blocks, columns_full, columns_free)
    x_descs = (x_rows_desc, x_columns_desc)
    work = (chains, whole, shared, share)
    gl.warp_specialize(
        [
            (
                _multiply,
                (out_ptr, shares_ptr, H, work, rings, 0, GROUP, STEPS, ROW_SLOTS, COLUMN_SLOTS),
            ),
            (
                _multiply,
                (out_ptr, shares_ptr, H, work, rings, 1, GROUP, STEPS, ROW_SLOTS, COLUMN_SLOTS),
            ),
            (_copy, (x_descs, H, work, rings, GROUP, STEPS, ROW_SLOTS, COLUMN_SLOTS)),
        ],
        [4, 1],
        [240, 24],
    )


@triton.jit(do_not_specialize=["chains", "whole_tiles", "share"])
def _add_shares_kernel(
    out_ptr,  # [P]
    shares_ptr,  # [programs, 128, 256]
    H,
    chains,
    whole_tiles,
    share,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds to ROWS rows of a shared tile what programs left of it, in the order of its tokens."""
    strip, row, column = place_of(whole_tiles + tl.program_id(0), H, GROUP)
    first_row = tl.program_id(1) * ROWS
    rows = first_row + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, 256)[None, :]
    begin = tl.program_id(0) * chains
    total = tl.zeros([ROWS, 256], tl.float32)
    # The program that begins the tile added to G itself.
    for program in range(begin // share + 1, tl.cdiv(begin + chains, share)):
        total += tl.load(shares_ptr + program * 32768 + (rows * 256 + columns))
    narrow = strip.to(tl.int32)
    stride = tl.minimum((narrow + 1) * 256, H)
    tile_ptr = out_ptr + strip * (strip + 1) * 32768 + (row - narrow * 256) * stride + column
    offsets = rows * stride + columns
    mask = (row + rows < H) & (column + columns < H)
    stored = tl.load(tile_ptr + offsets, mask=mask, other=0.0)
    tl.store(tile_ptr + offsets, stored + total, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _collect_kernel(
    sums_ptr,  # [H], or None
    nonfinite_ptr,  # [H], or None
    x_ptr,  # [tokens, H]
    H,
    tokens,
    stride,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Adds Σx and the number of NaN and infinite values of a block of channels."""
    channels = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    fits = channels < H
    sums = tl.zeros([BLOCK_H], tl.float32)
    counts = tl.zeros([BLOCK_H], tl.int32)
    for first in range(0, tokens, BLOCK_T):
        own = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (own < tokens)[:, None] & fits[None, :]
        x = tl.load(x_ptr + own[:, None] * stride + channels[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        counts += tl.sum((~(tl.abs(x) < float("inf"))).to(tl.int32), axis=0)
        sums += tl.sum(x, axis=0)
    add_collected(sums_ptr, nonfinite_ptr, 0, sums, counts, channels, fits, False)


def takes(part: GramCall) -> bool:
    """Returns whether this kernel is for the part: its GPU, 16 bits, and widths that rows align."""
    plain = part.weights is None and part.gate is None and part.offsets is None
    return (
        plain
        and tuning.architecture_of(part.out.device) == "sm_90"
        and part.x.dtype != torch.float32
        and part.x.shape[-1] % _ALIGNED_CHANNELS == 0
    )


def add(plan: Plan, parts: list[GramCall], config: tuning.GramConfig) -> None:
    """Adds launches of the kernel for each matrix of each part of a call."""
    for matrix in matrices(plan, parts):
        work, channels = schedule_of(matrix), matrix.x.shape[-1]
        blocks = {"x_rows_desc": ROW_BLOCK, "x_columns_desc": COLUMN_BLOCK}
        plan.launch(
            _gram_wide_kernel,
            (work.programs,),
            out_ptr=matrix.out,
            shares_ptr=workspace_of(plan, work),
            **{name: descriptor(matrix.x, block) for name, block in blocks.items()},
            H=channels,
            **work.arguments,
            **constants(config),
            **OPTIONS,
        )
        add_shares(plan, matrix, work, config.group)


def matrices(plan: Plan, parts: list[GramCall]) -> Iterator[GramCall]:
    """The parts of a call matrix by matrix, with x [T, H] that the copy engine can read.

    Their sums and counts of values that are not finite are collected before.
    """
    for part in parts:
        for laid in gram_tma.laid_out(plan, part.x, part.mask):
            for index, x in enumerate(laid.unbind(0)):
                matrix = part.at(index, *part.targets)._replace(x=x, mask=None)
                if matrix.sums is not None or matrix.nonfinite is not None:
                    _collect(plan, matrix)
                yield matrix


def _collect(plan: Plan, matrix: GramCall) -> None:
    tokens, channels = matrix.x.shape
    block_tokens, block_channels = COLLECT_BLOCK
    plan.launch(
        _collect_kernel,
        (math.ceil(channels / block_channels),),
        sums_ptr=matrix.sums,
        nonfinite_ptr=matrix.nonfinite,
        x_ptr=matrix.x,
        H=channels,
        tokens=tokens,
        stride=matrix.x.stride(0),
        BLOCK_T=block_tokens,
        BLOCK_H=block_channels,
    )


def schedule_of(matrix: GramCall) -> Schedule:
    """The division of the work on a matrix among the multiprocessors of its GPU."""
    tokens, channels = matrix.x.shape
    return schedule(channels, tokens, processors_of(matrix.out.device))


def workspace_of(plan: Plan, work: Schedule) -> Tensor:
    """A tile for each program, [programs, 128, 256] fp32; where none shares tiles, one unused."""
    programs = work.programs if work.is_split else 1
    return plan.scratch("shares", (programs, TILE_ROWS, TILE_COLUMNS), torch.float32)


def add_shares(plan: Plan, matrix: GramCall, work: Schedule, group: int) -> None:
    """Adds the launch that adds what programs left in the workspace to G."""
    if not work.is_split:
        return
    plan.launch(
        _add_shares_kernel,
        (work.shared, TILE_ROWS // SHARE_ROWS),
        out_ptr=matrix.out,
        shares_ptr=workspace_of(plan, work),
        H=matrix.x.shape[-1],
        chains=work.chains,
        whole_tiles=work.whole * work.programs,
        share=work.share,
        GROUP=group,
        ROWS=SHARE_ROWS,
    )


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """The description of `x` [T, H] to the copy engine, in blocks of [tokens, channels]."""
    layout = layout_of(block, x.dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def layout_of(block: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The swizzled layout of such a block in shared memory."""
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for(block, kind)


def constants(config: tuning.GramConfig) -> dict[str, int]:
    """The compile-time arguments; `bench/tools/aot.py` compiles with the same."""
    return {
        "GROUP": config.group,
        "STEPS": tuning.CHAIN_TOKENS // STEP_TOKENS,
        "ROW_SLOTS": config.stages,
        "COLUMN_SLOTS": SLOTS - config.stages,
    }
