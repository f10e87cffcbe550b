"""Speed and accuracy of accumulated Gram matrices: grail_kernels against libraries.

    python bench/gram.py                        every model, on the GPU if there is one
    python bench/gram.py --model llama-3-8b     the sites of one model
    python bench/gram.py --shape 8192,4096      8192 tokens of 4096 channels; may be repeated
    python bench/gram.py --heads 8192,32,128    8192 tokens of 32 heads of 128 channels
    python bench/gram.py --experts 4096,8,768   4096 tokens among 8 experts of 768 channels
    python bench/gram.py --calls 4096,256,1536  4096 tokens by 256 a call, then the dense matrix
    python bench/gram.py --predict h100         the model of time alone; needs no GPU

% limit: of the machine's best product and copy. error: in eps = 2^-23, wrong from 16 on; then there
are no times, and the exit code is 1. All columns and providers: docs/benches.md.
"""

import argparse
import ctypes
import itertools
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import grail_kernels as gk
from bench.kernels import cases
from bench.tools import model
from bench.tools.commandline import DTYPES, CommandLine, sizes
from bench.tools.measuring import (
    Call,
    percentiles,
    quantiles,
    seconds_of,
    settle,
    time_in_turns,
    write_rows,
)
from bench.tools.measuring import Row as Record
from bench.tools.tables import aligned
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
GPU_TOKENS = 65_536
# FLOPs of a full product that one call may take on a CPU: a second or two on a few cores.
CPU_FLOPS = 1.5e11
CHECKED_CHANNELS = 64
CHECKED_MATRICES = 3
LIBRARY = ("addmm", "loop")
# Tokens together, tokens of a call and channels: what a calibration library does with small calls.
CALLS = [
    (tokens, call, channels)
    for channels in (576, 1536, 4096)
    for tokens, call in ((1024, 64), (4096, 256), (4096, 1024), (4096, 2048), (8192, 8192))
]
COLUMNS = dict.fromkeys(
    ("kernel", "provider", "metric", "unit", "dtype", "tokens", "channels", "matrices", "call"), ""
) | dict.fromkeys(("p20", "p50", "p80"), "")
# By kind of case: its kernel, and its matrices in words.
KINDS = {
    "gram": "",
    "gram_batched": " of each of {} heads",
    "gram_ragged": ", {} experts",
    "gram_readout": " by {} a call, with the read-out",
}


@dataclass(frozen=True)
class Shape:
    """A case: `tokens` activations of `channels` channels; for each head, or among experts.

    With experts the tokens are those of all together. With `call` they come by so many a call, and
    the dense matrix is read out at the end.
    """

    tokens: int
    channels: int
    matrices: int = 1
    ragged: bool = False
    call: int = 0

    @property
    def kernel(self) -> str:
        """The function of `grail_kernels` that is measured."""
        if self.call:
            return "gram_readout"
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
        many = KINDS[self.kernel].format(self.call or self.matrices)
        return f"{self.tokens} tokens x {self.channels} channels{many}"


@dataclass(frozen=True)
class Roof:
    """Best rates of the machine: FLOP/s of a large product, byte/s of a large copy."""

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
    seconds: list[float]
    limit: float
    error: float
    prediction: model.Prediction | None

    @property
    def median(self) -> float:
        """Seconds of the median call."""
        return quantiles(self.seconds)[1]


def shapes_of(model: str, device: str) -> list[Shape]:
    """The cases of a model."""
    found = [Shape(default_tokens(h, device), h) for h in MODELS.get(model, ())]
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
    size: tuple[int, ...] = (shape.tokens, shape.channels)
    if shape.kernel == "gram_batched":
        size = (shape.tokens, shape.matrices, shape.channels)
    # A mean, as activations have one: sums of cancelling terms would hide a biased adder.
    x = (torch.randn(size, device=device) + 0.5).to(dtype)
    return x.transpose(0, 1) if x.dim() == 3 else x


