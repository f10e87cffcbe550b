"""The two calls of a lent GPU: all that needs one, the most valuable first.

    python bench/on_gpu.py --call 1     what decides: candidates, benches, calibrations, counters
    python bench/on_gpu.py --call 2     what proves it: tests, repeats, sanitizer, the final bench
    python bench/on_gpu.py --call 1 --dry-run     the same code on the CPU at toy sizes
    python bench/on_gpu.py --list     the steps of both calls with their seconds

Every step runs in a process of its own, which ends with its time at the latest: a step that hangs
or crashes the GPU costs only itself. What it found lies in --output before the next starts. A call
leaves at most 8 files there and writes nowhere else. The exit code is 1 if a step failed.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run without an installation

import grail_kernels as gk
from bench.kernels import accuracy, trials
from bench.kernels import gram as gram_bench
from bench.quality import calibrate
from bench.tools import tune
from bench.tools.commandline import DTYPES, CommandLine
from bench.tools.measuring import ROOT, Row, bare_seconds, machine, write_rows
from grail_kernels import reference

# Seconds that a step keeps back to write what it has, before it is stopped.
GRACE = 8.0
# Files that come back from a call.
MOST_FILES = 8
# The end of a step's output that is printed, in characters; the log has all of it.
_SHOWN = 1500
# A whole model is calibrated if four of its blocks take no longer.
_QUICK_SECONDS = 8.0
_BLOCKS, _ALL_BLOCKS = 4, 32
# Kernels of which something changed; the interpreter and the CPU run the others.
_GPU_TESTS = ("test_gram_wide.py", "test_gram_tma.py", "test_gram.py", "test_gram_batched.py")


@dataclass(frozen=True)
class Run:
    """The conditions of one step."""

    device: str
    dry: bool
    output: Path
    deadline: float

    def size(self, real: int, toy: int) -> int:
        """`real`, or `toy` in a dry run."""
        return toy if self.dry else real

    def left(self) -> float:
        """Seconds until the deadline, below 0 after it."""
        return self.deadline - time.monotonic()

    def path(self, name: str) -> str:
        """The file of that name in the output."""
        return str(self.output / name)

    def write(self, name: str, rows: list[Row]) -> None:
        """Rows as CSV, each with the conditions of the run."""
        conditions = machine(self.device)
        write_rows(self.output / name, [row | conditions for row in rows])
        print(f"{name}: {len(rows)} rows", flush=True)


@dataclass(frozen=True)
class Step:
    """The work of a step, the seconds that it may take, and the file that it writes."""

    work: Callable[[Run], None]
    seconds: float
    file: str


def run_trials(run: Run) -> None:
    """The candidates of the Gram kernel: checked, then timed beside the library's product."""
    limit = ["--device", run.device, "--seconds", str(run.left())]
    if trials.main([*limit, "--output", run.path("wide.csv")]):
        raise ArithmeticError("the shipped kernel failed its check, see above")


def run_gram(run: Run, file: str = "gram.csv") -> None:
    """The bench of Grams in bf16, over 8192, 16,384 and 65,536 tokens."""
    tokens, channels = (8192, 16_384, 65_536), (4096, 11_008, 2048, 14_336, 1536, 576)
    shapes = [(64, 40)] if run.dry else itertools.product(tokens, channels)
    cases = [f"--shape={count},{width}" for count, width in shapes]
    limit = ["--device", run.device, "--seconds", str(run.left()), "--repeats", "5"]
    if gram_bench.main([*limit, "--dtype", "bf16", *cases, "--output", run.path(file)]):
        raise ArithmeticError("a result was wrong, see the tables above")


def _calibrated(run: Run, design: str, file: str, blocks: int) -> list[str]:
    """The arguments of a calibration of so many blocks."""
    sizes = ["--blocks", str(run.size(blocks, 1))]
    if run.dry:
        sizes += ["--tokens", "64", "--sequence-length", "32"]
    return ["--device", run.device, "--designs", design, *sizes, "--output", run.path(file)]


