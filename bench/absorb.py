"""The correction product of a selection, W_D G_DP: grail_kernels against what libraries offer.

    python bench/absorb.py                       MLP sites of real models at half of the channels
    python bench/absorb.py --model llama-3-8b --keep 0.7
    python bench/absorb.py --shape 4096,11008    O consumer rows, H channels; may be repeated

How to read the table
  grail packed   gk.absorb on the packed accumulator, as calibration leaves it
  grail dense    gk.absorb on the dense matrix
  gather         W[:, D] @ G[D][:, P] on the dense matrix, after unpacking it: the obvious way
  full           (W @ G)[:, P] on the dense matrix, after unpacking it: all rows multiply
  p20, p50, p80  milliseconds; providers take turns
  GFLOP/s        2*O*D*K / p50: the FLOPs that the answer needs
  x gather       how many times faster than the obvious way
  error          largest error in units of eps = 2^-23 of the summed magnitudes, against fp64, on a
                 sample of consumer rows

Correctness comes first: a provider of grail that is off by 16 or more stops that shape.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run without an installation

import grail_kernels as gk
from bench.measuring import machine, quantiles, time_in_turns
from grail_kernels import reference

# (consumer rows O, channels H) of the MLP sites.
MODELS = {
    "smollm2-135m": (576, 1536),
    "qwen3-0.6b": (1024, 3072),
    "llama-2-7b": (4096, 11008),
    "llama-3-8b": (4096, 14336),
}
CPU_MODELS = ("smollm2-135m", "qwen3-0.6b")
CHECKED_ROWS = 32


@dataclass(frozen=True)
class Problem:
    """A consumer, the Gram of what it reads, and the channels that stay."""

    weight: Tensor  # [O, H]
    packed: Tensor  # [packed_numel(H)]
    keep: Tensor  # [K]

    @property
    def flops(self) -> float:
        """FLOPs of W_D G_DP."""
        (outputs, channels), kept = self.weight.shape, self.keep.numel()
        return 2.0 * outputs * (channels - kept) * kept


def problem(outputs: int, channels: int, keep: float, device: str) -> Problem:
    """A random case; the Gram is of positive-mean activations, as real ones are."""
    packed = torch.zeros(gk.packed_numel(channels), device=device)
    gk.gram_(packed, torch.randn(1024, channels, device=device) + 0.5)
    kept = torch.randperm(channels, device=device)[: max(1, round(keep * channels))]
    return Problem(torch.randn(outputs, channels, device=device), packed, kept)


def providers(case: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every way to the answer, as a function of the weight."""
    channels = case.weight.shape[1]
    keep, packed = case.keep, case.packed
    dense = gk.unpack(packed, channels)
    is_dropped = torch.ones(channels, dtype=torch.bool, device=keep.device)
    is_dropped[keep] = False
    dropped = is_dropped.nonzero().flatten()

    def gather(weight: Tensor) -> Tensor:
        gram = gk.unpack(packed, channels)
        return weight[:, dropped] @ gram[dropped][:, keep]

    def full(weight: Tensor) -> Tensor:
        gram = gk.unpack(packed, channels)
        return (weight.index_fill(1, keep, 0.0) @ gram)[:, keep]

    return {
        "grail packed": lambda weight: gk.absorb(weight, packed, keep),
        "grail dense": lambda weight: gk.absorb(weight, dense, keep),
        "gather": gather,
        "full": full,
    }


def errors(case: Problem) -> dict[str, float]:
    """The error ratio of each provider on a sample of consumer rows."""
    dense = gk.unpack(case.packed, case.weight.shape[1])
    rows = case.weight[:CHECKED_ROWS]
    exact = reference.absorb(rows, dense, case.keep)
    magnitude = reference.absorb(rows.abs(), dense.abs(), case.keep)
    return {
        name: reference.error_ratio(call(case.weight)[:CHECKED_ROWS], exact, magnitude)
        for name, call in providers(case).items()
    }


def measure(case: Problem, repeats: int) -> list[dict[str, str]]:
    """One row a provider, ready for a CSV.

    Raises:
        ArithmeticError: a result of grail is wrong, so nothing was timed.
    """
    ratios = errors(case)
    wrong = {name: r for name, r in ratios.items() if "grail" in name and not r < 16}
    if wrong:
        raise ArithmeticError(f"{tuple(case.weight.shape)}: off by {wrong} eps")
    outputs, channels = case.weight.shape
    rows = []
    timed = time_in_turns(providers(case), [case.weight, case.weight.clone()], repeats)
    for name, seconds in timed.items():
        times = dict(zip(("p20", "p50", "p80"), quantiles(seconds), strict=True))
        rows.append(
            {"kernel": "absorb", "provider": name, "metric": "time", "unit": "s"}
            | {"outputs": str(outputs), "channels": str(channels)}
            | {"kept": str(case.keep.numel()), "error": f"{ratios[name]:.3g}"}
            | {key: f"{value:.6g}" for key, value in times.items()}
        )
    return rows


def show(case: Problem, rows: list[dict[str, str]]) -> str:
    """The rows of one case as a table."""
    outputs, channels = case.weight.shape
    lines = [f"\n{outputs} outputs x {channels} channels, {case.keep.numel()} kept, ms"]
    names = ("p20", "p50", "p80", "GFLOP/s", "x gather", "error")
    lines.append(" ".join([f"{'provider':12}", *(f"{name:>9}" for name in names)]))
    obvious = next(float(row["p50"]) for row in rows if row["provider"] == "gather")
    for row in rows:
        times = " ".join(f"{1e3 * float(row[name]):9.2f}" for name in ("p20", "p50", "p80"))
        median = float(row["p50"])
        lines.append(
            f"{row['provider']:12} {times} {case.flops / median / 1e9:9.1f} "
            f"{obvious / median:9.2f} {float(row['error']):9.2f}"
        )
    return "\n".join(lines)


def _shape(text: str) -> tuple[int, int]:
    try:
        outputs, channels = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not O,H such as 4096,11008") from None
    if outputs < 1 or channels < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1 output and 2 channels")
    return outputs, channels


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit code is 1 if a result was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=[*MODELS], help="may be repeated")
    parser.add_argument("--shape", action="append", type=_shape, metavar="O,H")
    parser.add_argument("--keep", type=float, default=0.5, help="share of channels (default 0.5)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the GPU if there is one"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--csv", type=Path, help="write every number here, in long format")
    options = parser.parse_args(arguments)
    if not 0 < options.keep < 1 or options.repeats < 2:
        parser.error("--keep lies between 0 and 1, --repeats is at least 2")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shapes = list(options.shape or [])
    if options.model or not shapes:
        models = options.model or (CPU_MODELS if device == "cpu" else tuple(MODELS))
        shapes += [MODELS[model] for model in models]
    conditions = machine(device)
    print(", ".join(f"{name} {value}" for name, value in conditions.items() if value))
    rows: list[dict[str, str]] = []
    failed = False
    for outputs, channels in shapes:
        case = problem(outputs, channels, options.keep, device)
        try:
            found = measure(case, options.repeats)
        except ArithmeticError as wrong:
            print(wrong)
            failed = True
            continue
        print(show(case, found), flush=True)
        rows += [row | conditions for row in found]
    if options.csv and rows:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