def expert_bounds(shape: Shape) -> list[int]:
    """Bounds of each expert's tokens: as uneven as routing is; the last expert has none."""
    shares = torch.linspace(1, 0, shape.matrices).square()
    ends = (shares.cumsum(0) / shares.sum() * shape.tokens).round().long()
    return [0, *ends.tolist()]


def matrices_of(x: Tensor, shape: Shape) -> list[Tensor]:
    """The activations [T, H] of every Gram matrix of a case."""
    if shape.kernel in ("gram", "gram_readout"):
        return [x]
    if shape.kernel == "gram_batched":
        return list(x.unbind(0))
    return [x[low:high] for low, high in pairwise(expert_bounds(shape))]


def providers(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Every way to accumulate, each adding to an accumulator of its own that it returns."""
    if shape.call:
        return _call_providers(shape, device)
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
            calls |= published()
    elif device == "cpu":
        calls |= _cpu_syrks()
    return calls


def _call_providers(shape: Shape, device: str) -> dict[str, Call]:
    """Calls into an accumulator and its read-out into a matrix, and calls into a dense matrix."""
    packed = torch.zeros(gk.packed_numel(shape.channels), device=device)
    matrix, dense = torch.zeros(2, shape.channels, shape.channels, device=device)

    def grail(x: Tensor) -> Tensor:
        for part in x.split(shape.call):
            gk.gram_(packed, part)
        return gk.unpack(packed, shape.channels, out=matrix)

    def addmm(x: Tensor) -> Tensor:
        for part in x.split(shape.call):
            _add_product(dense, part)
        return dense

    return {"grail": grail, "addmm": addmm}


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
    """Adds x^T x in fp32: straight from 16 bits on a GPU, which a CPU's library cannot."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.addmm(dense, x.T, x, out_dtype=torch.float32, out=dense)
    x = x.float()
    return dense.addmm_(x.T, x)


def _cpu_syrks() -> dict[str, Call]:
    """NumPy, which calls syrk for x^T x, and SciPy's BLAS; neither accumulates."""
    calls: dict[str, Call] = {"numpy syrk": lambda x: torch.from_numpy(x.numpy().T @ x.numpy())}
    try:
        from scipy.linalg.blas import ssyrk
    except ImportError:
        return calls
    # x [T, H] in C order is its transpose in Fortran's: the upper triangle there is the lower here.
    calls["scipy ssyrk"] = lambda x: torch.from_numpy(ssyrk(1.0, x.numpy().T, lower=0).T)
    return calls


def published() -> dict[str, Call]:
    """Published kernels, where they are installed; both write X X^T, none adds to it.

    Sources: github.com/nil0x9/flash-muon, which reads rows; github.com/Dao-AILab/quack.
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
                check.ratio(result[index] if shape.matrices > 1 else result)
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


def openblas_kernels() -> str:
    """The processor whose kernels NumPy's OpenBLAS has chosen; OPENBLAS_CORETYPE sets another."""
    core = getattr(np, "_core", None) or np.core
    library = ctypes.CDLL(core._multiarray_umath.__file__)
    for prefix, suffix in itertools.product(("scipy_", ""), ("64_", "")):
        call = getattr(library, f"{prefix}openblas_get_corename{suffix}", None)
        if call is not None:
            call.restype = ctypes.c_char_p
            return str(call().decode())
    return "none"


def operand_of(dtype: str, device: str) -> str:
    """The dtype that grail multiplies: a CPU upcasts 16 bits, a GPU splits fp32 into bf16."""
    if device == "cpu":
        return "fp32"
    return "bf16" if dtype == "fp32" else dtype


def modelled(dtype: str, device: str, roofs: dict[str, Roof]) -> model.Cpu | model.Gpu:
    """This machine in the model of time, at the measured rate of its operands."""
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
    shape: Shape, dtype: str, roofs: dict[str, Roof], options: argparse.Namespace
) -> list[Row]:
    """The rows of one case.

    Raises:
        ArithmeticError: grail's result is wrong, so nothing was timed.
    """
    of, device = DTYPES[dtype], options.device
    inputs = [activations(shape, of, device) for _ in range(2)]
    calls = providers(shape, of, device)
    found = errors(calls, inputs[0], shape)
    ratio, _ = found["grail"]
    if not ratio < reference.ERROR_LIMIT:
        raise ArithmeticError(f"{dtype} {shape.describe()}: grail is off by {ratio:.1f} eps")
    limit = roofs[dtype].limit(shape, of.itemsize)
    machine = modelled(dtype, device, roofs)
    prediction = machine.predict(shape.tokens_of_each, shape.channels, of, shape.ragged)
    working = {name: calls[name] for name in found}
    return [
        Row(
            *(name, dtype, shape, found[name][1], seconds, limit, found[name][0]),
            prediction if name == "grail" else None,
        )
        for name, seconds in time_in_turns(working, inputs, options.repeats).items()
    ]


