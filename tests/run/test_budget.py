import itertools
import math
import statistics

import pytest
import torch

from grail.errors import InputError
from grail.run import budget


def drawn(*shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator).square() for shape in shapes]


def standardised(values: list[float]) -> list[float]:
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return [(v - mean) / deviation for v in values]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_flap_keeps_what_lies_above_one_threshold_of_standardised_scores(keep):
    scores = drawn(20, 20, 20)
    pooled = [standardised(s.tolist()) for s in scores]
    threshold = sorted(itertools.chain(*pooled), reverse=True)[round(60 * keep) - 1]
    expected = [sum(v >= threshold for v in site) / 20 for site in pooled]
    assert budget.flap(scores, keep) == expected
    assert statistics.mean(expected) == pytest.approx(keep)


def test_a_sites_own_scale_does_not_change_its_share():
    scores = drawn(20, 30)
    scaled = [1e6 * scores[0] + 7, scores[1]]
    assert budget.flap(scaled, 0.5) == budget.flap(scores, 0.5)


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.6, 0.8])
def test_heads_are_standardised_by_channel_and_then_averaged(keep):
    heads, channels = drawn((30, 4), 30)
    flat = standardised(heads.flatten().tolist())
    units = [statistics.mean(flat[4 * i : 4 * i + 4]) for i in range(30)]
    pooled = sorted(units + standardised(channels.tolist()), reverse=True)
    threshold = pooled[round(60 * keep) - 1]
    assert budget.flap([heads, channels], keep)[0] == sum(u >= threshold for u in units) / 30


def test_parameters_are_what_flap_counts():
    scores, parameters = drawn(10, 300), [30.0, 1.0]
    shares = budget.flap(scores, 0.6, parameters)
    spent = sum(s * len(t) * p for s, t, p in zip(shares, scores, parameters, strict=True))
    assert spent == pytest.approx(0.6 * 600, abs=15)  # half of the largest unit


def test_a_site_of_bad_scores_keeps_its_best_unit():
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0])]
    assert budget.flap(scores, 0.1) == [1 / 3, 1.0]


@pytest.mark.parametrize(
    ("scores", "parameters"),
    [([], None), ([torch.ones(3)], [1.0, 2.0]), ([torch.ones(0)], None)],
    ids=["none", "lengths", "empty"],
)
def test_flap_refuses_sites_without_scores_or_counts(scores, parameters):
    with pytest.raises(InputError, match="scores for every site"):
        budget.flap(scores, 0.5, parameters)


def test_slimgpt_gives_the_ratios_of_the_authors_recipe():
    lost = [1 - share for share in budget.slimgpt(32, 0.8)]
    expected = [1 / 16 + (1 / 4 - 1 / 16) * math.log(i + 1) / math.log(32) for i in range(32)]
    # Their 1/4 makes the mean 20.04%, not 20%.
    assert lost == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("blocks", [1, 2, 30])
def test_slimgpts_blocks_keep_the_share_asked_for_in_the_mean(blocks, keep):
    shares = budget.slimgpt(blocks, keep)
    assert statistics.mean(shares) == pytest.approx(keep)
    assert shares == sorted(shares, reverse=True)


def test_slimgpt_refuses_a_last_block_without_channels():
    with pytest.raises(InputError, match="let the first lose more than 0"):
        budget.slimgpt(32, 0.2)
    assert budget.slimgpt(32, 0.2, first=0.5)[-1] > 0


@pytest.mark.parametrize(("blocks", "first"), [(0, 0.1), (4, -0.1), (4, 1.0)], ids=str)
def test_slimgpt_refuses_no_blocks_and_losses_that_are_no_share(blocks, first):
    with pytest.raises(InputError, match="blocks must be"):
        budget.slimgpt(blocks, 0.5, first)
