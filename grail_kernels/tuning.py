"""The tile sizes and warps that each kernel launches with: a static table, no autotuning.

`launches.json`, next to this file, has a row for each kernel, operand class and shape class. The
rows of "default" are complete and serve every architecture that has no row of its own.
`bench/tools/tune.py` measures candidates on a GPU and writes the rows of its architecture. The
record of `bench/tools/aot.py`, which compiles every row ahead of time, shows that each fits shared
memory. The rows of sm_90 were timed on an H100 (bench/results/gpu/tuning.csv, and trials.csv for
the wide ones of `gram_tma`). Those of "default" were not timed; they spill two dozen registers at
most.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

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


class LaunchTableError(GrailError, ValueError):
    """The launch table cannot be read, lacks a row, or holds one that no kernel can launch with."""


@dataclass(frozen=True)
class GramConfig:
    """The launch of a Gram kernel.

    Attributes:
        block_tokens: tokens that one step of a program multiplies.
        block_channels: edge of the square tile that a program owns; divides `tiles.STRIP_ROWS`.
        group: tile rows that neighbouring programs share, so that their tokens meet in the cache.
        warps, stages: as Triton takes them.
    """

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


Config = GramConfig | AbsorbConfig
AnyConfig = TypeVar("AnyConfig", GramConfig, AbsorbConfig)
Key = tuple[str, str, str]  # kernel, operand class, shape class

# Every row that "default" has to have. Operands are split into three bf16 parts where tensor cores
# do not take them as they are; "gated" and "scattered" activations are loaded in their own way.
ROWS: dict[Key, type[Config]] = {
    (kernel, operands, shape): kind
    for kernel, kind, operand_classes, shapes in (
        ("gram", GramConfig, "16-bit split", "narrow middle wide gated scattered"),
        ("gram_tma", GramConfig, "16-bit split", "narrow middle wide"),
        ("absorb", AbsorbConfig, "bf16 split", "middle wide"),
    )
    for operands in operand_classes.split()
    for shape in shapes.split()
}


def gram_config(
    dtype: torch.dtype,
    channels: int,
    *,
    weighted: bool = False,
    gated: bool = False,
    aligned: bool = True,
    architecture: str = DEFAULT,
) -> GramConfig:
    """The launch of the Gram kernel for activations of `dtype` with H = `channels`.

    Weighted products are split like those of fp32; `aligned` activations allow reads of 16 bytes.

    Raises:
        LaunchTableError: the table is damaged.
    """
    operands = "16-bit" if multiplies_natively(dtype, weighted) else "split"
    shape = "scattered" if not aligned else "gated" if gated else _width(channels)
    return _row(architecture, ("gram", operands, shape), GramConfig)


def tma_config(parts: int, channels: int, *, architecture: str = DEFAULT) -> GramConfig:
    """The launch of the kernel of `gram_tma` for activations in 1 or 3 parts, H = `channels`."""
    operands = "16-bit" if parts == 1 else "split"
    return _row(architecture, ("gram_tma", operands, _width(channels)), GramConfig)


def absorb_config(
    dtype: torch.dtype, channels: int = _MIDDLE_CHANNELS + 1, architecture: str = DEFAULT
) -> AbsorbConfig:
    """The way to compute the correction for weights [O, H] of this dtype and H = `channels`."""
    operands = "bf16" if dtype == torch.bfloat16 else "split"
    shape = "middle" if channels <= _MIDDLE_CHANNELS else "wide"
    return _row(architecture, ("absorb", operands, shape), AbsorbConfig)


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
def read_table(path: Path) -> Mapping[tuple[str, Key], Config]:
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
        table[architecture, key] = _config(ROWS[key], values, f"{path}: {name}")
    missing = ["/".join(key) for key in ROWS if (DEFAULT, key) not in table]
    if missing:
        raise LaunchTableError(f"{path}: {DEFAULT} lacks {', '.join(missing)}")
    return table


def write_table(path: Path, table: Mapping[tuple[str, Key], Config]) -> None:
    """Writes a table that `read_table` reads, a line a row; the file is replaced as a whole."""
    document: dict[str, Any] = {}
    for (architecture, (kernel, operands, shape)), config in table.items():
        rows = document.setdefault(architecture, {}).setdefault(kernel, {}).setdefault(operands, {})
        rows[shape] = asdict(config)
    written = path.with_name(path.name + ".new")
    text = json.dumps(document, indent=1)
    text = re.sub(r"\{[^{}]*\}", lambda row: json.dumps(json.loads(row[0])), text)
    written.write_text(text + "\n", encoding="utf-8")
    written.replace(path)
    read_table.cache_clear()


def _row(architecture: str, key: Key, kind: type[AnyConfig]) -> AnyConfig:
    table = read_table(TABLE)
    config = table.get((architecture, key)) or table[DEFAULT, key]
    assert isinstance(config, kind)
    return config


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
    if not isinstance(value, int) or isinstance(value, bool):
        return False, "an integer"
    if field.startswith("block_"):  # Triton's ranges are powers of two, its products of 16 at least
        rows = tiles.STRIP_ROWS
        return 16 <= value <= rows and rows % value == 0, f"16 or more and a divisor of {rows}"
    if field == "warps":
        return value in (1, 2, 4, 8, 16), "1, 2, 4, 8 or 16"
    return value >= 1, "1 or more"
