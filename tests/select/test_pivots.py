import math

import pytest
import torch

from grail.select import pivots
from grail.select.elimination import cheapness
from grail.select.greedy import gain

H, O = 60, 17


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(H, 90, generator=generator).double() * torch.logspace(0, -2, H)[:, None]
    outputs = torch.randn(O, H, generator=generator).double()
    return mixing @ mixing.T, outputs


def updated(matrix: torch.Tensor, outputs: torch.Tensor, j: int) -> tuple[torch.Tensor, ...]:
    """S and A without channel j's part, from the definition."""
    share = matrix[j] / matrix[j, j]
    return matrix - torch.outer(matrix[:, j], share), outputs - torch.outer(outputs[:, j], share)


def by_definition(matrix, outputs, count: int, score, block: int) -> tuple[list[int], torch.Tensor]:
    """The order of choices, and A after them, every update made at once and in full."""
    first, order = matrix.diagonal().clone(), []

    def scores() -> torch.Tensor:
        values = score(outputs.square().sum(0), matrix.diagonal(), first)
        values[order] = -math.inf
        return values

    while len(order) < count:
        pool = scores().argsort(descending=True, stable=True)[: pivots.POOL * block]
        for _ in range(min(block, count - len(order))):
            order.append(int(pool[scores()[pool].argmax()]))
            matrix, outputs = updated(matrix, outputs, order[-1])
    return order, outputs


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("score", [gain, cheapness], ids=["gain", "cheapness"])
def test_choices_and_corrections_are_those_of_one_channel_after_another(score, block):
    matrix, outputs = problem()
    expected, corrected = by_definition(matrix, outputs, 40, score, block)
    outputs = outputs.T.contiguous()
    order = pivots.pivots(matrix, outputs, 40, score, block)
    assert order == expected
    # A condition number near 1e4 of fp64's 1e-16, some forty times.
    torch.testing.assert_close(outputs.T, corrected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_the_search_stops_before_a_score_of_minus_infinity(block):
    matrix, outputs = problem()
    matrix[10:], matrix[:, 10:] = 0, 0
    order = pivots.pivots(matrix, outputs.T.contiguous(), 40, gain, block)
    assert sorted(order) == list(range(10))
