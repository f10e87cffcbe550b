"""Searches the launch table on a GPU, and writes the rows of its architecture into it.

    python -m bench.tools.tune                     every row, into grail_kernels/launches.json
    python -m bench.tools.tune --row gram/16-bit/wide --row absorb/bf16/wide
    python -m bench.tools.tune --seconds 120       the rows that fit, most important first
    python -m bench.tools.tune --dry-run           on the CPU, at toy sizes; TRITON_INTERPRET=1 runs
                                                   the kernels. Writes only where --table names it

A candidate is out that does not compile or fit, is off by 16 eps or more, or gives other bits when
it runs again. The fastest of its kernel takes the place of the present one if it beats it by 2%,
summed over the shapes; a row of Grams lists its kernels in the order of their times.
Run `python -m bench.tools.aot` afterwards: it compiles every shipped row.
"""

import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import grail_kernels as gk
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Row, quantiles, time_in_turns
from grail_kernels import gram_serve, reference, tuning
from grail_kernels.backend import interpreting
from grail_kernels.tuning import AbsorbConfig, Config, GramConfig, Key

# What a candidate has to gain, as a share of the time: less is noise.
MARGIN = 0.02
CHECKED = 64

# Tokens, channels, group, warps, stages; by operands, and whether a matrix is narrow. What fits
# shared memory: two blocks a stage, six where fp32 is in parts.
TMA_CANDIDATES = {
    ("16-bit", False): (
        *((128, 128, group, 8, 3) for group in (4, 8, 12, 16)),
        *((64, 128, group, 8, 4) for group in (4, 8)),
        (64, 128, 8, 8, 5),
        (64, 128, 8, 4, 3),
        (128, 64, 8, 4, 3),
        (64, 64, 8, 4, 4),
    ),
    ("16-bit", True): tuple(
        (tokens, 64, 1, 4, stages) for tokens, stages in ((64, 3), (64, 5), (128, 2), (128, 3))
    ),
    ("split", False): (
        *((32, 128, group, 8, stages) for group in (8, 16) for stages in (3, 4)),
        (64, 128, 8, 8, 2),
        (32, 64, 8, 4, 3),
        (64, 64, 8, 4, 2),
    ),
    ("split", True): ((32, 64, 1, 4, 3), (32, 64, 1, 4, 4), (64, 64, 1, 4, 2), (64, 64, 1, 4, 3)),
}

# Storing the activation, which the first launch for ordinary ones then reads.
_FORMING = [tuning.FORMING, replace(tuning.FORMING, block_tokens=16, block_channels=256)]

# Tokens of the calls that compile, of the same alignment as those that are timed.
COMPILED_TOKENS = 2048

# In the order of what a calibration spends its time on.
_ORDER = """
    gram/16-bit/wide  gram/16-bit/middle  absorb/bf16/wide  gram/split/wide  gram/16-bit/narrow
    gram/16-bit/gated  absorb/bf16/middle  absorb/split/wide  gram/split/middle
    gram/16-bit/scattered  absorb/split/middle  gram/split/narrow  gram/split/gated
    gram/split/scattered
"""
ORDER: tuple[Key, ...] = tuple(tuple(name.split("/")) for name in _ORDER.split())
# Matrices, tokens, channels of each shape class.
GRAM_SIZES = {
    "narrow": ((32, 65_536, 64),),
    "middle": ((1, 65_536, 1024), (32, 65_536, 128)),
    # As calibration launches them: what one program reads stays in L2 for its neighbours.
    "wide": ((1, tuning.BUFFER_TOKENS, 4096), (1, tuning.BUFFER_TOKENS, 11_008)),
    "gated": ((1, 16_384, 11_008),),
    "scattered": ((1, 32_768, 4001),),
}
# Outputs and channels; half of the channels stay.
ABSORB_SIZES = {"middle": ((576, 1536),), "wide": ((4096, 11_008),)}


@dataclass(frozen=True)
class Work:
    """One shape of a class: a call whose launch is searched, and the error of its result.

    Attributes:
        name: the shape in words.
        call: computes the result from nothing, so that it can be compared and repeated.
        error: the error ratio of a result.
    """

    name: str
    call: Callable[[], Tensor]
    error: Callable[[Tensor], float]


