"""One site's ridge and absorb: grail against the way of today's libraries.

    python -m bench.kernels.ridge                        MLP sites of real models at half of the channels
    python -m bench.kernels.ridge --model llama-3-8b --keep 0.7
    python -m bench.kernels.ridge --shape 4096,11008     O consumer rows, H channels; may be repeated

From a Gram matrix and a consumer W [O, H] to the narrow weight [O, K], toward zero, so that all
providers answer the same question: W' = W G_:P (G_PP + λI)⁻¹.

How to read the table
  grail          grail.fit: absorb, then solve in fp64 (in refined fp32 on GPUs that are slow at
                 fp64), and with both errors of the site, which the others do not have
  grail solve    the same without the errors: V G Rᵀ and grail.ridge.solve
  reference      fp32 torch.linalg.solve for B [H, K], then W @ B: H right-hand sides, as published
                 code does it
  p20, p50, p80  milliseconds; providers take turns, so that a slow moment hits each alike
  x reference    how many times faster than the reference, p50 against p50
  GFLOP          what a provider has to compute, by count; grail's is in fp64
  memory         MB that torch allocates at the peak, beside the packed Gram and W
  ratio          backward error of W' in units of eps = 2^-24: ‖T − W'A‖ / (‖A‖ ‖W'‖ K eps) with
                 T = W G_:P and A damped, in the 1-norm (LAPACK's xPOT02); below 30 is correct
  error          ‖W' − W'64‖ / ‖W'64‖ against the closed form in fp64, for information

Correctness comes first: where a ratio of grail's is 30 or more, that shape gets no times and the
exit code is 1. The reference keeps its row, and its ratio stands beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import grail
from bench.report import figures
from bench.tools.allocations import peak_bytes
from bench.tools.measuring import command_line, machine, quantiles, time_in_turns, write_rows
from grail.algebra import ridge

# (consumer rows O, channels H) of the MLP sites.
MODELS = {
    "smollm2-135m": (576, 1536),
    "qwen3-0.6b": (1024, 3072),
    "llama-2-7b-quarter": (1024, 2752),
    "llama-2-7b": (4096, 11008),
    "llama-3-8b": (4096, 14336),
}
# A minute on two cores; the quarter has Llama-2-7B's proportions.
CPU_MODELS = ("smollm2-135m", "llama-2-7b-quarter")
GPU_MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-2-7b", "llama-3-8b")
ALPHA = 1e-3
RATIO_LIMIT = 30.0
MEGA = 1e6

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """A case: a consumer [O, H], the Gram of what it reads, and the channels that stay."""

    weight: Tensor
    gram: grail.Gram
    selection: grail.Selection

    @property
    def sizes(self) -> tuple[int, int, int]:
        """O, H, K."""
        return (*self.weight.shape, self.selection.kept)

    def damped(self, dtype: torch.dtype) -> Tensor:
        """G_PP + λI [K, K]."""
        a = self.selection.normal(self.gram.matrix()).to(dtype)
        a.diagonal().add_(ALPHA * a.diagonal().mean())
        return a


@dataclass(frozen=True)
class Row:
    """One provider on one case: times in seconds, memory in bytes."""

    provider: str
    outputs: int
    channels: int
    kept: int
    p20: float
    p50: float
    p80: float
    flops: float
    memory: int
    ratio: float
    error: float


def site(outputs: int, channels: int, keep: float, device: str) -> Site:
    """A random case with correlated channels of positive mean, as activations are."""
    gram = grail.Gram(channels, device=device)
    rank = channels // 4
    mixing = torch.randn(rank, channels, device=device) / rank**0.5
    for _ in range(max(1, 2 * channels // 2048)):
        tokens = torch.randn(2048, rank, device=device) @ mixing
        gram.update(tokens + 0.5 * torch.randn(2048, channels, device=device) + 0.5)
    kept = torch.randperm(channels)[: max(1, round(keep * channels))].sort().values
    weight = torch.randn(outputs, channels, device=device)
    return Site(weight, gram, grail.Selection(kept, channels))


def providers(case: Site) -> dict[str, Call]:
    """Every way to W', as a function of the weight."""
    selection = case.selection
    kept = selection.index.to(case.weight.device)
    is_dropped = torch.ones(selection.channels, dtype=torch.bool, device=kept.device)
    is_dropped[kept] = False
    dropped = is_dropped.nonzero().flatten()

    def fitted(weight: Tensor) -> Tensor:
        return grail.fit(case.gram, selection, weight, alpha=ALPHA, toward="zero").weight

    def solved(weight: Tensor) -> Tensor:
        gram = case.gram.matrix()
        plain = weight[:, kept].double()
        damping = ALPHA * case.gram.energy[kept].double().mean()
        right = weight[:, dropped].double() @ gram[dropped][:, kept].double() - damping * plain
        solution = ridge.solve(lambda: selection.normal(gram).double(), right, damping)
        return (plain + solution.x).to(weight.dtype)

    def reference(weight: Tensor) -> Tensor:
        gram = case.gram.matrix()
        a = gram[kept][:, kept]
        a.diagonal().add_(ALPHA * a.diagonal().mean())
        return weight @ torch.linalg.solve(a, gram[:, kept], left=False)

    return {"grail": fitted, "grail solve": solved, "reference": reference}


