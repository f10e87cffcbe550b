"""Gram matrices of a batch of heads or experts in one call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import reference
from tests.kernels.cases import MANY, positive
from tests.kernels.conftest import Runner, every_runner, leave_to_fp16
from tests.kernels.test_gram import in_dtype, poison_scratch

CHANNELS = 67


def _poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def _sliced_heads(tokens: int) -> Tensor:
    whole = _poisoned(tokens, 5, CHANNELS + 3)
    whole[:, 1:4, 1 : CHANNELS + 1] = positive(tokens, 3, CHANNELS)
    return whole[:, 1:4, 1 : CHANNELS + 1].transpose(0, 1)


def _every_other_matrix(tokens: int) -> Tensor:
    whole = _poisoned(5, tokens, CHANNELS)
    whole[::2] = positive(3, tokens, CHANNELS)
    return whole[::2]


def _windows(tokens: int) -> Tensor:
    whole = _poisoned(3, 4, 6, tokens // 6, CHANNELS)
    whole[:, ::2, ::2] = positive(3, 2, 3, tokens // 6, CHANNELS)
    return whole[:, ::2, ::2]


def _pixels_in_groups(tokens: int) -> Tensor:
    return positive(2, 3, CHANNELS, tokens // 8, 4).permute(1, 0, 3, 4, 2)


# Each takes tokens and gives [matrices, ..., channels]; what lies between the elements is NaN.
BATCHES: dict[str, Callable[[int], Tensor]] = {
    "stacked": lambda tokens: positive(3, tokens, CHANNELS),
    "heads": lambda tokens: positive(tokens, 3, CHANNELS).transpose(0, 1),
    "heads of sequences": lambda tokens: positive(2, tokens // 2, 3, CHANNELS).permute(2, 0, 1, 3),
    "sliced heads": _sliced_heads,
    "every other matrix": _every_other_matrix,
    "one matrix repeated": lambda tokens: positive(tokens, CHANNELS).expand(3, -1, -1),
    "channels outside": lambda tokens: positive(3, CHANNELS, tokens).mT,
    "pixels in groups": _pixels_in_groups,
    "windows": _windows,
    "a token each": lambda tokens: positive(3, CHANNELS),
    "one matrix": lambda tokens: positive(1, tokens, CHANNELS),
    "no matrix": lambda tokens: positive(0, tokens, CHANNELS),
    "no token": lambda tokens: positive(3, 0, CHANNELS),
}


def matrices(x: Tensor, runner: Runner, **options: Tensor | None) -> Tensor:
    """The dense Grams [E, H, H] of `x`, by way of accumulators whose scratch is NaN."""
    channels = x.shape[-1]
    out = gk.pack(torch.zeros(x.shape[0], channels, channels))
    for accumulator in out:
        poison_scratch(accumulator, channels)
    moved = {
        name: None if value is None else value.to(runner.device) for name, value in options.items()
    }
    out = out.to(runner.device)
    gk.gram_batched_(out, x.to(runner.device), backend=runner.backend, **moved)
    return gk.unpack(out.cpu(), channels)


def assert_match_fp64(
    result: Tensor, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> None:
    assert torch.equal(result, result.mT)
    for matrix, tokens in zip(result, x, strict=True):
        exact = reference.gram(tokens, mask, weights)
        magnitude = reference.gram(tokens.abs(), mask, weights)
        assert reference.error_ratio(matrix, exact, magnitude) < reference.ERROR_LIMIT


@every_runner
@pytest.mark.parametrize("tokens", [1, 63, 65, MANY])
@pytest.mark.parametrize("channels", [1, 64, 129])
def test_all_sizes_match_fp64(
    tokens: int, channels: int, dtype: torch.dtype, runner: Runner
) -> None:
    if tokens != 65:
        leave_to_fp16(dtype)
    x = positive(tokens, 2, channels).to(dtype).transpose(0, 1)
    assert_match_fp64(matrices(x, runner), x)


@every_runner
@pytest.mark.parametrize("batch", BATCHES)
def test_all_layouts_match_fp64_and_are_left_alone(
    batch: str, dtype: torch.dtype, runner: Runner
) -> None:
    x = in_dtype(BATCHES[batch](runner.tokens), dtype)
    before = x.clone()
    assert_match_fp64(matrices(x, runner), x)
    assert torch.equal(x, before)


@every_runner
@pytest.mark.parametrize("batch", ["heads", "heads of sequences", "pixels in groups", "windows"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_masks_weights_sums_and_counts_match_fp64(
    batch: str, weighted: bool, masked: bool, runner: Runner
) -> None:
    x = in_dtype(BATCHES[batch](runner.tokens), torch.float16)
    mask = torch.rand(x.shape[1:-1]) < 0.7 if masked else None
    weights = torch.rand(x.shape[1:-1]) if weighted else None
    sums = torch.zeros(3, CHANNELS, device=runner.device)
    nonfinite = torch.zeros(3, CHANNELS, dtype=torch.int64, device=runner.device)
    result = matrices(x, runner, mask=mask, weights=weights, sums=sums, nonfinite=nonfinite)
    assert_match_fp64(result, x, mask, weights)
    for matrix_sums, tokens in zip(sums.cpu(), x, strict=True):
        exact = reference.channel_sums(tokens, mask, weights)
        magnitude = reference.channel_sums(tokens.abs(), mask, weights)
        assert reference.error_ratio(matrix_sums, exact, magnitude) < reference.ERROR_LIMIT
    assert not nonfinite.any()


@every_runner
@pytest.mark.parametrize("batch", ["heads", "pixels in groups"])
def test_tokens_split_over_programs_match_fp64(
    batch: str, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grail_kernels.tuning._FEWEST_SPLIT_TOKENS", 64)
    x = in_dtype(BATCHES[batch](300), torch.float16)
    x[1, ..., 5] = torch.inf
    sums = torch.zeros(3, CHANNELS, device=runner.device)
    nonfinite = torch.zeros(3, CHANNELS, dtype=torch.int64, device=runner.device)
    result = matrices(x, runner, sums=sums, nonfinite=nonfinite)
    assert torch.equal(nonfinite.cpu(), torch.stack([reference.nonfinite_counts(m) for m in x]))
    assert_match_fp64(result[::2], x[::2])
    for matrix_sums, tokens in zip(sums.cpu()[::2], x[::2], strict=True):
        exact, magnitude = reference.channel_sums(tokens), reference.channel_sums(tokens.abs())
        assert reference.error_ratio(matrix_sums, exact, magnitude) < reference.ERROR_LIMIT


@every_runner
def test_more_than_a_tile_and_a_strip_of_each_matrix_match_fp64(runner: Runner) -> None:
    x = positive(16, 3, 400).half().transpose(0, 1)
    sums = torch.zeros(3, 400, device=runner.device)
    assert_match_fp64(matrices(x, runner, sums=sums), x)


@every_runner
def test_what_is_there_is_added_to(runner: Runner) -> None:
    x = BATCHES["heads"](100).half()
    out = torch.zeros(3, gk.packed_numel(CHANNELS), device=runner.device)
    for _ in range(2):
        gk.gram_batched_(out, x.to(runner.device), backend=runner.backend)
    assert_match_fp64(gk.unpack(out.cpu(), CHANNELS), torch.cat([x, x], dim=1))


@every_runner
def test_a_batch_of_one_has_the_bits_of_a_single_matrix(runner: Runner) -> None:
    x = positive(runner.tokens, CHANNELS).half().to(runner.device)
    batched, single = (torch.zeros(1, gk.packed_numel(CHANNELS)).to(runner.device) for _ in "ab")
    gk.gram_batched_(batched, x[None], backend=runner.backend)
    gk.gram_(single[0], x, backend=runner.backend)
    assert torch.equal(gk.unpack(batched, CHANNELS), gk.unpack(single, CHANNELS))


@every_runner
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype, runner: Runner) -> None:
    x = BATCHES["heads"](runner.tokens).to(dtype)
    assert torch.equal(matrices(x, runner), matrices(x, runner))


@every_runner
def test_what_masked_tokens_hold_changes_no_bit(runner: Runner) -> None:
    x = BATCHES["heads"](200).half()
    mask = torch.rand(200) < 0.5
    poisoned = x.masked_fill(~mask[None, :, None], torch.nan)
    assert torch.equal(matrices(poisoned, runner, mask=mask), matrices(x, runner, mask=mask))


@every_runner
@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference mode", "autocast"],
)
def test_the_callers_mode_changes_no_bit(
    context: Callable[[], AbstractContextManager[object]], runner: Runner
) -> None:
    x = BATCHES["heads"](100)
    options = {"weights": torch.rand(100)}
    expected = matrices(x, runner, **options)
    with context():
        assert torch.equal(matrices(x, runner, **options), expected)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"\[matrices, \.\.\., channels\]", {"x": torch.ones(CHANNELS)}),
        ("x must be bfloat16", {"x": torch.ones(2, 20, CHANNELS).double()}),
        ("66 channels has", {"x": torch.ones(2, 20, 66)}),
        ("out must have shape", {"x": torch.ones(3, 20, CHANNELS)}),
        ("out must have shape", {"out": torch.zeros(gk.packed_numel(CHANNELS))}),
        ("one entry per token", {"mask": torch.ones(2, 20, dtype=torch.bool)}),
        ("one entry per token", {"weights": torch.ones(19)}),
        ("mask must be torch.bool", {"mask": torch.ones(20)}),
        ("sums must have shape", {"sums": torch.zeros(CHANNELS)}),
        ("nonfinite must be", {"nonfinite": torch.zeros(2, CHANNELS)}),
        ("one device", {"weights": torch.ones(20, device="meta")}),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(
    message: str, changes: dict[str, Tensor]
) -> None:
    arguments = {
        "out": torch.zeros(2, gk.packed_numel(CHANNELS)),
        "x": torch.ones(2, 20, CHANNELS),
        "sums": torch.zeros(2, CHANNELS),
        "nonfinite": torch.zeros(2, CHANNELS, dtype=torch.int64),
    } | changes
    with pytest.raises(gk.InputError, match=message):
        gk.gram_batched_(**arguments)
    assert not any(arguments[name].any() for name in ("out", "sums", "nonfinite"))


def test_accumulators_that_overlap_the_activations_are_refused() -> None:
    memory = torch.zeros(10_000)
    out, x = memory[: 2 * 64 * 64].view(2, -1), memory[8000:9280].view(2, 10, 64)
    with pytest.raises(gk.InputError, match="overlaps x"):
        gk.gram_batched_(out, x)
