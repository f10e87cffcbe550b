import itertools

import pytest
import torch
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import ward as scipy_ward

import grail
from grail import select
from grail.algebra.width import ChannelWidth, HeadWidth
from grail.errors import InputError
from grail.select.extra.kmeans import kmeans
from grail.select.folding import ward

H = 30
BY_ROWS = ("folding-kmeans", "folding-agglomerative")
FOLDINGS = (*BY_ROWS, "folding")


def activations() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(200, 8, generator=generator) @ torch.randn(8, H, generator=generator)


def view(width=None) -> select.View:
    generator = torch.Generator().manual_seed(7)
    gram = grail.Gram(H)
    gram.update(activations())
    return select.View(
        producers=(
            torch.randn(H, 6, generator=generator),
            torch.randn(H, 2, 1, 3, generator=generator),  # a convolution
        ),
        consumer=torch.randn(4, H, generator=generator),
        gram=gram,
        width=width or ChannelWidth(H, H - 1),
        generator=torch.Generator().manual_seed(0),
    )


def spread(rows: torch.Tensor, labels) -> float:
    labels = torch.as_tensor(labels)
    return sum(
        (rows[labels == k] - rows[labels == k].mean(0)).square().sum().item()
        for k in labels.unique()
    )


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_well_separated_clusters_exactly(seed):
    # Against every possible labelling of 7 rows into 3 clusters.
    generator = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(3, 4, generator=generator)
    rows = centres[[0, 1, 2, 0, 1, 2, 2]] + 0.1 * torch.randn(7, 4, generator=generator)
    labels = kmeans(rows, 3, generator)
    best = min(
        spread(rows, labelling)
        for labelling in itertools.product(range(3), repeat=7)
        if set(labelling) == {0, 1, 2}
    )
    assert spread(rows, labels) == pytest.approx(best, rel=1e-4)
    assert labels[0] == 0  # numbered by first member


@pytest.mark.parametrize("clusters", [1, 2, 5, 6])
def test_kmeans_leaves_no_cluster_empty_even_among_copies(clusters):
    rows = torch.ones(6, 3)
    labels = kmeans(rows, clusters, torch.Generator().manual_seed(0))
    assert labels.unique().tolist() == list(range(clusters))


def partition(labels) -> set[frozenset[int]]:
    labels = torch.as_tensor(labels)
    return {frozenset((labels == k).nonzero().flatten().tolist()) for k in labels.unique()}


@pytest.mark.parametrize("clusters", [1, 2, 7, 30, 59, 60])
@pytest.mark.parametrize("seed", range(3))
def test_wards_clusters_are_those_of_scipy(seed, clusters):
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(seed)).double()
    labels = ward(points @ points.T, clusters)
    expected = fcluster(scipy_ward(points.numpy()), clusters, "maxclust")
    assert partition(labels) == partition(expected)
    assert labels[0] == 0  # numbered by first member


@pytest.mark.parametrize("clusters", [1, 2, 5, 6])
def test_ward_leaves_no_cluster_empty_even_among_copies(clusters):
    labels = ward(torch.ones(6, 6, dtype=torch.float64), clusters)
    assert labels.unique().tolist() == list(range(clusters))


@pytest.mark.parametrize("kept", [3, 11, 20])
def test_activations_fold_as_points_in_token_space(kept):
    labels = select.get("folding")(view(ChannelWidth(H, kept))).labels
    expected = fcluster(scipy_ward(activations().double().T.numpy()), kept, "maxclust")
    assert partition(labels) == partition(expected)


@pytest.mark.parametrize("name", BY_ROWS)
def test_folding_clusters_rows_of_all_producers(name):
    seen = view()
    seen.producers[0][4] = seen.producers[0][6]  # alike in one producer only
    for producer in seen.producers:
        producer[8] = producer[2]
    labels = select.get(name)(seen).labels
    assert labels[8] == labels[2]
    assert labels.unique().numel() == H - 1


@pytest.mark.parametrize("name", FOLDINGS)
def test_the_same_site_folds_the_same_way(name):
    first, second = (select.get(name)(view(ChannelWidth(H, 9))).labels for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", FOLDINGS)
def test_folding_refuses_attention_heads(name):
    with pytest.raises(InputError, match="attention heads"):
        select.get(name)(view(HeadWidth(15, 1, 2, 3, 1)))
