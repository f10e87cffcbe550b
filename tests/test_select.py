import itertools

import pytest
import torch

import grail
from bench import allocations
from grail import select
from grail.errors import InputError
from grail.select.folding import kmeans
from grail.select.greedy import forward, peak_bytes, removal_costs
from grail.width import ChannelWidth, HeadWidth

H = 10


def activations(generator: torch.Generator) -> torch.Tensor:
    sizes, means = torch.rand(2, H, generator=generator)
    return torch.randn(50, H, generator=generator) * sizes + means


def view(width=None, seed: int = 0) -> select.View:
    generator = torch.Generator().manual_seed(7)
    gram = grail.Gram(H)
    gram.update(activations(generator))
    return select.View(
        producers=tuple(torch.randn(H, 6, generator=generator) for _ in range(2)),
        consumer=torch.randn(4, H, generator=generator),
        gram=gram,
        width=width or ChannelWidth(H, 4),
        generator=torch.Generator().manual_seed(seed),
    )


def scores_of(name: str, seen: select.View) -> list[float]:
    """Each channel's score from the published formula, one channel at a time in fp64."""
    energy = seen.gram.matrix().double().diagonal()
    variance = activations(torch.Generator().manual_seed(7)).double().var(0)
    formulas = {
        "magnitude": lambda h: sum(p.double()[h].square().sum() for p in seen.producers).sqrt(),
        "wanda": lambda h: sum(abs(w) * energy[h].sqrt() for w in seen.consumer.double()[:, h]),
        "gram": lambda h: energy[h],
        "flap": lambda h: variance[h] * seen.consumer.double()[:, h].square().sum(),
    }
    return [float(formulas[name](h)) for h in range(H)]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "gram", "flap"])
def test_the_channels_of_highest_published_score_stay(name):
    seen = view()
    scores = scores_of(name, seen)
    best = sorted(sorted(range(H), key=lambda h: -scores[h])[:4])
    assert select.get(name)(seen).index.tolist() == best


def test_each_pivot_is_what_those_before_say_least_about():
    seen = view(ChannelWidth(H, H))
    gram = seen.gram.matrix().double()
    kept: list[int] = []
    for width in range(1, H):
        schur = gram - gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept]) @ gram[kept]
        left = schur.diagonal().clone()
        left[kept] = -1
        kept.append(int(left.argmax()))
        chosen = select.get("cholesky")(view(ChannelWidth(H, width))).index.tolist()
        assert chosen == sorted(kept)


def test_a_combination_of_others_is_never_a_pivot_too():
    x = (10 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))).round()
    gram = grail.Gram(5)
    gram.update(torch.cat([x[:, :1] + x[:, 1:2], x], 1))  # integers: exact in fp32
    seen = select.View((), torch.ones(1, 5), gram, ChannelWidth(5, 4), torch.Generator())
    (dropped,) = set(range(5)) - set(select.get("cholesky")(seen).index.tolist())
    assert dropped in (0, 1, 2)


def test_random_depends_on_the_generator_alone_and_keeps_heads_whole():
    width = HeadWidth(5, 1, 2, 3, 1)
    draws = [select.get("random")(view(width, seed)).index.tolist() for seed in (1, 1, 2, 3, 4)]
    assert draws[0] == draws[1]
    assert len({tuple(d) for d in draws}) > 1
    assert all(d[0::2] == [c - 1 for c in d[1::2]] and len(d) == 6 for d in draws)


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


def test_folding_clusters_rows_of_all_producers():
    seen = view(ChannelWidth(H, H - 1))
    for producer in seen.producers:
        producer[8] = producer[2]
    labels = select.get("folding")(seen).labels
    assert labels[8] == labels[2]
    assert labels.unique().numel() == H - 1


def test_folding_refuses_attention_heads():
    with pytest.raises(InputError, match="attention heads"):
        select.get("folding")(view(HeadWidth(5, 1, 2, 3, 1)))


def test_names_are_listed_and_unknown_ones_refused():
    assert {"folding", "gram", "magnitude", "random", "wanda"} <= set(select.names())
    with pytest.raises(InputError, match=r"'magic'; choose one of .*wanda"):
        select.get("magic")


def test_a_callable_is_a_selector():
    def first(seen: select.View) -> grail.Reduction:
        return grail.Selection(list(range(seen.width.kept)), seen.width.channels)

    assert select.get(first) is first


