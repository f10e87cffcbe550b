"""A trial beside `grail_kernels.gram_wide`: the same tiles, one chain for all tokens of a launch.

A tensor core truncates each of its additions, so the error grows with the tokens of a chain: 257
eps over 8192 of them, where chains of 256 have 6. The accumulator of 64 × 256 is all that a group
of warps keeps, and a product is twice as wide. If `gram_wide` is within 5% of this kernel, exact
chains cost nothing; else they are worth a mode of their own. With COPIES_ONLY nothing is
multiplied: the time is that of the copies from L2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from grail_kernels import gram_wide, tuning
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_plan import Plan
from grail_kernels.gram_wide import ROW_BLOCK, make_ring, place_of, put, turn_of

COLUMN_BLOCK = [gram_wide.STEP_TOKENS, gram_wide.TILE_COLUMNS]
SLOTS = 4


@gluon.jit
def _copy(
    rows_desc,
    columns_desc,
    H,
    work,
    rings,
    GROUP: gl.constexpr,
    STEPS: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Fills the slots, each with the rows and the columns of a step."""
    chains, whole, shared, share = work
    row_blocks, column_blocks, full, free = rings
    done = 0
    for turn in range(whole + 2):
        tile, first, count = turn_of(turn, chains, whole, shared, share)
        _, row, column = place_of(tile, H, GROUP)
        for step in range(first * STEPS, (first + count) * STEPS):
            slot = done % SLOTS
            mbarrier.wait(free.index(slot), (done // SLOTS & 1) ^ 1)
            ready = full.index(slot)
            rows_bytes: gl.constexpr = 2 * rows_desc.block_type.nbytes
            mbarrier.expect(ready, rows_bytes + columns_desc.block_type.nbytes)
            for own in gl.static_range(2):
                block = row_blocks.index(slot * 2 + own)
                place = [step * 64, row + own * 64]
                tma.async_copy_global_to_shared(rows_desc, place, ready, block)
            block = column_blocks.index(slot)
            tma.async_copy_global_to_shared(columns_desc, [step * 64, column], ready, block)
            done += 1


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
    SLOTS: gl.constexpr,
    COPIES_ONLY: gl.constexpr,
):
    """The sums of 64 rows of each tile of a program, by one group of warps."""
    chains, whole, shared, share = work
    row_blocks, column_blocks, full, free = rings
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    done = 0
    for turn in range(whole + 2):
        _, _, count = turn_of(turn, chains, whole, shared, share)
        if count > 0:
            total = gl.zeros([64, 256], gl.float32, layout)
            for step in range(count * STEPS):
                slot = done % SLOTS
                mbarrier.wait(full.index(slot), done // SLOTS & 1)
                if COPIES_ONLY:
                    mbarrier.arrive(free.index(slot))
                else:
                    own_rows = row_blocks.index(slot * 2 + OWN).permute((1, 0))
                    columns = column_blocks.index(slot)
                    total = warpgroup_mma(own_rows, columns, total, use_acc=step > 0, is_async=True)
                    total = warpgroup_mma_wait(1, deps=(total,))
                    mbarrier.arrive(free.index((done + SLOTS - 1) % SLOTS), pred=step > 0)
                done += 1
            if not COPIES_ONLY:
                total = warpgroup_mma_wait(0, deps=(total,))
                mbarrier.arrive(free.index((done + SLOTS - 1) % SLOTS))
                tile, first, _ = turn_of(turn, chains, whole, shared, share)
                place = place_of(tile, H, GROUP)
                put(out_ptr, shares_ptr, total, place, OWN * 64, 0, H, first == 0, layout)


@gluon.jit(do_not_specialize=["chains", "whole", "shared", "share"])
def _one_chain_kernel(
    out_ptr,  # [P]
    shares_ptr,  # [programs, 128, 256]
    x_rows_desc,
    x_columns_desc,
    H,
    chains,
    whole,
    shared,
    share,
    GROUP: gl.constexpr,
    STEPS: gl.constexpr,
    SLOTS: gl.constexpr,
    COPIES_ONLY: gl.constexpr,
):
    """All tiles of one matrix."""
    row_blocks, full, free = make_ring(2, x_rows_desc, SLOTS)
    column_blocks, _, _ = make_ring(1, x_columns_desc, SLOTS)
    rings = (row_blocks, column_blocks, full, free)
    work = (chains, whole, shared, share)
    gl.warp_specialize(
        [
            (
                _multiply,
                (out_ptr, shares_ptr, H, work, rings, 0, GROUP, STEPS, SLOTS, COPIES_ONLY),
            ),
            (
                _multiply,
                (out_ptr, shares_ptr, H, work, rings, 1, GROUP, STEPS, SLOTS, COPIES_ONLY),
            ),
            (_copy, (x_rows_desc, x_columns_desc, H, work, rings, GROUP, STEPS, SLOTS)),
        ],
        [4, 1],
        [240, 24],
    )


def constants(config: tuning.GramConfig) -> dict[str, int | bool]:
    """The compile-time arguments; no stages mean copies alone."""
    steps = tuning.CHAIN_TOKENS // gram_wide.STEP_TOKENS
    fixed = {"GROUP": config.group, "STEPS": steps, "SLOTS": config.stages or SLOTS}
    return fixed | {"COPIES_ONLY": not config.stages}


def takes(part: GramCall) -> bool:
    """As `gram_wide.takes`."""
    return gram_wide.takes(part)


def add(plan: Plan, parts: list[GramCall], config: tuning.GramConfig) -> None:
    """As `gram_wide.add`."""
    for matrix in gram_wide.matrices(plan, parts):
        work = gram_wide.schedule_of(matrix)
        plan.launch(
            _one_chain_kernel,
            (work.programs,),
            out_ptr=matrix.out,
            shares_ptr=gram_wide.workspace_of(plan, work),
            x_rows_desc=gram_wide.descriptor(matrix.x, ROW_BLOCK),
            x_columns_desc=gram_wide.descriptor(matrix.x, COLUMN_BLOCK),
            H=matrix.x.shape[-1],
            **work.arguments,
            **constants(config),
            **gram_wide.OPTIONS,
        )
        if config.stages:
            gram_wide.add_shares(plan, matrix, work, config.group)
