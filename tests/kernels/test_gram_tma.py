"""The kernel that reads by descriptors: what it reads in place, what is laid out, and how."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import reference
from tests.kernels.cases import positive
from tests.kernels.conftest import BACKENDS, Runner

gram_tma = pytest.importorskip("grail_kernels.gram_tma")

runs = pytest.mark.parametrize("runner", [b for b in BACKENDS if b != "torch"], indirect=True)


def strided(dtype: torch.dtype, start: int = 0, width: int = 64) -> Tensor:
    """[1, 1, 10, 48] out of rows of `width`, from `start` on."""
    return torch.zeros(10, width, dtype=dtype)[None, None, :, start : start + 48]


IN_PLACE = {
    "contiguous": (strided(torch.bfloat16, width=48), True),
    "columns of wider rows": (strided(torch.float16, start=8), True),
    "heads beside each other": (torch.zeros(10, 3, 8).half().transpose(0, 1)[:, None], True),
    "a base between two addresses": (strided(torch.bfloat16, start=3), False),
    "rows of a width of their own": (strided(torch.bfloat16, width=49), False),
    "channels apart": (torch.zeros(48, 10).half().T[None, None], False),
    "one token for all": (torch.zeros(1, 48).half().expand(10, -1)[None, None], False),
    "fp32": (strided(torch.float32), False),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_only_rows_of_aligned_16_bits_are_read_in_place(case: str) -> None:
    x, expected = IN_PLACE[case]
    assert gram_tma._is_laid(x) == expected


@runs
def test_fp32_is_laid_out_as_three_parts_and_masked_tokens_as_zeros(runner: Runner) -> None:
    x = torch.randn(2, 3, 20, 67, device=runner.device) * 1e3
    mask = torch.rand(60, device=runner.device) > 0.4
    laid = gram_tma._lay(x, mask.view(torch.uint8), first=7, tokens=40)
    assert laid.shape == (6, 40, 72)
    parts = laid.unflatten(0, (2, 3)).float()
    expected = x.flatten(1, 2)[:, 7:47] * mask[7:47, None]
    assert torch.equal(parts[..., :67].flip(1).sum(1), expected)
    assert not parts[..., 67:].any()
    assert laid.dtype == torch.bfloat16


@runs
@pytest.mark.parametrize("channels", [64, 67], ids=["in place", "laid out"])
def test_a_launch_takes_some_of_the_tokens(
    channels: int, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []
    add = gram_tma.Launch.add

    def spy(launch: object, tokens: int, /, *rest: int, **read: object) -> None:
        launched.append(tokens)
        add(launch, tokens, *rest, **read)

    monkeypatch.setattr(gram_tma.Launch, "add", spy)
    monkeypatch.setattr("grail_kernels.tuning.LAUNCHED_TOKENS", 50)
    monkeypatch.setattr(gram_tma, "_LAID_TOKENS", 50)
    x = positive(130, channels).half()
    sums = torch.zeros(channels, device=runner.device)
    out = torch.zeros(gk.packed_numel(channels), device=runner.device)
    gk.gram_(out, x.to(runner.device), sums=sums, backend=runner.backend)
    assert launched == [50, 50, 30]
    result = gk.unpack(out.cpu(), channels)
    magnitude = reference.gram(x.abs())
    assert reference.error_ratio(result, reference.gram(x), magnitude) < reference.ERROR_LIMIT
    assert torch.allclose(sums.cpu().double(), x.double().sum(0), rtol=1e-5)


@pytest.mark.parametrize(("outer", "inner"), [(1, 7), (1, 250), (7, 30), (2, 250), (3, 100)])
def test_launches_take_every_token_once_and_not_too_many(
    outer: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grail_kernels.gram_triton import _launches

    monkeypatch.setattr("grail_kernels.tuning.LAUNCHED_TOKENS", 100)
    x = torch.arange(outer * inner).view(1, outer, inner, 1)
    seen = []
    for part, tokens in _launches(x):
        assert torch.equal(x[part].flatten(), torch.arange(outer * inner)[tokens])
        assert 0 < x[part].numel() <= 100
        seen += x[part].flatten().tolist()
    assert seen == list(range(outer * inner))
