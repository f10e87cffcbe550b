"""GGUF's grids: bytes that the package gguf reads as the same values, codes found again."""

import re

import gguf
import numpy as np
import pytest
import torch

from grail.algebra import grids
from grail.algebra.grids import FORMATS, Grid, pack, round_to_nearest
from grail.errors import InputError, ModelError

SHAPE = (24, 96)


def random(seed: int = 0, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    """Rows of sizes from 1e-3 to 1e3, some of one sign."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=draw) + torch.rand(shape[0], 1, generator=draw)
    return weights * torch.logspace(-3, 3, shape[0])[:, None]


def odd_rows() -> torch.Tensor:
    rows = torch.zeros(8, 32)
    rows[1] = 0.37  # one value
    rows[2, 5] = -4.0  # one weight that is not zero
    rows[3] = torch.linspace(-2e-7, 1e-7, 32)  # scales that fp16 holds only as subnormal numbers
    rows[4] = 1e-9  # less than fp16 has
    rows[5] = 1000 + torch.linspace(0, 1e-3, 32)  # a range far below the weights' size
    rows[6] = torch.linspace(-6e4, 6e4, 32)
    rows[7] = -torch.linspace(1, 2, 32)
    return rows


@pytest.mark.parametrize("weights", [random(), odd_rows()], ids=["random", "odd"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_are_what_gguf_reads_as_the_same_values(name, weights):
    grid, codes = round_to_nearest(weights, FORMATS[name])
    stored = pack(grid, codes)
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert stored.shape == gguf.quant_shape_to_byte_shape(tuple(weights.shape), kind)
    read = torch.from_numpy(gguf.dequantize(stored.numpy(), kind))
    assert torch.equal(read, grid.values(codes))
    assert grid.format.bits == pytest.approx(8 * stored.numel() / weights.numel())


@pytest.mark.parametrize("weights", [random(), odd_rows()], ids=["random", "odd"])
@pytest.mark.parametrize("name", FORMATS)
def test_each_weight_gets_the_nearest_point_of_its_grid(name, weights):
    grid, codes = round_to_nearest(weights, FORMATS[name])
    kind = grid.format
    points = torch.stack(
        [
            grid.values(torch.full(codes.shape, code, dtype=torch.int8))
            for code in range(kind.least, kind.most + 1)
        ]
    ).double()
    found = (grid.values(codes).double() - weights).abs()
    best = (points - weights).abs().amin(0)
    assert bool((found <= best + 1e-6 * weights.abs()).all())


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_as_good_as_that_of_gguf(name):
    weights = random(1)
    grid, codes = round_to_nearest(weights, FORMATS[name])
    kind = gguf.GGMLQuantizationType[name.upper()]
    theirs = gguf.dequantize(gguf.quantize(weights.numpy(), kind), kind)
    own, other = (
        np.square(values - weights.numpy()).sum(1)
        for values in (grid.values(codes).numpy(), theirs)
    )
    assert (own <= 1.02 * other).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_found_again_from_the_values_in_any_dtype(name, dtype):
    weights = random(2) * 1e-1
    grid, codes = round_to_nearest(weights, FORMATS[name])
    values = grid.values(codes).to(dtype)
    found = grid.codes(values)
    assert torch.equal(grid.values(found).to(dtype), values)
    if dtype == torch.float32:
        assert torch.equal(found, codes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_off_its_grid_is_refused(name):
    grid, codes = round_to_nearest(random(), FORMATS[name])
    values = grid.values(codes)
    values[3, 7] += 0.4 * grid.table[0, 3, 0].float()
    with pytest.raises(ModelError, match=r"1 of 2,304 weights are not on their grid"):
        grid.codes(values)
    with pytest.raises(ModelError, match=r"a grid of \(24, 96\) came to weights of \(23, 96\)"):
        grid.codes(values[1:])


def test_codes_of_zeros_are_zeros():
    for kind in FORMATS.values():
        grid = Grid(torch.zeros(1 + kind.has_minimum, 2, 1, dtype=torch.float16))
        assert not grid.values(grid.codes(torch.zeros(2, 32))).any()


@pytest.mark.parametrize("value", [7e4, float("nan"), float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_no_scale_holds_are_refused(name, value):
    weights = torch.zeros(2, 32)
    weights[1, 3] = value * (1 if name == "q4_1" else 200)
    weights[1] -= value  # a minimum beyond the range, too
    with pytest.raises(ModelError, match="beyond 65504, the range of GGUF's scales"):
        round_to_nearest(weights, FORMATS[name])


def test_rows_of_part_blocks_are_refused():
    with pytest.raises(InputError, match=r"a matrix reads 48 channels, .*--multiple 32"):
        round_to_nearest(torch.zeros(2, 48), FORMATS["q8_0"])


def test_an_unknown_format_is_named_with_the_nearest_one():
    assert grids.format_of(" Q4_1 ") is FORMATS["q4_1"]
    with pytest.raises(InputError, match=re.escape("q4_1, q8_0; did you mean 'q8_0'?")):
        grids.format_of("q8")
    with pytest.raises(InputError, match="got 4"):
        grids.format_of(4)


def test_a_search_finds_a_grid_of_less_weighted_error():
    weights = torch.randn(32, 500, generator=torch.Generator().manual_seed(4))
    importance = torch.logspace(-2, 2, 32)
    kind = FORMATS["q4_1"]
    plain, found = kind.fit(weights), kind.search(weights, importance)

    def error(grid):
        apart = kind.values(kind.codes(weights, grid), grid) - weights
        return (apart.square() * importance[:, None]).sum(0)

    assert bool((error(found) <= error(plain)).all())
    assert float(error(found).sum()) < 0.6 * float(error(plain).sum())
    assert torch.equal(found.half().float(), found)
    eight = FORMATS["q8_0"]
    assert torch.equal(eight.search(weights, importance), eight.fit(weights))


def test_a_search_keeps_weights_that_are_on_a_grid():
    grid, codes = round_to_nearest(random(3), FORMATS["q4_1"])
    blocks = grid.values(codes).unflatten(1, (-1, 32)).movedim(2, 0)
    found = Grid(FORMATS["q4_1"].search(blocks, torch.ones(32)).half())
    assert torch.equal(found.values(found.nearest(grid.values(codes))), grid.values(codes))


def test_a_search_in_blocks_of_one_value_finds_it():
    blocks = torch.full((32, 3), 0.25)
    blocks[:, 1] = 0
    found = FORMATS["q4_1"].search(blocks, torch.ones(32))
    kind = FORMATS["q4_1"]
    assert torch.equal(kind.values(kind.codes(blocks, found), found), blocks)
