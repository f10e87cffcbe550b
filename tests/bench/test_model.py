"""The model of time: FLOPs, bytes and waves against counts by hand and the kernel's own walk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import grail_kernels as gk
from bench.kernels import gram
from bench.tools import model
from bench.tools.measuring import read_rows
from grail_kernels import tuning
from grail_kernels.backend import interpreting

H100 = model.GPUS["h100"]
RESULTS = Path(gram.__file__).parents[1] / "results"
PREDICTED = RESULTS / "gram_predicted.csv"
TRIALS = RESULTS / "gpu" / "trials.csv"


@pytest.fixture
def without_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches that the figures of a test are of, should the table list `gram_wide` as well."""
    launches = tuning.gram_launches

    def others(*form: Any, **more: Any) -> tuple[tuning.GramConfig, ...]:
        return tuple(c for c in launches(*form, **more) if c.kernel != "wide")

    monkeypatch.setattr(tuning, "gram_launches", others)


@pytest.mark.usefixtures("without_wide")
def test_4096_channels_are_four_full_waves_of_an_h100() -> None:
    found = H100.predict([65_536], 4096, torch.bfloat16)
    # 32 * 33 / 2 = 528 tiles of 128 x 128, one to each of 132 multiprocessors at a time.
    assert found.waves == 4.0
    assert found.busy == 1.0
    assert found.flops == 65_536 * 4096 * (4096 + 128)
    # Each tile copies its rows and its columns from L2, which takes longer than the products.
    assert found.copied == 528 * 65_536 * 2 * 128 * 2
    assert found.seconds == pytest.approx(found.copied / 8.06e12)
    assert found.flops / found.seconds == pytest.approx(516e12, rel=1e-3)


def test_a_last_wave_of_one_program_takes_as_long_as_a_full_one() -> None:
    # 3 tiles of each of 45 experts are 135 programs, 3 more than there are places for.
    found = H100.predict([1024] * 45, 256, torch.bfloat16, ragged=True)
    assert found.waves == 135 / 132
    assert found.busy == pytest.approx(135 / (2 * 132))


def test_experts_wait_for_the_one_with_most_tokens() -> None:
    step = H100.config(128, torch.bfloat16, ragged=True).block_tokens
    found = H100.predict([step * 100, step, 0], 128, torch.bfloat16, ragged=True)
    assert found.flops == 101 * step * 2 * 128**2
    # 100 steps on one of 132 multiprocessors.
    assert found.seconds == pytest.approx(100 * step * 2 * 128 * 2 / (8.06e12 / 132))


def test_programs_take_the_first_free_place() -> None:
    # [3, 2, 3] and [3, 2], then the last as soon as the second place is free.
    assert model.makespan([3, 3, 2, 2, 3, 1], places=2) == 8
    assert model.makespan([], places=2) == 0


def test_padding_is_executed() -> None:
    # 3 tiles of 128 channels for 208; 128 tokens for 65.
    found = H100.predict([65], 208, torch.bfloat16, ragged=True)
    assert found.flops == 3 * 2 * 128 * 128 * 128


def test_fp32_takes_six_products_of_its_own_tiles_and_is_laid_out_before() -> None:
    found = H100.predict([65_536], 4096, torch.float32)
    assert found.flops == 6 * 65_536 * 4096 * (4096 + 128)
    laid_out = 65_536 * 4096 * (4 + 3 * 2)
    expected = found.flops / (0.84 * 770e12) + laid_out / 3.35e12
    assert found.seconds == pytest.approx(expected)


def test_copies_have_no_limit_where_nobody_measured_it() -> None:
    other = model.Gpu("other", "sm_80", 132, 770e12, 3.35e12)
    found = other.predict([8192], 4096, torch.bfloat16)
    assert found.seconds == pytest.approx(found.flops / 770e12)


@pytest.mark.usefixtures("without_wide")
@pytest.mark.parametrize(
    ("tokens", "dtype", "trial"),
    [
        (8192, torch.bfloat16, ("descriptors, chains in a flat loop", "128 tokens", "256")),
        (32_768, torch.bfloat16, ("descriptors, chains in a flat loop", "128 tokens", "256")),
        (8192, torch.float32, ("fp32 in parts, one chain a step", "32 tokens", "32")),
    ],
)
def test_the_model_agrees_with_an_h100(
    tokens: int, dtype: torch.dtype, trial: tuple[str, str, str]
) -> None:
    """Trials of the tiles that the table ships."""
    (measured,) = (
        float(row["p50"])
        for row in read_rows(TRIALS)
        if (row["tokens"], row["channels"]) == (str(tokens), "11008")
        and (row["provider"], row["config"].partition(",")[0], row["chain"]) == trial
    )
    assert H100.predict([tokens], 11_008, dtype).seconds == pytest.approx(measured, rel=0.06)


def test_a_wide_launch_shares_its_last_wave() -> None:
    pytest.importorskip("triton")
    # 272 tiles of 128 x 256: two waves of 32 chains, and 3 chains each of the 8 tiles left.
    found = H100.predict_wide(8192, 4096)
    chain = 256 * 2 * (128 + 256) / (8.06e12 / 132)
    workspace = 132 * 2 * 4 * 128 * 256
    assert found.seconds == pytest.approx(67 * chain + workspace / 3.35e12)
    assert found.flops == 272 * 2 * 8192 * 128 * 256
    assert found.waves == 272 / 132
    # Eight full waves are nothing to share: 688 TFLOP/s, the rate of the copies.
    full = H100.predict_wide(8192, 8192)
    assert full.busy == 1.0
    assert full.flops / full.seconds == pytest.approx(688e12, rel=1e-3)
    assert H100.predict_wide(8192, 8192, matrices=3).seconds == pytest.approx(3 * full.seconds)


