import pytest
import torch

import grail
from grail import select
from grail.algebra.width import ChannelWidth, HeadWidth
from grail.select import pivots
from grail.select.elimination import errors_of_heads, exact_cost
from grail.select.slimgpt import grouped_cholesky_cost

H = 12
DAMPINGS = {"slimgpt": 1e-2, "backward": 3e-5}


def site(width) -> select.View:
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(H, H, generator=generator) * torch.logspace(0, -1.5, H)[:, None]
    x = torch.randn(60, H, generator=generator) @ mixing  # so uneven that 1% of damping matters
    gram = grail.Gram(H)
    gram.update(x)
    weight = torch.randn(5, H, generator=generator)
    return select.View((), weight, gram, width, torch.Generator())


def hessian(seen: select.View, damping: float) -> torch.Tensor:
    gram = seen.gram.matrix().double()
    return gram + damping * gram.diagonal().mean() * torch.eye(H, dtype=gram.dtype)


def loss(weight: torch.Tensor, hessian: torch.Tensor, dropped: list[int]) -> float:
    """min over W' with W'_D = 0 of tr((W' − W) H (W' − W)ᵀ), from its definition."""
    kept = [h for h in range(H) if h not in dropped]
    inner = (
        hessian[dropped][:, dropped]
        - hessian[dropped][:, kept]
        @ torch.linalg.inv(hessian[kept][:, kept])
        @ (hessian[kept][:, dropped])
    )
    lost = weight[:, dropped].double()
    return torch.trace(lost @ inner @ lost.T).item()


@pytest.mark.parametrize("name", DAMPINGS)
def test_each_drop_is_the_cheapest_of_all(name):
    dropped: list[int] = []
    for kept in range(H - 1, 0, -1):
        seen = site(ChannelWidth(H, kept))
        h = hessian(seen, DAMPINGS[name])
        losses = {j: loss(seen.consumer, h, [*dropped, j]) for j in range(H) if j not in dropped}
        dropped.append(min(losses, key=losses.__getitem__))
        stay = select.get(name)(seen).index.tolist()
        assert stay == [j for j in range(H) if j not in dropped]


def test_the_weight_updates_of_slimgpt_end_in_compensation_toward_the_baseline():
    seen = site(ChannelWidth(H, 5))
    selection = select.get("slimgpt")(seen)
    kept = selection.index.tolist()
    weight = seen.consumer.double()
    inverse = torch.linalg.inv(hessian(seen, DAMPINGS["slimgpt"]))
    for j in (j for j in range(H) if j not in kept):
        weight = weight - torch.outer(weight[:, j], inverse[j]) / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    energy = seen.gram.energy.double()
    alpha = float(DAMPINGS["slimgpt"] * energy.mean() / energy[kept].mean())
    fitted = grail.fit(seen.gram, selection, seen.consumer, alpha=alpha, toward="baseline").weight
    # One rounding into fp32, 6e-8, and fp64's of a condition number near 1e3.
    torch.testing.assert_close(fitted.double(), weight[:, kept], rtol=1e-6, atol=1e-6)


def test_a_heads_pivots_are_the_inverse_once_its_earlier_channels_are_gone():
    seen = site(ChannelWidth(H, H))
    h = hessian(seen, 1e-2)
    head, weight = [3, 4, 5, 6], seen.consumer.double()
    expected = 0.0
    for i, j in enumerate(head):
        rest = [c for c in range(H) if c not in head[:i]]
        inverse = torch.linalg.inv(h[rest][:, rest])
        expected += (weight[:, j].square().sum() / inverse[rest.index(j), rest.index(j)]).item()
    inverse = torch.linalg.inv(h)[head][:, head]
    cost = grouped_cholesky_cost(weight[:, head], inverse).item()
    assert cost == pytest.approx(expected, rel=1e-9)