def flops(outputs: int, channels: int, kept: int) -> dict[str, float]:
    """What each provider has to compute, by count."""
    lost = channels - kept
    solve = kept**3 / 3 + 2 * outputs * kept**2
    return {
        "grail": solve + 2 * outputs * lost * channels + 4 * outputs * kept**2,
        "grail solve": solve + 2 * outputs * lost * kept,
        "reference": 2 * kept**3 / 3 + 2 * channels * kept**2 + 2 * outputs * channels * kept,
    }


def accuracies(case: Site, calls: dict[str, Call]) -> dict[str, tuple[float, float]]:
    """The backward ratio of each provider's W', and its distance from fp64's."""
    a = case.damped(torch.float64)
    kept = case.selection.index.to(a.device)
    target = case.weight.double() @ case.gram.matrix()[:, kept].double()
    exact = torch.cholesky_solve(target.T, torch.linalg.cholesky(a)).T
    eps, norm = torch.finfo(torch.float32).eps / 2, torch.linalg.matrix_norm
    found = {}
    for name, call in calls.items():
        x = call(case.weight).double()
        ratio = norm(target - x @ a, 1) / (norm(a, 1) * norm(x, 1) * len(a) * eps)
        found[name] = ratio.item(), (norm(x - exact) / norm(exact)).item()
    return found


def measure(case: Site, repeats: int) -> list[Row]:
    """The rows of one case.

    Raises:
        ArithmeticError: a result of grail is wrong, so nothing was timed.
    """
    calls = providers(case)
    accuracy = accuracies(case, calls)
    wrong = {n: r for n, (r, _) in accuracy.items() if "grail" in n and not r < RATIO_LIMIT}
    if wrong:
        raise ArithmeticError(f"O, H, K = {case.sizes}: backward ratios {wrong}")
    device, count = case.weight.device.type, flops(*case.sizes)
    peak = {name: peak_bytes(partial(call, case.weight), device) for name, call in calls.items()}
    timed = time_in_turns(calls, [case.weight, case.weight.clone()], repeats)
    return [
        Row(name, *case.sizes, *quantiles(seconds), count[name], peak[name], *accuracy[name])
        for name, seconds in timed.items()
    ]


def show(rows: list[Row]) -> str:
    """The rows of one case as a table."""
    first = rows[0]
    names = ("p20", "p50", "p80", "x ref.", "GFLOP", "memory", "ratio", "error")
    lines = [
        f"\n{first.outputs} outputs x {first.channels} channels, {first.kept} kept; ms, MB",
        " ".join([f"{'provider':12}", *(f"{name:>9}" for name in names)]),
    ]
    rival = next(row.p50 for row in rows if row.provider == "reference")
    for row in rows:
        times = " ".join(f"{1e3 * value:9.2f}" for value in (row.p20, row.p50, row.p80))
        lines.append(
            f"{row.provider:12} {times} {rival / row.p50:9.2f} {row.flops / 1e9:9.2f} "
            f"{row.memory / MEGA:9.1f} {row.ratio:9.2g} {row.error:9.1e}"
        )
    return "\n".join(lines)


def records(rows: Iterable[Row], conditions: dict[str, str]) -> list[dict[str, str]]:
    """One record a row, its conditions beside it; times in seconds, memory in bytes."""
    return [
        {"kernel": "ridge", "alpha": str(ALPHA)}
        | {
            name: f"{value:.6g}" if isinstance(value, float) else str(value)
            for name, value in asdict(row).items()
        }
        | conditions
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit code is 1 if a result was wrong."""
    options = parse(arguments)
    deadline = time.monotonic() + (options.seconds or float("inf"))
    conditions = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in conditions.items() if value))
    rows: list[Row] = []
    failed = False
    for outputs, channels in options.shape:
        if time.monotonic() > deadline:
            print(f"{outputs} x {channels}: left out, --seconds are over")
            continue
        try:
            found = measure(site(outputs, channels, options.keep, options.device), options.repeats)
        except ArithmeticError as wrong:
            print(wrong)
            failed = True
            continue
        rows += found
        print(show(found), flush=True)
    if options.csv and rows:
        write_rows(options.csv, records(rows, conditions))
    if options.plot and rows:
        figures.save(options.plot, figures.ridge(records(rows, conditions)))
    return int(failed)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = command_line(
        __doc__,
        writes="a table to the screen; files with --csv and --plot",
        takes="many minutes on 2 cores; --seconds limits it",
    )
    parser.add_argument("--model", action="append", choices=[*MODELS], help="may be repeated")
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="O,H",
        help="a case of its own, may be repeated",
    )
    parser.add_argument("--keep", type=float, default=0.5, help="share of channels (default 0.5)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the GPU if there is one"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--seconds", type=float, help="no case starts later than this")
    parser.add_argument("--csv", type=Path, help="write every number here")
    parser.add_argument("--plot", type=Path, help="draw the times here (needs matplotlib)")
    options = parser.parse_args(arguments)
    if not 0 < options.keep < 1 or options.repeats < 2:
        parser.error("--keep lies between 0 and 1, --repeats is at least 2")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.shape = options.shape or []
    if options.model or not options.shape:
        default = CPU_MODELS if options.device == "cpu" else GPU_MODELS
        options.shape += [MODELS[model] for model in options.model or default]
    return options


def _shape(text: str) -> tuple[int, int]:
    try:
        outputs, channels = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not O,H such as 4096,11008") from None
    if outputs < 1 or channels < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1 output and 2 channels")
    return outputs, channels


if __name__ == "__main__":
    sys.exit(main())