def table(rows: list[Row]) -> str:
    """The rows of one case as text."""
    columns = ("first", "p20", "p50", "p80", "TF-eq", "x library", "% limit", "error")
    library = next((row.median for row in rows if row.provider in LIBRARY), float("nan"))
    lines = []
    for row in rows:
        times = [f"{1e3 * value:.2f}" for value in (row.first, *quantiles(row.seconds))]
        rates = [f"{row.shape.flops / row.median / 1e12:.3f}", f"{library / row.median:.2f}"]
        rates += [f"{100 * row.limit / row.median:.1f}", f"{row.error:.2f}"]
        predicted = ["", ""]
        if ours := row.prediction:
            waves = "-" if ours.waves is None else f"{ours.waves:.2f}"
            predicted = [f"{1e3 * ours.seconds:.2f}", waves]
        lines.append([row.provider, *times, *rates, *predicted])
    title = f"\n{rows[0].dtype}  {rows[0].shape.describe()}, ms\n"
    return title + aligned(("provider", *columns, "model", "waves"), lines)


def records(device: str, roofs: dict[str, Roof], rows: Iterable[Row]) -> list[Record]:
    """All that was measured in long format: one record a number."""
    found = []
    for dtype, roof in roofs.items():
        case = COLUMNS | {"kernel": "roof", "provider": "torch", "dtype": dtype}
        found += numbers(case, [("product", "FLOP/s", roof.flops), ("copy", "B/s", roof.bandwidth)])
    for row in rows:
        case = case_of(row.shape, row.provider, row.dtype)
        found.append(case | {"metric": "time", "unit": "s"} | percentiles(row.seconds))
        found += numbers(case, [("first call", "s", row.first), ("limit", "s", row.limit)])
        found += numbers(case, [("error", "eps", row.error)])
        found += numbers(case, row.prediction.numbers() if row.prediction else ())
    library = {"openblas": openblas_kernels()} if device == "cpu" else {}
    return [record | library for record in found]


def case_of(shape: Shape, provider: str, dtype: str) -> Record:
    """The columns that identify a case."""
    lengths = {name: str(value) for name, value in asdict(shape).items() if name != "ragged"}
    lengths["call"] = lengths["call"] if shape.call else ""
    return COLUMNS | {"kernel": shape.kernel, "provider": provider, "dtype": dtype} | lengths


def numbers(case: Record, measured: Iterable[tuple[str, str, float]]) -> list[Record]:
    """A record of `case` for each (metric, unit, value)."""
    return [
        case | {"metric": metric, "unit": unit, "p50": f"{value:.6g}"}
        for metric, unit, value in measured
    ]


