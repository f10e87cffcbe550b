"""The correction product of a selection, W_D G_DP: grail_kernels against libraries.

    python -m bench.kernels.absorb                       MLP sites of real models, half of them kept
    python -m bench.kernels.absorb --model llama-3-8b --keep 0.7
    python -m bench.kernels.absorb --shape 4096,11008    O consumer rows, H channels; repeatable

How to read the table: docs/benches.md.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import grail_kernels as gk
from bench.kernels import cases
from bench.tools.commandline import DTYPES
from bench.tools.measuring import Call, Row, percentiles, time_in_turns
from bench.tools.tables import aligned
from grail_kernels import reference, tuning
from grail_kernels.backend import interpreting

CPU_MODELS = ("smollm2-135m", "qwen3-0.6b")
CHECKED_ROWS = 32
OURS = ("fused", "gathered", "gathered fp64")


@dataclass(frozen=True)
class Problem:
    """A consumer, the Gram of its inputs, and the kept channels."""

    weight: Tensor  # [O, H]
    packed: Tensor  # [packed_numel(H)]
    keep: Tensor  # [K]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """O, H, K."""
        return (*self.weight.shape, self.keep.numel())


def problem(
    outputs: int, channels: int, keep: float, device: str, dtype: torch.dtype = torch.float32
) -> Problem:
    """A random case; the Gram is of positive-mean activations, as real ones are."""
    packed = torch.zeros(gk.packed_numel(channels), device=device)
    gk.gram_(packed, torch.randn(1024, channels, device=device) + 0.5)
    kept = torch.randperm(channels, device=device)[: max(1, round(keep * channels))]
    return Problem(torch.randn(outputs, channels, device=device).to(dtype), packed, kept)


def providers(case: Problem) -> dict[str, Call]:
    """Every way to W_D G_DP, as a function of the weight."""
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

    def ours(weight: Tensor, backend: str, dtype: torch.dtype) -> Tensor:
        of_dropped = weight.index_select(1, dropped)
        return gk.absorb(of_dropped, packed, keep, backend, drop=dropped, dtype=dtype)

    calls: dict[str, Call] = {}
    if packed.is_cuda or interpreting():
        calls["fused"] = partial(ours, backend="triton", dtype=torch.float32)
    calls["gathered"] = partial(ours, backend="torch", dtype=torch.float32)
    calls["gathered fp64"] = partial(ours, backend="torch", dtype=torch.float64)
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
    lengths = dict(zip(("outputs", "channels", "kept"), map(str, case.sizes), strict=True))
    timed = time_in_turns(providers(case), [case.weight, case.weight.clone()], repeats)
    return [
        {"kernel": "absorb", "provider": name, "metric": "time", "unit": "s"}
        | {"dtype": str(case.weight.dtype).removeprefix("torch.")}
        | lengths
        | {"error": f"{ratios[name]:.3g}"}
        | percentiles(seconds)
        for name, seconds in timed.items()
    ]


def show(device: str, rows: list[Row]) -> str:
    """The rows of one case as text."""
    first, times = rows[0], ("p20", "p50", "p80")
    outputs, channels, kept = (int(first[name]) for name in ("outputs", "channels", "kept"))
    obvious = next(float(row["p50"]) for row in rows if row["provider"] == "permuted")
    lines = []
    for row in rows:
        median = float(row["p50"])
        flops = 2.0 * outputs * (channels - kept) * kept
        rates = (f"{flops / median / 1e9:.1f}", f"{obvious / median:.2f}")
        milliseconds = (f"{1e3 * float(row[name]):.2f}" for name in times)
        lines.append((row["provider"], *milliseconds, *rates, f"{float(row['error']):.2f}"))
    counted = ways(outputs, channels, kept)
    listed = ", ".join(f"{name} {flops / 1e9:.1f} GFLOP" for name, flops in counted.items())
    return (
        f"\n{first['dtype']}  {outputs} outputs x {channels} channels, {kept} kept, ms\n"
        + aligned(("provider", *times, "GFLOP/s", "x permuted", "error"), lines)
        + f"\ngk.absorb takes: {taken(first['dtype'], channels, device)}"
        + f"\n{listed}: {min(counted, key=lambda name: counted[name])}"
    )


def taken(dtype: str, channels: int, device: str) -> str:
    """The method that `gk.absorb` takes on its own."""
    if device == "cpu":
        return "gathered"
    architecture = tuning.architecture_of(torch.device(device))
    return tuning.absorb_config(getattr(torch, dtype), channels, architecture).method


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, saves; the exit code is 1 if a result was wrong."""
    options = cases.parse_mlp(
        *(__doc__, arguments, CPU_MODELS, "dtype"),
        takes="minutes on 2 cores; --seconds limits it",
        results="absorb{device}",
        dtype={"choices": ["fp32", "bf16"], "help": "of W; default: fp32"},
    )
    cases.announce(options.device)

    def measured(outputs: int, channels: int, dtype: str) -> list[Row]:
        case = problem(outputs, channels, options.keep, options.device, DTYPES[dtype])
        return measure(case, options.repeats)

    todo = [
        (f"{outputs} x {channels} {dtype}", partial(measured, outputs, channels, dtype))
        for outputs, channels in options.shapes
        for dtype in options.dtype or ["fp32"]
    ]
    return cases.run(options, todo, partial(show, options.device))


if __name__ == "__main__":
    raise SystemExit(main())