def run_paper(run: Run) -> None:
    """The paper's recipe on four blocks of a 7B model, by phase, over bare forward passes."""
    arguments = _calibrated(run, "paper", "calibrate_paper.csv", _BLOCKS)
    if calibrate.main([*arguments, "--repeats", "2"]):
        raise ArithmeticError("a compensated site was worse than a pruned one, see above")


def run_default(run: Run) -> None:
    """The defaults on four blocks; then once on all 32, if four took less than 8 s."""
    file = "calibrate_default.csv"
    arguments = _calibrated(run, "default", file, _BLOCKS)
    if calibrate.main([*arguments, "--repeats", "2"]):
        raise ArithmeticError("a compensated site was worse than a pruned one, see above")
    with Path(run.path(file)).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    # Of the quicker round: the other one compiled.
    seconds = next(float(row["p20"]) for row in rows if row["metric"] == "total")
    expected = seconds * _ALL_BLOCKS / _BLOCKS
    if seconds >= _QUICK_SECONDS or expected > run.left():
        print(f"32 blocks: left out, {expected:.0f} s expected, {run.left():.0f} s left")
        return
    run.write(file, [*rows, *_whole_model(run, file)])


def _whole_model(run: Run, file: str) -> list[Row]:
    """A row for each phase of one calibration of the whole model with the defaults."""
    options = calibrate.parse(_calibrated(run, "default", file, _ALL_BLOCKS))
    model, tokenizer = calibrate.build(options)
    batches = calibrate.batches_of(tokenizer, options)
    bare = bare_seconds(model, batches, run.device)
    found = calibrate.run_round(model, batches, calibrate.DESIGNS["default"], options)
    numbers = [("", calibrate.BARE, bare), *(("default", *item) for item in found.seconds.items())]
    case = {"kernel": "calibrate", "unit": "s", "model": options.model, "sites": "mlp"}
    case |= {"blocks": str(model.config.num_hidden_layers), "keep": str(options.keep)}
    case |= {"tokens": str(sum(batch.numel() for batch in batches))}
    return [
        case | {"design": design, "metric": metric, "p50": f"{seconds:.6g}"}
        for design, metric, seconds in numbers
    ]


# Each kernel once on one shape, for counters.
_COUNTED = """
import sys, torch, grail_kernels as gk
from bench.kernels import trials
device, tokens, channels = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
x = trials.activations(tokens, channels, device)
out = torch.zeros(gk.packed_numel(channels), device=device)
chosen = ("shipped", "wide group=4 slots=8", "one chain group=4", "copies only group=4")
for name, candidate in trials.candidates(device).items():
    if name in chosen:
        candidate.add(out, x)
if device == "cuda":
    torch.cuda.synchronize()
"""


def run_counters(run: Run) -> None:
    """Runs the shipped kernel and the candidates under Nsight Compute's counters."""
    tool = shutil.which("ncu")
    if not run.dry and not tool:
        run.write("ncu.csv", [{"check": "ncu", "result": "skipped: not installed here"}])
        return
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis")
    watched = [] if run.dry or not tool else [tool, "--clock-control", "none", "--csv"]
    if watched:
        watched += ["--kernel-name", "regex:gram|chain", "--log-file", run.path("ncu.csv")]
        for section in (*sections, "WarpStateStats", "LaunchStats"):
            watched += ["--section", section]
    shape = [str(run.size(8192, 64)), str(run.size(11_008, 40))]
    _run_apart([*watched, sys.executable, "-c", _COUNTED, run.device, *shape], run)
    if not watched:
        run.write("ncu.csv", [{"check": "ncu", "result": "dry"}])


def _run_apart(command: list[str], run: Run) -> str:
    """The output of a program that knows this checkout.

    Raises:
        RuntimeError: it failed; the end of its output.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=run.left()
    )
    if finished.returncode:
        raise RuntimeError(finished.stdout[-3000:] + finished.stderr[-1000:])
    return finished.stdout


def run_tests(run: Run) -> None:
    """The tests of the Gram kernels, on the GPU."""
    selected = "(triton and not interpreter and not bench) or gpu"
    files = ["test_tiles.py"] if run.dry else _GPU_TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(Path("tests/kernels") / file) for file in files]
    if not run.dry:
        command += ["-k", selected]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(max(1, (os.cpu_count() or 1) // 2))]
    summary = _run_apart(command, run).strip().splitlines()[-1:]
    run.write("tests.csv", [{"check": "tests", "result": " ".join(summary)}])


def activations(tokens: int, channels: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random activations with a mean, the same for the same arguments."""
    return trials.activations(tokens, channels, device, tokens + channels).to(dtype)


