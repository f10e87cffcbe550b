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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grail.algebra import ridge
from grail.algebra.reduction import Reduction, Selection
from grail.algebra.width import HeadWidth
from grail.select import pivots
from grail.select.view import View

# Of the mean diagonal: with fewer tokens than channels an fp32 Gram has eigenvalues of some -1e-5
# of it.
DAMPING = 3e-5

# The cost of dropping a block of channels, from its columns [O, d] and block of M⁻¹ [d, d].
BlockCost = Callable[[Tensor, Tensor], Tensor]


def eliminate(views: Sequence[View], damping: float, block_cost: BlockCost) -> list[Reduction]:
    """Drops the channels, or heads, of least cost one after another.

    Args:
        views: sites of equal sizes, whose channels are dropped as one batch.
        damping: λ as a share of the mean diagonal of G.
        block_cost: of a head.
    """
    width = views[0].width
    if isinstance(width, HeadWidth):
        return [_without_heads(view, damping, block_cost) for view in views]
    with pivots.one_thread() as in_parallel:
        inverse, weight = _prepared(views, damping, in_parallel)
        inverse, weight = inverse.float(), weight.float()
    dropped = pivots.pivots(inverse, weight, width.channels - width.kept, least=True)
    kept = torch.ones(len(views), width.channels, dtype=torch.bool).scatter_(1, dropped, False)
    return [Selection(mask, width.channels) for mask in kept]


def peak_bytes(view: View) -> int:
    """Returns the peak memory of `eliminate` for one site."""
    h, o, dropped = view.width.channels, len(view.consumer), view.width.channels - view.width.kept
    solving = 4 * h * h  # G, the identity, the factor of M and its inverse
    if isinstance(view.width, HeadWidth):
        return 8 * (solving + h * o)
    # The fp32 inverse with the fp64 one, or with the search.
    after = max(3 * h * h, h * h + pivots.searching(h, dropped, o))
    return max(8 * (solving + h * o), 4 * (after + h * o))


def exact_cost(columns: Tensor, inverse: Tensor) -> Tensor:
    """Returns tr(W_g·([M⁻¹]_gg)⁻¹·W_gᵀ), the squared output error after all others compensate."""
    return (columns @ torch.linalg.inv(inverse) * columns).sum()


def _prepared(
    views: Sequence[View], damping: float, in_parallel: pivots.InParallel
) -> tuple[Tensor, Tensor]:
    """Returns M⁻¹ [E, H, H] and Wᵀ [E, H, O] in fp64, with channels without data decoupled.

    G is scaled by a power of two to a mean diagonal in [1, 4), so that fp32 holds M⁻¹: its diagonal
    lies between 1/(4·H) and 1/λ.
    """
    gram = pivots.stacked([view.gram.matrix() for view in views]).double()
    weight = pivots.consumers(views, gram)
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    unit = pivots.power_below_root(mean).double().square()
    gram /= unit[:, None, None]
    dead = gram.diagonal(dim1=1, dim2=2) == 0
    gram.diagonal(dim1=1, dim2=2).masked_fill_(dead, 1)
    weight.masked_fill_(dead[:, :, None], 0)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    with in_parallel(2 * gram.numel() * gram.shape[1]):
        return ridge.solve(gram, identity.expand_as(gram), damping * mean / unit).x, weight


def _without_heads(view: View, damping: float, block_cost: BlockCost) -> Selection:
    """Drops the heads of one site."""
    assert isinstance(view.width, HeadWidth)
    with pivots.one_thread() as in_parallel:
        inverse, weight = _prepared([view], damping, in_parallel)
        kept = _kept_heads(inverse[0], weight[0].mT, view.width, block_cost, in_parallel)
    return Selection(kept, view.width.channels)


def _kept_heads(
    inverse: Tensor,
    weight: Tensor,
    width: HeadWidth,
    cost: BlockCost,
    in_parallel: pivots.InParallel,
) -> Tensor:
    """Returns the channels [K] that stay; overwrites `inverse` and `weight`."""
    channels = torch.arange(width.channels).view(width.groups, width.queries, width.head_dim)
    groups = [list(group) for group in channels]  # by group, the channels of each head

    def drop_cheapest(blocks: list[Tensor]) -> int:
        costs = [float(cost(weight[:, g], inverse[g[:, None], g])) for g in blocks]
        cheapest = costs.index(min(costs))
        g = blocks[cheapest]
        with in_parallel(2 * inverse.numel() * len(g)):
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
