import pytest
import torch
from torch import nn

from grail.calibrate.stream import Stream
from grail.errors import ModelError
from grail.networks import CalibrationPoint
from grail.networks.layers import Consumer, Routed
from grail.recipe import Recipe
from grail.statistics.site_statistics import SiteStatistics, without_held_out

ALL = Recipe(alpha=1e-3, drift_correction=0)


def statistics_of(module, given, recipe=ALL, group=None):
    model = nn.Identity()
    model.scale = nn.Parameter(torch.ones(1))
    stream = Stream(model, [model], given)
    consumer = Consumer("read", module)
    point = CalibrationPoint(name="site", block=0, consumers=(consumer,), group=group)
    return SiteStatistics(point, consumer, stream, recipe)


def assert_gram(gram, tokens):
    tokens = tokens.flatten(0, -2).double()
    # Sums of fp32 products, in any order.
    bound = 16 * torch.finfo(torch.float32).eps * (tokens.abs().T @ tokens.abs())
    assert ((gram.matrix().double() - tokens.T @ tokens).abs() <= bound).all()
    assert gram.tokens == len(tokens)


def test_every_fifth_sample_is_held_out_and_joins_the_others_where_nothing_is_chosen():
    x = torch.randn(5, 3, 4)
    statistics = statistics_of(nn.Linear(4, 2), [x], Recipe())
    statistics.update(0, x)
    assert_gram(statistics.train, x[:4])
    assert_gram(statistics.held_out, x[4:])
    assert statistics.tokens == 15
    joined = without_held_out(statistics.named_grams(), "site")
    assert_gram(joined["train"], x)
    assert joined["held_out"].tokens == 0


def test_taps_are_columns_and_channels_have_sums_of_their_own():
    x = torch.randn(5, 3, 6, 6)
    layer = nn.Conv2d(3, 2, 3)
    statistics = statistics_of(layer, [x], Recipe())
    statistics.update(0, x)
    assert list(statistics.named_grams()) == [
        "train",
        "held_out",
        "channels",
        "held_out_channels",
    ]
    assert_gram(statistics.train, nn.functional.unfold(x[:4], 3).mT)
    assert_gram(statistics.channels, x[:4].movedim(1, -1))
    without = statistics_of(layer, [x], Recipe(per_tap=False))
    assert without.channels is without.train


def test_experts_count_the_mask_and_the_sample_of_each_token_that_they_got():
    ids = torch.randn(5, 4, 3)
    statistics = statistics_of(nn.Linear(3, 2), [ids], Recipe(), group=object())
    places = torch.tensor([0, 3, 9, 17, 19])  # of 5 samples of 4 tokens; the last is held out
    x = torch.randn(5, 3)
    statistics.update(0, x, routed=Routed(places, torch.ones(5)))
    assert_gram(statistics.train, x[:3])
    assert_gram(statistics.held_out, x[3:])
    assert statistics.underdetermined(4)
    assert not statistics.underdetermined(3)


def test_tokens_of_no_sample_cannot_be_held_out():
    statistics = statistics_of(nn.Linear(4, 2), [torch.randn(5, 3, 4)], Recipe())
    with pytest.raises(ModelError, match=r"site reads tokens \[7\] of 5 samples"):
        statistics.update(0, torch.randn(7, 4))
