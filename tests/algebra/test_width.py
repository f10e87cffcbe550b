import pytest
import torch

from grail.algebra.width import ChannelWidth, HeadWidth
from grail.errors import InputError


@pytest.mark.parametrize(
    ("channels", "keep", "multiple", "kept"),
    [
        (1536, 0.7, None, 1088),  # 1075.2, in multiples of 32
        (800, 0.7, None, 560),  # in multiples of 8
        (11008, 0.5, None, 5632),  # 5504 = 21.5 · 256
        (4095, 0.5, None, 2048),  # 2047.5, in multiples of 32
        (63, 0.7, None, 44),  # too few channels to lose some to rounding
        (1536, 0.5, 128, 768),
        (100, 0.5, 4, 52),  # 50 lies between 48 and 52: ties go up
        (100, 0.99, 64, 100),  # never more than there are
        (100, 1, 64, 100),  # keeping all is never rounded
        (7, 0.001 + 1 / 7, 1, 1),
    ],
)
def test_channel_widths_are_the_nearest_multiple(channels, keep, multiple, kept):
    assert ChannelWidth.nearest(channels, keep, multiple).kept == kept


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, float("nan"), "half", True, None])
def test_a_keep_outside_its_range_is_refused(keep):
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        ChannelWidth.nearest(64, keep, 1)
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        HeadWidth.nearest(2, 2, 8, keep)


def test_a_width_of_zero_is_refused_with_the_least_that_works():
    with pytest.raises(InputError, match=r"width of 0.*at least 0\.125"):
        ChannelWidth.nearest(64, 0.01, 8)
    with pytest.raises(InputError, match=r"width of 0; choose a multiple of at most 40$"):
        ChannelWidth.nearest(40, 0.3, 64)
    with pytest.raises(InputError, match=r"9 heads is a width of 0"):
        HeadWidth.nearest(3, 3, 64, 0.05)


@pytest.mark.parametrize("multiple", [0, -8, 2.5, True])
def test_an_impossible_multiple_is_refused(multiple):
    with pytest.raises(InputError, match="multiple"):
        ChannelWidth.nearest(64, 0.5, multiple)


def divides(hidden: int):
    return lambda width: hidden % (width.kept_groups * width.kept_queries) == 0


@pytest.mark.parametrize(
    ("groups", "queries", "keep", "hidden", "kept"),
    [
        (3, 3, 0.9, 576, (3, 3)),  # SmolLM2: 8 heads are not a product of 1…3 and 1…3
        (3, 3, 0.7, 576, (2, 3)),  # 6 heads: of (2, 3) and (3, 2) the fewer groups
        (3, 3, 0.5, 576, (2, 2)),  # 4 heads, nearer to 4.5 than 3 or 6
        (8, 4, 0.5, 4096, (4, 4)),
        (32, 1, 0.7, 4096, (16, 1)),  # 22 heads do not divide 4096; 16 and 32 do, 16 is nearer
        (32, 1, 0.7, 1, (22, 1)),  # where the architecture does not mind
    ],
)
def test_head_widths_are_the_nearest_feasible(groups, queries, keep, hidden, kept):
    allowed = divides(hidden) if hidden > 1 else lambda width: True
    width = HeadWidth.nearest(groups, queries, 64, keep, allowed)
    assert (width.kept_groups, width.kept_queries) == kept


def test_the_best_heads_are_whole_and_equally_many_in_every_kept_group():
    width = HeadWidth(groups=3, queries=3, head_dim=2, kept_groups=2, kept_queries=2)
    heads = torch.tensor([[9.0, 0, 1], [3, 2, 3.5], [0, 8, 4]])  # best pairs: 10, 6.5, 12
    selection = width.best(heads.flatten().repeat_interleave(2))
    kept_heads = [0, 2, 7, 8]
    assert selection.index.tolist() == [c for h in kept_heads for c in (2 * h, 2 * h + 1)]
    assert width.group_rows(selection).index.tolist() == [0, 1, 4, 5]  # groups 0 and 2
    assert (width.channels, width.kept) == (18, 8)


def test_of_equal_scores_the_first_stay():
    assert ChannelWidth(40, 3).best(torch.ones(40)).index.tolist() == [0, 1, 2]
    heads = HeadWidth(3, 2, 2, 2, 1).best(torch.ones(12)).index.tolist()
    assert heads == [0, 1, 4, 5]
