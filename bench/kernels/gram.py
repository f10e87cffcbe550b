"""How fast, and how exactly, Gram matrices are accumulated: grail_kernels against libraries.

    python bench/gram.py                        every model below, on the GPU if there is one
    python bench/gram.py --model llama-3-8b     the sites of one model
    python bench/gram.py --shape 8192,4096      8192 tokens of 4096 channels; may be repeated
    python bench/gram.py --heads 8192,32,128    8192 tokens of 32 heads of 128 channels
    python bench/gram.py --experts 4096,8,768   4096 tokens among 8 experts of 768 channels
    python bench/gram.py --dtype bf16 --csv out.csv --plot out.svg
    python bench/gram.py --predict h100         what the model of time says; needs no GPU

How to read the table
  first          milliseconds of the very first call, in which kernels compile and libraries load
  p20, p50, p80  milliseconds of one call; all providers take turns, so that a slow moment of the
                 machine hits each alike
  TF-eq          2*T*H^2 / p50: the FLOPs of a full product, whether they were executed or not
  x library      how many times faster than the library's own accumulation, p50 against p50: addmm,
                 for heads and experts a loop of it
  % limit        time of the limit / p50. The limit is the larger of T*H*(H + 1) FLOPs at the rate
                 of the library's best product, and one read of x plus one read and write of half of
                 G at the rate of the best copy; both measured in this run
  model          milliseconds that grail's launch should take at those rates: the FLOPs and bytes of
                 its tiles, in whole waves of programs; see bench/tools/model.py
  waves          programs over the places for them on the GPU; a last wave of few is time lost
  error          largest error in units of eps = 2^-23 of the summed magnitudes, against fp64, on a
                 sample of channels; a correct fp32 accumulation stays below 16

Providers
  grail          gram_, gram_batched_ for heads, gram_ragged_ for experts
  addmm, loop    torch.addmm into fp32, or one for each head or expert
  float addmm    a copy in fp32, then the product: today's calibration libraries
  mm             the product in the dtype of the activations, not accumulated
  bmm            torch.bmm over all heads, or over experts padded to the longest
  numpy syrk, scipy ssyrk, flash-muon, quack    where installed; none of them accumulates

Correctness comes first: where grail's error is 16 or more, that shape gets no times and the exit
code is 1. A provider that rounds (mm in bf16) keeps its row, and its error stands beside it.
On a CPU the tokens are fewer. Inputs are random and rotate, so that none of them stays in a cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import grail_kernels as gk
from bench.report import figures
from bench.tools import model
from bench.tools.measuring import (
    Call,
    command_line,
    machine,
    quantiles,
    seconds_of,
    settle,
    time_in_turns,
    write_rows,
)
from grail_kernels import reference, tuning

# Channels of the sites whose Gram matrices a compression needs: attention heads together, MLP.
MODELS = {
    "smollm2-135m": (576, 1536),
    "qwen3-0.6b": (2048, 3072),
    "llama-2-7b": (4096, 11008),
    "llama-3-8b": (4096, 14336),
    "qwen2.5-7b": (3584, 18944),
    "vit-b-16": (768, 3072),
}
# Heads and their channels, for a Gram matrix each.
HEADS = {"smollm2-135m": (9, 64), "llama-2-7b": (32, 128), "llama-3-8b": (32, 128)}
# Experts and the channels inside each.
EXPERTS = {"qwen3-30b-a3b": (128, 768)}
DEFAULT_MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-2-7b", "qwen3-30b-a3b")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPU_TOKENS = 65_536
# FLOPs of a full product that one call may take on a CPU: a second or two on a few cores.
CPU_FLOPS = 1.5e11
CHECKED_CHANNELS = 64
CHECKED_MATRICES = 3
LIBRARY = ("addmm", "loop")
COLUMNS = dict.fromkeys(
    ("kernel", "provider", "metric", "unit", "dtype", "tokens", "channels", "matrices"), ""
) | dict.fromkeys(("p20", "p50", "p80"), "")


@dataclass(frozen=True)
class Shape:
    """One case: `tokens` activations of `channels` channels; for each head, or among experts.

    With experts the tokens are those of all together.
    """

    tokens: int
    channels: int
    matrices: int = 1
    ragged: bool = False

    @property
    def kernel(self) -> str:
        """The function of `grail_kernels` that is measured."""
        return "gram_ragged" if self.ragged else "gram_batched" if self.matrices > 1 else "gram"

    @property
    def products(self) -> int:
        """Tokens times the matrices that each is added to."""
        return self.tokens * (1 if self.ragged else self.matrices)

    @property
    def flops(self) -> float:
        """FLOPs of the full products."""
        return 2.0 * self.products * self.channels**2

    @property
    def tokens_of_each(self) -> list[int]:
        """The tokens of each matrix."""
        if self.ragged:
            return [high - low for low, high in pairwise(expert_bounds(self))]
        return [self.tokens] * self.matrices

    def describe(self) -> str:
        """The case in words."""
        many = {"gram": "", "gram_batched": " of each of {} heads", "gram_ragged": ", {} experts"}
        return f"{self.tokens} tokens x {self.channels} channels" + many[self.kernel].format(
            self.matrices
        )


@dataclass(frozen=True)
class Roof:
    """What the machine does at best: FLOP/s of a large product, byte/s of a large copy."""

    flops: float
    bandwidth: float

    def limit(self, shape: Shape, itemsize: int) -> float:
        """Seconds below which a symmetric accumulation cannot go."""
        executed = shape.products * shape.channels * (shape.channels + 1)
        moved = shape.products * shape.channels * itemsize
        moved += 4 * shape.matrices * shape.channels * (shape.channels + 1)
        return max(executed / self.flops, moved / self.bandwidth)


@dataclass(frozen=True)
class Row:
    """One provider on one case; times in seconds."""

    provider: str
    dtype: str
    shape: Shape
    first: float
    p20: float
    p50: float
    p80: float
    limit: float
    error: float
    prediction: model.Prediction | None


def shapes_of(model: str, device: str) -> list[Shape]:
    """The cases of a model."""
    found = [
        Shape(default_tokens(channels, device), channels) for channels in MODELS.get(model, ())
    ]
    if model in HEADS:
        heads, channels = HEADS[model]
        found.append(Shape(default_tokens(heads * channels, device), channels, heads))
    if model in EXPERTS:
        experts, channels = EXPERTS[model]
        experts = experts if device == "cuda" else experts // 8
        found.append(Shape(default_tokens(channels, device), channels, experts, ragged=True))
    return found


def default_tokens(channels: int, device: str) -> int:
    """Tokens of a case that names only its channels."""
    if device == "cuda":
        return GPU_TOKENS
    return max(256, min(8192, int(CPU_FLOPS / (2 * channels**2)) // 256 * 256))


def activations(shape: Shape, dtype: torch.dtype, device: str) -> Tensor:
    """Random activations: [tokens, channels], for heads [heads, tokens, channels] as models lie."""
    size = (shape.tokens, shape.channels)
    if shape.kernel == "gram_batched":
        size = (shape.tokens, shape.matrices, shape.channels)
    # A mean, as activations have one: sums of cancelling terms would hide a biased adder.
    x = (torch.randn(size, device=device) + 0.5).to(dtype)
    return x.transpose(0, 1) if x.dim() == 3 else x


def expert_bounds(shape: Shape) -> list[int]:
    """Where each expert's tokens begin, and the end: as uneven as routing is, the last has none."""
    shares = torch.linspace(1, 0, shape.matrices).square()
    ends = (shares.cumsum(0) / shares.sum() * shape.tokens).round().long()
    return [0, *ends.tolist()]


