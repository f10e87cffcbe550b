import dataclasses

import pytest
import torch

import grail
from bench.tools import allocations
from grail import select
from grail.algebra.width import ChannelWidth, HeadWidth
from grail.errors import InputError
from grail.select import pivots
from grail.select.greedy import peak_bytes

H = 10


def activations(generator: torch.Generator) -> torch.Tensor:
    sizes, means = torch.rand(2, H, generator=generator)
    return torch.randn(50, H, generator=generator) * sizes + means


def view(width=None, seed: int = 0) -> select.View:
    generator = torch.Generator().manual_seed(7)
    gram = grail.Gram(H)
    gram.update(activations(generator))
    return select.View(
        producers=(
            torch.randn(H, 6, generator=generator),
            torch.randn(H, 2, 1, 3, generator=generator),  # a convolution
        ),
        consumer=torch.randn(4, H, generator=generator),
        gram=gram,
        width=width or ChannelWidth(H, 4),
        generator=torch.Generator().manual_seed(seed),
        gradient=torch.rand(4, H, generator=generator),
    )


def scores_of(name: str, seen: select.View) -> list[float]:
    """Each channel's score from the published formula, one channel at a time in fp64."""
    x = activations(torch.Generator().manual_seed(7)).double()
    read = seen.consumer.double()

    def written(h: int) -> list[float]:
        return [v for p in seen.producers for v in p[h].flatten().tolist()]

    def norm(values: list[float]) -> float:
        return sum(v * v for v in values) ** 0.5

    formulas = {
        "magnitude": lambda h: norm(written(h)),
        "magnitude-l1": lambda h: sum(abs(v) for v in written(h)),
        "magnitude-consumers": lambda h: norm(read[:, h].tolist()),
        "magnitude-both": lambda h: norm(written(h) + read[:, h].tolist()),
        "wanda": lambda h: sum(abs(w) * norm(x[:, h].tolist()) for w in read[:, h]),
        "wanda++": lambda h: sum(
            (100 * g + norm(x[:, h].tolist())) * abs(w)
            for g, w in zip(seen.gradient[:, h].double(), read[:, h], strict=True)
        ),
        "gram": lambda h: x[:, h].square().sum(),
        "flap": lambda h: x[:, h].var() * read[:, h].square().sum(),  # of N - 1
    }
    return [float(formulas[name](h)) for h in range(H)]


PUBLISHED = (
    "magnitude",
    "magnitude-l1",
    "magnitude-consumers",
    "magnitude-both",
    "wanda",
    "wanda++",
    "gram",
    "flap",
)


@pytest.mark.parametrize("kept", range(1, H))
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_channels_of_highest_published_score_stay(name, kept):
    seen = view(ChannelWidth(H, kept))
    scores = scores_of(name, seen)
    best = sorted(sorted(range(H), key=lambda h: -scores[h])[:kept])
    assert select.get(name)(seen).index.tolist() == best


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_heads_of_highest_published_score_stay(name):
    seen = view(HeadWidth(5, 1, 2, 3, 1))
    scores = scores_of(name, seen)
    best = sorted(sorted(range(5), key=lambda i: -scores[2 * i] - scores[2 * i + 1])[:3])
    assert select.get(name)(seen).index.tolist() == [c for i in best for c in (2 * i, 2 * i + 1)]


def test_only_regional_gradients_need_a_gradient():
    assert [name for name in select.names() if select.needs_gradient(name)] == ["wanda++"]


def test_a_callable_says_itself_that_it_needs_a_gradient():
    class Mine:
        needs_gradient = True

        def __call__(self, seen: select.View) -> grail.Reduction:
            return seen.width.best(seen.gradient.sum(0))

    assert select.needs_gradient(Mine())
    assert not select.needs_gradient(lambda seen: seen.width.best(seen.gram.energy))


@pytest.mark.parametrize(
    ("gradient", "message"),
    [(None, "'wanda\\+\\+' needs the gradient"), (torch.ones(H, 4), r"must be \[4, 10\]")],
    ids=["missing", "transposed"],
)
def test_a_gradient_that_is_missing_or_does_not_fit_is_refused(gradient, message):
    with pytest.raises(InputError, match=message):
        select.get("wanda++")(dataclasses.replace(view(), gradient=gradient))


def test_wanda_plus_counts_an_input_once_however_many_consumers_read_it():
    one = view()
    twice = grail.Gram(H)
    for _ in range(2):
        twice.update(activations(torch.Generator().manual_seed(7)))
    both = {"consumer": torch.cat([one.consumer] * 2), "gradient": torch.cat([one.gradient] * 2)}
    score = select.wanda_plus.wanda_plus
    seen = dataclasses.replace(one, gram=twice, consumers=2, **both)
    torch.testing.assert_close(score(seen), 2 * score(one))


