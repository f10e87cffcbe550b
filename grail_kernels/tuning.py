"""The kernel, tile sizes and warps that each call launches with: a static table, no autotuning.

`launches.json`, next to this file, has a row for each operation, operand class and shape class. A
row of Grams lists launches, the fastest first; each names its kernel. A call takes the first whose
kernel can serve it, and the last of a row serves every call. The rows of "default" are complete and
serve every architecture that has no row of its own.

`bench/tools/tune.py` measures candidates on a GPU and writes the rows of its architecture. The
record of `bench/tools/aot.py`, which compiles every launch ahead of time, shows that each fits
shared memory. The rows of sm_90 were timed on an H100 (bench/results/gpu/tuning.csv, and trials.csv
for the wide ones of "tma"). Their order is that of tuning.csv: over 65,536 tokens of fp32, 32
matrices of 64 channels take 2.42 ms by "tma" and 0.69 by "pointers", 32 of 128 take 2.20 and 1.43,
one of 1024 takes 1.89 and 1.57. The rows of "default" were not timed; they spill two dozen
registers at most.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch

from grail_kernels import tiles
from grail_kernels.errors import GrailError

TABLE = Path(__file__).with_name("launches.json")

# The architecture whose rows serve all others.
DEFAULT = "default"

# Tokens that a tensor core sums up before an addition that rounds to nearest takes over. Its own
# additions truncate: on an H100 the diagonal is biased by 4e-7 over so many tokens, by 3e-5 over
# 8192 and by 6e-3 over a million (bench/results/gpu/accuracy.csv).
CHAIN_TOKENS = 256

# Tokens worth waiting for before a launch: G is read and written once for all of them.
BUFFER_TOKENS = 8192

# The most tokens of a launch. Over many more, an H100 was a third slower: programs start together,
# drift apart and probably lose L2 reuse. Long sums of a tile are also less exact in fp32.
LAUNCHED_TOKENS = 2 * BUFFER_TOKENS

# The most channels of a "narrow" matrix, which one tile holds, and of a "middle" one, which fills a
# GPU only together with others: heads, experts.
_NARROW_CHANNELS, _MIDDLE_CHANNELS = 64, 2048

# Programs per multiprocessor at which a launch stops splitting the tokens of small matrices.
_PROGRAMS_PER_PROCESSOR = 4

# A split shorter than this costs more to write and add up than it computes.
_FEWEST_SPLIT_TOKENS = 1024

_METHODS = ("fused", "gathered")

# Of Grams: `gram_triton`, which serves every call but gates of other strides, `gram_tma`,
# `gram_halves` and `gram_wide`; and `gram_gate`, which stores silu(gate)·up for another kernel.
EVERY_CALL, FORMED = "pointers", "formed"
_KERNELS = (EVERY_CALL, "tma", "halves", "wide", FORMED)


class LaunchTableError(GrailError, ValueError):
    """The launch table cannot be read, lacks a row, or holds one that no kernel can launch with."""

    page = "docs/kernels.md"


@dataclass(frozen=True)
class GramConfig:
    """The launch of a Gram kernel.

    Attributes:
        kernel: the kernel's name in `gram_launch.KERNELS`.
        block_tokens: tokens that one step of a program multiplies.
        block_channels: edge of the square tile that a program owns; divides `tiles.STRIP_ROWS`.
            Of "wide", edge of the pair of tiles beside the diagonal.
        group: tile rows that neighbouring programs share, so that their tokens meet in the cache.
        warps, stages: as Triton takes them. Of "wide", slots of shared memory for rows.
    """

    kernel: str
    block_tokens: int
    block_channels: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class AbsorbConfig:
    """The way to compute the correction of a selection.

    Attributes:
        block_outputs, block_kept: the tile of the result that a program owns. Every element of G
            that it gathers and splits serves `block_outputs` rows.
        block_dropped: dropped channels that one step of a program multiplies.
        group: tile rows that neighbouring programs share, so that W and G meet in the cache.
        warps, stages: as Triton takes them.
        method: what `backend="auto"` takes on a GPU: "fused", the kernel, or "gathered", the
            library's GEMM on gathered operands.
    """

    block_outputs: int
    block_kept: int
    block_dropped: int
    group: int
    warps: int
    stages: int
    method: str = "fused"


# How the activation of gates with strides of their own is stored: bound by memory.
FORMING = GramConfig(FORMED, block_tokens=32, block_channels=128, group=1, warps=4, stages=1)

Config = GramConfig | AbsorbConfig
Launches = tuple[GramConfig, ...]  # the first whose kernel takes a call serves it
Row = Launches | AbsorbConfig
Key = tuple[str, str, str]  # operation, operand class, shape class

# Every row that "default" has to have. Operands are split into three bf16 parts where tensor cores
# do not take them as they are; "gated" and "scattered" activations are loaded in their own way.
ROWS: dict[Key, type[Config]] = {
    (operation, operands, shape): kind
    for operation, kind, operand_classes, shapes in (
        ("gram", GramConfig, "16-bit split", "narrow middle wide gated scattered"),
        ("absorb", AbsorbConfig, "bf16 split", "middle wide"),
    )
    for operands in operand_classes.split()
    for shape in shapes.split()
}


def gram_launches(
    dtype: torch.dtype,
    channels: int,
    *,
    weighted: bool = False,
    gated: bool = False,
    aligned: bool = True,
    architecture: str = DEFAULT,
) -> Launches:
    """The launches for activations of `dtype` with H = `channels`, the fastest first.

    Weighted products are split like those of fp32; `aligned` activations allow reads of 16 bytes.

    Raises:
        LaunchTableError: the table is damaged.
    """
    operands = "16-bit" if multiplies_natively(dtype, weighted) else "split"
    shape = "scattered" if not aligned else "gated" if gated else _width(channels)
    launches = _row(architecture, ("gram", operands, shape))
    assert isinstance(launches, tuple)
    return launches


def absorb_config(
    dtype: torch.dtype, channels: int = _MIDDLE_CHANNELS + 1, architecture: str = DEFAULT
) -> AbsorbConfig:
    """The way to compute the correction for weights [O, H] of this dtype and H = `channels`."""
    operands = "bf16" if dtype == torch.bfloat16 else "split"
    shape = "middle" if channels <= _MIDDLE_CHANNELS else "wide"
    config = _row(architecture, ("absorb", operands, shape))
    assert isinstance(config, AbsorbConfig)
    return config


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The table's name of the GPU `device`, such as "sm_90" or "gfx942"; else "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def multiplies_natively(dtype: torch.dtype, weighted: bool) -> bool:
    """Returns whether tensor cores take activations as they are, not in three bf16 parts."""
    return dtype != torch.float32 and not weighted


def token_splits(tiles: int, tokens: int, processors: int) -> int:
    """The number of parts that tokens are cut into so that a small matrix still fills the GPU."""
    wanted = _PROGRAMS_PER_PROCESSOR * processors // tiles
    return max(1, min(wanted, tokens // _FEWEST_SPLIT_TOKENS))


@functools.cache
def read_table(path: Path) -> Mapping[tuple[str, Key], Row]:
    """Every row of the table in `path`, by architecture and key.

    Raises:
        LaunchTableError: it cannot be read, "default" lacks a row, or a row cannot be launched.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise LaunchTableError(f"the launch table {path} cannot be read: {problem}") from problem
    table = {}
    for architecture, key, values in _flatten(document):
        name = "/".join((architecture, *key))
        if key not in ROWS:
            raise LaunchTableError(f"{path}: {name} is no row that a kernel asks for")
        table[architecture, key] = _read_row(ROWS[key], values, f"{path}: {name}")
    missing = ["/".join(key) for key in ROWS if (DEFAULT, key) not in table]
    if missing:
        raise LaunchTableError(f"{path}: {DEFAULT} lacks {', '.join(missing)}")
    return table


