"""The search that `greedy` runs forward and `elimination` backward, by blocks of channels.

Each chosen channel j takes its part out of all the others, for a symmetric S [H, H] and A [O, H]:

    S ← S − S_:j S_j: / S_jj        A ← A − A_:j S_j: / S_jj

S itself is never rewritten: a pivoted partial Cholesky S ≈ V Vᵀ gives the columns that are asked
for, S_:j − V V_jᵀ, and A is corrected by the outer products of V. To work with matrices, not
vectors, the order is exact among the candidates only, those of best score, and all channels are
looked at again after a block of choices. For N channels with p candidates for a block of b:
H·N²·p/b + 2·N·O·H FLOPs in matrix products, and N passes over [H, p].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Channels that are chosen between two looks at all of them, and how many times as many of the best
# are candidates for that.
BLOCK, POOL = 16, 8

# From A [O, n], diag S [n] and what diag S was at first [n]: a score [n], the highest is next.
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def flops(channels: int, count: int, outputs: int) -> int:
    """Of the matrix products of a search for `count` of H channels with O outputs."""
    return channels * count * (count * POOL + 2 * outputs)


def working_numbers(channels: int, outputs: int) -> int:
    """The most fp64 numbers that a search holds beside S, A and V."""
    h, o, pool = channels, outputs, min(POOL * BLOCK, channels)
    # Candidates are gathered while those of the block before are still there, or A is corrected.
    return max(pool * (4 * h + o), h * o + pool * (h + o) + 2 * BLOCK * o)


def pivots(
    matrix: Tensor, outputs: Tensor, count: int, score: Score, block: int = BLOCK
) -> list[int]:
    """Up to `count` channels in the order of their choice; of equals the first.

    Stops before a channel whose score is -inf.

    Args:
        matrix: S [H, H] fp64.
        outputs: A [O, H] fp64; overwritten.
        block: how many are chosen between two looks at all channels; 1 is the exact greedy order.
    """
    first = matrix.diagonal()
    left = first.clone()  # diag S
    factor = matrix.new_zeros(matrix.shape[0], count)  # V
    chosen = torch.zeros_like(first, dtype=torch.bool)
    order: list[int] = []

    def scored(part: Tensor, index: Tensor | slice) -> Tensor:
        return score(part, left[index], first[index]).where(~chosen[index], -math.inf)

    while len(order) < count:
        start = len(order)
        ranked = scored(outputs, slice(None)).argsort(descending=True, stable=True)
        pool = ranked[: POOL * block]
        columns = matrix[:, pool] - factor[:, :start] @ factor[pool, :start].T
        candidates, corrections = outputs[:, pool], []
        while len(order) < min(start + block, count):
            values = scored(candidates, pool)
            best = int(values.argmax())
            if values[best] == -math.inf:
                break
            j = int(pool[best])
            column, output = (t[:, best] / left[j].sqrt() for t in (columns, candidates))
            columns -= torch.outer(column, column[pool])
            candidates -= torch.outer(output, column[pool])
            left = (left - column.square()).clamp_min(0)
            factor[:, len(order)] = column
            corrections.append(output)
            chosen[j] = True
            order.append(j)
        if not corrections:
            break
        outputs -= torch.stack(corrections, 1) @ factor[:, start : len(order)].T
    return order
