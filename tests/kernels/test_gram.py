"""The streaming Gram accumulator against fp64, on every backend that runs here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import reference
from tests.kernels.cases import CHANNELS, LAYOUTS, TOKENS, positive
from tests.kernels.conftest import BACKENDS, Runner, every_runner, leave_to_fp16


def accumulate(x: Tensor, runner: Runner, **options: Tensor | None) -> Tensor:
    """The packed Gram of `x`, into an accumulator whose scratch is poisoned with NaN."""
    channels = x.shape[-1]
    out = gk.pack(torch.zeros(channels, channels))
    poison_scratch(out, channels)
    moved = {
        name: None if value is None else value.to(runner.device) for name, value in options.items()
    }
    out = out.to(runner.device)
    gk.gram_(out, x.to(runner.device), backend=runner.backend, **moved)
    return out.cpu()


def poison_scratch(out: Tensor, channels: int) -> None:
    for strip in gk.tiles.strips(channels):
        block = strip.view(out)[:, strip.low :]
        block.masked_fill_(torch.ones_like(block).triu(1).bool(), torch.nan)


def matrix(x: Tensor, runner: Runner, **options: Tensor | None) -> Tensor:
    return gk.unpack(accumulate(x, runner, **options), x.shape[-1])


def assert_matches_fp64(
    result: Tensor, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> None:
    exact = reference.gram(x, mask, weights)
    magnitude = reference.gram(x.abs(), mask, None if weights is None else weights.abs())
    assert reference.error_ratio(result, exact, magnitude) < reference.ERROR_LIMIT


@every_runner
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_all_sizes_match_fp64_and_are_symmetric(
    tokens: int, channels: int, dtype: torch.dtype, runner: Runner
) -> None:
    if tokens != 65:
        leave_to_fp16(dtype)
    x = positive(tokens, channels).to(dtype)
    result = matrix(x, runner)
    assert torch.equal(result, result.T)
    assert_matches_fp64(result, x)


@every_runner
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_match_fp64_and_are_left_alone(
    layout: str, dtype: torch.dtype, runner: Runner
) -> None:
    x = in_dtype(LAYOUTS[layout](runner.tokens, 67), dtype)
    before = x.clone()
    assert_matches_fp64(matrix(x, runner), x)
    assert torch.equal(x, before)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another dtype with the same strides and the same storage offset."""
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return torch.as_strided(whole.to(dtype), x.shape, x.stride(), x.storage_offset())