def write_table(path: Path, table: Mapping[tuple[str, Key], Row]) -> None:
    """Writes a table that `read_table` reads, a line a launch; the file is replaced as a whole."""
    document: dict[str, Any] = {}
    for (architecture, (operation, operands, shape)), row in table.items():
        rows = document.setdefault(architecture, {}).setdefault(operation, {})
        values = [asdict(c) for c in row] if isinstance(row, tuple) else asdict(row)
        rows.setdefault(operands, {})[shape] = values
    written = path.with_name(path.name + ".new")
    text = json.dumps(document, indent=1)
    text = re.sub(r"\{[^{}]*\}", lambda row: json.dumps(json.loads(row[0])), text)
    written.write_text(text + "\n", encoding="utf-8")
    written.replace(path)
    read_table.cache_clear()


def _row(architecture: str, key: Key) -> Row:
    table = read_table(TABLE)
    return table.get((architecture, key)) or table[DEFAULT, key]


def _width(channels: int) -> str:
    if channels <= _NARROW_CHANNELS:
        return "narrow"
    return "middle" if channels <= _MIDDLE_CHANNELS else "wide"


def _flatten(document: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Key, Any]]:
    """Architecture, key and values of every row, which lie four names deep."""
    if len(path) == 4:
        yield path[0], path[1:], document
    elif isinstance(document, dict):
        for name, part in document.items():
            yield from _flatten(part, (*path, name))
    else:
        raise LaunchTableError(f"the launch table has no names under {'/'.join(path) or 'its top'}")


def _read_row(kind: type[Config], values: Any, name: str) -> Row:
    """The row `values`: a configuration, or launches that every call finds one of."""
    if kind is AbsorbConfig:
        return cast(AbsorbConfig, _config(AbsorbConfig, values, name))
    if not isinstance(values, list) or not values:
        raise LaunchTableError(f"{name} must list launches, the fastest first; it has {values}")
    launches = [cast(GramConfig, _config(GramConfig, each, name)) for each in values]
    if launches[-1].kernel != EVERY_CALL:
        raise LaunchTableError(
            f"{name} must end with a launch of {EVERY_CALL!r}, which serves every call; "
            f"it ends with {launches[-1].kernel!r}"
        )
    return tuple(launches)


def _config(kind: type[Config], values: Any, name: str) -> Config:
    """The row `values` as a `kind`, refused under `name` if the kernel could not launch with it."""
    names = {field.name for field in fields(kind)}
    if not isinstance(values, dict) or values.keys() != names:
        raise LaunchTableError(f"{name} must have {', '.join(sorted(names))}; it has {values}")
    for field, value in values.items():
        fits, allowed = _rule(field, value)
        if not fits:
            raise LaunchTableError(f"{name}: {field} must be {allowed}; it is {value!r}")
    return kind(**values)


def _rule(field: str, value: Any) -> tuple[bool, str]:
    """Returns True if a field can have that value, and the allowed values in words."""
    if field == "method":
        return value in _METHODS, " or ".join(_METHODS)
    if field == "kernel":
        return value in _KERNELS, " or ".join(_KERNELS)
    if not isinstance(value, int) or isinstance(value, bool):
        return False, "an integer"
    if field.startswith("block_"):  # Triton's ranges are powers of two, its products of 16 at least
        rows = tiles.STRIP_ROWS
        return 16 <= value <= rows and rows % value == 0, f"16 or more and a divisor of {rows}"
    if field == "warps":
        return value in (1, 2, 4, 8, 16), "1, 2, 4, 8 or 16"
    return value >= 1, "1 or more"