def candidates(key: Key) -> list[Config]:
    """The candidates of a row: a dozen a kernel, since each takes seconds to compile."""
    operation, operands, shape = key
    if operation == "absorb":
        return [
            AbsorbConfig(outputs, kept, dropped, 8, 8, stages)
            for (outputs, kept), (dropped, stages) in itertools.product(
                ((128, 128), (128, 64), (64, 128), (256, 64)), ((32, 2), (32, 3), (64, 2))
            )
        ]
    if shape == "gated":
        return [*_by_pointers(operands), *_FORMING]
    by_engine = TMA_CANDIDATES[operands, shape == "narrow"]
    kernels = ("tma", "halves") if operands == "split" else ("tma",)
    rest = [GramConfig(kernel, *values) for kernel in kernels for values in by_engine]
    return [*_by_pointers(operands), *rest]


def _by_pointers(operands: str) -> list[GramConfig]:
    if operands == "split":
        sizes = (((32, 64), 4), ((16, 64), 8), ((64, 64), 8), ((32, 128), 8), ((16, 128), 8))
        return _gram_configs(sizes, (2, 3))
    sizes = (((64, 128), 8), ((32, 128), 8), ((128, 128), 8), ((64, 64), 4), ((32, 64), 4))
    groups = [GramConfig("pointers", 64, 128, group, 8, 3) for group in (4, 16)]
    return groups + _gram_configs(sizes, (3, 4))


def _gram_configs(
    sizes: Iterable[tuple[tuple[int, int], int]], stages: tuple[int, int]
) -> list[GramConfig]:
    pairs = itertools.product(sizes, stages)
    return [GramConfig("pointers", *edges, 8, warps, number) for (edges, warps), number in pairs]


def works(key: Key, device: str, dry: bool, most: int = 2**31) -> Iterator[Work]:
    """The shapes that decide a row, of `most` tokens at most; toy ones in a dry run."""
    kernel, operands, shape = key
    if kernel == "absorb":
        for sizes in ABSORB_SIZES[shape]:
            yield _absorb_work(operands, *((12, 40) if dry else sizes), device)
        return
    for matrices, tokens, channels in GRAM_SIZES[shape]:
        if dry:
            matrices, tokens, channels = min(matrices, 2), 40, 33 if channels % 16 else 48
        yield _gram_work(operands, shape, (matrices, min(tokens, most), channels), device)


def _gram_work(operands: str, shape: str, size: tuple[int, int, int], device: str) -> Work:
    matrices, tokens, channels = size
    # The interpreter gets products of bf16 wrong.
    half = torch.bfloat16 if device == "cuda" else torch.float16
    dtype = torch.float32 if operands == "split" else half
    backend = kernel_backend(device)
    # A mean, as activations have one; heads lie beside each other within a token.
    x = (torch.randn(tokens, matrices, channels, device=device) + 0.5).to(dtype).transpose(0, 1)
    # Of these silu is the identity in every dtype, so that its last bit is nobody's matter.
    gate = torch.empty_like(x).copy_(torch.arange(channels, device=device) % 8 + 17)
    first = gate[0] * x[0] if shape == "gated" else x[0]

    def call() -> Tensor:
        out = torch.zeros(matrices, gk.packed_numel(channels), device=device)
        if shape == "gated":
            return gk.gram_swiglu_(out[0], gate[0], x[0], backend=backend)[None]
        return gk.gram_batched_(out, x, backend=backend)

    def error(result: Tensor) -> float:
        parts = {0: first, matrices - 1: first if matrices == 1 else x[-1]}
        return max(_gram_error(result[index], part) for index, part in parts.items())

    many = f"{matrices} x " if matrices > 1 else ""
    return Work(f"{many}{tokens} tokens x {channels} channels", call, error)


def _gram_error(packed: Tensor, x: Tensor) -> float:
    """The error ratio of the first and the last rows of a Gram matrix."""
    dense = gk.unpack(packed, x.shape[1])
    ratios = []
    for rows in (slice(0, CHECKED), slice(-CHECKED, None)):
        left, right = x[:, rows].double(), x.double()
        magnitude = left.abs().T @ right.abs()
        ratios.append(reference.error_ratio(dense[rows], left.T @ right, magnitude))
    return max(ratios)