@every_runner
@pytest.mark.parametrize("layout", ["rows", "transposed", "padded batch", "pixels"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_masks_weights_sums_and_counts_match_fp64(
    layout: str, weighted: bool, masked: bool, dtype: torch.dtype, runner: Runner
) -> None:
    leave_to_fp16(dtype)
    x = in_dtype(LAYOUTS[layout](runner.tokens, 67), dtype)
    mask = torch.rand(x.shape[:-1]) < 0.7 if masked else None
    weights = torch.rand(x.shape[:-1]) if weighted else None
    sums = torch.zeros(67, device=runner.device)
    nonfinite = torch.zeros(67, dtype=torch.int64, device=runner.device)
    result = matrix(x, runner, mask=mask, weights=weights, sums=sums, nonfinite=nonfinite)
    assert_matches_fp64(result, x, mask, weights)
    exact = reference.channel_sums(x, mask, weights)
    magnitude = reference.channel_sums(x.abs(), mask, weights)
    assert reference.error_ratio(sums.cpu(), exact, magnitude) < reference.ERROR_LIMIT
    assert not nonfinite.any()


@every_runner
def test_nonfinite_values_are_counted_by_channel(runner: Runner) -> None:
    x = positive(2, 90, 67)
    for value, channel, count in ((torch.nan, 3, 1), (torch.inf, 5, 4), (-torch.inf, 66, 90)):
        x[1, :count, channel] = value
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, 0] = False
    nonfinite = torch.ones(67, dtype=torch.int64, device=runner.device)
    result = matrix(x, runner, mask=mask, nonfinite=nonfinite)
    assert torch.equal(nonfinite.cpu(), 1 + reference.nonfinite_counts(x, mask))
    assert not torch.isfinite(result[66, 66])


@every_runner
def test_what_is_there_is_added_to(dtype: torch.dtype, runner: Runner) -> None:
    x = positive(100, 260).to(dtype)
    out = accumulate(x, runner).to(runner.device)
    gk.gram_(out, x.to(runner.device), backend=runner.backend)
    assert_matches_fp64(gk.unpack(out.cpu(), 260), torch.cat([x, x]))


@every_runner
def test_chunks_in_any_order_match_one_pass(dtype: torch.dtype, runner: Runner) -> None:
    tokens = runner.tokens
    x = positive(tokens, 130).to(dtype)
    out = torch.zeros(gk.packed_numel(130), device=runner.device)
    for part in reversed(x.split([100, 1, 0, tokens - 101])):
        gk.gram_(out, part.to(runner.device), backend=runner.backend)
    assert_matches_fp64(gk.unpack(out.cpu(), 130), x)


@every_runner
def test_more_tile_rows_than_a_group_match_fp64(runner: Runner) -> None:
    x = positive(16, 1100).half()
    assert_matches_fp64(matrix(x, runner), x)


@every_runner
def test_short_chains_match_fp64(
    dtype: torch.dtype, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grail_kernels.tuning.CHAIN_TOKENS", 64)
    x = positive(180, 67).to(dtype)
    assert_matches_fp64(matrix(x, runner), x)


@every_runner
@pytest.mark.parametrize("layout", ["rows", "padded batch", "pixels"])
def test_blocks_of_few_tokens_match_fp64(
    layout: str, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grail_kernels.gram_torch.block_tokens", lambda channels: 100)
    x = in_dtype(LAYOUTS[layout](180, 67), torch.float16)
    mask = torch.rand(x.shape[:-1]) < 0.7
    assert_matches_fp64(matrix(x, runner, mask=mask), x, mask)


@every_runner
def test_shards_add_up(dtype: torch.dtype, runner: Runner) -> None:
    x = positive(runner.tokens, 130).to(dtype)
    merged = accumulate(x[:100], runner) + accumulate(x[100:], runner)
    assert_matches_fp64(gk.unpack(merged, 130), x)


@every_runner
def test_masked_tokens_are_removed_tokens(dtype: torch.dtype, runner: Runner) -> None:
    x = positive(200, 67).to(dtype)
    mask = torch.rand(200) < 0.5
    assert_matches_fp64(matrix(x, runner, mask=mask), x[mask])


@every_runner
def test_what_masked_tokens_hold_changes_no_bit(dtype: torch.dtype, runner: Runner) -> None:
    x = positive(200, 67).to(dtype)
    mask = torch.rand(200) < 0.5
    poisoned = x.masked_fill(~mask[:, None], torch.nan)
    assert torch.equal(matrix(poisoned, runner, mask=mask), matrix(x, runner, mask=mask))


@every_runner
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_weight_zero_removes_a_token_and_weight_two_repeats_it(
    masked: bool, dtype: torch.dtype, runner: Runner
) -> None:
    x = positive(200, 67).to(dtype)
    weights = torch.randint(0, 3, (200,)).float()
    x[weights == 0] = torch.nan
    mask = torch.rand(200) < 0.7 if masked else torch.ones(200, dtype=torch.bool)
    repeated = x[mask].repeat_interleave(weights[mask].long(), dim=0)
    result = matrix(x, runner, weights=weights, mask=mask if masked else None)
    assert_matches_fp64(result, repeated)


@every_runner
@pytest.mark.parametrize("padding", [1, 64, 500])
def test_zero_tokens_at_the_end_change_no_bit(
    padding: int, dtype: torch.dtype, runner: Runner
) -> None:
    x = positive(100, 129).to(dtype)
    padded = torch.cat([x, x.new_zeros(padding, 129)])
    assert torch.equal(matrix(padded, runner), matrix(x, runner))


@every_runner
@pytest.mark.parametrize("exponent", [-4, 3])
def test_scaling_by_a_power_of_two_scales_every_bit(
    exponent: int, dtype: torch.dtype, runner: Runner
) -> None:
    # Normal fp16 numbers stay normal: |x| in [2^-6, 2^5].
    x = positive(100, 129).clamp(2**-6, 2**5).to(dtype)
    scale = 2.0**exponent
    assert torch.equal(matrix(x * scale, runner), matrix(x, runner) * scale**2)


@every_runner
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype, runner: Runner) -> None:
    x = positive(runner.tokens, 140).to(dtype)
    assert torch.equal(matrix(x, runner), matrix(x, runner))


@every_runner
def test_large_and_small_magnitudes_survive(runner: Runner) -> None:
    x = positive(200, 66) * torch.logspace(-18, 18, 66)
    assert_matches_fp64(matrix(x, runner), x)


@every_runner
def test_the_gram_is_positive_semidefinite_to_rounding(dtype: torch.dtype, runner: Runner) -> None:
    # Rank 8 of 128. Weyl: an eigenvalue moves by at most the norm of the error matrix, which the
    # componentwise bound keeps below ERROR_LIMIT * eps * | |X|^T |X| |, in the Frobenius norm.
    x = (torch.randn(runner.tokens, 8) @ torch.randn(8, 128)).to(dtype)
    lowest = torch.linalg.eigvalsh(matrix(x, runner).double())[0]
    exact = torch.linalg.eigvalsh(reference.gram(x))[0]
    eps = torch.finfo(torch.float32).eps
    assert lowest - exact > -reference.ERROR_LIMIT * eps * reference.gram(x.abs()).norm()


@every_runner
def test_activations_that_need_gradients_are_fine(runner: Runner) -> None:
    x = positive(70, 20)
    expected = accumulate(x, runner)
    assert torch.equal(
        gk.unpack(accumulate(x.requires_grad_(), runner), 20), gk.unpack(expected, 20)
    )


@every_runner
@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference mode", "autocast"],
)
def test_the_callers_mode_changes_no_bit(
    context: Callable[[], torch.autocast], runner: Runner
) -> None:
    x = positive(100, 140)
    options = {"weights": torch.rand(100)}
    expected = matrix(x, runner, **options)
    with context():
        assert torch.equal(matrix(x, runner, **options), expected)


def x64() -> Tensor:
    return torch.ones(4, 5, 64)


REFUSALS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "integer x": ("x must be bfloat16", {"x": torch.ones(4, 64, dtype=torch.int32)}),
    "double x": ("x must be bfloat16", {"x": x64().double()}),
    "sparse x": ("dense", {"x": torch.eye(64).to_sparse()}),
    "scalar x": ("at least 1 channel", {"x": torch.tensor(1.0)}),
    "no channels": ("at least 1 channel", {"x": torch.ones(4, 0)}),
    "another width": ("63 channels has", {"x": torch.ones(4, 63)}),
    "dense out": ("packed accumulator", {"out": torch.zeros(64, 64)}),
    "half out": ("out must be torch.float32", {"out": torch.zeros(64 * 64).half()}),
    "strided out": ("contiguous", {"out": torch.zeros(64 * 64 * 2)[::2]}),
    "integer mask": ("mask must be torch.bool", {"mask": torch.ones(4, 5, dtype=torch.int64)}),
    "short mask": ("one entry per token", {"mask": torch.ones(4, 4, dtype=torch.bool)}),
    "flat mask": ("one entry per token", {"mask": torch.ones(20, dtype=torch.bool)}),
    "integer weights": ("floating", {"weights": torch.ones(4, 5, dtype=torch.int64)}),
    "long weights": ("one entry per token", {"weights": torch.ones(4, 6)}),
    "double sums": ("sums must be", {"sums": torch.zeros(64).double()}),
    "short sums": ("sums must have shape", {"sums": torch.zeros(63)}),
    "float counts": ("nonfinite must be", {"nonfinite": torch.zeros(64)}),
    "another device": ("one device", {"mask": torch.ones(4, 5, dtype=torch.bool, device="meta")}),
}


