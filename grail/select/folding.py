"""Folding: each cluster of channels with similar activations becomes its mean.

Ward's clusters: the two clusters whose joint mean fits them best are merged next. The Gram holds
the inner products of the channels as points in token space, so their distances follow from it:
|x_h − x_k|² = G_hh − 2·G_hk + G_kk. Ward's criterion is the loss of folding itself,
Σ_h |x_h − mean of its cluster|². No seeds are needed: the same Gram gives the same clusters.

Joining i and j raises that loss by half of their Ward distance d_ij, of clusters of n channels

    d_ij = 2·n_i·n_j / (n_i + n_j) · |mean_i − mean_j|²
    d_k,ij = ((n_i + n_k)·d_ik + (n_j + n_k)·d_jk − n_k·d_ij) / (n_i + n_j + n_k)

Every chain of nearest neighbours ends in a pair that can be joined at once: O(H²) time and memory,
in fp64, on the CPU.

Sources: Wang et al., "Forget the data and fine-tuning! Just fold the network to compress" (ICLR
2025) for folding; Ward, "Hierarchical grouping to optimize an objective function" (JASA 1963);
Lance, Williams (Computer Journal 1967) for the update; Murtagh (Computer Journal 1983) for the
chain.
"""

import math

import torch
from torch import Tensor

from grail.algebra.reduction import Folding, Reduction
from grail.algebra.width import ChannelWidth
from grail.errors import InputError
from grail.select import View, register


@register("folding", folds=True)
def folding(view: View) -> Reduction:
    """Folds Ward's clusters of the activations."""
    return Folding(ward(view.gram.matrix().double(), foldable(view).kept))


def foldable(view: View) -> ChannelWidth:
    """Returns the width of a site whose channels can be averaged.

    Raises:
        InputError: an attention site, where the mean of two heads' queries and keys is no head,
            since their softmax weights differ; or the input of a grouped convolution, whose groups
            read different channels.
    """
    if not isinstance(view.width, ChannelWidth):
        raise InputError(
            "folding averages single channels, not attention heads or the channels of groups: "
            f"{view.width.structure}; choose other sites, or a selector that keeps channels"
        )
    return view.width


def ward(products: Tensor, clusters: int) -> Tensor:
    """Returns Ward's clusters of H points.

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


def by_first_member(labels: Tensor, clusters: int) -> Tensor:
    """Renumbers labels [H] in [0, clusters) by each cluster's first member."""
    first = torch.full((clusters,), labels.numel(), dtype=torch.int64, device=labels.device)
    first.scatter_reduce_(0, labels, torch.arange(labels.numel(), device=labels.device), "amin")
    rank = torch.empty_like(first)
    rank[first.argsort()] = torch.arange(clusters, device=labels.device)
    return rank[labels]


def _merges(distance: Tensor) -> list[tuple[float, int, int]]:
    """Lists all joins by distance and one channel of each cluster; overwrites `distance` [H, H]."""
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
    """Makes cluster j the union of both and removes cluster i."""
    own = distance[i, j].clone()
    joined = (size[i] + size) * distance[i] + (size[j] + size) * distance[j] - size * own
    joined /= size[i] + size[j] + size
    size[j] += size[i]
    size[i] = 0
    joined[(size == 0).nonzero().flatten()] = math.inf
    joined[j] = math.inf
    distance[j], distance[:, j] = joined, joined
    distance[i], distance[:, i] = math.inf, math.inf
