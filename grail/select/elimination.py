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
        inverse, weight, _ = _prepared(views, damping, in_parallel)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns M⁻¹ [E, H, H] and Wᵀ [E, H, O] in fp64, with channels without data decoupled.

    G is scaled by a power of two to a mean diagonal in [1, 4), so that fp32 holds M⁻¹: its diagonal
    lies between 1/(4·H) and 1/λ. The third [E] is what G was divided by.
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
        inverse = ridge.solve(gram, identity.expand_as(gram), damping * mean / unit).x
    return inverse, weight, unit


def errors_of_heads(view: View, widths: Sequence[HeadWidth]) -> list[float]:
    """Returns ‖W·X − W'·R·X‖² of the best W' at each width, with the heads that `greedy` keeps.

    It is the sum of the costs of all that is dropped, with G damped by `DAMPING`. Widths with
    equally many queries in a group share one search.
    """
    found: dict[HeadWidth, float] = {}
    with pivots.one_thread() as in_parallel:
        inverse, weight, unit = _prepared([view], DAMPING, in_parallel)
        for kept_queries in {width.kept_queries for width in widths}:
            of_search = [width for width in widths if width.kept_queries == kept_queries]
            heads = _Heads(
                inverse[0].clone(), weight[0].mT.clone(), of_search[0], exact_cost, in_parallel
            )
            for width in sorted(of_search, key=lambda width: -width.kept_groups):
                heads.drop_to(width)
                found[width] = heads.lost * float(unit)
    return [found[width] for width in widths]


def _without_heads(view: View, damping: float, block_cost: BlockCost) -> Selection:
    """Drops the heads of one site."""
    assert isinstance(view.width, HeadWidth)
    with pivots.one_thread() as in_parallel:
        inverse, weight, _ = _prepared([view], damping, in_parallel)
        heads = _Heads(inverse[0], weight[0].mT, view.width, block_cost, in_parallel)
        heads.drop_to(view.width)
    return Selection(heads.kept, view.width.channels)


class _Heads:
    """The heads of one site while they are dropped one after another.

    Args:
        inverse: M⁻¹ [H, H]; overwritten.
        weight: W [O, H]; overwritten.
        width: any of the site.
        cost: of dropping a head or a group.

    `lost`: the sum of the costs so far.
    """

    def __init__(
        self,
        inverse: Tensor,
        weight: Tensor,
        width: HeadWidth,
        cost: BlockCost,
        in_parallel: pivots.InParallel,
    ):
        self._inverse, self._weight, self._cost = inverse, weight, cost
        self._in_parallel, self.lost = in_parallel, 0.0
        channels = torch.arange(width.channels).view(width.groups, width.queries, width.head_dim)
        self._groups = [list(group) for group in channels]  # by group, the channels of each head

    @property
    def kept(self) -> Tensor:
        """The channels [K] that stay."""
        return torch.cat([head for group in self._groups for head in group])

    def drop_to(self, width: HeadWidth) -> None:
        """Drops the surplus heads of each group, then whole groups, down to a width."""
        while crowded := [group for group in self._groups if len(group) > width.kept_queries]:
            heads = [(group, i) for group in crowded for i in range(len(group))]
            group, i = heads[self._drop_cheapest([group[i] for group, i in heads])]
            del group[i]
        while len(self._groups) > width.kept_groups:
            del self._groups[self._drop_cheapest([torch.cat(group) for group in self._groups])]

    def _drop_cheapest(self, blocks: list[Tensor]) -> int:
        """Drops the block of channels of least cost; returns its number."""
        inverse, weight = self._inverse, self._weight
        costs = [float(self._cost(weight[:, g], inverse[g[:, None], g])) for g in blocks]
        cheapest = costs.index(min(costs))
        self.lost += costs[cheapest]
        g = blocks[cheapest]
        with self._in_parallel(2 * inverse.numel() * len(g)):
            share = torch.linalg.solve(inverse[g[:, None], g], inverse[g])
            weight.sub_(weight[:, g] @ share)
            inverse.sub_(inverse[:, g] @ share)
        return cheapest