@pytest.mark.parametrize(("message", "changes"), REFUSALS.values(), ids=REFUSALS.keys())
def test_bad_arguments_are_refused_and_nothing_is_written(
    message: str, changes: dict[str, Tensor]
) -> None:
    arguments = {
        "out": torch.zeros(gk.packed_numel(64)),
        "x": x64(),
        "sums": torch.zeros(64),
        "nonfinite": torch.zeros(64, dtype=torch.int64),
    } | changes
    with pytest.raises(gk.InputError, match=message):
        gk.gram_(**arguments)
    assert not any(arguments[name].any() for name in ("out", "sums", "nonfinite"))


@pytest.mark.parametrize("victim", ["x", "sums", "weights"])
def test_a_target_that_overlaps_another_argument_is_refused(victim: str) -> None:
    memory = torch.zeros(8192)
    views = {
        "x": memory[4095:5375].view(20, 64),
        "sums": memory[4000:4064],
        "weights": memory[10:30],
    }
    arguments = {"x": torch.ones(20, 64), victim: views[victim]}
    with pytest.raises(gk.InputError, match=f"overlaps {victim}"):
        gk.gram_(memory[:4096], **arguments)
    assert not memory.any()


def test_neighbours_in_memory_are_no_overlap() -> None:
    memory = torch.ones(4096 + 640)
    gk.gram_(memory[:4096].zero_(), memory[4096:].view(10, 64))
    assert memory[0] == 10


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(gk.InputError, match="auto, torch, triton"):
        gk.resolve_backend(x64(), "cuda")


def test_triton_on_a_cpu_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = torch.zeros(gk.packed_numel(64))
    with pytest.raises(gk.BackendError, match="not on a GPU"):
        gk.gram_(out, x64(), backend="triton")
    assert not out.any()


def test_auto_takes_torch_on_a_cpu_tensor() -> None:
    assert gk.resolve_backend(x64()) == "torch"


@every_runner
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("layout", ["rows", "padded batch", "pixels"])
def test_many_launches_match_fp64(
    layout: str, weighted: bool, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grail_kernels.tuning.LAUNCHED_TOKENS", 70)
    x = in_dtype(LAYOUTS[layout](180, 67), torch.float16)
    mask = torch.rand(x.shape[:-1]) < 0.7
    weights = torch.rand(x.shape[:-1]) if weighted else None
    assert_matches_fp64(matrix(x, runner, mask=mask, weights=weights), x, mask, weights)


@pytest.mark.parametrize("runner", [b for b in BACKENDS if b != "torch"], indirect=True)
def test_weighted_bf16_leaves_out_only_products_that_are_zero(runner: Runner) -> None:
    x, weights = positive(150, 80).bfloat16(), torch.rand(150)
    result = matrix(x, runner, weights=weights)
    assert_matches_fp64(result, x, weights=weights)
    # fp32 takes all six: the same bits.
    assert torch.equal(result, matrix(x.float(), runner, weights=weights))
