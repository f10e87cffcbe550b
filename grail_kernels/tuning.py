"""Which tile sizes and how many warps each kernel launches with: a static table, no autotuning.

Every row is compiled ahead of time for every architecture by `bench/aot.py`, whose record says
that it fits shared memory and spills two dozen registers at most. No row has been timed on a GPU
yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Tokens that one fp32 accumulator takes before it is added to the Gram matrix: a tensor core that
# truncates biases the diagonal by 1e-5 over so many and by 1e-3 over a million.
FLUSH_TOKENS = 8192

# Programs per multiprocessor at which a launch stops splitting the tokens of small matrices.
_PROGRAMS_PER_PROCESSOR = 4

# A split shorter than this costs more to write and add up than it computes.
_FEWEST_SPLIT_TOKENS = 1024


@dataclass(frozen=True)
class GramConfig:
    """How the Gram kernel is launched.

    Attributes:
        block_tokens: tokens that one step of a program multiplies.
        block_channels: edge of the square tile that a program owns; divides `tiles.BLOCK`.
        group: tile rows that neighbouring programs share, so that their tokens meet in the cache.
        warps, stages: as Triton takes them.
    """

    block_tokens: int
    block_channels: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class AbsorbConfig:
    """How the absorb kernel is launched.

    Attributes:
        block_outputs, block_kept: the tile of the result that a program owns. Every element of G
            that it gathers and splits serves `block_outputs` rows.
        block_dropped: dropped channels that one step of a program multiplies.
        group: tile rows that neighbouring programs share, so that W and G meet in the cache.
        warps, stages: as Triton takes them.
    """

    block_outputs: int
    block_kept: int
    block_dropped: int
    group: int
    warps: int
    stages: int


_PLAIN = GramConfig(64, 128, 8, 8, 3)
_NARROW = GramConfig(64, 64, 1, 4, 3)
# Six products of bf16 parts, which live in registers.
_PARTS = GramConfig(32, 64, 8, 4, 2)
# Four blocks in shared memory where the others have two.
_GATED = GramConfig(32, 128, 8, 8, 3)
# One 64-bit address an element: a larger tile would spill a kilobyte of them.
_SCATTERED = GramConfig(32, 64, 8, 8, 2)
_SCATTERED_PARTS = GramConfig(16, 64, 8, 8, 2)

_ABSORB = AbsorbConfig(128, 128, 32, 8, 8, 3)
# Six products where a bf16 weight takes three.
_ABSORB_PARTS = AbsorbConfig(128, 64, 32, 8, 8, 3)


def gram_config(
    dtype: torch.dtype,
    channels: int,
    *,
    weighted: bool = False,
    gated: bool = False,
    aligned: bool = True,
) -> GramConfig:
    """The launch of the Gram kernel for one call.

    Args:
        dtype: of the activations.
        channels: H.
        weighted: whether tokens have weights; products are then split like those of fp32.
        gated: whether activations are multiplied from two tensors on the way in.
        aligned: whether 16 bytes of activations can be read at once.
    """
    if not multiplies_natively(dtype, weighted):
        return _PARTS if aligned else _SCATTERED_PARTS
    if not aligned:
        return _SCATTERED
    if gated:
        return _GATED
    return _PLAIN if channels > 64 else _NARROW


def absorb_config(dtype: torch.dtype) -> AbsorbConfig:
    """The launch of the absorb kernel for weights of this dtype."""
    return _ABSORB if dtype == torch.bfloat16 else _ABSORB_PARTS


def multiplies_natively(dtype: torch.dtype, weighted: bool) -> bool:
    """Whether tensor cores take the activations as they are, not in three bf16 parts."""
    return dtype != torch.float32 and not weighted


def token_splits(tiles: int, tokens: int, processors: int) -> int:
    """Into how many parts the tokens are cut so that a small matrix still fills the GPU."""
    wanted = _PROGRAMS_PER_PROCESSOR * processors // tiles
    return max(1, min(wanted, tokens // _FEWEST_SPLIT_TOKENS))
