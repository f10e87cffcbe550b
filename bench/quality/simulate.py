"""A simulation, not a measurement, of compressing models that do not fit here.

    python -m bench.quality.simulate                 all models
    python -m bench.quality.simulate --models llama-2-7b
    python -m bench.quality.simulate --output bench/results    writes bench/results/simulated.csv

`smollm2-135m` is simulated and also measured. The method is described in docs/benches.md.
"""

import copy
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import grail
from bench.quality.shapes import LLAMAS, MIXTRAL
from bench.tools import assets
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS as FOLDER
from bench.tools.measuring import Row, machine, write_rows
from bench.tools.tables import markdown as as_markdown
from grail.calibrate.hidden_states import HiddenStates
from grail.calibrate.stream import Stream
from grail.files.load import load_model
from grail.networks import find
from grail.recipe import Recipe
from grail.run import peak_memory
from grail.run.block import BlockCompressor
from grail.run.blocks import Blocks
from grail.runtime.clock import Clock
from grail.runtime.onload import largest_block
from grail.runtime.transaction import Transaction, eval_no_grad

RESULTS = FOLDER / "simulated.csv"
TOKENS, LENGTH = 131072, 2048
TRIAL = 1024  # tokens of one of the two sequences of the shrunk block
# How FLOPs grow with the widths, by phase; and with tokens.
POWERS = {"forward": 2, "gram": 2, "select": 3, "solve": 3}
BY_TOKENS = ("forward", "gram")
# FLOP/s of an H100 SXM: 40% of 989 bf16, as large GEMMs reach inside models; of 67 fp64 a quarter,
# as triangular solves are slower than GEMMs. Bytes/s to and from the host: PCIe 5 x16 at 80%.
ASSUMED = {"forward": 4e14, "gram": 2e14, "select": 1.7e13, "solve": 1.7e13}
ASSUMED_LINK = 5e10


@dataclass(frozen=True)
class Shape:
    """A model's configuration, by the names of transformers, and what to narrow.

    `shrink`: divides widths and heads of the block that is really compressed.
    """

    kind: str
    config: dict[str, int]
    sites: tuple[str, ...]
    shrink: int


SHAPES = {
    "smollm2-135m": Shape("llama", LLAMAS["smollm2-135m"], ("mlp",), 3),
    "llama-2-7b": Shape("llama", LLAMAS["llama-2-7b"], ("mlp",), 4),
    "llama-2-70b": Shape("llama", LLAMAS["llama-2-70b"], ("mlp",), 8),
    "mixtral-8x22b": Shape("mixtral", MIXTRAL, ("experts",), 8),
}
# Divided by `Shape.shrink`.
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


class Counting(Clock):
    """A clock that counts FLOPs by phase as well."""

    def __init__(self, counter: FlopCounterMode):
        super().__init__(torch.device("cpu"))
        self._counter, self._before = counter, 0
        self.flops: Counter[str] = Counter()

    def _settle(self) -> None:
        now = self._counter.get_total_flops()
        if self._stack:
            self.flops[self._stack[-1]] += now - self._before
        self._before = now
        super()._settle()


@dataclass
class Trial:
    """Cost of compressing the shrunk block by phase, and how often it moved hidden states."""

    seconds: dict[str, float]
    flops: dict[str, float]
    moves: float