def test_rounding_beside_a_large_mean_is_no_fluctuation():
    x = torch.full((4000, 2), 3e4 + 0.3)
    x[:, 1] += torch.randn(4000) * 3e3
    gram = grail.Gram(2)
    gram.update(x)
    score = select.flap.flap(dataclasses.replace(view(), consumer=torch.ones(4, 2), gram=gram))
    assert score[0] == 0
    assert score[1] == pytest.approx(4 * float(x[:, 1].double().var()) * 3999, rel=1e-2)


BY_DATA = ("wanda", "flap", "gram", "cholesky", "greedy", "slimgpt", "backward")


@pytest.mark.parametrize("name", BY_DATA)
def test_channels_without_data_go_first_however_much_they_are_read(name):
    seen = view(ChannelWidth(H, 7))
    x = activations(torch.Generator().manual_seed(7))
    x[:, [0, 4, 9]] = 0
    gram = grail.Gram(H)
    gram.update(x)
    consumer = seen.consumer.clone()
    consumer[:, [0, 4, 9]] = 1e4
    dead = dataclasses.replace(seen, gram=gram, consumer=consumer)
    assert select.get(name)(dead).index.tolist() == [1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize("name", BY_DATA)
@pytest.mark.parametrize("width", [ChannelWidth(H, 4), HeadWidth(5, 1, 2, 3, 1)], ids=str)
def test_a_site_without_any_data_comes_to_its_width(name, width):
    gram = grail.Gram(H)
    gram.update(torch.zeros(3, H))
    assert select.get(name)(dataclasses.replace(view(width), gram=gram)).kept == width.kept


@pytest.mark.parametrize("name", ["cholesky", "greedy", "slimgpt", "backward"])
def test_as_many_channels_as_tokens_say_all_the_rest(name):
    tokens, channels = 6, 40
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    gram = grail.Gram(channels)
    gram.update(x)
    consumer = torch.randn(9, channels, generator=torch.Generator().manual_seed(1))
    seen = select.View((), consumer, gram, ChannelWidth(channels, tokens), torch.Generator())
    kept = select.get(name)(seen).index
    # Six random vectors of six are a basis; a choice that repeats itself would leave a direction.
    rebuilt = x[:, kept].double() @ torch.linalg.pinv(x[:, kept].double()) @ x.double()
    torch.testing.assert_close(rebuilt, x.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "kept"), [("greedy", [0, 1, 2]), ("slimgpt", [7, 8, 9]), ("backward", [7, 8, 9])]
)
def test_of_equal_channels_the_first_is_chosen(name, kept):
    gram = grail.Gram(H)
    gram.update(torch.eye(H))
    seen = select.View((), torch.ones(2, H), gram, ChannelWidth(H, 3), torch.Generator())
    assert select.get(name)(seen).index.tolist() == kept  # chosen to stay, chosen to go


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


EXTRA = [
    *("folding-agglomerative", "folding-kmeans"),
    *("magnitude-both", "magnitude-consumers", "magnitude-l1"),
]


def test_names_are_listed_with_the_extra_ones_last_and_unknown_ones_refused():
    found = select.names()
    assert {"folding", "gram", "magnitude", "random", "wanda"} <= set(found)
    assert found[-len(EXTRA) :] == EXTRA
    assert found[: -len(EXTRA)] == sorted({*found} - {*EXTRA})
    with pytest.raises(InputError, match=r"'magic'; choose one of .*wanda"):
        select.get("magic")


