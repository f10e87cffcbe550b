"""The packed layout against dense matrices."""

from __future__ import annotations

import pytest
import torch

import grail_kernels as gk
from grail_kernels import tiles

CHANNELS = (1, 2, 255, 256, 257, 512, 700)


def symmetric(channels: int) -> torch.Tensor:
    matrix = torch.randn(channels, channels)
    return matrix + matrix.T


@pytest.mark.parametrize("channels", CHANNELS)
def test_unpack_inverts_pack(channels: int) -> None:
    matrix = symmetric(channels)
    packed = gk.pack(matrix)
    assert packed.shape == (gk.packed_numel(channels),)
    assert torch.equal(gk.unpack(packed, channels), matrix)


@pytest.mark.parametrize("channels", CHANNELS)
def test_diagonal_is_the_diagonal_of_the_matrix(channels: int) -> None:
    matrix = symmetric(channels)
    assert torch.equal(gk.diagonal(gk.pack(matrix), channels), matrix.diagonal())


@pytest.mark.parametrize("channels", CHANNELS)
def test_nothing_above_the_diagonal_is_read(channels: int) -> None:
    matrix = symmetric(channels)
    packed = gk.pack(matrix.masked_fill(torch.ones_like(matrix).triu(1).bool(), torch.nan))
    for strip in tiles.strips(channels):
        block = strip.view(packed)[:, strip.low :]
        block.masked_fill_(torch.ones_like(block).triu(1).bool(), torch.nan)
    assert torch.equal(gk.unpack(packed, channels), matrix)
    assert torch.equal(gk.diagonal(packed, channels), matrix.diagonal())


def test_leading_dimensions_are_a_batch() -> None:
    matrices = torch.stack([symmetric(300) for _ in range(6)]).view(2, 3, 300, 300)
    packed = gk.pack(matrices)
    assert torch.equal(gk.unpack(packed, 300), matrices)
    assert torch.equal(gk.diagonal(packed, 300), matrices.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("channels", [2560, 4096, 11008])
def test_packing_takes_at_most_55_percent_of_dense(channels: int) -> None:
    assert gk.packed_numel(channels) <= 0.55 * channels**2


@pytest.mark.parametrize("channels", CHANNELS)
def test_strips_are_contiguous_and_end_at_packed_numel(channels: int) -> None:
    end = 0
    for strip in tiles.strips(channels):
        assert strip.offset == end
        end += (strip.high - strip.low) * strip.high
    assert end == gk.packed_numel(channels)


def test_packed_of_another_width_is_refused() -> None:
    packed = torch.zeros(gk.packed_numel(300))
    for call in (gk.unpack, gk.diagonal):
        with pytest.raises(gk.InputError, match="301 channels has"):
            call(packed, 301)


def test_shapes_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(gk.InputError, match="square"):
        gk.pack(torch.zeros(3, 4))
    with pytest.raises(gk.InputError, match="at least 1 channel"):
        gk.packed_numel(0)
