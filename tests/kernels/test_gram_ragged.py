"""Gram matrices of many experts in one call."""

from __future__ import annotations

import pytest
import torch

import grail_kernels as gk
from grail_kernels import reference
from tests.kernels.cases import positive
from tests.kernels.conftest import Runner

CHANNELS = 67
# Experts of a tail, of no tokens, of one, of exactly one step; rows after the last are nobody's.
OFFSETS = (0, 0, 70, 71, 71, 135)
TOKENS = 140


def accumulators(experts: int) -> torch.Tensor:
    return torch.zeros(experts, gk.packed_numel(CHANNELS))


def test_every_expert_matches_fp64(dtype: torch.dtype, runner: Runner) -> None:
    x = positive(TOKENS, CHANNELS).to(dtype)
    x[OFFSETS[-1] :] = torch.nan
    experts = len(OFFSETS) - 1
    out = accumulators(experts).to(runner.device)
    sums = torch.zeros(experts, CHANNELS, device=runner.device)
    gk.gram_ragged_(
        out, x.to(runner.device), torch.tensor(OFFSETS), sums=sums, backend=runner.backend
    )
    for expert in range(experts):
        tokens = x[OFFSETS[expert] : OFFSETS[expert + 1]]
        matrix = gk.unpack(out[expert].cpu(), CHANNELS)
        exact, magnitude = reference.gram(tokens), reference.gram(tokens.abs())
        assert reference.error_ratio(matrix, exact, magnitude) < reference.ERROR_LIMIT
        exact, magnitude = reference.channel_sums(tokens), reference.channel_sums(tokens.abs())
        ratio = reference.error_ratio(sums[expert].cpu(), exact, magnitude)
        assert ratio < reference.ERROR_LIMIT


def test_nonfinite_values_are_counted_by_expert(runner: Runner) -> None:
    x = positive(TOKENS, CHANNELS)
    x[0, 3] = torch.nan
    x[80:82, 5] = torch.inf
    experts = len(OFFSETS) - 1
    counts = torch.zeros(experts, CHANNELS, dtype=torch.int64, device=runner.device)
    out = accumulators(experts).to(runner.device)
    gk.gram_ragged_(
        out, x.to(runner.device), torch.tensor(OFFSETS), nonfinite=counts, backend=runner.backend
    )
    expected = torch.zeros(experts, CHANNELS, dtype=torch.int64)
    expected[1, 3], expected[4, 5] = 1, 2
    assert torch.equal(counts.cpu(), expected)


def test_an_expert_without_tokens_is_left_as_it_is(runner: Runner) -> None:
    out = torch.full((2, gk.packed_numel(CHANNELS)), 7.0, device=runner.device)
    x = positive(5, CHANNELS).to(runner.device)
    gk.gram_ragged_(out, x, torch.tensor([0, 5, 5]), backend=runner.backend)
    assert (gk.unpack(out[1].cpu(), CHANNELS) == 7).all()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("never decrease", {"offsets": torch.tensor([0, 5, 4])}),
        ("from 0", {"offsets": torch.tensor([1, 5, 6])}),
        ("at most the 20 tokens", {"offsets": torch.tensor([0, 5, 21])}),
        ("offsets must be torch.int64", {"offsets": torch.tensor([0, 5, 20]).int()}),
        ("offsets must have shape", {"offsets": torch.tensor([0, 5, 10, 20])}),
        (r"\[tokens, channels\]", {"x": torch.ones(2, 10, CHANNELS)}),
        (r"\[experts, packed", {"out": torch.zeros(gk.packed_numel(CHANNELS))}),
        ("66 channels has", {"x": torch.ones(20, 66)}),
        ("sums must have shape", {"sums": torch.zeros(CHANNELS)}),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(
    message: str, changes: dict[str, torch.Tensor]
) -> None:
    arguments = {
        "out": accumulators(2),
        "x": torch.ones(20, CHANNELS),
        "offsets": torch.tensor([0, 5, 20]),
    } | changes
    with pytest.raises(gk.InputError, match=message):
        gk.gram_ragged_(**arguments)
    assert not arguments["out"].any()
