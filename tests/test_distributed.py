import os
import time

import pytest
import torch

import grail
from grail.distributed import Group, all_reduce
from grail.errors import InputError

from .processes import run

H, O = 40, 6
COUNTS = [2, 4]


def tokens(number: int, drift: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What process `number` sees: 10·(number + 1) tokens, and a drift, but process 1 none."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(10 * (number + 1), H, generator=generator)
    return x, torch.randn(len(x), O, generator=generator) if drift and number != 1 else None


def _all_reduced(number: int) -> dict[str, torch.Tensor]:
    gram = grail.Gram(H, name="site")
    if number != 2:  # which sees nothing, and has allocated nothing
        x, drift = tokens(number)
        gram.update(x, drift=drift)
    all_reduce(gram)
    return {"matrix": gram.matrix(), **gram._tensors()}


@pytest.fixture(scope="module", params=COUNTS)
def all_reduced(request) -> list[dict[str, torch.Tensor]]:
    return run(request.param, _all_reduced)


def test_every_process_has_the_sums_of_all_bit_for_bit(all_reduced):
    for name, tensor in all_reduced[0].items():
        assert all(torch.equal(other[name], tensor) for other in all_reduced)


def test_token_counts_are_exact(all_reduced):
    seen = [number for number in range(len(all_reduced)) if number != 2]
    assert all_reduced[0]["tokens"] == sum(10 * (number + 1) for number in seen)


def test_the_sums_are_those_of_one_process(all_reduced):
    seen = [tokens(number) for number in range(len(all_reduced)) if number != 2]
    x = torch.cat([x for x, _ in seen]).double()
    # The bound of one process's Gram holds for the sum.
    magnitude = x.abs().T @ x.abs() * torch.finfo(torch.float32).eps
    assert ((all_reduced[0]["matrix"] - x.T @ x).abs() / magnitude).max() < 16
    torch.testing.assert_close(all_reduced[0]["sum"].double(), x.sum(0), rtol=1e-5, atol=1e-5)
    drifted = [(x.double(), drift.double()) for x, drift in seen if drift is not None]
    cross = sum(drift.T @ x for x, drift in drifted)
    torch.testing.assert_close(all_reduced[0]["drift.cross"].double(), cross, rtol=1e-5, atol=1e-5)
    energy = sum(drift.square().sum() for _, drift in drifted)
    torch.testing.assert_close(all_reduced[0]["drift.energy"], energy)


def _different_sites(number: int) -> None:
    all_reduce(grail.Gram(H + number))


def test_sums_of_different_sites_are_refused_by_all():
    for message in run(2, _different_sites):
        assert message.startswith("InputError: the processes hold sums of different sites")


def _sent(number: int) -> int:
    ranks, gram = Group(), grail.Gram(1000)
    gram.update(torch.ones(3, 1000))
    ranks.reduce(gram, owner=0)
    return ranks.sent


def test_only_the_packed_triangle_is_sent():
    # 2·H·(H + 256) bytes, in blocks of 128 channels, and vectors of H: fp32 sums, int64 counts.
    padded = 1024
    owner, other = run(2, _sent)
    assert owner == 0
    assert other <= 2 * padded * (padded + 256) + 12 * 1000 + 8


def _one_fails(number: int) -> None:
    with Group().together():
        if number == 1:
            raise InputError("a broken batch")
        Group().total(torch.ones(()))


def test_what_fails_in_one_process_fails_in_all():
    healthy, broken = run(2, _one_fails)
    assert healthy == "RankError: process 1 of 2 failed: InputError: a broken batch"
    assert broken == "InputError: a broken batch"


def _one_dies(number: int) -> None:
    with Group().together():
        if number == 1:
            os._exit(1)
        while True:
            Group().total(torch.ones(()))


def test_a_process_that_is_lost_ends_the_others_with_an_error():
    start = time.monotonic()
    survivor, _ = run(2, _one_dies)
    assert survivor.startswith("RankError: process 0 of 2 lost touch with another")
    assert time.monotonic() - start < 30  # not by the group's timeout