def model_of(shape: Shape, shrink: int, layers: int, device: str) -> Any:
    """A random model of a shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**shape.config, "num_hidden_layers": layers, "vocab_size": 32000}
    if shrink > 1:
        config |= {key: max(1, config[key] // shrink) for key in _WIDTHS}
        config["vocab_size"] = 256
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.kind, **config))
    return model.to(dtype).eval()


def trial(shape: Shape, shrink: int) -> Trial:
    """Compresses one shrunk block: seconds of a plain run, FLOPs of another one that counts."""
    model, options = model_of(shape, shrink, 2, "cpu"), Recipe(keep=0.5, sites=shape.sites)
    batches = _batches()
    seconds: dict[str, float] = {}
    for _ in range(2):  # the first time warms up
        clock = Clock(torch.device("cpu"))
        _run_block(copy.deepcopy(model), options, batches, clock)
        seconds = clock.seconds
    with FlopCounterMode(display=False, custom_mapping=_linear_algebra()) as counter:
        counting = Counting(counter)
        with _counted_moves() as moved:
            blocks = _run_block(model, options, batches, counting)
    hidden = sum(tensor.nbytes for tensor in blocks.stream.hidden)
    flops = {phase: float(count) for phase, count in counting.flops.items()}
    # The CPU's Gram and drift call BLAS themselves, which no dispatcher sees: T·H² FLOPs for the
    # triangle, 2·T·O·H for the cross moment.
    sites = blocks.sites[1]
    per_token = sum(
        site.channels * (site.channels + 2 * sum(c.outputs for c in site.consumers))
        for site in sites
    )
    if shape.kind == "mixtral":
        per_token *= shape.config["num_experts_per_tok"] / shape.config["num_local_experts"]
    flops["gram"] = flops.get("gram", 0.0) + 2 * TRIAL * per_token
    return Trial(seconds, flops, moved["bytes"] / hidden)


def device_parts(shape: Shape) -> dict[str, int]:
    """Returns the bytes on a device to which blocks are brought, without the blocks, by part."""
    model, options = model_of(shape, shape.shrink, 2, "cpu"), Recipe(keep=0.5, sites=shape.sites)
    architecture = find(model, options.sites)
    with eval_no_grad(model):
        stream = Stream(model, architecture.blocks, _batches())
        clock = Clock(stream.device)
        predicted = peak_memory.predict(architecture, options, stream, clock, onloads=True)
    assert predicted is not None
    found = predicted.parts(hidden_states=False)
    scaled = {part: found[part] * shape.shrink**2 for part in ("statistics", "working set")}
    return {"hidden states": 0, "weights": 0, **scaled}  # both wait on the host


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (1, TRIAL), generator=generator) for _ in range(2)]


def _run_block(model: Any, options: Recipe, batches: list[torch.Tensor], clock: Clock) -> Blocks:
    architecture = find(model, options.sites)
    with eval_no_grad(model), Transaction() as transaction:
        stream = Stream(model, architecture.blocks, batches)
        stream.forbid_inputs()  # what waits, waits on the host
        blocks = Blocks(architecture, options, stream, clock)
        blocks.first_active = -1  # as one of the later blocks, which have drift
        BlockCompressor(blocks, transaction).compress(0, lambda _: None)
    return blocks


@contextmanager
def _counted_moves() -> Iterator[Counter[str]]:
    """Counts the bytes of hidden states that are stored and fetched."""
    moved: Counter[str] = Counter()
    put, get = HiddenStates.put, HiddenStates.__getitem__

    def putting(states: HiddenStates, batch: int, tensor: torch.Tensor) -> None:
        moved["bytes"] += tensor.nbytes
        put(states, batch, tensor)

    def getting(states: HiddenStates, batch: int) -> torch.Tensor:
        tensor = get(states, batch)
        moved["bytes"] += tensor.nbytes
        return tensor

    HiddenStates.put, HiddenStates.__getitem__ = putting, getting  # type: ignore[method-assign]
    try:
        yield moved
    finally:
        HiddenStates.put, HiddenStates.__getitem__ = put, get  # type: ignore[method-assign]


def _linear_algebra() -> dict[Any, Any]:
    """FLOPs of operators that torch's own counter does not know."""
    aten = torch.ops.aten

    def cholesky(a: Any, *_: Any, **__: Any) -> int:
        return int(torch.Size(a[:-2]).numel() * a[-1] ** 3 / 3)

    def triangular(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return int(torch.Size(b).numel() * a[-1])

    def inverse(a: Any, *_: Any, **__: Any) -> int:
        return int(2 * torch.Size(a).numel() * a[-1])

    def solve(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return int(2 * torch.Size(a).numel() * a[-1] / 3 + 2 * torch.Size(b).numel() * a[-1])

    def added_product(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
        return int(2 * torch.Size(a).numel() * b[-1])

    return {
        aten.addmm_: added_product,
        aten.linalg_cholesky_ex: cholesky,
        aten.linalg_solve_triangular: triangular,
        aten.linalg_inv_ex: inverse,
        aten._linalg_solve_ex: solve,
    }


def rows(name: str, tokens: int = TOKENS) -> list[Row]:
    """The simulated phases of one model, on both bases, and their totals."""
    shape = SHAPES[name]
    blocks = shape.config["num_hidden_layers"]
    small = trial(shape, shape.shrink)
    full = {
        phase: small.flops[phase]
        * shape.shrink**power
        * (tokens / (2 * TRIAL) if phase in BY_TOKENS else 1)
        * blocks
        for phase, power in POWERS.items()
    }
    model = model_of(shape, 1, blocks, "meta")
    architecture, options = find(model, shape.sites), Recipe(keep=0.5, sites=shape.sites)
    parts = device_parts(shape)
    parts["blocks"] = 2 * largest_block(architecture.blocks)
    element = next(model.parameters()).element_size()
    weights = sum(p.nbytes for block in architecture.blocks for p in block.parameters())
    hidden = tokens * shape.config["hidden_size"] * element
    widths = options.widths(architecture)
    narrowed = element * sum(  # what comes back
        sum(p.numel() for layer in site.modules().values() for p in layer.parameters())
        - site.parameters_saved(widths[site.name])
        for site in options.all_sites(architecture)
    )
    moved = weights + narrowed + small.moves * hidden * blocks
    measured = {phase: small.flops[phase] / small.seconds[phase] for phase in POWERS}
    common: Row = {
        "model": name,
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "sites": ",".join(shape.sites),
        "keep": "0.5",
        "tokens": str(tokens),
        "blocks": str(blocks),
        "largest_block_bytes": str(largest_block(architecture.blocks)),
        "device_peak_bytes": str(sum(parts.values())),
        **{f"{part.replace(' ', '_')}_bytes": str(size) for part, size in parts.items()},
        "moved_bytes": str(int(moved)),
    }
    found = []
    for basis, rates in (("measured rates", measured), ("assumed H100 rates", ASSUMED)):
        seconds = {phase: full[phase] / rates[phase] for phase in POWERS}
        link = moved / ASSUMED_LINK if basis.startswith("assumed") else 0.0
        if link:
            seconds["link"] = link
        found.append(
            {
                "simulated on": basis,
                **common,
                **{f"{phase}_s": f"{value:.4g}" for phase, value in seconds.items()},
                "total_s": f"{sum(seconds.values()):.4g}",
                **{f"{phase}_flops": f"{full[phase]:.4g}" for phase in POWERS},
                **{f"{phase}_rate": f"{rates[phase]:.4g}" for phase in POWERS},
                **machine("cpu"),
            }
        )
    return found


def markdown(found: list[Row]) -> str:
    """The table of docs/scale.md: models that were not run."""
    by_model: dict[str, dict[str, Row]] = {}
    for row in found:
        by_model.setdefault(row["model"], {})[row["simulated on"]] = row
    lines = []
    for name, of_model in by_model.items():
        if "assumed H100 rates" not in of_model:
            continue
        row = of_model["measured rates"]
        hours, minutes = (
            float(of_model[basis]["total_s"]) / unit
            for basis, unit in (("measured rates", 3600), ("assumed H100 rates", 60))
        )
        sizes = (row[f"{part}_bytes"] for part in ("largest_block", "device_peak", "moved"))
        parts = (f"{int(size) / 1e9:.1f} GB" for size in sizes)
        count = f"{int(row['parameters']) / 1e9:.1f}B"
        lines.append([name, count, row["sites"], *parts, f"{hours:,.0f} h", f"{minutes:.0f} min"])
    header = ["model", "parameters", "sites", "largest block", "peak on the device", "bytes moved"]
    return as_markdown([*header, "this CPU, measured rates", "one H100, assumed rates"], lines)


def measured_seconds(tokens: int) -> dict[str, float]:
    """Seconds by phase of compressing the real SmolLM2-135M with as many tokens."""
    model, _ = load_model(assets.smollm2())
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(1000, (1, TRIAL), generator=generator) for _ in range(tokens // TRIAL)]
    report = grail.compress(model, batches, keep=0.5, sites=("mlp",), progress=False)
    return report.seconds


def main(arguments: list[str] | None = None) -> None:
    """Simulates, prints, saves after each model."""
    takes = "many minutes on 2 cores; a model alone, minutes"
    parser = CommandLine(__doc__, takes=takes, results="simulated")
    parser.add_argument("--models", default=",".join(SHAPES), help="separated by commas")
    options = parser.read(arguments)
    found: list[Row] = []
    for name in options.models.split(","):
        start = time.perf_counter()
        if name == "smollm2-135m":
            few = 8 * TRIAL
            of_model = rows(name, few)[:1]
            for phase, seconds in measured_seconds(few).items():
                of_model[0][f"measured_{phase}_s"] = f"{seconds:.4g}"
        else:
            of_model = rows(name)
        found += of_model
        print(f"{name}: {of_model[0]['total_s']} s at measured rates", flush=True)
        print(f"  simulated in {time.perf_counter() - start:.0f} s", flush=True)
        if options.output:
            write_rows(options.output, found)
    print(markdown(found))


if __name__ == "__main__":
    main()
