"""The grids of GGUF's formats Q4_1 and Q8_0: weights as codes, with a scale for each 32 of a row.

    Q4_1   w = d·q + m   q in 0 … 15       d, m fp16   20 bytes for 32 weights
    Q8_0   w = d·q       q in −127 … 127   d fp16      34 bytes for 32 weights

A product d·q is exact in fp32, so llama.cpp, `gguf.dequantize` and this module give the same bits,
with and without fused multiply-add.

Source: ggml, `block_q4_1` and `block_q8_0` of ggml-common.h.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grail.arguments import did_you_mean
from grail.errors import InputError, ModelError

BLOCK = 32  # weights of a row that share a scale
_LARGEST = torch.finfo(torch.float16).max
# Of a search: ranges to start from, as shares of that of the weights, and steps. On down_proj of
# SmolLM2 the output's error by GPTQ is 0.0438 instead of 0.0512; 36 ranges and no steps, 0.0433.
_STARTS, _STEPS = (1.0, 0.9), 3
_TINY = 1e-12


@dataclass(frozen=True)
class Format:
    """A format of GGUF: its name there in lower case, its codes, and the bytes of a block."""

    name: str
    least: int
    most: int
    has_minimum: bool
    bytes: int

    def fit(self, weights: Tensor, share: float = 1.0) -> Tensor:
        """Returns the grid [G, …] of blocks [32, …]: scale and minimum, or the scale alone.

        Args:
            weights: of the blocks.
            share: of their range that the grid spans; 1 as in ggml's reference.

        Returns:
            fp32 values that fp16 holds.

        Raises:
            ModelError: a weight beyond the range of fp16.
        """
        if self.has_minimum:
            lowest, highest = weights.aminmax(dim=0)
            scale = (highest - lowest) * (share / self.most)
            return torch.stack([_as_fp16(scale), _as_fp16(lowest * share)])
        return _as_fp16(weights.abs().amax(0) * (share / self.most))[None]

    def search(self, weights: Tensor, importance: Tensor) -> Tensor:
        """Returns a grid of small error Σ importance·(w − q)², in the form of `fit`.

        Alternates from several ranges between the nearest codes and the scale and minimum of least
        squares. A format without a minimum, whose codes are fine, keeps the range of the weights.

        Args:
            weights: [32, …] of the blocks.
            importance: [32], of the columns.
        """
        best = self.fit(weights)
        if not self.has_minimum:
            return best
        shares = (importance / importance.sum()).reshape(-1, *[1] * (weights.dim() - 1))
        mean, least = (shares * weights).sum(0), torch.full_like(best[0], torch.inf)
        for start in _STARTS:
            grid = best if start == 1 else self.fit(weights, start)
            for _ in range(_STEPS + 1):
                codes = self.codes(weights, grid)
                error = ((self.values(codes, grid) - weights).square() * shares).sum(0)
                best, least = torch.where(error < least, grid, best), torch.minimum(error, least)
                centre = (shares * codes).sum(0)
                apart = (codes - centre) * shares
                spread = (apart * codes).sum(0)
                slope = (apart * (weights - mean)).sum(0) / spread.clamp_min(_TINY)
                scale = torch.where(spread > _TINY, slope.clamp_min(0), grid[0])
                grid = torch.stack([_as_fp16(scale), _as_fp16(mean - scale * centre)])
        return best

    def codes(self, weights: Tensor, grid: Tensor) -> Tensor:
        """Returns the nearest codes, as integers in the dtype of `weights`.

        Args:
            weights: [32, …], or with another leading axis that `grid` broadcasts to.
            grid: [G, …] of these weights.
        """
        scale = grid[0]
        shifted = weights - grid[1] if self.has_minimum else weights
        inverse = torch.where(scale > 0, scale, torch.inf).reciprocal()
        return (shifted * inverse).round_().clamp_(self.least, self.most)

    def values(self, codes: Tensor, grid: Tensor) -> Tensor:
        """Returns the weights that codes stand for; arguments as those of `codes`."""
        values = codes * grid[0]
        return values.add_(grid[1]) if self.has_minimum else values

    @property
    def bits(self) -> float:
        """Bits of a weight, with its share of the scales."""
        return 8 * self.bytes / BLOCK


FORMATS: Mapping[str, Format] = {
    "q4_1": Format("q4_1", 0, 15, True, 20),
    "q8_0": Format("q8_0", -127, 127, False, 34),
}


def format_of(name: object) -> Format:
    """Returns the format of a name, in any case.

    Raises:
        InputError: an unknown name; the message has the nearest known one.
    """
    if isinstance(name, str) and (found := FORMATS.get(name.strip().lower())):
        return found
    meant = did_you_mean(name, FORMATS) if isinstance(name, str) else ""
    raise InputError(f"quantize must be one of {', '.join(FORMATS)}; {meant}got {name!r}")


@dataclass(frozen=True)
class Grid:
    """The grid of a matrix [O, C]: for each 32 weights of a row a scale, and a minimum in Q4_1.

    `table`: [G, O, C/32] fp16, scales and then minima. It alone determines the format, by G.
    """

    table: Tensor

    @property
    def format(self) -> Format:
        """The format."""
        return FORMATS["q4_1" if len(self.table) == 2 else "q8_0"]

    @property
    def shape(self) -> tuple[int, int]:
        """O and C."""
        return self.table.shape[1], self.table.shape[2] * BLOCK

    def codes(self, weights: Tensor) -> Tensor:
        """Returns the codes [O, C] int8 of weights that are on the grid, up to their dtype.

        Raises:
            ModelError: another shape, or a weight that is not the one of its code.
        """
        if tuple(weights.shape) != self.shape:
            raise ModelError(f"a grid of {self.shape} came to weights of {tuple(weights.shape)}")
        codes = self.nearest(weights)
        off = int((self.values(codes).to(weights.dtype) != weights).sum())
        if off:
            raise ModelError(f"{off:,} of {weights.numel():,} weights are not on their grid")
        return codes

    def nearest(self, weights: Tensor) -> Tensor:
        """Returns the codes [O, C] int8 of the points of the grid that are nearest to weights."""
        of_block = weights.float().unflatten(1, (-1, BLOCK))
        return self.format.codes(of_block, self._of_block(weights)).flatten(1).to(torch.int8)

    def values(self, codes: Tensor) -> Tensor:
        """Returns the weights [O, C] fp32 of codes [O, C]."""
        of_block = codes.float().unflatten(1, (-1, BLOCK))
        return self.format.values(of_block, self._of_block(codes)).flatten(1)

    def _of_block(self, like: Tensor) -> Tensor:
        return self.table.to(like.device).float()[..., None]


def require_blocks(name: str, columns: int) -> None:
    """Raises InputError unless rows of so many weights are whole blocks."""
    if columns % BLOCK:
        raise InputError(
            f"{name} reads {columns} channels, and GGUF's formats store blocks of {BLOCK}: choose "
            f"widths that {BLOCK} divides (--multiple {BLOCK}), or do not quantise this model"
        )


def round_to_nearest(weights: Tensor, kind: Format) -> tuple[Grid, Tensor]:
    """Returns the grid of a matrix [O, C] and the nearest codes [O, C] int8, as ggml rounds.

    Raises:
        InputError: 32 does not divide C.
        ModelError: a weight beyond the range of fp16.
    """
    require_blocks("a matrix", weights.shape[1])
    blocks = weights.float().unflatten(1, (-1, BLOCK)).movedim(2, 0)
    grid = Grid(kind.fit(blocks).half())
    return grid, grid.nearest(weights)


def pack(grid: Grid, codes: Tensor) -> Tensor:
    """Returns the bytes [O, C/32 · bytes] uint8 of a matrix, as GGUF stores it.

    Args:
        grid: of the matrix.
        codes: [O, C] int8.
    """
    table = grid.table.cpu().permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    codes = codes.cpu().unflatten(1, (-1, BLOCK))
    if grid.format.has_minimum:
        low, high = codes.to(torch.uint8).split(BLOCK // 2, dim=2)
        stored = low | (high << 4)
    else:
        stored = codes.contiguous().view(torch.uint8)
    return torch.cat([table.view(torch.uint8), stored], 2).flatten(1)


def _as_fp16(values: Tensor) -> Tensor:
    """Returns values rounded to fp16, in fp32.

    Raises:
        ModelError: a value beyond its range.
    """
    rounded = values.half().float()
    if not bool(rounded.isfinite().all()):
        raise ModelError(
            f"a weight is beyond {_LARGEST:g}, the range of GGUF's scales, or is not finite; "
            "this network cannot be quantised"
        )
    return rounded
