import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grail.select import pivots

H, O = 60, 17


def problem(seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(H, 90, generator=generator).double() * torch.logspace(0, -2, H)[:, None]
    outputs = torch.randn(O, H, generator=generator).double()
    return mixing @ mixing.T, outputs


def searched(matrix, outputs, count, **settings) -> list[int]:
    """The search on copies in fp32 of one S [H, H] and A [O, H]."""
    return pivots.pivots(
        matrix.float()[None].clone(), outputs.mT.float()[None].clone(), count, **settings
    )[0].tolist()


def updated(matrix: torch.Tensor, outputs: torch.Tensor, j: int) -> tuple[torch.Tensor, ...]:
    """S and A without channel j's part, from the definition."""
    share = matrix[j] / matrix[j, j]
    return matrix - torch.outer(matrix[:, j], share), outputs - torch.outer(outputs[:, j], share)


def by_definition(matrix, outputs, count: int, least: bool) -> list[int]:
    """The order of choices in fp64, every update made at once and in full."""
    order = []

    def scores() -> torch.Tensor:
        values = outputs.square().sum(0) / matrix.diagonal() * (-1 if least else 1)
        values[order] = -math.inf
        return values

    panel = pivots.panel_size(count)
    while len(order) < count:
        pool = scores().argsort(descending=True, stable=True)[: pivots.POOL]
        for _ in range(min(panel, count - len(order))):
            order.append(int(pool[scores()[pool].argmax()]))
            matrix, outputs = updated(matrix, outputs, order[-1])
    return order


@pytest.mark.parametrize("panel", [1, 3, 16, 64])
@pytest.mark.parametrize("least", [False, True], ids=["largest", "least"])
def test_choices_are_those_of_one_channel_after_another(least, panel, monkeypatch):
    monkeypatch.setattr(pivots, "panel_size", lambda count: panel)
    matrix, outputs = problem()
    assert searched(matrix, outputs, 40, least=least) == by_definition(matrix, outputs, 40, least)


@pytest.mark.parametrize("least", [False, True], ids=["largest", "least"])
def test_a_batch_is_searched_as_its_matrices_are(least):
    problems = [problem(seed) for seed in range(3)]
    together = pivots.pivots(
        torch.stack([matrix.float() for matrix, _ in problems]),
        torch.stack([outputs.mT.float() for _, outputs in problems]),
        40,
        least=least,
    )
    assert together.tolist() == [searched(*each, 40, least=least) for each in problems]


@pytest.mark.parametrize("panel", [1, 4, 16])
def test_channels_that_cannot_be_chosen_follow_by_their_diagonal(panel, monkeypatch):
    monkeypatch.setattr(pivots, "panel_size", lambda count: panel)
    matrix, outputs = problem()
    outputs[:, 10:] = 0  # without a gain
    matrix[:10, 10:], matrix[10:, :10] = 0, 0
    order = searched(matrix, outputs, 40)
    assert sorted(order[:10]) == list(range(10))
    assert order[10:] == (matrix.diagonal()[10:].argsort(descending=True)[:30] + 10).tolist()


def test_a_matrix_of_a_batch_that_ends_early_leaves_the_others_alone():
    ends, outputs = problem()
    read = outputs.clone()
    read[:, 10:] = 0
    apart = ends.clone()
    apart[:10, 10:], apart[10:, :10] = 0, 0
    together = pivots.pivots(
        torch.stack([apart, ends]).float(), torch.stack([read.mT, outputs.mT]).float(), 40
    )
    assert together.tolist() == [searched(apart, read, 40), searched(ends, outputs, 40)]


def test_a_panel_whose_candidates_are_copies_does_not_end_the_search(monkeypatch):
    monkeypatch.setattr(pivots, "panel_size", lambda count: 4)
    matrix, outputs = problem()
    copies = [0] * 30 + list(range(1, 31))  # thirty of the best channel come before all others
    matrix, outputs = matrix[copies][:, copies], outputs[:, copies]
    outputs[:, :30] *= 1e3
    order = searched(matrix, outputs, 31)
    assert len({copies[j] for j in order}) == 31


@pytest.mark.parametrize("power", [-60, -31, 1, 40, 60])
def test_activations_scaled_by_a_power_of_two_have_the_same_order(power):
    matrix, outputs = (t.float() for t in problem())
    scale = 2.0**power
    expected = searched(matrix, outputs, 40)
    assert searched(matrix * scale * scale, outputs * scale, 40) == expected
    each = torch.full((H,), scale).float()
    each[::2] = 1
    scaled = matrix * each[:, None] * each, outputs * each
    assert searched(*scaled, 40) == expected


class Operators(TorchDispatchMode):
    """Counts the operators of torch that run, and those that read a device."""

    def __init__(self):
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        self.reads += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def operators_of(matrices: int, count: int) -> Operators:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(matrices, 400, 200, generator=generator)
    seen = torch.randn(matrices, 200, 5, generator=generator)
    with Operators() as counted:
        pivots.pivots(x.mT @ x, seen, count)
    return counted


def test_operators_of_a_search_grow_with_panels_alone(monkeypatch):
    # Parallel operators of a choice would wait at their threads' barriers, launches for the host.
    monkeypatch.setattr(pivots, "panel_size", lambda count: 16)
    one, two, five = (operators_of(1, 16 * panels).count for panels in (1, 2, 5))
    assert five - two == 3 * (two - one)
    assert two - one < 100
    monkeypatch.setattr(pivots, "panel_size", lambda count: 32)
    assert operators_of(1, 32).count == one


def test_operators_and_reads_do_not_grow_with_the_batch():
    few, many = operators_of(2, 128), operators_of(9, 128)
    assert (few.count, few.reads) == (many.count, many.reads)