def test_a_selector_is_registered_by_one_decorator(monkeypatch):
    monkeypatch.setattr(select, "_registry", dict(select._registry))

    @select.register("first")
    def first(seen: select.View) -> torch.Tensor:
        return -torch.arange(seen.width.channels, dtype=torch.float32)

    @select.register("halves")
    def halves(seen: select.View) -> grail.Reduction:
        return grail.Folding([channel // 2 for channel in range(seen.width.channels)])

    seen = view(ChannelWidth(H, 3))
    assert select.get("First")(seen).index.tolist() == [0, 1, 2]
    assert select.get("halves")(seen).kept == (H + 1) // 2
    assert select.names().index("first") < select.names().index(EXTRA[0])


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


def forward(gram: torch.Tensor, weight: torch.Tensor, kept: int) -> list[int]:
    """The channels that stay of G [H, H] and W [O, H], in the order of their choice."""
    return pivots.pivots(gram.float()[None], (gram @ weight.T).float()[None], kept)[0].tolist()


@pytest.mark.parametrize("panel", [1, 3, 16])  # all channels are candidates
def test_each_greedy_step_is_the_best_of_all_steps(panel, monkeypatch):
    monkeypatch.setattr(pivots, "panel_size", lambda count: panel)
    monkeypatch.setattr(pivots, "POOL", H)
    gram, weight = correlated()
    order = forward(gram, weight, 6)
    for step in range(6):
        kept = order[:step]
        errors = {j: compensated_error(gram, weight, [*kept, j]) for j in range(H) if j not in kept}
        assert min(errors, key=errors.__getitem__) == order[step]


def drifting(share: float, width) -> tuple[select.View, torch.Tensor, torch.Tensor]:
    """A site whose consumer is to say W x + `share`·δ; its tokens, and that for each of them."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(80, H, generator=generator)
    x += x @ torch.randn(H, H, generator=generator) / 4
    drift = x @ torch.randn(H, 4, generator=generator) + torch.randn(80, 4, generator=generator)
    consumer = torch.randn(4, H, generator=generator)
    gram = grail.Gram(H)
    gram.update(x, drift=drift)
    seen = select.View((), consumer, gram, width, torch.Generator(), drift_correction=share)
    return seen, x.double(), (x @ consumer.T + share * drift).double()


def rebuilt_error(x: torch.Tensor, target: torch.Tensor, kept: list[int]) -> float:
    """min over W' of ‖T − X_P W'ᵀ‖², by QR."""
    return (target - x[:, kept] @ torch.linalg.lstsq(x[:, kept], target).solution).square().sum()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_each_greedy_step_is_the_best_for_what_undoes_drift_as_well(share):
    before: list[int] = []
    for width in (1, 2, 3):
        seen, x, target = drifting(share, ChannelWidth(H, width))
        chosen = select.get("greedy")(seen).index.tolist()
        steps = [sorted([*before, j]) for j in range(H) if j not in before]
        assert chosen == min(steps, key=lambda kept: rebuilt_error(x, target, kept))
        before = chosen


@pytest.mark.parametrize("name", sorted({*select.names()} - {"greedy"}))
def test_others_choose_as_published_whatever_drifts(name):
    (seen, *_), (still, *_) = (drifting(share, ChannelWidth(H, 4)) for share in (1.0, 0.0))
    chosen = [
        select.get(name)(
            dataclasses.replace(
                one,
                producers=(torch.arange(2.0 * H).view(H, 2).sin(),),
                gradient=torch.ones(4, H),
                generator=torch.Generator().manual_seed(1),
            )
        )
        for one in (seen, still)
    ]
    assert torch.equal(*(reduction.lift(torch.eye(4)) for reduction in chosen))


def test_choosing_by_panels_costs_little(monkeypatch):
    channels, kept = 240, 120
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(channels, channels, generator=generator).double()
    mixing *= torch.logspace(0, -2, channels)  # a spectrum that falls, as activations' do
    gram = (mixing @ mixing.T) / channels
    weight = torch.randn(60, channels, generator=generator).double()

    panels = compensated_error(gram, weight, forward(gram, weight, kept))
    monkeypatch.setattr(pivots, "panel_size", lambda count: 1)
    exact = compensated_error(gram, weight, forward(gram, weight, kept))
    random = compensated_error(gram, weight, list(range(kept)))
    assert panels - exact < 0.02 * (random - exact)


@pytest.mark.parametrize(
    ("kept", "outputs"), [(100, 40), (180, 600), (300, 40), (380, 600)], ids=str
)
def test_the_stated_memory_of_greedy_is_what_torch_allocates(kept, outputs):
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
    assert used == pytest.approx(peak_bytes(seen), rel=0.02)


def test_greedy_never_keeps_a_copy_while_another_channel_helps():
    gram, weight = correlated()
    copies = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    gram = gram[copies][:, copies]
    order = forward(gram, weight, 5)
    assert sorted(copies[j] for j in order) == [0, 1, 2, 3, 4]


def test_greedy_fills_up_when_nothing_is_left_to_gain():
    gram = torch.diag(torch.tensor([0.0, 2, 0, 1], dtype=torch.float64))
    weight = torch.tensor([[1.0, 0, 1, 1]], dtype=torch.float64)  # the loudest is not read
    assert forward(gram, weight, 2) == [3, 1]
    assert sorted(forward(gram, weight, 4)) == [0, 1, 2, 3]


def test_greedy_keeps_whole_heads():
    index = select.get("greedy")(view(HeadWidth(5, 1, 2, 3, 1))).index.tolist()
    assert index[0::2] == [c - 1 for c in index[1::2]]
    assert len(index) == 6
