"""Folding by Ward's clusters: merge next the two clusters whose joint mean serves them best.

"folding-agglomerative" merges channels whose producer rows are alike, "folding-activations" those
whose activations are: the Gram holds the inner products of the channels as points in token space,
so |x_h − x_k|² = G_hh − 2 G_hk + G_kk, and nothing else is asked of the data. Ward's criterion is
the loss of folding itself, Σ_h |x_h − mean of its cluster|², and needs no seeds: the same Gram
gives the same clusters.

Joining i and j raises that loss by half of their Ward distance d_ij, of clusters of n channels

    d_ij = 2 n_i n_j / (n_i + n_j) · |mean_i − mean_j|²
    d_k,ij = ((n_i + n_k) d_ik + (n_j + n_k) d_jk − n_k d_ij) / (n_i + n_j + n_k)

Every chain of nearest neighbours ends in a pair that can be joined at once: O(H²) time and memory,
in fp64, on the CPU.

Source: Ward, "Hierarchical grouping to optimize an objective function" (JASA 1963); Lance, Williams
(Computer Journal 1967) for the update; Murtagh (Computer Journal 1983) for the chain.
"""

import math

import torch
from torch import Tensor

from grail.algebra.reduction import Folding, Reduction
from grail.select import View, reduces
from grail.select.folding import by_first_member, foldable


def _peak_bytes_of_rows(view: View) -> int:
    """Returns the most memory that clusters of rows take: the rows [H, D], and products in fp64."""
    values, h = sum(producer.numel() for producer in view.producers), view.width.channels
    return max(12 * values, 8 * values + 8 * h * h)


def _peak_bytes_of_gram(view: View) -> int:
    """Returns the most memory that clusters of activations take: G in fp32 and in fp64."""
    return 12 * view.width.channels**2


@reduces("folding-agglomerative", peak_bytes=_peak_bytes_of_rows, folds=True)
def folding_agglomerative(view: View) -> Reduction:
    """Ward's clusters of the producer rows."""
    rows = view.rows.double()
    return Folding(ward(rows @ rows.T, foldable(view).kept))


@reduces("folding-activations", peak_bytes=_peak_bytes_of_gram, folds=True)
def folding_activations(view: View) -> Reduction:
    """Ward's clusters of the activations."""
    return Folding(ward(view.gram.matrix().double(), foldable(view).kept))


def ward(products: Tensor, clusters: int) -> Tensor:
    """Ward's clusters of H points.

    Args:
        products: [H, H] fp64, inner products of the points; overwritten.
        clusters: K ≤ H.

    Returns:
        [H] labels in [0, K), numbered by each cluster's first member.
    """
    energy = products.diagonal().clone()
    distance = products.mul_(-2).add_(energy).add_(energy[:, None]).clamp_min_(0).cpu()
    label = torch.arange(len(energy))
    merges = sorted(_merges(distance), key=lambda merge: merge[0])  # stable: of equals the first
    for _, i, j in merges[: len(energy) - clusters]:
        label[label == label[i]] = label[j].item()
    numbers = label.unique(return_inverse=True)[1]
    return by_first_member(numbers, clusters)


def _merges(distance: Tensor) -> list[tuple[float, int, int]]:
    """All joins by distance, and by one channel of each cluster; overwrites `distance` [H, H]."""
    size = torch.ones(len(distance), dtype=distance.dtype)
    distance.fill_diagonal_(math.inf)
    merges: list[tuple[float, int, int]] = []
    chain: list[int] = []
    while len(merges) < len(distance) - 1:
        if not chain:
            chain = [int(size.argmax())]
        i = chain[-1]
        j = int(distance[i].argmin())
        if len(chain) > 1 and distance[i, chain[-2]] <= distance[i, j]:  # a pair: each other's best
            j = chain[-2]
            del chain[-2:]
            merges.append((float(distance[i, j]), i, j))
            _join(distance, size, i, j)
        else:
            chain.append(j)
    return merges


def _join(distance: Tensor, size: Tensor, i: int, j: int) -> None:
    """Cluster j becomes the union, cluster i is gone."""
    own = distance[i, j].clone()
    joined = (size[i] + size) * distance[i] + (size[j] + size) * distance[j] - size * own
    joined /= size[i] + size[j] + size
    size[j] += size[i]
    size[i] = 0
    joined[(size == 0).nonzero().flatten()] = math.inf
    joined[j] = math.inf
    distance[j], distance[:, j] = joined, joined
    distance[i], distance[:, i] = math.inf, math.inf
