"""The Gram matrix of silu(gate) * up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import grail_kernels as gk
from grail_kernels import gram_serve, reference, tuning
from grail_kernels.backend import interpreting
from tests.kernels.cases import positive
from tests.kernels.conftest import BACKENDS, Runner

CHANNELS = 67


def halves(layout: str, tokens: int) -> tuple[Tensor, Tensor]:
    if layout == "one projection":
        return positive(tokens, 2 * CHANNELS).chunk(2, dim=-1)
    if layout == "batch":
        return positive(2, tokens // 2, CHANNELS), positive(2, tokens // 2, CHANNELS)
    return positive(tokens, CHANNELS), positive(CHANNELS, tokens).T


def assert_matches(result: Tensor, gate: Tensor, up: Tensor, mask: Tensor | None = None) -> None:
    hidden = F.silu(gate) * up
    magnitude = reference.gram(hidden.abs(), mask)
    # exp differs by an ulp between libraries, and so silu by one rounding of its dtype now and
    # then: twice that for a product of two activations.
    roundings = 2 * torch.finfo(gate.dtype).eps / torch.finfo(torch.float32).eps
    limit = reference.ERROR_LIMIT + roundings
    assert reference.error_ratio(result, reference.gram(hidden, mask), magnitude) < limit


@pytest.mark.parametrize("layout", ["one projection", "batch", "other strides"])
def test_all_layouts_match_fp64(layout: str, dtype: torch.dtype, runner: Runner) -> None:
    if interpreting() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds")
    gate, up = (half.to(dtype) for half in halves(layout, runner.tokens))
    out = torch.zeros(gk.packed_numel(CHANNELS), device=runner.device)
    mask = torch.rand(gate.shape[:-1]) < 0.7
    sums = torch.zeros(CHANNELS, device=runner.device)
    gk.gram_swiglu_(
        out,
        gate.to(runner.device),
        up.to(runner.device),
        mask=mask.to(runner.device),
        sums=sums,
        backend=runner.backend,
    )
    assert_matches(gk.unpack(out.cpu(), CHANNELS), gate, up, mask)
    hidden = F.silu(gate) * up
    exact, magnitude = (reference.channel_sums(h, mask) for h in (hidden, hidden.abs()))
    roundings = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    limit = reference.ERROR_LIMIT + roundings
    assert reference.error_ratio(sums.cpu(), exact, magnitude) < limit


@pytest.mark.parametrize("runner", [b for b in BACKENDS if b != "torch"], indirect=True)
@pytest.mark.parametrize("form", ["matrix", "batch", "experts"])
def test_a_row_that_forms_the_activation_first_gives_the_same(
    form: str, runner: Runner, own_table: Path
) -> None:
    up, gate = (positive(2, 60, CHANNELS).to(runner.device) for _ in range(2))
    offsets = None
    out = torch.zeros(2, gk.packed_numel(CHANNELS), device=runner.device)
    if form == "matrix":
        out = out[0]
    if form == "experts":
        up, gate = up.flatten(0, 1), gate.flatten(0, 1)
        offsets = torch.tensor([0, 50, 110])
    mask = torch.rand(60 if form == "batch" else up.shape[:-1], device=runner.device) < 0.7
    call = (up, mask.expand(up.shape[out.dim() - 1 : -1]) if offsets is None else mask, None)
    found = []
    for formed in (False, True):
        if formed:
            table = dict(tuning.read_table(own_table))
            for key, row in table.items():
                if key[1][2] in ("gated", "scattered"):
                    table[key] = (tuning.FORMING, *row)
            tuning.write_table(own_table, table)
            gram_serve.forget_forms()
        written = out.clone(), torch.zeros(*out.shape[:-1], CHANNELS, device=runner.device)
        torch.ops.grail.gram_(
            written[0], *call, written[1], None, gate, offsets, backend=runner.backend
        )
        found.append((gk.unpack(written[0], CHANNELS), written[1]))
    for loaded, formed in zip(*found, strict=True):
        # Sums of other lengths: the activations are the same.
        assert torch.allclose(loaded, formed, rtol=3e-6, atol=1e-5)


def test_the_torch_twin_is_the_gram_of_the_hidden_activation_bit_for_bit() -> None:
    gate, up = positive(700, CHANNELS).bfloat16(), positive(700, CHANNELS).bfloat16()
    out, expected = (torch.zeros(gk.packed_numel(CHANNELS)) for _ in range(2))
    gk.gram_swiglu_(out, gate, up)
    gk.gram_(expected, F.silu(gate) * up)
    assert torch.equal(gk.unpack(out, CHANNELS), gk.unpack(expected, CHANNELS))


def test_one_token_is_a_vector(runner: Runner) -> None:
    gate, up = positive(CHANNELS), positive(CHANNELS)
    out = torch.zeros(gk.packed_numel(CHANNELS), device=runner.device)
    gk.gram_swiglu_(out, gate.to(runner.device), up.to(runner.device), backend=runner.backend)
    assert_matches(gk.unpack(out.cpu(), CHANNELS), gate, up)


@pytest.mark.parametrize(
    ("message", "gate", "up"),
    [
        ("one shape and dtype", torch.ones(4, CHANNELS), torch.ones(5, CHANNELS)),
        ("one shape and dtype", torch.ones(4, CHANNELS).half(), torch.ones(4, CHANNELS)),
        ("gate must be", torch.ones(4, CHANNELS).double(), torch.ones(4, CHANNELS).double()),
        ("66 channels has", torch.ones(4, 66), torch.ones(4, 66)),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(
    message: str, gate: Tensor, up: Tensor
) -> None:
    out = torch.zeros(gk.packed_numel(CHANNELS))
    with pytest.raises(gk.InputError, match=message):
        gk.gram_swiglu_(out, gate, up)
    assert not out.any()