def matrices_of(x: Tensor, shape: Shape) -> list[Tensor]:
    """The activations [T, H] behind every Gram matrix of a case."""
    if shape.kernel == "gram":
        return [x]
    if shape.kernel == "gram_batched":
        return list(x.unbind(0))
    bounds = expert_bounds(shape)
    return [x[low:high] for low, high in pairwise(bounds)]


def providers(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Every way to accumulate, each adding to an accumulator of its own that it returns."""
    if shape.kernel != "gram":
        return _batch_providers(shape, dtype, device)
    packed = torch.zeros(gk.packed_numel(shape.channels), device=device)
    dense, upcast = torch.zeros(2, shape.channels, shape.channels, device=device)
    calls: dict[str, Call] = {
        "grail": lambda x: gk.gram_(packed, x),
        "addmm": lambda x: _add_product(dense, x),
    }
    if dtype != torch.float32:
        calls["mm"] = lambda x: x.T @ x
        if device == "cuda":
            calls["float addmm"] = lambda x: _add_product(upcast, x.float())
            calls |= _published()
    elif device == "cpu":
        calls |= _cpu_syrks()
    return calls


def _batch_providers(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Call]:
    packed = torch.zeros(shape.matrices, gk.packed_numel(shape.channels), device=device)
    size = (shape.matrices, shape.channels, shape.channels)
    looped, batched = torch.zeros(2, *size, device=device)
    offsets = torch.tensor(expert_bounds(shape))

    def grail(x: Tensor) -> Tensor:
        return gk.gram_ragged_(packed, x, offsets) if shape.ragged else gk.gram_batched_(packed, x)

    def loop(x: Tensor) -> Tensor:
        for target, part in zip(looped, matrices_of(x, shape), strict=True):
            _add_product(target, part)
        return looped

    def bmm(x: Tensor) -> Tensor:
        if shape.ragged:
            parts = matrices_of(x, shape)
            x = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        if device == "cuda" and dtype != torch.float32:
            return batched.add_(torch.bmm(x.mT, x, out_dtype=torch.float32))
        x = x.float()
        return batched.baddbmm_(x.mT, x)

    return {"grail": grail, "loop": loop, "bmm": bmm}


def _add_product(dense: Tensor, x: Tensor) -> Tensor:
    """Add x^T x in fp32: straight from 16 bits on a GPU, which a CPU's library cannot."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.addmm(dense, x.T, x, out_dtype=torch.float32, out=dense)
    x = x.float()
    return dense.addmm_(x.T, x)


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


def _published() -> dict[str, Call]:
    """Kernels that others published, where they are installed; both write X X^T, none adds to it.

    Sources: github.com/nil0x9/flash-muon, which wants rows; github.com/Dao-AILab/quack.
    """
    calls: dict[str, Call] = {}
    try:
        from flash_muon import matmul_transpose

        calls["flash-muon"] = lambda x: matmul_transpose(x.T.contiguous())
    except ImportError:
        pass
    try:
        from quack.gemm_interface import gemm_symmetric

        calls["quack"] = lambda x: gemm_symmetric(x.T, x, out_dtype=torch.float32)
    except ImportError:
        pass
    return calls


def errors(calls: dict[str, Call], x: Tensor, shape: Shape) -> dict[str, tuple[float, float]]:
    """The error ratio of each provider's first call, and the seconds that this call took.

    On a sample of channels of a few of the matrices, lower triangle. A library that cannot make
    that call here is left out.
    """
    parts = matrices_of(x, shape)
    chosen = range(0, len(parts), max(1, (len(parts) - 1) // (CHECKED_MATRICES - 1)))
    checks = {index: _Check(parts[index]) for index in chosen}
    found = {}
    for name, call in calls.items():
        try:
            settle(x.device.type)
            start = time.perf_counter()
            result = call(x)
            settle(x.device.type)
            first = time.perf_counter() - start
            ratio = max(
                check.ratio(result if shape.kernel == "gram" else result[index])
                for index, check in checks.items()
            )
        except Exception as problem:
            if name == "grail":
                raise
            print(f"{name} left out: {str(problem).splitlines()[0]}")
            continue
        found[name] = ratio, first
    return found


class _Check:
    """A sample of the Gram matrix of `x` [T, H] in fp64, to compare with."""

    def __init__(self, x: Tensor):
        self._channels = x.shape[1]
        self._chosen = torch.randperm(self._channels)[:CHECKED_CHANNELS].to(x.device)
        columns = torch.arange(self._channels, device=x.device)
        self._below = columns[None, :] <= self._chosen[:, None]
        rows = x[:, self._chosen].double()
        self._exact, self._magnitude = (
            torch.cat([left.T @ part.double() for part in right.split(4096, dim=1)], dim=1)
            for left, right in ((rows, x), (rows.abs(), x.abs()))
        )

    def ratio(self, result: Tensor) -> float:
        """The error ratio of a packed or dense `result`."""
        dense = gk.unpack(result, self._channels) if result.dim() == 1 else result
        return reference.error_ratio(
            dense[self._chosen][self._below].float(),
            self._exact[self._below],
            self._magnitude[self._below],
        )


def measure_roof(dtype: torch.dtype, device: str) -> Roof:
    """The best of a few large products and copies of this machine."""
    size = 8192 if device == "cuda" else 2048
    square = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(square)
    best = min(seconds_of(lambda x: torch.mm(x, x, out=product), square) for _ in range(10))
    if device == "cpu" and dtype == torch.float32:
        # On AMD, NumPy's OpenBLAS is the faster library.
        multiply: Call = lambda x: torch.from_numpy(x.numpy() @ product.numpy())  # noqa: E731
        best = min(best, *(seconds_of(multiply, square) for _ in range(10)))
    source = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    copied = min(seconds_of(target.copy_, source) for _ in range(10))
    return Roof(2.0 * size**3 / best, 2.0 * source.numel() * source.element_size() / copied)


def operand_of(dtype: str, device: str) -> str:
    """What grail multiplies: a CPU upcasts 16 bits, a GPU takes fp32 apart into bf16."""
    if device == "cpu":
        return "fp32"
    return "bf16" if dtype == "fp32" else dtype


def modelled(dtype: str, device: str, roofs: dict[str, Roof]) -> model.Cpu | model.Gpu:
    """This machine as the model of time sees it, at the measured rate of what it multiplies."""
    roof = roofs[operand_of(dtype, device)]
    if device == "cpu":
        return model.Cpu(roof.flops, roof.bandwidth)
    return model.Gpu(
        torch.cuda.get_device_name(),
        tuning.architecture_of(torch.device(device)),
        torch.cuda.get_device_properties(device).multi_processor_count,
        roof.flops,
        roof.bandwidth,
    )


def measure(
    shape: Shape,
    dtype_name: str,
    device: str,
    roof: Roof,
    machine_model: model.Cpu | model.Gpu,
    repeats: int,
) -> list[Row]:
    """The rows of one case.

    Raises:
        ArithmeticError: grail's result is wrong, so nothing was timed.
    """
    dtype = DTYPES[dtype_name]
    inputs = [activations(shape, dtype, device) for _ in range(2)]
    calls = providers(shape, dtype, device)
    found = errors(calls, inputs[0], shape)
    ratio, _ = found["grail"]
    if not ratio < reference.ERROR_LIMIT:
        raise ArithmeticError(f"{dtype_name} {shape.describe()}: grail is off by {ratio:.1f} eps")
    limit = roof.limit(shape, dtype.itemsize)
    prediction = machine_model.predict(shape.tokens_of_each, shape.channels, dtype, shape.ragged)
    rows = []
    working = {name: calls[name] for name in found}
    for name, seconds in time_in_turns(working, inputs, repeats).items():
        ratio, first = found[name]
        times = quantiles(seconds)
        ours = prediction if name == "grail" else None
        rows.append(Row(name, dtype_name, shape, first, *times, limit, ratio, ours))
    return rows


def table(rows: list[Row]) -> Iterator[str]:
    """The rows of one case as lines of text."""
    columns = ("first", "p20", "p50", "p80", "TF-eq", "x library", "% limit", "error")
    yield f"\n{rows[0].dtype}  {rows[0].shape.describe()}, ms"
    yield " ".join([f"{'provider':12}", *(f"{name:>9}" for name in (*columns, "model", "waves"))])
    library = next((row.p50 for row in rows if row.provider in LIBRARY), float("nan"))
    for row in rows:
        seconds = (row.first, row.p20, row.p50, row.p80)
        times = " ".join(f"{1e3 * value:9.2f}" for value in seconds)
        yield (
            f"{row.provider:12} {times} {row.shape.flops / row.p50 / 1e12:9.3f} "
            f"{library / row.p50:9.2f} {100 * row.limit / row.p50:9.1f} {row.error:9.2f}"
            f"{_model_columns(row.prediction)}"
        )


def _model_columns(prediction: model.Prediction | None) -> str:
    if prediction is None:
        return ""
    waves = "-" if prediction.waves is None else f"{prediction.waves:.2f}"
    return f" {1e3 * prediction.seconds:9.2f} {waves:>9}"


def records(
    rows: Iterable[Row], roofs: dict[str, Roof], conditions: dict[str, str]
) -> list[dict[str, str]]:
    """All that was measured in long format: one record a number, its conditions beside it."""
    found = []
    for dtype, roof in roofs.items():
        case = COLUMNS | {"kernel": "roof", "provider": "torch", "dtype": dtype} | conditions
        found += numbers(case, [("product", "FLOP/s", roof.flops), ("copy", "B/s", roof.bandwidth)])
    for row in rows:
        case = case_of(row.shape, row.provider, row.dtype) | conditions
        times = {name: f"{getattr(row, name):.6g}" for name in ("p20", "p50", "p80")}
        found.append(case | {"metric": "time", "unit": "s"} | times)
        found += numbers(case, [("first call", "s", row.first), ("limit", "s", row.limit)])
        found += numbers(case, [("error", "eps", row.error)])
        found += numbers(case, row.prediction.numbers() if row.prediction else ())
    return found


def case_of(shape: Shape, provider: str, dtype: str) -> dict[str, str]:
    """The columns that say what a number is of."""
    sizes = {name: str(value) for name, value in asdict(shape).items() if name != "ragged"}
    return COLUMNS | {"kernel": shape.kernel, "provider": provider, "dtype": dtype} | sizes


def numbers(
    case: dict[str, str], measured: Iterable[tuple[str, str, float]]
) -> list[dict[str, str]]:
    """A record of `case` for each (metric, unit, value)."""
    return [
        case | {"metric": metric, "unit": unit, "p50": f"{value:.6g}"}
        for metric, unit, value in measured
    ]


def predict(gpu: model.Gpu, shapes: Iterable[Shape], dtypes: list[str]) -> list[dict[str, str]]:
    """Print and return what the model of time says of a GPU that need not be here."""
    print(
        f"\n{gpu.name}, predicted, not measured: {gpu.products / 1e12:.0f} TFLOP/s of 16-bit "
        f"products, {gpu.bandwidth / 1e12:.2f} TB/s; addmm at these rates, without waves"
    )
    columns = ("ms", "TF-eq", "x addmm", "waves", "% busy")
    print(" ".join([f"{'':54}", *(f"{name:>9}" for name in columns)]))
    found = []
    for shape in shapes:
        for dtype in dtypes:
            sizes = (shape.tokens_of_each, shape.channels, DTYPES[dtype])
            prediction = gpu.predict(*sizes, ragged=shape.ragged)
            equivalent = shape.flops / prediction.seconds / 1e12
            speed = gpu.full_product(*sizes) / prediction.seconds
            print(
                f"{dtype}  {shape.describe():48} {1e3 * prediction.seconds:9.3f} "
                f"{equivalent:9.1f} {speed:9.2f} {prediction.waves:9.2f} "
                f"{100 * prediction.busy:9.1f}"
            )
            case = case_of(shape, "model", dtype) | {"device": f"{gpu.name} (predicted)"}
            found += numbers(case, prediction.numbers())
            found += numbers(case, [("TF-eq", "TFLOP/s", equivalent), ("speed", "x addmm", speed)])
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = command_line(
        __doc__,
        writes="a table to the screen; files with --csv and --plot",
        takes="many minutes on 2 cores; --seconds limits it",
    )
    models = sorted({*MODELS, *HEADS, *EXPERTS})
    parser.add_argument(
        "--predict",
        action="append",
        choices=[*model.GPUS],
        help="measure nothing; what the model of time says of this GPU, for every model",
    )
    parser.add_argument("--model", action="append", choices=models, help="may be repeated")
    for name, example in (("shape", "T,H"), ("heads", "T,E,H"), ("experts", "T,E,H")):
        parser.add_argument(
            f"--{name}",
            action="append",
            type=_sizes(example),
            default=[],
            metavar=example,
            help="a case of its own, may be repeated",
        )
    parser.add_argument(
        "--dtype", action="append", choices=[*DTYPES], help="default: fp32 and bf16"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the GPU if there is one"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--seconds", type=float, help="no case starts later than this")
    parser.add_argument("--csv", type=Path, help="write every number here, in long format")
    parser.add_argument("--plot", type=Path, help="draw %% of the limit here (needs matplotlib)")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ["fp32", "bf16"]
    options.shapes = [Shape(*sizes) for sizes in options.shape]
    options.shapes += [Shape(tokens, h, heads) for tokens, heads, h in options.heads]
    options.shapes += [Shape(tokens, h, e, ragged=True) for tokens, e, h in options.experts]
    usual = models if options.predict else DEFAULT_MODELS
    for name in options.model or (() if options.shapes else usual):
        options.shapes += shapes_of(name, "cuda" if options.predict else options.device)
    options.shapes = list(dict.fromkeys(options.shapes))
    if options.repeats < 2:
        parser.error("--repeats: percentiles need at least 2 rounds")
    if options.predict and options.plot:
        parser.error("--plot: what is predicted has no figure")
    return options


def _sizes(example: str) -> Callable[[str], tuple[int, ...]]:
    """Reads as many positive numbers with commas between as `example` has, for argparse."""

    def read(text: str) -> tuple[int, ...]:
        numbers = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
        if len(numbers) != len(example.split(",")) or min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not {example}, each of them positive")
        return numbers

    return read


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit code is 1 if a result was wrong."""
    options = parse(arguments)
    if options.predict:
        found = [
            number
            for name in options.predict
            for number in predict(model.GPUS[name], options.shapes, options.dtype)
        ]
        if options.csv:
            write_rows(options.csv, found)
        return 0
    deadline = time.monotonic() + (options.seconds or float("inf"))
    conditions = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in conditions.items() if value))
    rows: list[Row] = []
    failed = False
    operands = (operand_of(dtype, options.device) for dtype in options.dtype)
    roofs = {
        dtype: measure_roof(DTYPES[dtype], options.device)
        for dtype in dict.fromkeys((*options.dtype, *operands))
    }
    for dtype, roof in roofs.items():
        print(f"roof {dtype}: {roof.flops / 1e12:.3f} TFLOP/s, {roof.bandwidth / 1e9:.0f} GB/s")
    machines = {dtype: modelled(dtype, options.device, roofs) for dtype in options.dtype}
    for shape in options.shapes:
        for dtype, machine_model in machines.items():
            if time.monotonic() > deadline:
                print(f"{dtype} {shape.describe()}: left out, --seconds are over")
                continue
            try:
                found = measure(
                    shape, dtype, options.device, roofs[dtype], machine_model, options.repeats
                )
            except ArithmeticError as wrong:
                print(wrong)
                failed = True
                continue
            rows += found
            print("\n".join(table(found)), flush=True)
    written = records(rows, roofs, conditions)
    if options.csv:
        write_rows(options.csv, written)
    if options.plot:
        figures.save(options.plot, figures.roof(written))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
