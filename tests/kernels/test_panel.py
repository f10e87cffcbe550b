"""The panel of pivots against updates made in full in fp64, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels.errors import InputError
from tests.kernels.conftest import Runner

P = 21


def problem(matrices: int = 3, candidates: int = P) -> tuple[Tensor, Tensor]:
    """S and B [E, p, p] in fp64, of values that fp32 holds."""
    generator = torch.Generator().manual_seed(candidates)
    x = torch.randn(matrices, 60, candidates, generator=generator)
    x *= torch.logspace(0, -1, candidates)
    read = torch.randn(matrices, 9, candidates, generator=generator)
    return (x.mT @ x).double(), (read.mT @ read).double()


def by_definition(
    schur: Tensor, products: Tensor, floor: Tensor, limit: int, least: bool
) -> tuple[list[int], Tensor]:
    """The choices of one matrix, and the Cholesky factor of S among them."""
    original, places = schur, []
    floor = floor.double().clone()
    for _ in range(limit):
        left, squares = schur.diagonal(), products.diagonal()
        possible = left > floor
        if not least:
            possible &= squares > 0
        ratios = (squares / left * (-1 if least else 1)).where(possible, -math.inf)
        if not bool(possible.any()):
            break
        j = int(ratios.argmax())
        places.append(j)
        floor[j] = math.inf
        move = torch.eye(len(schur)).double()
        move[:, j] -= schur[:, j] / schur[j, j]  # what projects channel j out of all others
        move[j, j] = 0
        schur, products = move @ schur @ move.mT, move @ products @ move.mT
    return places, torch.linalg.cholesky(original[places][:, places])


def chosen(
    runner: Runner,
    schur: Tensor,
    products: Tensor,
    floor: Tensor,
    limits: Tensor,
    count: int,
    least: bool = False,
) -> tuple[Tensor, Tensor]:
    given = (schur.float(), products.float(), floor.float(), limits)
    found = gk.choose_panel(
        *(tensor.to(runner.device) for tensor in given), count, least=least, backend=runner.backend
    )
    return found[0].cpu(), found[1].cpu()


@pytest.mark.parametrize("candidates", [1, 7, 21, 128])
@pytest.mark.parametrize("least", [False, True], ids=["largest", "least"])
def test_choices_and_triangle_are_those_of_full_updates(
    runner: Runner, candidates: int, least: bool
) -> None:
    schur, products = problem(2, candidates)
    floor = 1e-5 * schur.diagonal(dim1=1, dim2=2)
    count = min(candidates, 16)
    limits = torch.tensor([count, count])
    places, triangle = chosen(runner, schur, products, floor, limits, count, least)
    for number in range(2):
        expected, factor = by_definition(
            schur[number], products[number], floor[number], count, least
        )
        assert places[number].tolist() == expected
        # A condition number near 1e3 of fp32's 6e-8.
        torch.testing.assert_close(triangle[number].double(), factor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("least", [False, True], ids=["largest", "least"])
def test_limits_and_floors_end_a_matrix_and_leave_the_others_alone(
    runner: Runner, least: bool
) -> None:
    schur, products = problem()
    floor = 1e-5 * schur.diagonal(dim1=1, dim2=2)
    floor[1, 4:] = math.inf
    floor[2, ::2] = math.inf
    limits = torch.tensor([0, 9, 5])
    places, triangle = chosen(runner, schur, products, floor, limits, 9, least)
    assert places[0].tolist() == [-1] * 9
    assert torch.equal(triangle[0], torch.eye(9))
    for number, count in ((1, 4), (2, 5)):
        expected, factor = by_definition(
            schur[number], products[number], floor[number], count, least
        )
        assert places[number].tolist() == expected + [-1] * (9 - count)
        torch.testing.assert_close(
            triangle[number, :count, :count].double(), factor, rtol=1e-4, atol=1e-4
        )
        assert torch.equal(triangle[number, count:], torch.eye(9)[count:])


def test_of_equal_candidates_the_first_is_chosen(runner: Runner) -> None:
    equal = torch.eye(6).expand(2, 6, 6).double()
    for least in (False, True):
        places, _ = chosen(runner, equal, equal, torch.zeros(2, 6), torch.tensor([4, 4]), 4, least)
        assert places.tolist() == [[0, 1, 2, 3]] * 2


def test_copies_and_candidates_without_a_gain_are_not_chosen(runner: Runner) -> None:
    schur, products = problem(1)
    copies = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    schur, products = (m[:, copies[:, None], copies].clone() for m in (schur, products))
    products[:, 6], products[:, :, 6] = 0, 0
    schur[:, 6, :6], schur[:, :6, 6] = 0, 0
    floor = 1e-5 * schur.diagonal(dim1=1, dim2=2)
    places, _ = chosen(runner, schur, products, floor, torch.tensor([7]), 7)
    assert sorted(copies[places[0, :3]].tolist()) == [0, 1, 2]
    assert places[0, 3:].tolist() == [-1] * 4


def test_inputs_are_only_read(runner: Runner) -> None:
    schur, products = (m.float().to(runner.device) for m in problem(1))
    floor = 1e-5 * schur.diagonal(dim1=1, dim2=2)
    given = (schur, products, floor, torch.tensor([4], device=runner.device))
    before = [tensor.clone() for tensor in given]
    gk.choose_panel(*given, 4, backend=runner.backend)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize(
    "change",
    [
        {"schur": torch.ones(2, 4, 5)},
        {"products": torch.ones(1, 4, 4)},
        {"floor": torch.ones(4)},
        {"floor": torch.ones(2, 0), "schur": torch.ones(2, 0, 0)},
        {"limits": torch.ones(3, dtype=torch.int64)},
        {"schur": torch.ones(2, 4, 4).double()},
        {"count": 0},
    ],
    ids=lambda change: " ".join(change),
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(change: dict[str, Tensor | int]) -> None:
    given = {
        "schur": torch.ones(2, 4, 4),
        "products": torch.ones(2, 4, 4),
        "floor": torch.ones(2, 4),
        "limits": torch.ones(2, dtype=torch.int64),
        "count": 3,
    }
    with pytest.raises(InputError, match="choose_panel takes"):
        gk.choose_panel(**given | change)
