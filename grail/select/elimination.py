"""Optimal brain surgeon by whole columns: repeatedly drops the channel of least cost.

With M = G + λI, and all remaining weights free to compensate, dropping channel j costs

    ‖W_:j‖² / [M⁻¹]_jj        and then        W ← W − W_:j·[M⁻¹]_j: / [M⁻¹]_jj
                                              M⁻¹ ← M⁻¹ − [M⁻¹]_:j·[M⁻¹]_j: / [M⁻¹]_jj

This is the forward search of `grail.select.greedy` with M⁻¹ instead of S, W instead of W·S and the
least instead of the largest: both run `grail.select.pivots`. To drop D of H channels takes 2·H³
FLOPs for the inverse, then H·D² + 2·D·O·H.

The updates of W are not computed: in any order, with the set D dropped and P kept, they end in
W_P + W_D·M_DP·M_PP⁻¹, which is `grail.fit(..., toward="baseline")` with the same λ.

Heads are dropped one by one, as blocks of channels: first the surplus heads of each key/value
group, then whole groups. A channel without data costs nothing.

Source: Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon"
(NeurIPS 1992), by columns as in Kurtic, Frantar, Alistarh, "ZipLM" (NeurIPS 2023).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grail.algebra import ridge
from grail.algebra.reduction import Selection
from grail.algebra.width import HeadWidth
from grail.select import pivots
from grail.select.view import View

# Of the mean diagonal: with fewer tokens than channels an fp32 Gram has eigenvalues of some -1e-5
# of it.
DAMPING = 3e-5

# The cost of dropping a block of channels, from its columns [O, d] and block of M⁻¹ [d, d].
BlockCost = Callable[[Tensor, Tensor], Tensor]


def eliminate(view: View, damping: float, block_cost: BlockCost) -> Selection:
    """Drops the channels, or heads, of least cost one after another.

    Args:
        damping: λ as a share of the mean diagonal of G.
        block_cost: of a head.
    """
    inverse, weight = _prepared(view, damping)
    width = view.width
    if isinstance(width, HeadWidth):
        return Selection(_kept_heads(inverse, weight.mT, width, block_cost), width.channels)
    dropped = pivots.pivots(inverse, weight, width.channels - width.kept, cheapness)
    kept = torch.ones(width.channels, dtype=torch.bool)
    kept[dropped] = False
    return Selection(kept.nonzero().flatten(), width.channels)


def peak_bytes(view: View) -> int:
    """Returns the peak memory of `eliminate`."""
    h, o, dropped = view.width.channels, len(view.consumer), view.width.channels - view.width.kept
    solving = 3 * h * h  # the identity, the factor of M and its inverse, in addition to G
    # V; the inverse is in G's place.
    searching = h * dropped + pivots.working_numbers(h, dropped, o)
    return 8 * (h * h + h * o + max(solving, searching))


def exact_cost(columns: Tensor, inverse: Tensor) -> Tensor:
    """Returns tr(W_g·([M⁻¹]_gg)⁻¹·W_gᵀ), the squared output error after all others compensate."""
    return (columns @ torch.linalg.inv(inverse) * columns).sum()


def cheapness(squares: Tensor, left: Tensor, first: Tensor) -> Tensor:
    """Returns -‖W_:j‖² / [M⁻¹]_jj by channel, for `pivots`."""
    return -squares / left


def _prepared(view: View, damping: float) -> tuple[Tensor, Tensor]:
    """Returns M⁻¹ [H, H] and Wᵀ [H, O] in fp64, with channels without data decoupled."""
    gram = view.gram.matrix().double()
    weight = gram.new_empty(view.consumer.mT.shape).copy_(view.consumer.mT)
    mean, dead = gram.diagonal().mean(), gram.diagonal() == 0
    gram.diagonal()[dead], weight[dead] = 1, 0
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return ridge.solve(gram, identity, damping * mean).x, weight


def _kept_heads(inverse: Tensor, weight: Tensor, width: HeadWidth, cost: BlockCost) -> Tensor:
    """Returns the channels [K] that stay; overwrites `inverse` and `weight`."""
    channels = torch.arange(width.channels).view(width.groups, width.queries, width.head_dim)
    groups = [list(group) for group in channels]  # by group, the channels of each head

    def drop_cheapest(blocks: list[Tensor]) -> int:
        costs = [float(cost(weight[:, g], inverse[g[:, None], g])) for g in blocks]
        cheapest = costs.index(min(costs))
        g = blocks[cheapest]
        share = torch.linalg.solve(inverse[g[:, None], g], inverse[g])
        weight.sub_(weight[:, g] @ share)
        inverse.sub_(inverse[:, g] @ share)
        return cheapest

    for _ in range(width.groups * (width.queries - width.kept_queries)):
        crowded = [group for group in groups if len(group) > width.kept_queries]
        heads = [(group, i) for group in crowded for i in range(len(group))]
        group, i = heads[drop_cheapest([group[i] for group, i in heads])]
        del group[i]
    for _ in range(width.groups - width.kept_groups):
        del groups[drop_cheapest([torch.cat(group) for group in groups])]
    return torch.cat([head for group in groups for head in group])
