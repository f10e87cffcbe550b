"""Folding of k-means clusters of the producers' rows, as in the GRAIL paper. Needs no data.

Rows of all producers are put side by side, so that channels fold together only when everything
that writes them is alike.

Source: Wang et al., "Forget the data and fine-tuning! Just fold the network to compress" (ICLR
2025).
"""

import torch
from torch import Tensor

from grail.algebra.reduction import Folding, Reduction
from grail.select import View, register
from grail.select.folding import by_first_member, foldable

ITERATIONS = 25


@register("folding-kmeans", folds=True)
def folding_kmeans(view: View) -> Reduction:
    """Folds k-means clusters of the producer rows."""
    return Folding(kmeans(view.rows, foldable(view).kept, view.generator))


def kmeans(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Returns clusters by Lloyd's algorithm with k-means++ seeds; none is empty.

    Args:
        rows: [H, D] fp32.
        clusters: K ≤ H.

    Returns:
        [H] labels in [0, K), numbered by each cluster's first member.
    """
    centres = _plus_plus(rows, clusters, generator)
    labels = torch.full((rows.shape[0],), -1, dtype=torch.int64, device=rows.device)
    for _ in range(ITERATIONS):
        distance = _squared_distance(rows, centres)
        nearest, assigned = distance.min(1)
        _fill_empty(assigned, nearest, clusters)
        if torch.equal(assigned, labels):
            break
        labels = assigned
        centres = torch.zeros_like(centres).index_add_(0, labels, rows)
        centres /= torch.bincount(labels, minlength=clusters)[:, None]
    return by_first_member(labels, clusters)


def _plus_plus(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(rows.shape[0], (), generator=generator))]
    closest = _squared_distance(rows, rows[chosen]).squeeze(1)
    for _ in range(clusters - 1):
        weight = closest.double().cpu()
        weight[chosen] = 0
        if weight.sum() == 0:  # only copies of chosen rows are left: any of them will do
            weight = torch.ones_like(weight)
            weight[chosen] = 0
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        closest = torch.minimum(closest, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen]


def _squared_distance(rows: Tensor, centres: Tensor) -> Tensor:
    cross = rows @ centres.T
    return (rows.square().sum(1)[:, None] - 2 * cross + centres.square().sum(1)).clamp_min_(0)


def _fill_empty(labels: Tensor, distance: Tensor, clusters: int) -> None:
    """Gives each empty cluster the worst-served row of a cluster that can spare one."""
    sizes = torch.bincount(labels, minlength=clusters)
    order = iter(distance.argsort(descending=True).tolist())
    for empty in (sizes == 0).nonzero().flatten().tolist():
        row = next(r for r in order if sizes[labels[r]] > 1)
        sizes[labels[row]] -= 1
        labels[row] = empty
        sizes[empty] = 1