def packed(add: Callable[[Tensor], Tensor], x: Tensor, *matrices: int) -> Tensor:
    """The packed Grams that `add` makes of zeros, zero where they are scratch."""
    channels = x.shape[-1]
    out = torch.zeros(*matrices, gk.packed_numel(channels), device=x.device)
    return gk.pack(gk.unpack(add(out), channels))


def launches(run: Run) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """A call for each kernel: by dtype and width; the candidates on wide matrices of 16 bits."""
    tokens = run.size(20_000, 300)
    for dtype, channels in (("bf16", 4096), ("fp16", 4096), ("fp32", 4096), ("bf16", 192)):
        x = activations(tokens, run.size(channels, 40), DTYPES[dtype], run.device)
        for kernel, call in _calls(x).items():
            if dtype == "bf16" or kernel == "gram {}":
                yield kernel.format(f"{dtype} {channels}"), call
        if dtype != "fp32" and channels == 4096:
            for name, candidate in trials.candidates(run.device).items():
                if candidate.limit:
                    yield f"{name} {dtype}", partial(packed, partial(_added, candidate, x), x)


def _added(candidate: trials.Candidate, x: Tensor, out: Tensor) -> Tensor:
    candidate.add(out, x)
    return out


def _calls(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    count, weights = len(x), x[:, 0].float().abs()
    heads = x[: count // 3 * 3].view(-1, 3, x.shape[1]).transpose(0, 1)  # strided as a model's are
    offsets = torch.tensor([0, count // 3, count // 3, count])  # of the experts, one has no token
    keep = torch.arange(0, x.shape[1], 2, device=x.device)  # of a consumer of 100 rows
    backend = tune.kernel_backend(x.device.type)
    return {
        "gram {}": lambda: packed(lambda out: gk.gram_(out, x), x),
        "gram {} weighted": lambda: packed(lambda out: gk.gram_(out, x, weights=weights), x),
        "batched {}": lambda: packed(lambda out: gk.gram_batched_(out, heads), x, 3),
        "ragged {}": lambda: packed(lambda out: gk.gram_ragged_(out, x, offsets), x, 3),
        "swiglu {}": lambda: packed(lambda out: gk.gram_swiglu_(out, x.flip(0), x), x),
        "absorb {}": lambda: gk.absorb(
            x[:100], packed(lambda out: gk.gram_(out, x), x), keep, backend
        ),
    }


def digests(run: Run) -> dict[str, str]:
    """A hash of the bits that each launch gives."""
    return {
        name: hashlib.sha256(call().cpu().numpy().tobytes()).hexdigest()
        for name, call in launches(run)
    }


def run_repeats(run: Run) -> None:
    """The bits of every kernel three times, once in another process."""
    first = digests(run)
    command = [sys.executable, __file__, "--digests"] + ["--dry-run"] * run.dry
    printed = _run_apart(command, run)
    elsewhere = dict(line.rsplit(" ", 1) for line in printed.splitlines())
    for again in (digests(run), elsewhere):
        changed = [name for name, digest in first.items() if again.get(name) != digest]
        if changed:
            raise ArithmeticError(f"not the same bits again: {', '.join(changed)}")
    rows = [{"check": f"repeats bitwise: {name}", "result": "yes"} for name in first]
    run.write("repeats.csv", rows)


# Two odd shapes: a corner of one tile; shared tiles, and a last strip of 16 rows.
ODD_SHAPES = """
import sys, torch, grail_kernels as gk
from bench.kernels import trials
device = sys.argv[1]
for tokens, channels in ((65, 48), (700, 272)):
    x = trials.activations(tokens, channels, device)
    out = torch.zeros(gk.packed_numel(channels), device=device)
    for name, candidate in trials.candidates(device).items():
        if name.startswith(("shipped", "wide")):
            candidate.add(out, x)
if device == "cuda":
    torch.cuda.synchronize()
"""


def run_sanitizer(run: Run) -> None:
    """compute-sanitizer over two odd shapes; a dry run does without it."""
    tool = shutil.which("compute-sanitizer")
    result = "dry" if run.dry else "no errors" if tool else "skipped: not installed here"
    if run.dry or tool:
        watched = [] if run.dry or not tool else [tool, "--error-exitcode", "9"]
        _run_apart([*watched, sys.executable, "-c", ODD_SHAPES, run.device], run)
    run.write("sanitizer.csv", [{"check": "compute-sanitizer", "result": result}])


def run_sizes(run: Run) -> None:
    """More than 2^31 elements in and out, by every kernel of 16 bits."""
    rows: list[Row] = []
    try:
        for name, candidate in trials.candidates(run.device).items():
            if candidate.limit:
                _many_activations(run, candidate)
                _large_accumulator(run, candidate)
                rows.append({"check": f"sizes beyond 32 bits: {name}", "result": "matches fp64"})
            if run.left() < 0:
                break
    finally:
        run.write("sizes.csv", rows)


def _many_activations(run: Run, candidate: trials.Candidate) -> None:
    """More than 2^31 elements in, the last tokens apart from all others."""
    tokens, channels = run.size(2**17 + 64, 200), run.size(2**14 + 16, 130)
    x = torch.zeros(tokens, channels, dtype=torch.bfloat16, device=run.device)
    x[-50:] = activations(50, channels, x.dtype, run.device)
    result = gk.unpack(packed(partial(_added, candidate, x), x), channels)
    for rows in (slice(0, 64), slice(-64, None)):
        _assert_error(result[rows], x[-50:, rows], x[-50:])


def _large_accumulator(run: Run, candidate: trials.Candidate) -> None:
    """More than 2^31 elements out; the last rows of the triangle are compared."""
    channels = run.size(65_792, 300)
    x = activations(64, channels, torch.bfloat16, run.device)
    out = torch.zeros(gk.packed_numel(channels), device=run.device)
    candidate.add(out, x)
    low = (channels - 1) // gk.STRIP_ROWS * gk.STRIP_ROWS
    last = out[-(channels - low) * channels :].view(-1, channels)[:, :low]
    _assert_error(last, x[:, low:], x[:, :low])


def _assert_error(result: Tensor, left: Tensor, right: Tensor) -> None:
    exact = left.double().T @ right.double()
    magnitude = left.double().abs().T @ right.double().abs()
    ratio = reference.error_ratio(result, exact, magnitude)
    if not ratio < reference.ERROR_LIMIT:
        raise ArithmeticError(f"off by {ratio:.1f} eps, the limit is {reference.ERROR_LIMIT:.0f}")


def run_accuracy(run: Run) -> None:
    """Error and bias against tokens, for several intervals of adding to fp32 G."""
    rows = accuracy.measure(run.device, run.size(2**22, 2**10), deadline=run.deadline)
    run.write("accuracy.csv", rows)
    biased = accuracy.biased(rows)
    if biased:
        raise ArithmeticError(f"the diagonal is biased by {accuracy.BIAS_LIMIT} or more: {biased}")


# The seconds of a call, its start and end included, and its steps in order.
CALLS: dict[int, tuple[float, dict[str, Step]]] = {
    1: (
        480.0,
        {
            "trials": Step(run_trials, 150, "wide.csv"),
            "gram": Step(run_gram, 60, "gram.csv"),
            "paper": Step(run_paper, 45, "calibrate_paper.csv"),
            "default": Step(run_default, 135, "calibrate_default.csv"),
            "counters": Step(run_counters, 50, "ncu.csv"),
        },
    ),
    2: (
        240.0,
        {
            "tests": Step(run_tests, 65, "tests.csv"),
            "repeats": Step(run_repeats, 45, "repeats.csv"),
            "sanitizer": Step(run_sanitizer, 35, "sanitizer.csv"),
            "final": Step(partial(run_gram, file="final.csv"), 40, "final.csv"),
            "sizes": Step(run_sizes, 15, "sizes.csv"),
            "accuracy": Step(run_accuracy, 20, "accuracy.csv"),
        },
    ),
}
STEPS = {name: step for _, steps in CALLS.values() for name, step in steps.items()}


def run_step(name: str, run: Run) -> bool:
    """Runs one step here; returns False, with the reason printed, if it failed."""
    try:
        STEPS[name].work(run)
    except Exception:
        traceback.print_exc()
        return False
    return True


def run_apart(name: str, options: argparse.Namespace, seconds: float, log: Path) -> str:
    """Runs one step in a process of its own, its output in `log`; how it ended, in words."""
    command = [sys.executable, __file__, "--step", name, "--seconds", str(seconds - GRACE)]
    command += ["--output", str(options.output)] + ["--dry-run"] * options.dry_run
    with log.open("a") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines, start_new_session=True)
        try:
            return "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            # With all processes that it started, and also after an interrupt.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_call(number: int, options: argparse.Namespace) -> bool:
    """Runs the steps of a call one after the other; the time that one leaves is the next one's."""
    seconds, steps = CALLS[number]
    deadline = time.monotonic() + (options.seconds or seconds - GRACE)
    plan, log = options.output / f"plan_{number}.csv", options.output / f"log_{number}.txt"
    rows: list[Row] = []
    later = sum(step.seconds for step in steps.values())
    for name, step in steps.items():
        later -= step.seconds
        limit = max(deadline - time.monotonic() - later, 0.0)
        begin = time.monotonic()
        written = log.stat().st_size if log.exists() else 0
        ended = run_apart(name, options, limit, log) if limit > GRACE else "left out: no time"
        taken = time.monotonic() - begin
        rows.append({"step": name, "ended": ended, "seconds": f"{taken:.0f}", "file": step.file})
        write_rows(plan, rows)
        with contextlib.suppress(FileNotFoundError):
            print(log.read_text(errors="replace")[written:][-_SHOWN:], flush=True)
        print(f"== {name}: {ended}, {taken:.0f} s", flush=True)
    return all(row["ended"] == "passed" for row in rows)


def listed() -> str:
    """Both calls: the steps with their seconds and what they do."""
    lines = []
    for number, (seconds, steps) in CALLS.items():
        lines.append(f"call {number}, {seconds:.0f} s")
        for name, step in steps.items():
            function = step.work.func if isinstance(step.work, partial) else step.work
            told = (function.__doc__ or "").splitlines()[0]
            lines.append(f"  {name:10} {step.seconds:3.0f}  {told} {step.file}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs a call or a step, or lists them; the exit code is 1 if a step failed."""
    parser = CommandLine(
        __doc__,
        *("output", "seconds", "dry_run"),
        writes="CSV files and a log into --output",
        takes="8 minutes for the first call, 4 for the second",
        output={"default": os.environ.get("OUT"), "help": "folder for files (default $OUT)"},
        seconds={"default": None, "help": "of all steps (default those of the call)"},
    )
    parser.add_argument("--call", type=int, choices=[*CALLS], help="the call to run")
    parser.add_argument("--step", choices=[*STEPS], help="one step alone, here")
    parser.add_argument("--list", action="store_true", help="print the steps of both calls")
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    options = parser.read(arguments)
    if options.list:
        print(listed())
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU is visible to torch; --dry-run runs the same code on the CPU")
        return 2
    device = "cpu" if options.dry_run else "cuda"
    if options.digests:
        run = Run(device, options.dry_run, Path(), float("inf"))
        print("\n".join(f"{name} {digest}" for name, digest in digests(run).items()))
        return 0
    if not (options.call or options.step) or options.output is None:
        parser.error("name --call or --step, and a folder by --output or $OUT")
    options.output = Path(options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.call:
        return int(not run_call(options.call, options))
    seconds = options.seconds or STEPS[options.step].seconds
    run = Run(device, options.dry_run, options.output, time.monotonic() + seconds)
    return int(not run_step(options.step, run))


if __name__ == "__main__":
    sys.exit(main())
