"""Everything that needs a GPU, in one run of at most ten minutes.

    python bench/on_gpu.py                  all steps, results under bench/results/gpu/
    python bench/on_gpu.py --steps checks   only the named steps
    python bench/on_gpu.py --dry-run        the same code on the CPU at toy sizes

Each step runs in a process of its own and writes its CSV as soon as it ends. The exit code is 1 if
one failed. Steps, with the most seconds of each:
"""

import argparse
import contextlib
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run without an installation

import grail_kernels as gk
from bench.kernels import absorb as absorb_bench
from bench.kernels import accuracy
from bench.kernels import gram as gram_bench
from bench.kernels import ridge as ridge_bench
from bench.quality import calibrate
from bench.tools import tune
from bench.tools.commandline import DTYPES, CommandLine
from bench.tools.measuring import RESULTS, ROOT, Row, machine, write_rows
from grail_kernels import reference, tuning

# Seconds in which a step that is out of time may finish its measurement.
GRACE = 15.0
# Nothing is timed in these, so that they run at once.
UNTIMED = ("tests", "checks", "accuracy")
GPU_TESTS = (
    "tests/test_gpu.py",
    "tests/algebra/test_gram.py",
    "tests/algebra/test_expert_grams.py",
    "tests/runtime/test_onload.py",
)


@dataclass(frozen=True)
class Run:
    """The conditions of one run of this script."""

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

    def write(self, name: str, rows: list[Row]) -> None:
        """Rows as CSV, each with the conditions of the run."""
        conditions = machine(self.device)
        write_rows(self.output / f"{name}.csv", [row | conditions for row in rows])
        print(f"{name}: {len(rows)} rows", flush=True)


