"""How fast, and how exactly, Gram matrices are accumulated: grail_kernels against libraries.

    python bench/gram.py                        every model below, on the GPU if there is one
    python bench/gram.py --model llama-3-8b     the sites of one model
    python bench/gram.py --shape 8192,4096      8192 tokens of 4096 channels; may be repeated
    python bench/gram.py --dtype bf16 --csv out.csv --plot out.png

How to read the table
  p20, p50, p80  milliseconds of one call; all providers take turns, so that a slow moment of the
                 machine hits each alike
  TF-eq          2*T*H^2 / p50: the FLOPs of a full product, whether they were executed or not
  x addmm        how many times faster than the library's own accumulation, p50 against p50
  % limit        time of the limit / p50. The limit is the larger of T*H*(H + 1) FLOPs at the rate
                 of the library's best product, and one read of x plus one read and write of half of
                 G at the rate of the best copy; both measured in this run
  error          largest error in units of eps = 2^-23 of the summed magnitudes, against fp64, on a
                 sample of channels; a correct fp32 accumulation stays below 16

Correctness comes first: where grail's error is 16 or more, that shape gets no times and the exit
code is 1. A provider that rounds (mm in bf16) keeps its row, and its error stands beside it.
On a CPU the tokens are fewer. Inputs are random and rotate, so that none of them stays in a cache.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run without an installation

import grail_kernels as gk
from grail_kernels import reference

# Channels of the sites whose Gram matrices a compression needs: attention heads, MLP.
MODELS = {
    "smollm2-135m": (576, 1536),
    "qwen3-0.6b": (2048, 3072),
    "llama-2-7b": (4096, 11008),
    "llama-3-8b": (4096, 14336),
    "qwen2.5-7b": (3584, 18944),
    "vit-b-16": (768, 3072),
}
DEFAULT_MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-2-7b")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPU_TOKENS = 65_536
# FLOPs of a full product that one call may take on a CPU: a second or two on a few cores.
CPU_FLOPS = 1.5e11
CHECKED_CHANNELS = 64

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One case: `tokens` activations of `channels` channels."""

    tokens: int
    channels: int

    @property
    def flops(self) -> float:
        """FLOPs of the full product."""
        return 2.0 * self.tokens * self.channels**2


@dataclass(frozen=True)
class Roof:
    """What the machine does at best: FLOP/s of a large product, byte/s of a large copy."""

    flops: float
    bandwidth: float

    def limit(self, shape: Shape, itemsize: int) -> float:
        """Seconds below which a symmetric accumulation cannot go."""
        executed = shape.tokens * shape.channels * (shape.channels + 1)
        moved = shape.tokens * shape.channels * itemsize + 4 * shape.channels * (shape.channels + 1)
        return max(executed / self.flops, moved / self.bandwidth)


@dataclass(frozen=True)
class Row:
    """One provider on one case; times in seconds."""

    provider: str
    dtype: str
    shape: Shape
    p20: float
    p50: float
    p80: float
    limit: float
    error: float


def shapes_of(model: str, device: str) -> list[Shape]:
    """The cases of a model."""
    return [Shape(default_tokens(channels, device), channels) for channels in MODELS[model]]