def predict(gpu: model.Gpu, shapes: Iterable[Shape], dtypes: list[str]) -> list[Record]:
    """Prints and returns the predictions of the model of time for a GPU that need not be here."""
    lines, found = [], []
    for shape in shapes:
        for dtype in dtypes:
            case = (shape.tokens_of_each, shape.channels, DTYPES[dtype])
            prediction = gpu.predict(*case, ragged=shape.ragged)
            equivalent = shape.flops / prediction.seconds / 1e12
            speed = gpu.full_product(*case) / prediction.seconds
            cells = (f"{1e3 * prediction.seconds:.3f}", f"{equivalent:.1f}", f"{speed:.2f}")
            shown = (f"{prediction.waves:.2f}", f"{100 * (prediction.busy or 0):.1f}")
            lines.append((f"{dtype}  {shape.describe()}", *cells, *shown))
            record = case_of(shape, "model", dtype) | {"device": f"{gpu.name} (predicted)"}
            found += numbers(record, prediction.numbers())
            rates = [("TF-eq", "TFLOP/s", equivalent), ("speed", "x addmm", speed)]
            found += numbers(record, rates)
    print(
        f"\n{gpu.name}, predicted, not measured: {gpu.products / 1e12:.0f} TFLOP/s of 16-bit "
        f"products, {gpu.bandwidth / 1e12:.2f} TB/s; addmm at these rates, without waves"
    )
    print(aligned(("", "ms", "TF-eq", "x addmm", "waves", "% busy"), lines))
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with defaults filled in."""
    models = sorted({*MODELS, *HEADS, *EXPERTS})
    parser = CommandLine(
        __doc__,
        *("model", "dtype", "device", "threads", "repeats", "seconds"),
        takes="about 5 minutes on 2 cores; --seconds limits it",
        results="gram{device}",
        instead={"predict": "gram_predicted"},
        model={"choices": models},
        repeats={"default": 5},
        dtype={"help": "default: fp32 and bf16"},
    )
    cases_of = {"shape": "T,H", "heads": "T,E,H", "experts": "T,E,H", "calls": "T,C,H"}
    for name, example in cases_of.items():
        case: dict[str, object] = {"type": sizes(example), "metavar": example, "default": []}
        parser.add_argument(f"--{name}", action="append", help="a case, may be repeated", **case)
    told = "measure nothing; the model of time for this GPU, for every model"
    parser.add_argument("--predict", action="append", choices=[*model.GPUS], help=told)
    options = parser.read(arguments)
    options.dtype = options.dtype or ["fp32", "bf16"]
    shapes = [Shape(*lengths) for lengths in options.shape]
    shapes += [Shape(tokens, h, heads) for tokens, heads, h in options.heads]
    shapes += [Shape(tokens, h, e, ragged=True) for tokens, e, h in options.experts]
    calls = options.calls
    if not (options.model or shapes or calls or options.predict or options.device == "cuda"):
        calls = CALLS
    called = [Shape(tokens, h, call=call) for tokens, call, h in calls]
    usual = () if options.calls else models if options.predict else DEFAULT_MODELS
    for name in options.model or (() if shapes else usual):
        shapes += shapes_of(name, "cuda" if options.predict else options.device)
    options.shapes = list(dict.fromkeys([*shapes, *called]))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, saves; the exit code is 1 if a result was wrong."""
    options = parse(arguments)
    if options.predict:
        gpus = [model.GPUS[name] for name in options.predict]
        found = [n for gpu in gpus for n in predict(gpu, options.shapes, options.dtype)]
        if options.output:
            write_rows(options.output, found)
        return 0
    cases.announce(options.device)
    if options.device == "cpu":
        print(f"OpenBLAS of NumPy: kernels for {openblas_kernels()}")
    operands = (operand_of(dtype, options.device) for dtype in options.dtype)
    roofs = {
        dtype: measure_roof(DTYPES[dtype], options.device)
        for dtype in dict.fromkeys((*options.dtype, *operands))
    }
    for dtype, roof in roofs.items():
        print(f"roof {dtype}: {roof.flops / 1e12:.3f} TFLOP/s, {roof.bandwidth / 1e9:.0f} GB/s")
    todo = [
        (f"{dtype} {shape.describe()}", partial(measure, shape, dtype, roofs, options))
        for shape in options.shapes
        for dtype in options.dtype
    ]
    return cases.run(options, todo, table, partial(records, options.device, roofs))


if __name__ == "__main__":
    raise SystemExit(main())