def dropped_heads(name: str, seen: select.View) -> set[int]:
    """The heads that go, from losses and inverses computed anew for every candidate."""
    width, d = seen.width, seen.width.head_dim
    h, gone = hessian(seen, DAMPINGS[name]), []

    def channels(heads) -> list[int]:
        return [c for head in heads for c in range(head * d, head * d + d)]

    def cost(heads) -> float:
        if name == "backward":
            return loss(seen.consumer, h, channels([*gone, *heads]))
        kept = [c for c in range(H) if c not in channels(gone)]
        own = [kept.index(c) for c in channels(heads)]
        inner = h[kept][:, channels(gone)] @ seen.consumer.double()[:, channels(gone)].T
        weight = seen.consumer.double()[:, kept] + inner.T @ torch.linalg.inv(h[kept][:, kept])
        factor = torch.linalg.cholesky(torch.linalg.inv(h[kept][:, kept])[own][:, own])
        return (weight[:, own].square().sum(0) / factor.diagonal().square()).sum().item()

    groups = [list(range(g * width.queries, (g + 1) * width.queries)) for g in range(width.groups)]
    while any(len(g) > width.kept_queries for g in groups):
        candidates = [i for g in groups if len(g) > width.kept_queries for i in g]
        gone.append(min(candidates, key=lambda i: cost([i])))
        groups = [[i for i in g if i not in gone] for g in groups]
    while len(groups) > width.kept_groups:
        group = min(groups, key=cost)
        gone.extend(group)
        groups.remove(group)
    return set(gone)


@pytest.mark.parametrize(
    "width",
    [HeadWidth(6, 1, 2, 2, 1), HeadWidth(2, 3, 2, 2, 1), HeadWidth(3, 2, 2, 2, 1)],
    ids=["heads", "queries", "both"],
)
@pytest.mark.parametrize("name", DAMPINGS)
def test_heads_go_one_after_another_the_cheapest_first(name, width):
    seen = site(width)
    gone = dropped_heads(name, seen)
    expected = [c for c in range(H) if c // 2 not in gone]
    assert select.get(name)(seen).index.tolist() == expected


@pytest.mark.parametrize("shape", [(6, 1, 2), (2, 3, 2), (3, 2, 2), (1, 4, 3)])
def test_errors_of_heads_are_the_losses_of_those_that_are_dropped(shape):
    groups, queries, _ = shape
    widths = [
        HeadWidth(*shape, kept_groups, kept_queries)
        for kept_groups in range(1, groups + 1)
        for kept_queries in range(1, queries + 1)
    ]
    found = errors_of_heads(site(widths[0]), widths)
    for width, error in zip(widths, found, strict=True):
        seen = site(width)
        kept = select.get("greedy")(seen).index.tolist()
        dropped = [c for c in range(H) if c not in kept]
        h = hessian(seen, DAMPINGS["backward"])
        expected = loss(seen.consumer, h, dropped) if dropped else 0.0
        assert error == pytest.approx(expected, rel=1e-6)


def test_the_exact_cost_of_a_head_is_what_its_loss_costs():
    seen = site(ChannelWidth(H, H))
    h, head = hessian(seen, 1e-2), [2, 3, 7]
    cost = exact_cost(seen.consumer[:, head].double(), torch.linalg.inv(h)[head][:, head])
    assert cost.item() == pytest.approx(loss(seen.consumer, h, head), rel=1e-9)


def test_dropping_by_panels_costs_little(monkeypatch):
    channels, kept = 240, 120
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(channels, channels, generator=generator).double()
    mixing *= torch.logspace(0, -2, channels)  # a spectrum that falls, as activations' do
    gram = (mixing @ mixing.T) / channels + 1e-6 * torch.eye(channels)
    weight = torch.randn(60, channels, generator=generator).double()

    def error(dropped: list[int]) -> float:
        stay = [h for h in range(channels) if h not in set(dropped)]
        schur = gram - gram[:, stay] @ torch.linalg.inv(gram[stay][:, stay]) @ gram[stay]
        return torch.trace(weight @ schur @ weight.T).item()

    def dropped() -> list[int]:
        inverse, outputs = torch.linalg.inv(gram).float()[None], weight.T.float()[None].clone()
        return pivots.pivots(inverse, outputs, channels - kept, least=True)[0].tolist()

    panels = error(dropped())
    monkeypatch.setattr(pivots, "panel_size", lambda count: 1)
    exact = error(dropped())
    random = error(list(range(channels - kept)))
    assert panels - exact < 0.02 * (random - exact)
