"""The correction product of a selection, W_D G_DP: grail_kernels against what libraries offer.

    python -m bench.kernels.absorb                       MLP sites of real models at half of the channels
    python -m bench.kernels.absorb --model llama-3-8b --keep 0.7
    python -m bench.kernels.absorb --shape 4096,11008    O consumer rows, H channels; may be repeated

Every provider starts from the packed accumulator, as calibration leaves it.

How to read the table
  fused          the Triton kernel, which gathers G inside the product; on a GPU or interpreted
  gathered       its torch twin: a strip of G gathered at a time, then the library's GEMM
  permuted       G unpacked, G_DP formed whole, then the library's GEMM: the obvious way
  full           G unpacked, all rows multiply: (W G)[:, P]
  p20, p50, p80  milliseconds; providers take turns
  GFLOP/s        2*O*D*K / p50: the FLOPs that the answer needs
  x permuted     how many times faster than the obvious way
  error          largest error in units of eps = 2^-23 of the summed magnitudes, against fp64, on a
                 sample of consumer rows
Below it stand what the launch table takes on this device, and the FLOPs of the two ways to the
whole W': absorb then solve, for O right-hand sides, or solve then absorb, for D of them. (grail.fit
needs W_D G_DP for its errors in any case: there, solving first costs that product again.)

Correctness comes first: a provider of grail that is off by 16 or more stops that shape.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import grail_kernels as gk
from bench.tools.measuring import (
    Call,
    Row,
    command_line,
    machine,
    quantiles,
    time_in_turns,
    write_rows,
)
from grail_kernels import reference, tuning
from grail_kernels.backend import interpreting

# (consumer rows O, channels H) of the MLP sites.
MODELS = {
    "smollm2-135m": (576, 1536),
    "qwen3-0.6b": (1024, 3072),
    "llama-2-7b": (4096, 11008),
    "llama-3-8b": (4096, 14336),
}
CPU_MODELS = ("smollm2-135m", "qwen3-0.6b")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED_ROWS = 32
OURS = ("fused", "gathered")


@dataclass(frozen=True)
class Problem:
    """A consumer, the Gram of what it reads, and the channels that stay."""

    weight: Tensor  # [O, H]
    packed: Tensor  # [packed_numel(H)]
    keep: Tensor  # [K]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """O, H, K."""
        return (*self.weight.shape, self.keep.numel())

    @property
    def flops(self) -> float:
        """FLOPs of W_D G_DP."""
        outputs, channels, kept = self.sizes
        return 2.0 * outputs * (channels - kept) * kept


def problem(
    outputs: int, channels: int, keep: float, device: str, dtype: torch.dtype = torch.float32
) -> Problem:
    """A random case; the Gram is of positive-mean activations, as real ones are."""
    packed = torch.zeros(gk.packed_numel(channels), device=device)
    gk.gram_(packed, torch.randn(1024, channels, device=device) + 0.5)
    kept = torch.randperm(channels, device=device)[: max(1, round(keep * channels))]
    return Problem(torch.randn(outputs, channels, device=device).to(dtype), packed, kept)


def providers(case: Problem) -> dict[str, Call]:
    """Every way to the answer, as a function of the weight."""
    channels = case.weight.shape[1]
    keep, packed = case.keep, case.packed
    is_dropped = torch.ones(channels, dtype=torch.bool, device=keep.device)
    is_dropped[keep] = False
    dropped = is_dropped.nonzero().flatten()

    def permuted(weight: Tensor) -> Tensor:
        coupling = gk.unpack(packed, channels)[dropped][:, keep]
        return weight[:, dropped].float() @ coupling

    def full(weight: Tensor) -> Tensor:
        gram = gk.unpack(packed, channels)
        return (weight.index_fill(1, keep, 0.0).float() @ gram)[:, keep]

    calls: dict[str, Call] = {}
    if packed.is_cuda or interpreting():
        calls["fused"] = lambda weight: gk.absorb(weight, packed, keep, backend="triton")
    calls["gathered"] = lambda weight: gk.absorb(weight, packed, keep, backend="torch")
    return calls | {"permuted": permuted, "full": full}


def ways(outputs: int, channels: int, kept: int) -> dict[str, float]:
    """FLOPs from G and W to W', for each order; the factorisation K^3 / 3 is in both."""
    dropped = channels - kept
    absorbing = 2.0 * outputs * dropped * kept
    return {
        "absorb then solve": kept**3 / 3 + absorbing + 2 * outputs * kept**2,
        "solve then absorb": kept**3 / 3 + absorbing + 2 * dropped * kept**2,
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


def measure(case: Problem, repeats: int) -> list[Row]:
    """One row a provider, ready for a CSV.

    Raises:
        ArithmeticError: a result of grail is wrong, so nothing was timed.
    """
    ratios = errors(case)
    limit = reference.ERROR_LIMIT
    wrong = {name: r for name, r in ratios.items() if name in OURS and not r < limit}
    if wrong:
        raise ArithmeticError(f"O, H, K = {case.sizes}: off by {wrong} eps")
    sizes = dict(zip(("outputs", "channels", "kept"), map(str, case.sizes), strict=True))
    rows = []
    timed = time_in_turns(providers(case), [case.weight, case.weight.clone()], repeats)
    for name, seconds in timed.items():
        times = dict(zip(("p20", "p50", "p80"), quantiles(seconds), strict=True))
        rows.append(
            {"kernel": "absorb", "provider": name, "metric": "time", "unit": "s"}
            | {"dtype": str(case.weight.dtype).removeprefix("torch.")}
            | sizes
            | {"error": f"{ratios[name]:.3g}"}
            | {key: f"{value:.6g}" for key, value in times.items()}
        )
    return rows


def show(case: Problem, rows: list[Row]) -> str:
    """The rows of one case as a table."""
    outputs, channels, kept = case.sizes
    names = ("p20", "p50", "p80", "GFLOP/s", "x permuted", "error")
    lines = [
        f"\n{rows[0]['dtype']}  {outputs} outputs x {channels} channels, {kept} kept, ms",
        " ".join([f"{'provider':12}", *(f"{name:>10}" for name in names)]),
    ]
    obvious = next(float(row["p50"]) for row in rows if row["provider"] == "permuted")
    for row in rows:
        times = " ".join(f"{1e3 * float(row[name]):10.2f}" for name in ("p20", "p50", "p80"))
        median = float(row["p50"])
        lines.append(
            f"{row['provider']:12} {times} {case.flops / median / 1e9:10.1f} "
            f"{obvious / median:10.2f} {float(row['error']):10.2f}"
        )
    counted = ways(*case.sizes)
    listed = ", ".join(f"{name} {flops / 1e9:.1f} GFLOP" for name, flops in counted.items())
    return "\n".join(
        [*lines, f"gk.absorb takes: {taken(case)}", f"{listed}: {min(counted, key=counted.get)}"]
    )


def taken(case: Problem) -> str:
    """The method that `gk.absorb` takes on its own."""
    if not case.packed.is_cuda:
        return "gathered"
    architecture = tuning.architecture_of(case.packed.device)
    return tuning.absorb_config(case.weight.dtype, case.weight.shape[1], architecture).method


def _shape(text: str) -> tuple[int, int]:
    try:
        outputs, channels = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not O,H such as 4096,11008") from None
    if outputs < 1 or channels < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1 output and 2 channels")
    return outputs, channels


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = command_line(
        __doc__,
        writes="a table to the screen; a CSV with --csv",
        takes="minutes on 2 cores; --seconds limits it",
    )
    parser.add_argument("--model", action="append", choices=[*MODELS], help="may be repeated")
    parser.add_argument("--shape", action="append", type=_shape, metavar="O,H", default=[])
    parser.add_argument("--keep", type=float, default=0.5, help="share of channels (default 0.5)")
    parser.add_argument("--dtype", action="append", choices=[*DTYPES], help="of W; default fp32")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the GPU if there is one"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--seconds", type=float, help="no case starts later than this")
    parser.add_argument("--csv", type=Path, help="write every number here, in long format")
    options = parser.parse_args(arguments)
    if not 0 < options.keep < 1 or options.repeats < 2:
        parser.error("--keep lies between 0 and 1, --repeats is at least 2")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    default = CPU_MODELS if options.device == "cpu" else tuple(MODELS)
    models = options.model or (() if options.shape else default)
    options.shape += [MODELS[model] for model in models]
    options.dtype = options.dtype or ["fp32"]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit code is 1 if a result was wrong."""
    options = parse(arguments)
    deadline = time.monotonic() + (options.seconds or float("inf"))
    conditions = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in conditions.items() if value))
    rows: list[Row] = []
    failed = False
    for outputs, channels in options.shape:
        for dtype in options.dtype:
            if time.monotonic() > deadline:
                print(f"{outputs} x {channels} {dtype}: left out, --seconds are over")
                continue
            case = problem(outputs, channels, options.keep, options.device, DTYPES[dtype])
            try:
                found = measure(case, options.repeats)
            except ArithmeticError as wrong:
                print(wrong)
                failed = True
                continue
            print(show(case, found), flush=True)
            rows += [row | conditions for row in found]
    if options.csv and rows:
        write_rows(options.csv, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