def _absorb_work(operands: str, outputs: int, channels: int, device: str) -> Work:
    # fp16 takes the products of fp32, and the interpreter reads bf16 weights rightly.
    dtype = torch.bfloat16 if operands == "bf16" else torch.float32
    packed = torch.zeros(gk.packed_numel(channels), device=device)
    gk.gram_(packed, torch.randn(1024, channels, device=device) + 0.5)
    weight = torch.randn(outputs, channels, device=device).to(dtype)
    keep = torch.randperm(channels, device=device)[: channels // 2]

    def call() -> Tensor:
        config = tuning.absorb_config(dtype, channels)
        fused = config.method == "fused"
        return gk.absorb(weight, packed, keep, kernel_backend(device) if fused else "torch")

    def error(result: Tensor) -> float:
        dense, rows = gk.unpack(packed, channels), weight[:CHECKED]
        exact = reference.absorb(rows, dense, keep)
        magnitude = reference.absorb(rows.abs(), dense.abs(), keep)
        return reference.error_ratio(result[:CHECKED], exact, magnitude)

    return Work(f"{outputs} outputs x {channels} channels", call, error)


def runs_here(config: Config, device: str) -> bool:
    """Checks whether that launch's kernel is for that device; a dry run tries every kernel."""
    by_engine = isinstance(config, GramConfig) and config.kernel in ("tma", "halves")
    if device == "cpu" or not by_engine:
        return True
    from grail_kernels.gram_tma import runs_on

    return runs_on(torch.device(device))


def kernel_backend(device: str) -> str:
    """The backend whose launches are searched; without a GPU or interpreter its twin stands in."""
    return "triton" if device == "cuda" or interpreting() else "torch"


@contextmanager
def launched_with(key: Key, config: Config) -> Iterator[None]:
    """A context in which every launch of the operation of `key` takes `config`."""
    if isinstance(config, AbsorbConfig):
        patch = mock.patch.object(tuning, "absorb_config", return_value=config)
    else:
        found = tuning.gram_launches

        def launches(*arguments: Any, gated: bool = False, **form: Any) -> tuning.Launches:
            # What stores the activation of a gate is followed by what ordinary ones take.
            ordinary = config.kernel == tuning.FORMED and not gated
            return found(*arguments, gated=gated, **form) if ordinary else (config,)

        patch = mock.patch.object(tuning, "gram_launches", launches)
    gram_serve.forget_forms()
    try:
        with patch:
            yield
    finally:
        gram_serve.forget_forms()


def compile_ahead(keys: list[Key], device: str) -> None:
    """Compiles every candidate of those rows into Triton's cache, as many at a time as cores."""
    jobs = [
        (key, config, device)
        for key in keys
        for config in candidates(key)
        if runs_here(config, device)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        list(pool.map(_compile, jobs))


def _compile(job: tuple[Key, Config, str]) -> None:
    key, config, device = job
    for work in works(key, device, dry=False, most=COMPILED_TOKENS):
        with launched_with(key, config), suppress(Exception):  # what does not fit is told later
            work.call()


def judge(key: Key, config: Config, work: Work, repeats: int) -> tuple[float, str]:
    """The median seconds of a candidate, or infinity and its problem."""
    try:
        with launched_with(key, config):
            result = work.call()
            ratio = work.error(result)
            if not ratio < reference.ERROR_LIMIT:
                return math.inf, f"off by {ratio:.3g} eps"
            if not torch.equal(result, work.call()):
                return math.inf, "not the same bits again"
            timed = time_in_turns({"": lambda _: work.call()}, [result], repeats)[""]
    except Exception as problem:  # a candidate that does not fit is a result, too
        return math.inf, str(problem).strip().splitlines()[-1]
    return quantiles(timed)[1], ""


def search(
    key: Key, present: tuning.Row, device: str, dry: bool, deadline: float
) -> tuple[tuning.Row, list[Row]]:
    """The row that a key should have, and the measurements for it.

    After `deadline` no candidate starts; the measurements until then count.
    """
    shapes = list(works(key, device, dry))
    tried: list[Config] = list(present) if isinstance(present, tuple) else [present]
    if isinstance(present, AbsorbConfig):
        tried.append(replace(present, method="gathered"))
    tried += candidates(key)[: 2 if dry else None]
    rows, scores = [], {}
    for config in dict.fromkeys(config for config in tried if runs_here(config, device)):
        if time.monotonic() > deadline:
            break
        found = [judge(key, config, work, 2 if dry else 7) for work in shapes]
        # Shapes count alike, however long they take.
        scores[config] = sum(math.log(seconds) for seconds, _ in found)
        for work, (seconds, problem) in zip(shapes, found, strict=True):
            rows.append(
                {"kernel": "tuning", "row": "/".join(key), "shape": work.name}
                | {"config": str(config), "unit": "s", "problem": problem}
                | {"p50": "" if problem else f"{seconds:.6g}"}
            )
    gain = len(shapes) * math.log(1 - MARGIN)
    if isinstance(present, AbsorbConfig):
        return _with_launch(_best(present, scores, gain), scores), rows
    return _ordered(present, scores, gain), rows


def _best(present: Config, scores: dict[Config, float], gain: float) -> Any:
    """The fastest of `scores` if it beats the present one by `gain`, else that."""
    best = min(scores, key=scores.__getitem__, default=present)
    keeps = best not in scores or not scores[best] < scores.get(present, math.inf) + gain
    return present if keeps else best


def _ordered(present: tuning.Launches, scores: dict[Config, float], gain: float) -> tuning.Launches:
    """The best launch of each kernel, the fastest kernel first, down to the one for every call."""
    before = {config.kernel: config for config in present}
    chosen = []
    for kernel in dict.fromkeys([*before, *(_kernel(config) for config in scores)]):
        own = {config: score for config, score in scores.items() if _kernel(config) == kernel}
        best = _best(before.get(kernel) or min(own, key=own.__getitem__), own, gain)
        if kernel in before or math.isfinite(own[best]):
            chosen.append(best)
    # What comes first keeps its place against a gain that is noise.
    times = {c: scores.get(c, math.inf) + gain * (c.kernel == present[0].kernel) for c in chosen}
    chosen.sort(key=times.__getitem__)
    last = next(i for i, config in enumerate(chosen) if config.kernel == tuning.EVERY_CALL)
    return tuple(chosen[: last + 1])


def _kernel(config: Config) -> str:
    return config.kernel if isinstance(config, GramConfig) else ""


def _with_launch(chosen: AbsorbConfig, scores: dict[Config, float]) -> Any:
    """`chosen`; if that is the library's product, with the best launch of the kernel beside it."""
    fused = {c: s for c, s in scores.items() if getattr(c, "method", "") == "fused"}
    if chosen.method != "gathered" or not fused:
        return chosen
    best = min(fused, key=fused.__getitem__)
    return replace(best, method="gathered") if math.isfinite(fused[best]) else chosen


def tune(
    keys: list[Key], device: str, *, dry: bool, table: Path | None, seconds: float = math.inf
) -> list[Row]:
    """Searches rows one after another and writes each to `table` as soon as it is found.

    Args:
        keys: the rows, in this order.
        device: "cuda" or "cpu".
        dry: toy sizes, two candidates a row.
        table: the file that gets the rows of this architecture; nothing is written if None.
        seconds: no candidate starts later.

    Returns:
        Measurements, a row for each candidate and shape.
    """
    deadline = time.monotonic() + seconds
    if device == "cuda":
        compile_ahead(keys, device)
    architecture = tuning.architecture_of(torch.device(device))
    measured = []
    for key in keys:
        launches = dict(tuning.read_table(table or tuning.TABLE))
        present = launches.get((architecture, key), launches[tuning.DEFAULT, key])
        chosen, rows = search(key, present, device, dry, deadline)
        if not rows:
            break
        measured += rows
        right = sum(not row["problem"] for row in rows)
        print(f"{'/'.join(key)}: {chosen} ({right} of {len(rows)} are right)", flush=True)
        if table and right:
            tuning.write_table(table, launches | {(architecture, key): chosen})
    return measured


def main(arguments: list[str] | None = None) -> int:
    """Searches, prints, writes."""
    parser = CommandLine(
        __doc__,
        *("seconds", "dry_run"),
        writes="grail_kernels/launches.json or --table; a CSV with --output",
        takes="minutes on a GPU; --seconds limits it",
        results="gpu/tuning",
    )
    rows = {"choices": ["/".join(key) for key in ORDER], "metavar": "KERNEL/OPERANDS/SHAPE"}
    parser.add_argument("--row", action="append", help="only this; may be repeated", **rows)
    parser.add_argument("--table", type=Path, help="the file that gets the rows")
    options = parser.read(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU is visible to torch; --dry-run runs the same code on the CPU")
        return 2
    options.device = "cpu" if options.dry_run else "cuda"
    table = options.table or (None if options.dry_run else tuning.TABLE)
    keys = [key for key in ORDER if not options.row or "/".join(key) in options.row]
    dry, seconds = options.dry_run, options.seconds
    save(options, tune(keys, options.device, dry=dry, table=table, seconds=seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