def test_a_table_that_lists_the_wide_kernel_is_predicted_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    launches = tuning.gram_launches(torch.bfloat16, 4096, architecture="sm_90")
    wide = tuning.GramConfig("wide", 64, 256, group=4, warps=4, stages=8)
    monkeypatch.setattr(tuning, "gram_launches", lambda *_, **__: (wide, *launches))
    found = H100.predict([16_384], 4096, torch.bfloat16)
    assert found == H100.predict_wide(16_384, 4096)
    assert H100.config(4096, torch.float32).kernel == "tma"
    assert H100.config(4104, torch.bfloat16).kernel == "tma"
    assert H100.config(4096, torch.bfloat16, ragged=True).kernel == "pointers"


def test_bytes_of_heads_are_their_tokens_accumulators_and_workspace() -> None:
    # 32 tiles on 132 multiprocessors: 16 splits of 1024 tokens, each added once; four launches.
    assert tuning.token_splits(32, 16_384, 132) == 16
    found = H100.predict([65_536] * 32, 128, torch.bfloat16)
    activations = 2 * 32 * 65_536 * 128
    accumulators = 4 * 16 * 32 * 8 * 128**2
    # Zeroed and summed, 16 parts each; the sum is written, read, and added to what is read.
    passes = 4 * (2 * 16 + 4) * 4 * 32 * gk.packed_numel(128)
    assert found.moved == activations + accumulators + passes
    assert found.seconds == pytest.approx(found.moved / 3.35e12)


def test_tokens_beyond_whole_launches_are_one_more() -> None:
    whole, more, rest = (H100.predict([t], 4096, torch.bfloat16) for t in (32_768, 33_000, 232))
    assert more.flops == whole.flops + rest.flops
    assert more.seconds == pytest.approx(whole.seconds + rest.seconds)
    assert more.waves == whole.waves


def test_a_tile_is_read_and_written_once_a_launch() -> None:
    once, twice = (
        H100.predict([tokens], 128, torch.bfloat16, ragged=True) for tokens in (8192, 16_384)
    )
    assert twice.moved - once.moved == 2 * 8192 * 128


@pytest.mark.usefixtures("without_wide")
def test_fp32_is_laid_out_before_it_is_read() -> None:
    one_wave = replace(H100, processors=1000)
    half, full = (
        one_wave.predict([1024], 4096, dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    # Read as fp32 and written in three parts of bf16, on top of being read by the product.
    assert full.moved - half.moved == 1024 * 4096 * (4 + 6 + 6 - 2)


def test_a_wave_reads_each_of_its_channels_once() -> None:
    # 36 tiles of 1024 channels run in one wave.
    tokens = 1024
    found = H100.predict([tokens], 1024, torch.bfloat16, ragged=True)
    assert found.moved == 2 * tokens * 1024 + 8 * 36 * 128**2


@pytest.mark.parametrize(
    ("dtype", "channels", "expected"),
    [(torch.bfloat16, 4096, 1), (torch.float32, 4096, 1), (torch.bfloat16, 64, 2)],
    ids=["wide bf16", "wide fp32", "narrow bf16"],
)
def test_registers_decide_how_many_programs_fit(
    dtype: torch.dtype, channels: int, expected: int
) -> None:
    # bench/results/aot.json: 180 registers of 256 threads of 65,536 in all; 98 kB of 227.
    config = H100.config(channels, dtype)
    assert H100.resident(config, channels, dtype) == expected


def test_one_program_fits_where_nothing_is_recorded() -> None:
    unknown = model.Gpu("unknown", "sm_123", 100, 1e14, 1e12)
    assert unknown.predict([8192] * 1000, 128, torch.bfloat16).waves == 1000 / 100


def test_a_cpu_multiplies_the_strips_and_has_no_waves() -> None:
    found = model.Cpu(1e9, 1e30).predict([1000, 500], 300, torch.bfloat16)
    strips = 256 * 256 + 44 * 300
    assert found.flops == 2 * 1500 * strips
    assert found.moved == 2 * 1500 * 300 + 2 * 8 * strips
    assert found.seconds == found.flops / 1e9
    assert {metric for metric, _, _ in found.numbers()} == {"model", "executed", "moved"}
    slow_memory = model.Cpu(1e30, 1e9).predict([1000, 500], 300, torch.bfloat16)
    assert slow_memory.seconds == found.moved / 1e9


@pytest.mark.skipif(not interpreting(), reason="test_interpreter.py runs it")
def test_the_walk_is_that_of_the_triton_kernel() -> None:
    import triton
    import triton.language as tl

    from grail_kernels.gram_blocks import tile_of

    @triton.jit
    def visit(row_ptr, column_ptr, tile_rows, TILE_OF: tl.constexpr, GROUP: tl.constexpr):
        program = tl.program_id(0).to(tl.int64)
        row, column = TILE_OF(program, tile_rows.to(tl.int64), GROUP)
        tl.store(row_ptr + program, row)
        tl.store(column_ptr + program, column)

    rows, columns = torch.zeros(2, 66, dtype=torch.int64)
    visit[(66,)](rows, columns, 11, TILE_OF=tile_of, GROUP=4)
    assert model.walk(11, group=4) == list(zip(rows.tolist(), columns.tolist(), strict=True))


def test_the_committed_prediction_is_what_the_model_says(tmp_path: Path) -> None:
    """After a change: python bench/gram.py --predict h100 --predict h200 --output <that file>."""
    path = tmp_path / "predicted.csv"
    assert gram.main(["--predict", "h100", "--predict", "h200", "--output", str(path)]) == 0
    assert read_rows(path) == read_rows(PREDICTED)
