"""A model of the time of the Gram kernels: executed FLOPs, bytes, and waves of programs.

A GPU's prediction is the time of the launch that the table picks, had every program its share of
the rate of a large product and of the copies from L2: the longest of products, copies and bytes of
memory, plus passes over a workspace and over activations that are laid out. A CPU's has no waves:
the strips of the packed triangle, x once, G once to and fro. See docs/benches.md.
"""

import heapq
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import grail_kernels as gk
from bench.tools.measuring import RESULTS
from grail_kernels import tuning

# Resources of the shipped launches: registers and shared memory decide how many programs fit.
COMPILED = RESULTS / "aot.json"
# Of a multiprocessor: its 32-bit registers, its bytes of shared memory, and those that CUDA itself
# takes for a program (CUDA programming guide, compute capabilities 8.0, 9.0 and 10.0).
_REGISTERS, _RESERVED_SHARED = 65_536, 1024
_SHARED = {"sm_80": 167_936, "sm_90": 233_472, "sm_100": 233_472}
# Byte/s from L2 to the shared memory of one multiprocessor: 8.06 TB/s for all of an H100, at tiles
# of 128 x 128 (517 TFLOP/s) and of 128 x 256 (688) alike, H = 11008 (results/gpu/trials.csv).
_COPIES = {"sm_90": 8.06e12 / 132}
# Products of bf16 parts in `gram_triton` for one product of fp32; and their share of the rate of a
# large product, as each is waited for: 650 TFLOP/s of 770 (trials.csv, both widths).
_PRODUCTS_OF_PARTS, _RATE_OF_PARTS = 6, 0.84
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a call.

    Attributes:
        flops: executed FLOPs.
        moved: bytes to and from memory.
        seconds: the time that both allow, and the copies.
        copied: bytes from L2 to shared memory; None on a CPU.
        waves: programs of a launch over the places for them; None on a CPU.
        busy: share of the places' time in which they have a program, 0 to 1; None on a CPU.
    """

    flops: float
    moved: float
    seconds: float
    copied: float | None = None
    waves: float | None = None
    busy: float | None = None

    def numbers(self) -> list[tuple[str, str, float]]:
        """All of it as (metric, unit, value)."""
        every = (
            ("model", "s", self.seconds),
            ("executed", "FLOP", self.flops),
            ("moved", "B", self.moved),
            ("copied", "B", self.copied),
            ("waves", "", self.waves),
            ("busy", "", self.busy),
        )
        return [(metric, unit, value) for metric, unit, value in every if value is not None]


@dataclass(frozen=True)
class Cpu:
    """Rates of a CPU: FLOP/s of a large fp32 product, which 16 bits are upcast for, and byte/s."""

    products: float
    bandwidth: float

    def predict(
        self, tokens: list[int], channels: int, dtype: torch.dtype, ragged: bool = False
    ) -> Prediction:
        """As `Gpu.predict`."""
        accumulator = gk.packed_numel(channels)
        flops = 2.0 * sum(tokens) * accumulator
        moved = sum(tokens) * channels * dtype.itemsize + 8 * len(tokens) * accumulator
        return Prediction(flops, moved, max(flops / self.products, moved / self.bandwidth))


@dataclass(frozen=True)
class Program:
    """One program of a launch: the tile that it owns and the steps over tokens that it makes."""

    matrix: int
    split: int
    row: int
    column: int
    steps: int


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: for the reader.
        architecture: as the launch table calls it.
        processors: multiprocessors.
        products: FLOP/s of a large dense product on 16-bit tensor cores.
        bandwidth: byte/s of memory.
    """

    name: str
    architecture: str
    processors: int
    products: float
    bandwidth: float

    def predict(
        self, tokens: list[int], channels: int, dtype: torch.dtype, ragged: bool = False
    ) -> Prediction:
        """One call on matrices of so many tokens each; `ragged` ones take one launch, unsplit."""
        most = tuning.LAUNCHED_TOKENS
        if self._lays_out(channels, dtype, ragged):
            most = tuning.BUFFER_TOKENS  # laid out at a time
        if ragged or tokens[0] <= most:
            return self._predict_launch(tokens, channels, dtype, ragged)
        rest = [tokens[0] - tokens[0] // most * most] * len(tokens)
        launches = [self._predict_launch([most] * len(tokens), channels, dtype, ragged)]
        launches *= tokens[0] // most
        launches += [self._predict_launch(rest, channels, dtype, ragged)] if rest[0] else []
        seconds = sum(launch.seconds for launch in launches)
        return Prediction(
            flops=sum(launch.flops for launch in launches),
            moved=sum(launch.moved for launch in launches),
            seconds=seconds,
            copied=sum(launch.copied or 0.0 for launch in launches),
            waves=launches[0].waves,
            busy=sum((launch.busy or 0.0) * launch.seconds for launch in launches) / seconds,
        )

    def _predict_launch(
        self, tokens: list[int], channels: int, dtype: torch.dtype, ragged: bool
    ) -> Prediction:
        config = self.config(channels, dtype, ragged)
        if config.kernel == "wide":
            return self.predict_wide(tokens[0], channels, len(tokens))
        steps = [math.ceil(count / config.block_tokens) for count in tokens]
        tiles = len(tokens) * len(walk(math.ceil(channels / config.block_channels), config.group))
        splits = 1 if ragged else tuning.token_splits(tiles, tokens[0], self.processors)
        launched = list(programs(steps, channels, config, splits))
        places = self.processors * self.resident(config, channels, dtype)

        flops_of_step = 2.0 * config.block_tokens * config.block_channels**2
        rate = self.products
        if dtype == torch.float32:
            flops_of_step *= _PRODUCTS_OF_PARTS
            rate *= _RATE_OF_PARTS
        total = sum(program.steps for program in launched)
        longest = makespan([program.steps for program in launched], places)
        itemsize = dtype.itemsize
        if config.kernel == "tma" and dtype == torch.float32:
            itemsize = 3 * torch.bfloat16.itemsize
        moved = _activation_bytes(launched, places, channels, config, itemsize)
        moved += _accumulator_bytes(launched, channels, config)
        # Zeroed; read and summed; that sum written, read and added.
        passes = 0 if splits == 1 else 2 * splits + 4
        apart = 4.0 * passes * len(tokens) * gk.packed_numel(channels)
        if self._lays_out(channels, dtype, ragged):  # before it is multiplied
            apart += sum(tokens) * channels * (dtype.itemsize + itemsize)
        products = longest * places * flops_of_step / rate
        # A block of rows and one of columns, also on the diagonal.
        bytes_of_step = 2.0 * config.block_tokens * config.block_channels * itemsize
        copies = longest * places * bytes_of_step / self.copies
        return Prediction(
            flops=total * flops_of_step,
            moved=moved + apart,
            seconds=max(products, copies, moved / self.bandwidth) + apart / self.bandwidth,
            copied=total * bytes_of_step,
            waves=len(launched) / places,
            busy=total / max(1, longest * places),
        )

    def predict_wide(self, tokens: int, channels: int, matrices: int = 1) -> Prediction:
        """Launches of the kernel of `gram_wide`, one a matrix [tokens, channels] of 16 bits.

        Its programs share the tiles that do not fill a wave; what they leave in the workspace is
        written and read. Memory is taken to be no limit: neighbouring tiles meet in L2.
        """
        from grail_kernels import gram_wide

        work = gram_wide.schedule(channels, tokens, self.processors)
        rows, columns = gram_wide.TILE_ROWS, gram_wide.TILE_COLUMNS
        flops = 2.0 * tuning.CHAIN_TOKENS * rows * columns
        copied = 2.0 * tuning.CHAIN_TOKENS * (rows + columns)
        chain = max(flops / self.products, copied / self.copies) * self.processors
        workspace = 8.0 * work.programs * rows * columns if work.is_split else 0.0
        moved = 2.0 * tokens * channels + 8.0 * gk.packed_numel(channels) + workspace
        chains = matrices * gram_wide.tiles_of(channels) * work.chains
        return Prediction(
            flops=chains * flops,
            moved=matrices * moved,
            seconds=matrices * (work.length * chain + workspace / self.bandwidth),
            copied=chains * copied,
            waves=gram_wide.tiles_of(channels) / work.programs,
            busy=chains / (matrices * work.length * self.processors),
        )

    @property
    def copies(self) -> float:
        """Byte/s from L2 to shared memory; without limit where nobody measured it."""
        return self.processors * _COPIES.get(self.architecture, math.inf)

    def config(self, channels: int, dtype: torch.dtype, ragged: bool = False) -> tuning.GramConfig:
        """The launch that the table picks."""
        aligned = channels % 16 == 0
        launches = tuning.gram_launches(
            dtype, channels, aligned=aligned, architecture=self.architecture
        )
        has_engine = self.architecture == "sm_90" and not ragged
        serves = {
            "pointers": True,
            "tma": has_engine,
            "wide": has_engine and dtype != torch.float32 and aligned,
        }
        return next(config for config in launches if serves[config.kernel])

    def _lays_out(self, channels: int, dtype: torch.dtype, ragged: bool) -> bool:
        """Returns True where the copy engine cannot read the activations without a copy."""
        by_engine = self.config(channels, dtype, ragged).kernel == "tma"
        return by_engine and (dtype == torch.float32 or channels % 8 != 0)

    def resident(self, config: tuning.GramConfig, channels: int, dtype: torch.dtype) -> int:
        """Programs that fit one multiprocessor; 1 where nothing is recorded for it."""
        record = json.loads(COMPILED.read_text())["cases"]
        name = f"{self.architecture}/{_DTYPES[dtype]}/"
        if config.kernel == "tma":
            name = f"gram_tma/{name}{{}}/plain"
        else:
            name = f"gram/{name}"
            name += "aligned/{}/plain" if channels % 16 == 0 else "unaligned/{}/collecting"
        # A width is recorded where its launch is not that of wide matrices.
        shapes = ("narrow", "wide") if channels <= 64 else ("middle", "wide")
        found = next((record[n] for n in map(name.format, shapes) if n in record), None)
        if found is None or self.architecture not in _SHARED:
            return 1
        registers = 32 * config.warps * math.ceil(found["registers"] / 8) * 8
        shared = found["shared"] + _RESERVED_SHARED
        return max(1, min(_REGISTERS // registers, _SHARED[self.architecture] // shared))

    def full_product(self, tokens: list[int], channels: int, dtype: torch.dtype) -> float:
        """Seconds of a full product into a dense G at the library's best rate, as if never idle."""
        rate = FP32_PRODUCTS if dtype == torch.float32 else self.products
        moved = sum(tokens) * channels * dtype.itemsize + 8.0 * len(tokens) * channels**2
        return max(2.0 * sum(tokens) * channels**2 / rate, moved / self.bandwidth)


# A large bf16 product of an H100 reached 770 TFLOP/s (bench/results/gpu/gram.csv); an H200 has the
# same chip. Multiprocessors and bandwidth are those of NVIDIA's data sheets, SXM cards.
GPUS = {
    "h100": Gpu("H100", "sm_90", 132, 770e12, 3.35e12),
    "h200": Gpu("H200", "sm_90", 132, 770e12, 4.8e12),
}
# FLOP/s of fp32 on the CUDA cores of both, nominal: what a library's fp32 product cannot exceed.
FP32_PRODUCTS = 67e12


def walk(tile_rows: int, group: int) -> list[tuple[int, int]]:
    """The tile (row, column) of each program, in the order of `gram_blocks.tile_of`."""
    order: list[tuple[int, int]] = []
    for first in range(0, tile_rows, group):
        rows = range(first, min(first + group, tile_rows))
        order += [(row, column) for column in range(first) for row in rows]
        order += [(row, column) for row in rows for column in range(first, row + 1)]
    return order


def programs(
    steps: list[int], channels: int, config: tuning.GramConfig, splits: int
) -> Iterator[Program]:
    """The programs of a launch in their order, on matrices of so many steps over tokens each."""
    tiles = walk(math.ceil(channels / config.block_channels), config.group)
    for split in range(splits):
        for matrix, total in enumerate(steps):
            span = math.ceil(total / splits)
            own = max(0, min(span, total - split * span))
            for row, column in tiles:
                yield Program(matrix, split, row, column, own)


def makespan(lengths: list[int], places: int) -> int:
    """End of the last of `places`, each taking the next of `lengths` as it gets free."""
    free = [0] * places
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def _activation_bytes(
    launched: list[Program], places: int, channels: int, config: tuning.GramConfig, itemsize: int
) -> float:
    elements = 0
    for start in range(0, len(launched), places):
        blocks = {
            (program.matrix, program.split, block): program.steps
            for program in launched[start : start + places]
            for block in (program.row, program.column)
        }
        elements += sum(
            _width(block, channels, config) * steps * config.block_tokens
            for (_, _, block), steps in blocks.items()
        )
    return float(elements * itemsize)


def _accumulator_bytes(launched: list[Program], channels: int, config: tuning.GramConfig) -> float:
    """A read and a write of four bytes an element."""
    return 8.0 * sum(
        _width(program.row, channels, config) * _width(program.column, channels, config)
        for program in launched
    )


def _width(block: int, channels: int, config: tuning.GramConfig) -> int:
    """The channels of a block: fewer in the last."""
    return min(config.block_channels, channels - block * config.block_channels)
