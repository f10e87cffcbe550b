"""The correction product of a selection against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import reference


def problem(channels: int, kept: int, outputs: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [O, H], a dense Gram [H, H] and an unsorted selection."""
    x = torch.randn(2 * channels, channels)
    return torch.randn(outputs, channels), x.T @ x, torch.randperm(channels)[:kept]


def symmetric(gram: Tensor) -> Tensor:
    return gram.tril() + gram.tril(-1).T


@pytest.mark.parametrize(
    ("channels", "kept"),
    [(1, 1), (2, 1), (17, 16), (256, 100), (257, 1), (257, 256), (600, 300)],
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_all_sizes_match_fp64(channels: int, kept: int, packed: bool, dtype: torch.dtype) -> None:
    weight, gram, keep = problem(channels, kept)
    gram, weight = symmetric(gram), weight.to(dtype)
    result = gk.absorb(weight, gk.pack(gram) if packed else gram, keep)
    exact = reference.absorb(weight, gram, keep)
    magnitude = reference.absorb(weight.abs(), gram.abs(), keep)
    assert result.dtype == torch.float32
    assert reference.error_ratio(result, exact, magnitude) < reference.ERROR_LIMIT


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_keeping_everything_owes_nothing(packed: bool) -> None:
    weight, gram, _ = problem(300, 1)
    gram = gk.pack(gram) if packed else gram
    assert not gk.absorb(weight, gram, torch.randperm(300)).any()


def test_scratch_of_the_packed_gram_is_not_read() -> None:
    weight, gram, keep = problem(300, 120)
    packed = gk.pack(gram)
    expected = gk.absorb(weight, packed, keep)
    for strip in gk.tiles.strips(300):
        block = strip.view(packed)[:, strip.low :]
        block.masked_fill_(torch.ones_like(block).triu(1).bool(), torch.nan)
    assert torch.equal(gk.absorb(weight, packed, keep), expected)


def test_a_gram_in_fp64_is_worked_on_in_fp64() -> None:
    weight, gram, keep = problem(300, 120)
    gram = symmetric(gram).double()
    exact = reference.absorb(weight, gram, keep)
    # 180 products of fp64: below 180 eps of the sum of their magnitudes.
    bound = 180 * torch.finfo(torch.float64).eps * reference.absorb(weight.abs(), gram.abs(), keep)
    assert ((gk.absorb(weight, gk.pack(gram), keep) - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"\[outputs, channels\]", {"weight": torch.ones(3, 20, 3, 3)}),
        ("floating point", {"weight": torch.ones(3, 20, dtype=torch.int64)}),
        ("gram must be float32", {"gram": torch.ones(20, 20).half()}),
        ("20 channels", {"gram": torch.ones(21, 21)}),
        ("20 channels has", {"gram": torch.ones(19)}),
        ("1-D int64", {"keep": torch.ones(20, dtype=torch.bool)}),
        ("1-D int64", {"keep": torch.tensor([], dtype=torch.int64)}),
        (r"\[0, 20\)", {"keep": torch.tensor([3, 20])}),
        (r"\[0, 20\)", {"keep": torch.tensor([-1, 3])}),
        ("more than once", {"keep": torch.tensor([3, 3])}),
    ],
)
def test_bad_arguments_are_refused(message: str, changes: dict[str, Tensor]) -> None:
    arguments = {
        "weight": torch.ones(3, 20),
        "gram": torch.ones(20, 20),
        "keep": torch.tensor([0, 1]),
    } | changes
    with pytest.raises(gk.InputError, match=message):
        gk.absorb(**arguments)