def default_tokens(channels: int, device: str) -> int:
    """Tokens of a case that names only its channels."""
    if device == "cuda":
        return GPU_TOKENS
    return max(256, min(8192, int(CPU_FLOPS / (2 * channels**2)) // 256 * 256))


def providers(channels: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Every way to accumulate, each adding to an accumulator of its own that it returns dense."""
    packed = torch.zeros(gk.packed_numel(channels), device=device)
    dense = torch.zeros(channels, channels, device=device)
    calls: dict[str, Call] = {"grail": lambda x: gk.gram_(packed, x)}
    if dtype == torch.float32:
        calls["addmm"] = lambda x: dense.addmm_(x.T, x)
    elif device == "cuda":
        calls["addmm"] = lambda x: torch.addmm(dense, x.T, x, out_dtype=torch.float32, out=dense)
        calls["float addmm"] = lambda x: dense.addmm_(x.float().T, x.float())
        calls["mm"] = lambda x: x.T @ x
    else:
        calls["addmm"] = lambda x: _upcast_addmm(dense, x)
        calls["mm"] = lambda x: x.T @ x
    if device == "cpu" and dtype == torch.float32:
        calls |= _cpu_syrks()
    return calls


def _upcast_addmm(dense: Tensor, x: Tensor) -> Tensor:
    """What calibration libraries do with 16-bit activations: a copy in fp32, then the product."""
    copy = x.float()
    return dense.addmm_(copy.T, copy)


def _cpu_syrks() -> dict[str, Call]:
    """NumPy, which calls syrk for x^T x, and SciPy's BLAS; neither accumulates."""
    calls: dict[str, Call] = {
        "numpy syrk": lambda x: torch.from_numpy(x.numpy().T @ x.numpy()),
    }
    try:
        from scipy.linalg.blas import ssyrk
    except ImportError:
        return calls
    # x [T, H] in C order is its transpose in Fortran's: the upper triangle there is the lower here.
    calls["scipy ssyrk"] = lambda x: torch.from_numpy(ssyrk(1.0, x.numpy().T, lower=0).T)
    return calls


def errors(calls: dict[str, Call], x: Tensor) -> dict[str, float]:
    """The error ratio of each provider's first call, on a sample of channels, lower triangle.

    A library that cannot make that call here is left out.
    """
    channels = x.shape[1]
    chosen = torch.randperm(channels)[:CHECKED_CHANNELS].to(x.device)
    rows, exact = x[:, chosen].double(), x.new_zeros(())
    below = torch.arange(channels, device=x.device)[None, :] <= chosen[:, None]
    exact, magnitude = (
        torch.cat([left.T @ part.double() for part in right.split(4096, dim=1)], dim=1)
        for left, right in ((rows, x), (rows.abs(), x.abs()))
    )
    found = {}
    for name, call in calls.items():
        try:
            result = call(x)
        except (RuntimeError, TypeError) as problem:
            if name == "grail":
                raise
            print(f"{name} left out: {str(problem).splitlines()[0]}")
            continue
        dense = gk.unpack(result, channels) if result.dim() == 1 else result
        found[name] = reference.error_ratio(
            dense[chosen][below].float(), exact[below], magnitude[below]
        )
    return found


def time_in_turns(
    calls: dict[str, Call], inputs: list[Tensor], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, every provider once per round, inputs rotating."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            elapsed = _seconds(call, inputs[round_number % len(inputs)])
            if round_number:  # the first round compiles and allocates
                seconds[name].append(elapsed)
    return seconds


def _seconds(call: Call, x: Tensor) -> float:
    if not x.is_cuda:
        start = time.perf_counter()
        call(x)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(x)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure_roof(dtype: torch.dtype, device: str) -> Roof:
    """The best of a few large products and copies of this machine."""
    size = 8192 if device == "cuda" else 2048
    square = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(square)
    best = min(_seconds(lambda x: torch.mm(x, x, out=product), square) for _ in range(10))
    source = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    copied = min(_seconds(target.copy_, source) for _ in range(10))
    return Roof(2.0 * size**3 / best, 2.0 * source.numel() * source.element_size() / copied)


def measure(shape: Shape, dtype_name: str, device: str, roof: Roof, repeats: int) -> list[Row]:
    """The rows of one case.

    Raises:
        ArithmeticError: grail's result is wrong, so nothing was timed.
    """
    dtype = DTYPES[dtype_name]
    size = (shape.tokens, shape.channels)
    # A mean, as activations have one: sums of cancelling terms would hide a biased adder.
    inputs = [(torch.randn(size, device=device) + 0.5).to(dtype) for _ in range(2)]
    calls = providers(shape.channels, dtype, device)
    ratios = errors(calls, inputs[0])
    if not ratios["grail"] < reference.ERROR_LIMIT:
        raise ArithmeticError(f"{dtype_name} {size}: grail is off by {ratios['grail']:.1f} eps")
    limit = roof.limit(shape, inputs[0].element_size())
    rows = []
    working = {name: calls[name] for name in ratios}
    for name, seconds in time_in_turns(working, inputs, repeats).items():
        rows.append(Row(name, dtype_name, shape, *quantiles(seconds), limit, ratios[name]))
    return rows


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The rows as lines of text, one block a case."""
    columns = ("p20", "p50", "p80", "TF-eq", "x addmm", "% limit", "error")
    header = " ".join([f"{'provider':12}", *(f"{name:>9}" for name in columns)])
    case = None
    rows = list(rows)
    library = {(row.dtype, row.shape): row.p50 for row in rows if row.provider == "addmm"}
    for row in rows:
        if case != (row.dtype, row.shape):
            case = (row.dtype, row.shape)
            yield f"\n{row.dtype}  {row.shape.tokens} tokens x {row.shape.channels} channels, ms"
            yield header
        times = " ".join(f"{1e3 * value:9.2f}" for value in (row.p20, row.p50, row.p80))
        rival = library.get(case, float("nan"))
        yield (
            f"{row.provider:12} {times} {row.shape.flops / row.p50 / 1e12:9.3f} "
            f"{rival / row.p50:9.2f} {100 * row.limit / row.p50:9.1f} {row.error:9.2f}"
        )


def write_csv(path: Path, rows: Iterable[Row], roofs: dict[str, Roof], device: str) -> None:
    """All that was measured in long format: one line a number, its conditions beside it."""
    conditions = machine(device)
    columns = ("kernel", "provider", "metric", "unit", "dtype", "tokens", "channels")
    columns += ("p20", "p50", "p80")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *conditions])
        writer.writeheader()
        for dtype, roof in roofs.items():
            for metric, unit, value in (
                ("product", "FLOP/s", roof.flops),
                ("copy", "B/s", roof.bandwidth),
            ):
                fixed = {"kernel": "roof", "provider": "torch", "metric": metric, "unit": unit}
                writer.writerow(fixed | {"dtype": dtype, "p50": f"{value:.5g}"} | conditions)
        for row in rows:
            case = {"kernel": "gram", "provider": row.provider, "dtype": row.dtype}
            case |= asdict(row.shape)
            times = {name: f"{getattr(row, name):.6g}" for name in ("p20", "p50", "p80")}
            writer.writerow(case | {"metric": "time", "unit": "s"} | times | conditions)
            for metric, unit, value in (("limit", "s", row.limit), ("error", "eps", row.error)):
                number = {"metric": metric, "unit": unit, "p50": f"{value:.6g}"}
                writer.writerow(case | number | conditions)


def machine(device: str) -> dict[str, str]:
    """The conditions that belong beside every number."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",  # above `threads`, others were using the processor
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def plot(path: Path, rows: Iterable[Row], roofs: dict[str, Roof]) -> None:
    """TF-eq by channels, one panel a dtype, with the rate of the library's best product."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(rows)
    figure, panels = pyplot.subplots(1, len(roofs), figsize=(6 * len(roofs), 4), squeeze=False)
    for panel, (dtype, roof) in zip(panels[0], roofs.items(), strict=True):
        ours = [row for row in rows if row.dtype == dtype]
        for name in dict.fromkeys(row.provider for row in ours):
            points = sorted(
                (r.shape.channels, r.shape.flops / r.p50 / 1e12) for r in ours if r.provider == name
            )
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.axhline(
            roof.flops / 1e12, color="grey", linestyle=":", label="library's best product"
        )
        panel.set(xscale="log", xlabel="channels H", ylabel="TF-eq = 2TH²/time", title=dtype)
        channels = sorted({row.shape.channels for row in ours})
        panel.set_xticks(channels, [str(channel) for channel in channels])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=[*MODELS], help="may be repeated")
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="T,H",
        help="a case of its own, may be repeated",
    )
    parser.add_argument(
        "--dtype", action="append", choices=[*DTYPES], help="default: fp32 and bf16"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the GPU if there is one"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--csv", type=Path, help="write every number here, in long format")
    parser.add_argument("--plot", type=Path, help="draw TF-eq by channels here (needs matplotlib)")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ["fp32", "bf16"]
    if not options.shape and not options.model:
        options.model = list(DEFAULT_MODELS)
    if options.repeats < 2:
        parser.error("--repeats: percentiles need at least 2 rounds")
    return options


def _shape(text: str) -> Shape:
    try:
        tokens, channels = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not T,H such as 8192,4096") from None
    if tokens < 1 or channels < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: tokens and channels must be positive")
    return Shape(tokens, channels)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit code is 1 if a result was wrong."""
    options = parse(arguments)
    shapes = list(options.shape or [])
    for model in options.model or []:
        shapes += shapes_of(model, options.device)
    print(", ".join(f"{name} {value}" for name, value in machine(options.device).items() if value))
    rows: list[Row] = []
    failed = False
    roofs = {dtype: measure_roof(DTYPES[dtype], options.device) for dtype in options.dtype}
    for dtype, roof in roofs.items():
        print(f"roof {dtype}: {roof.flops / 1e12:.3f} TFLOP/s, {roof.bandwidth / 1e9:.0f} GB/s")
        for shape in dict.fromkeys(shapes):
            try:
                found = measure(shape, dtype, options.device, roof, options.repeats)
            except ArithmeticError as wrong:
                print(wrong)
                failed = True
                continue
            rows += found
            print("\n".join(table(found)), flush=True)
    if options.csv:
        write_csv(options.csv, rows, roofs, options.device)
    if options.plot:
        plot(options.plot, rows, roofs)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