def compensated_error(gram: torch.Tensor, weight: torch.Tensor, kept: list[int]) -> float:
    """min over W' of ‖W X − W' X_P‖², from its definition."""
    schur = gram - gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept]) @ gram[kept]
    return torch.trace(weight @ schur @ weight.T).item()


def correlated(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, H, generator=generator) @ torch.randn(H, H, generator=generator)
    weight = torch.randn(4, H, generator=generator)
    return (x.T @ x).double(), weight.double()


@pytest.mark.parametrize("block", [1, 3, 16])  # all channels are candidates
def test_each_greedy_step_is_the_best_of_all_steps(block, monkeypatch):
    monkeypatch.setattr("grail.select.greedy.POOL", H)
    gram, weight = correlated()
    order = forward(gram, weight, 6, block=block).tolist()
    for step in range(6):
        kept = order[:step]
        errors = {j: compensated_error(gram, weight, [*kept, j]) for j in range(H) if j not in kept}
        assert min(errors, key=errors.__getitem__) == order[step]


def test_choosing_by_blocks_costs_little():
    channels, kept = 240, 120
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(channels, channels, generator=generator).double()
    mixing *= torch.logspace(0, -2, channels)  # a spectrum that falls, as activations' do
    gram = (mixing @ mixing.T) / channels
    weight = torch.randn(60, channels, generator=generator).double()
    exact, blocks = (
        compensated_error(gram, weight, forward(gram, weight, kept, block=b).tolist())
        for b in (1, 16)
    )
    random = compensated_error(gram, weight, list(range(kept)))
    assert blocks - exact < 0.02 * (random - exact)


@pytest.mark.parametrize(("kept", "outputs"), [(100, 40), (300, 600)], ids=str)
def test_the_predicted_memory_of_greedy_is_what_torch_allocates(kept, outputs):
    channels = 400
    gram = grail.Gram(channels)
    gram.update(torch.randn(500, channels))
    seen = select.View(
        (),
        torch.randn(outputs, channels),
        gram,
        ChannelWidth(channels, kept),
        torch.Generator(),
    )
    used = allocations.peak_bytes(lambda: select.get("greedy")(seen))
    assert used == pytest.approx(peak_bytes(channels, kept, outputs), rel=0.02)


def test_greedy_never_keeps_a_copy_while_another_channel_helps():
    gram, weight = correlated()
    copies = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    order = forward(gram[copies][:, copies], weight, 5).tolist()
    assert sorted(copies[j] for j in order) == [0, 1, 2, 3, 4]


def test_greedy_fills_up_when_nothing_is_left_to_gain():
    gram = torch.diag(torch.tensor([0.0, 2, 0, 1], dtype=torch.float64))
    weight = torch.tensor([[1.0, 0, 1, 1]], dtype=torch.float64)  # the loudest is not read
    assert forward(gram, weight, 2).tolist() == [3, 1]
    assert sorted(forward(gram, weight, 4).tolist()) == [0, 1, 2, 3]


def test_a_heads_cost_is_the_error_that_its_removal_leaves():
    gram, weight = correlated()
    costs = removal_costs(gram, weight, 2)
    for head in range(H // 2):
        kept = [c for c in range(H) if c // 2 != head]
        # removal_costs damps by 3e-5 of the mean diagonal: the smallest eigenvalue is 8e-5 here.
        assert costs[head].item() == pytest.approx(compensated_error(gram, weight, kept), rel=2e-2)


def test_dead_heads_cost_nothing_to_remove():
    dead = torch.zeros(6, 6, dtype=torch.float64)
    assert removal_costs(dead, torch.ones(2, 6, dtype=torch.float64), 2).tolist() == [0, 0, 0]


def test_the_cost_of_heads_survives_an_fp32_gram_of_few_tokens():
    # Rank 64 of 128: fp32 puts the other eigenvalues at both sides of 0.
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) + 1
    weight = torch.randn(9, 128, generator=torch.Generator().manual_seed(1)).double()
    gram = grail.Gram(128)
    gram.update(x)
    exact = removal_costs(x.double().T @ x.double(), weight, 32)
    rounded = removal_costs(gram.matrix().double(), weight, 32)
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0)


def test_greedy_keeps_whole_heads():
    index = select.get("greedy")(view(HeadWidth(5, 1, 2, 3, 1))).index.tolist()
    assert index[0::2] == [c - 1 for c in index[1::2]]
    assert len(index) == 6