def activations(tokens: int, channels: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random activations with a mean, the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(tokens + channels)
    size = (tokens, channels)
    return torch.randn(size, generator=generator, device=device).add_(0.5).to(dtype)


def packed(add: Callable[[Tensor], Tensor], x: Tensor, *matrices: int) -> Tensor:
    """The packed Grams that `add` makes of zeros, zero where they are scratch."""
    channels = x.shape[-1]
    out = torch.zeros(*matrices, gk.packed_numel(channels), device=x.device)
    return gk.pack(gk.unpack(add(out), channels))


def run_tests(run: Run) -> None:
    """The tests of the kernels that need a GPU."""
    selected = "(triton and not interpreter and not bench) or gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_tiles" if run.dry else selected]
    command += ["tests/kernels", *([] if run.dry else GPU_TESTS)]
    if importlib.util.find_spec("xdist") is not None and not run.dry:
        command += ["-n", str(max(1, (os.cpu_count() or 1) // 3))]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=run.left())
    if finished.returncode:
        raise RuntimeError(finished.stdout[-3000:] + finished.stderr[-1000:])
    summary = finished.stdout.strip().splitlines()[-1:]
    run.write("tests", [{"check": "tests", "result": " ".join(summary)}])


def launches(run: Run) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """A call for each shipped launch: by kernel, dtype, width, alignment and weights."""
    tokens = run.size(20_000, 300)
    for (name, dtype), channels in itertools.product(DTYPES.items(), (64, 192, 201, 4096)):
        x = activations(tokens, run.size(channels, min(channels, 201)), dtype, run.device)
        for kernel, call in _calls(x).items():
            yield kernel.format(f"{name} {channels}"), call


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


def run_checks(run: Run) -> None:
    """Repeats, sizes beyond 32 bits, and the sanitizer; rows are written also after a failure."""
    rows: list[Row] = []
    try:
        for check in (repeats, _many_activations, _large_accumulator, _sanitizer):
            rows += check(run)
    finally:
        run.write("checks", rows)


def repeats(run: Run) -> list[Row]:
    """Every launch, all of which gave the same bits three times, once elsewhere."""
    first = digests(run)
    command = [sys.executable, __file__, "--digests"] + ["--dry-run"] * run.dry
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=run.left()
    ).stdout
    elsewhere = dict(line.rsplit(" ", 1) for line in printed.splitlines())
    for again in (digests(run), elsewhere):
        changed = [name for name, digest in first.items() if again.get(name) != digest]
        if changed:
            raise ArithmeticError(f"not the same bits again: {', '.join(changed)}")
    return [{"check": f"repeats bitwise: {name}", "result": "yes"} for name in first]


def _many_activations(run: Run) -> list[Row]:
    """More than 2^31 elements in, the last tokens apart from all others."""
    tokens, channels = run.size(2**17 + 64, 200), run.size(2**14 + 16, 130)
    x = torch.zeros(tokens, channels, dtype=torch.bfloat16, device=run.device)
    x[-50:] = activations(50, channels, x.dtype, run.device)
    result = gk.unpack(packed(lambda out: gk.gram_(out, x), x), channels)
    for rows in (slice(0, 64), slice(-64, None)):
        _assert_error(result[rows], x[-50:, rows], x[-50:])
    return [{"check": f"{x.numel()} activations", "result": "matches fp64"}]


def _large_accumulator(run: Run) -> list[Row]:
    """More than 2^31 elements out; the last rows of the triangle are compared."""
    channels = run.size(65_792, 300)
    x = activations(64, channels, torch.bfloat16, run.device)
    out = torch.zeros(gk.packed_numel(channels), device=run.device)
    gk.gram_(out, x)
    low = (channels - 1) // gk.STRIP_ROWS * gk.STRIP_ROWS
    last = out[-(channels - low) * channels :].view(-1, channels)[:, :low]
    _assert_error(last, x[:, low:], x[:, :low])
    return [{"check": f"{out.numel()} elements of G", "result": "matches fp64"}]


def _assert_error(result: Tensor, left: Tensor, right: Tensor) -> None:
    exact = left.double().T @ right.double()
    magnitude = left.double().abs().T @ right.double().abs()
    ratio = reference.error_ratio(result, exact, magnitude)
    if not ratio < reference.ERROR_LIMIT:
        raise ArithmeticError(f"off by {ratio:.1f} eps, the limit is {reference.ERROR_LIMIT:.0f}")


# Every kernel once, at widths around the edges of a tile.
ODD_SHAPES = """
import sys, torch, grail_kernels as gk
device = sys.argv[1]
for channels in (1, 2, 17, 129, 257):
    x = torch.randn(65, channels, device=device).bfloat16()
    out = torch.zeros(3, gk.packed_numel(channels), device=device)
    gk.gram_(out[0], x)
    gk.gram_batched_(out, x.expand(3, -1, -1))
    gk.gram_ragged_(out, x, torch.tensor([0, 1, 1, 65]))
    gk.gram_swiglu_(out[0], x, x)
    gk.absorb(x, out[0], torch.arange(0, channels, 2, device=device))
if device == "cuda":
    torch.cuda.synchronize()
"""


def _sanitizer(run: Run) -> list[Row]:
    """compute-sanitizer over odd shapes, where it is installed; a dry run does without it."""
    tool = shutil.which("compute-sanitizer")
    if not run.dry and not tool:
        return [{"check": "compute-sanitizer", "result": "skipped: not installed here"}]
    watched = [] if run.dry or not tool else [tool, "--error-exitcode", "9"]
    command = [*watched, sys.executable, "-c", ODD_SHAPES, run.device]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=run.left()
    )
    if finished.returncode:
        raise RuntimeError(finished.stdout[-3000:] + finished.stderr[-1000:])
    return [{"check": "compute-sanitizer", "result": "dry" if run.dry else "no errors"}]


def run_accuracy(run: Run) -> None:
    """Error and bias against tokens, for several intervals of adding to fp32 G."""
    rows = accuracy.measure(run.device, run.size(2**22, 2**10), deadline=run.deadline)
    run.write("accuracy", rows)
    biased = accuracy.biased(rows)
    if biased:
        raise ArithmeticError(f"the diagonal is biased by {accuracy.BIAS_LIMIT} or more: {biased}")


def run_tuning(run: Run) -> None:
    """The rows of this architecture; a copy of the table stands beside the results."""
    copy = run.output / "launches.json"
    if run.dry:
        shutil.copy(tuning.TABLE, copy)
    keys = list(tune.ORDER[: run.size(len(tune.ORDER), 3)])
    table = copy if run.dry else tuning.TABLE
    rows = tune.tune(keys, run.device, dry=run.dry, table=table, seconds=run.left())
    run.write("tuning", rows)
    if not run.dry:
        shutil.copy(tuning.TABLE, copy)


def run_bench(run: Run) -> None:
    """The benches; they write CSV files of their own, and print their tables."""
    two = ["--repeats", "2"]
    toys = {
        "gram": ["--shape", "64,40", "--heads", "64,3,20", "--experts", "64,3,20", *two],
        "absorb": ["--shape", "20,40", *two],
        "ridge": ["--shape", "20,40", *two],
    }
    models = sorted({*gram_bench.MODELS, *gram_bench.HEADS, *gram_bench.EXPERTS})
    real = {
        "gram": [f"--model={name}" for name in models],
        "absorb": ["--dtype", "bf16", "--dtype", "fp32"],
        "ridge": [],
    }
    # Shares of the time that is left: most of it for the Grams.
    benches = {"absorb": (absorb_bench, 0.2), "ridge": (ridge_bench, 0.35), "gram": (gram_bench, 1)}
    failed = []
    for name, (bench, share) in benches.items():
        limit = ["--device", run.device, "--seconds", str(share * run.left())]
        case = (toys if run.dry else real)[name]
        failed += [name] * bench.main([*limit, *case, "--write", str(run.output / f"{name}.csv")])
        _empty_cache()
    if failed:
        raise ArithmeticError(f"a result was wrong, see the tables above: {', '.join(failed)}")


def run_calibrate(run: Run) -> None:
    """A whole compression by phase, where transformers is installed."""
    if importlib.util.find_spec("transformers") is None:
        print("calibrate: skipped, transformers is not installed here")
        return
    toy = ["--blocks", "1", "--tokens", "64", "--sequence-length", "32"] if run.dry else []
    path = str(run.output / "calibrate.csv")
    if calibrate.main(["--device", run.device, "--repeats", "2", *toy, "--write", path]):
        raise ArithmeticError("a compensated site was worse than a pruned one, see above")


@dataclass(frozen=True)
class Step:
    """The work of a step, and the seconds that it may take."""

    work: Callable[[Run], None]
    seconds: float


STEPS = {
    "tests": Step(run_tests, 150),
    "checks": Step(run_checks, 100),
    "accuracy": Step(run_accuracy, 60),
    "tuning": Step(run_tuning, 150),
    "bench": Step(run_bench, 130),
    "calibrate": Step(run_calibrate, 100),
}


def run_step(name: str, run: Run) -> bool:
    """Runs one step here; returns False, with the reason printed, if it failed."""
    begin = time.monotonic()
    try:
        STEPS[name].work(run)
    except Exception:
        traceback.print_exc()
        return False
    finally:
        _empty_cache()
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    return True


def run_apart(name: str, options: argparse.Namespace, seconds: float) -> bool:
    """Runs one step in a process of its own, which ends with its time at the latest."""
    command = [sys.executable, __file__, "--steps", name, "--seconds", str(seconds)]
    command += ["--output", str(options.output)] + ["--dry-run"] * options.dry_run
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds + GRACE) == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped, it had {seconds:.0f} s", flush=True)
        return False
    finally:
        # With all processes that it started, and also after an interrupt.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _empty_cache() -> None:
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps; the exit code is 1 if one of them failed."""
    steps = (
        f"  {name:10} {step.seconds:3.0f}  {(step.work.__doc__ or '').splitlines()[0]}"
        for name, step in STEPS.items()
    )
    parser = CommandLine(
        "\n".join([__doc__ or "", *steps]),
        *("output", "seconds", "dry_run"),
        writes="CSV files into --output; the step tuning grail_kernels/launches.json",
        takes="at most --seconds, 10 minutes",
        output={"default": RESULTS / "gpu"},
        seconds={"default": 585, "help": "of all steps (default 585)"},
    )
    parser.add_argument("--steps", nargs="+", choices=[*STEPS], default=[*STEPS])
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    options = parser.read(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU is visible to torch; --dry-run runs the same code on the CPU")
        return 2
    deadline = time.monotonic() + options.seconds
    device = "cpu" if options.dry_run else "cuda"
    run = Run(device, options.dry_run, options.output, deadline)
    if options.digests:
        print("\n".join(f"{name} {digest}" for name, digest in digests(run).items()))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    if len(options.steps) == 1:
        return int(not run_step(options.steps[0], run))

    def passes(name: str) -> bool:
        left = deadline - time.monotonic()
        return left > 0 and run_apart(name, options, min(left, STEPS[name].seconds))

    untimed = [name for name in options.steps if name in UNTIMED]
    with ThreadPoolExecutor(len(UNTIMED)) as pool:
        passed = dict(zip(untimed, pool.map(passes, untimed), strict=True))
    passed |= {name: passes(name) for name in options.steps if name not in UNTIMED}
    failed = [name for name in options.steps if not passed[name]]
    print(f"failed: {', '.join(failed)}" if failed else "every step passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
