"""fp32 by three products of fp16: the numbers, and the kernel behind a row of the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import gram_serve, reference, tuning
from tests.kernels.cases import positive
from tests.kernels.conftest import BACKENDS, Runner

EPS = 2.0**-23
LAUNCH = tuning.GramConfig("halves", 32, 64, 8, 4, 2)

runs = pytest.mark.parametrize("runner", [b for b in BACKENDS if b != "torch"], indirect=True)

VALUES: dict[str, Callable[[int, int], Tensor]] = {
    "normal": positive,
    "over many binades": lambda tokens, channels: torch.exp(2 * torch.randn(tokens, channels)),
    "channels of other sizes": lambda tokens, channels: (
        positive(tokens, channels) * torch.logspace(-15, 12, channels)
    ),
    "one huge token": lambda tokens, channels: torch.cat(
        [torch.randn(tokens - 1, channels) * 1e-4, torch.full((1, channels), 100.0)]
    ),
    "zeros": lambda tokens, channels: positive(tokens, channels) * (torch.arange(channels) > 2),
}


def emulated(x: Tensor) -> Tensor:
    """The Gram matrix by the parts of the docstring of `gram_halves`, its sums in fp64."""
    _, exponents = torch.frexp(x.abs().amax(0))
    scale = torch.ldexp(torch.ones(x.shape[1]), 15 - exponents)
    high = (x * scale).half()
    low = (x * scale - high.float()).half()
    high, low = high.double() / scale, low.double() / scale
    return high.T @ high + high.T @ low + low.T @ high


@pytest.mark.parametrize("name", VALUES)
def test_what_three_products_leave_out_is_below_the_rounding_of_fp32_sums(name: str) -> None:
    x = VALUES[name](4096, 48)
    ratio = reference.error_ratio(emulated(x), reference.gram(x), reference.gram(x.abs()))
    assert ratio < (0.5 if name == "normal" else 8)  # 2^-20 of each product


def test_the_smallest_eigenvalue_falls_no_lower_than_what_low_parts_carry() -> None:
    directions = positive(512, 8) @ positive(8, 48)  # rank 8: 40 eigenvalues of 0
    smallest = torch.linalg.eigvalsh(emulated(directions))[0]
    trace = float(directions.double().square().sum())
    assert -(2.0**-22) * trace <= float(smallest)


@pytest.fixture
def halves(own_table: Path) -> None:
    """Every fp32 call takes the kernel."""
    table = dict(tuning.read_table(own_table))
    for (architecture, key), row in table.items():
        if key[:2] == ("gram", "split") and isinstance(row, tuple):
            table[architecture, key] = (LAUNCH, *row)
    tuning.write_table(own_table, table)
    gram_serve.forget_forms()


@runs
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(("tokens", "channels"), [(130, 67), (1, 16), (65, 129)])
@pytest.mark.usefixtures("halves")
def test_the_kernel_matches_fp64(name: str, tokens: int, channels: int, runner: Runner) -> None:
    x = VALUES[name](tokens, channels)
    out = torch.zeros(gk.packed_numel(channels), device=runner.device)
    sums = torch.zeros(channels, device=runner.device)
    gk.gram_(out, x.to(runner.device), sums=sums, backend=runner.backend)
    result = gk.unpack(out.cpu(), channels)
    ratio = reference.error_ratio(result, reference.gram(x), reference.gram(x.abs()))
    assert ratio < reference.ERROR_LIMIT
    assert torch.equal(result, result.T)
    exact, size = reference.channel_sums(x), reference.channel_sums(x.abs())
    assert reference.error_ratio(sums.cpu(), exact, size) < reference.ERROR_LIMIT


@runs
@pytest.mark.usefixtures("halves")
def test_masks_batches_and_blocks_of_tokens(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grail_kernels.tuning.BUFFER_TOKENS", 40)
    x, mask = positive(2, 100, 33), torch.rand(100) < 0.7
    x[:, ~mask] = torch.nan
    x[1, :40] *= 1e4  # each block of tokens has scales of its own
    out = torch.zeros(2, gk.packed_numel(33), device=runner.device)
    gk.gram_batched_(out, x.to(runner.device), mask=mask.to(runner.device), backend=runner.backend)
    for packed, matrix in zip(out.cpu(), x, strict=True):
        exact, size = (reference.gram(values[mask]) for values in (matrix, matrix.abs()))
        ratio = reference.error_ratio(gk.unpack(packed, 33), exact, size)
        assert ratio < reference.ERROR_LIMIT


@runs
@pytest.mark.usefixtures("halves")
def test_what_is_not_finite_is_counted_and_harms_no_other_channel(runner: Runner) -> None:
    x = positive(50, 20)
    x[3, 4], x[7, 9], x[8, 9] = torch.inf, torch.nan, -torch.inf
    out = torch.zeros(gk.packed_numel(20), device=runner.device)
    nonfinite = torch.zeros(20, dtype=torch.int64, device=runner.device)
    gk.gram_(out, x.to(runner.device), nonfinite=nonfinite, backend=runner.backend)
    assert nonfinite.tolist() == [{4: 1, 9: 2}.get(channel, 0) for channel in range(20)]
    result, kept = gk.unpack(out.cpu(), 20), [c for c in range(20) if c not in (4, 9)]
    clean = x[:, kept]
    ratio = reference.error_ratio(
        result[kept][:, kept], reference.gram(clean), reference.gram(clean.abs())
    )
    assert ratio < reference.ERROR_LIMIT
    assert not result[4, 4].isfinite()
    assert not result[9, 9].isfinite()
