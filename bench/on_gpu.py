"""Everything that needs a GPU, in one run of at most ten minutes.

    python bench/on_gpu.py                  all steps, results under bench/results/gpu/
    python bench/on_gpu.py --steps checks   only the named steps
    python bench/on_gpu.py --dry-run        the same code on the CPU at toy sizes: does it run?

Steps, in this order
  tests      tests/kernels on the GPU, every backend
  checks     each shipped launch gives the same bits twice and in a new process; more than 2^31
             elements of activations and of the accumulator; compute-sanitizer, where installed
  accuracy   error and bias of the diagonal against the number of tokens, by flush interval, on
             activations with a mean
  bench      bench/gram.py and bench/absorb.py on the real models
  tuning     other launch configurations on the same shapes, errors first

A step that fails is reported with its reason and the others go on; the exit code is 1. After
--seconds (default 570) no new measurement starts. Each step writes its CSV as soon as it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run without an installation

import grail_kernels as gk
from bench import absorb as absorb_bench
from bench import gram as gram_bench
from grail_kernels import reference, tuning

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, str]


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

    def in_time(self) -> bool:
        """Whether another measurement may start."""
        return time.monotonic() < self.deadline


def activations(tokens: int, channels: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random activations with a mean, the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(tokens + channels)
    size = (tokens, channels)
    return torch.randn(size, generator=generator, device=device).add_(0.5).to(dtype)


def packed_gram(x: Tensor, **options: Tensor) -> Tensor:
    """The packed Gram of `x`, zero where it is scratch."""
    out = torch.zeros(gk.packed_numel(x.shape[-1]), device=x.device)
    gk.gram_(out, x, **options)
    return gk.pack(gk.unpack(out, x.shape[-1]))


def run_tests(run: Run) -> list[Row]:
    """The tests of the kernels, on what this machine has."""
    selected = "test_tiles" if run.dry else "not compiled and not bench"
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-x", "-k", selected]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = finished.stdout.strip().splitlines()[-1:]
    if finished.returncode:
        raise RuntimeError(finished.stdout[-3000:])
    return [{"check": "tests", "result": " ".join(summary)}]


def launches(run: Run) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """An input for each shipped launch: by dtype, width, alignment and weights."""
    tokens = run.size(20_000, 300)
    for dtype, channels in itertools.product(gram_bench.DTYPES.values(), (64, 192, 201, 4096)):
        x = activations(tokens, run.size(channels, min(channels, 201)), dtype, run.device)
        name = f"{dtype} {channels}".removeprefix("torch.")
        yield name, x, {}
        yield f"{name} weighted", x, {"weights": x[:, 0].float().abs()}


def digests(run: Run) -> dict[str, str]:
    """A hash of the bits that each launch gives."""
    return {
        name: hashlib.sha256(packed_gram(x, **options).cpu().numpy().tobytes()).hexdigest()
        for name, x, options in launches(run)
    }


def run_checks(run: Run) -> list[Row]:
    """Repeats, sizes beyond 32 bits, and the sanitizer."""
    rows = [{"check": f"repeats bitwise: {name}", "result": "yes"} for name in _repeats(run)]
    rows += [_many_activations(run), _large_accumulator(run), _sanitizer(run)]
    return rows


def _repeats(run: Run) -> list[str]:
    """The names of the launches, all of which gave the same bits three times, once elsewhere."""
    first = digests(run)
    command = [sys.executable, __file__, "--digests"] + ["--dry-run"] * run.dry
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    elsewhere = dict(line.rsplit(" ", 1) for line in printed.splitlines())
    for again in (digests(run), elsewhere):
        changed = [name for name, digest in first.items() if again.get(name) != digest]
        if changed:
            raise ArithmeticError(f"not the same bits again: {', '.join(changed)}")
    return list(first)


def _many_activations(run: Run) -> Row:
    """More than 2^31 elements in, the last tokens apart from all others."""
    tokens, channels = run.size(2**17 + 64, 200), run.size(2**14 + 16, 130)
    x = torch.zeros(tokens, channels, dtype=torch.bfloat16, device=run.device)
    x[-50:] = activations(50, channels, x.dtype, run.device)
    _assert_matches(gk.unpack(packed_gram(x), channels), x[-50:])
    return {"check": f"{x.numel()} activations", "result": "matches fp64"}


def _large_accumulator(run: Run) -> Row:
    """More than 2^31 elements out; the last rows of the triangle are compared."""
    channels = run.size(65_792, 300)
    x = activations(64, channels, torch.bfloat16, run.device)
    out = torch.zeros(gk.packed_numel(channels), device=run.device)
    gk.gram_(out, x)
    low = (channels - 1) // gk.tiles.BLOCK * gk.tiles.BLOCK
    last = out[-(channels - low) * channels :].view(-1, channels)[:, :low]
    _assert_error(last, x[:, low:], x[:, :low])
    return {"check": f"{out.numel()} elements of G", "result": "matches fp64"}


def _assert_matches(result: Tensor, x: Tensor) -> None:
    rows = slice(0, 64), slice(-64, None)
    for part in rows:
        _assert_error(result[part], x[:, part], x)


def _assert_error(result: Tensor, left: Tensor, right: Tensor) -> None:
    exact = left.double().T @ right.double()
    magnitude = left.double().abs().T @ right.double().abs()
    ratio = reference.error_ratio(result, exact, magnitude)
    if not ratio < reference.ERROR_LIMIT:
        raise ArithmeticError(f"off by {ratio:.1f} eps, the limit is {reference.ERROR_LIMIT:.0f}")


def _sanitizer(run: Run) -> Row:
    """compute-sanitizer over the odd shapes of the launches, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if run.dry or not tool:
        return {"check": "compute-sanitizer", "result": "skipped: not installed here"}
    code = (
        "import torch, grail_kernels as gk\n"
        "for h in (1, 17, 129, 257):\n"
        "    x = torch.randn(65, h, device='cuda').bfloat16()\n"
        "    gk.gram_(torch.zeros(gk.packed_numel(h), device='cuda'), x)\n"
        "torch.cuda.synchronize()\n"
    )
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if finished.returncode:
        raise RuntimeError(finished.stdout[-3000:])
    return {"check": "compute-sanitizer", "result": "no errors"}


def run_accuracy(run: Run) -> list[Row]:
    """Error and bias against tokens, for several intervals of adding to fp32 G."""
    channels, most = 128, run.size(2**21, 2**10)
    rows = []
    x = activations(most, channels, torch.bfloat16, run.device)
    for flush in (1024, 8192, 65_536, 2**30):
        for exponent in range(8, most.bit_length()):
            if not run.in_time():
                return rows
            part = x[: 2**exponent]
            with mock.patch.object(tuning, "FLUSH_TOKENS", flush):
                result = gk.unpack(packed_gram(part), channels)
            exact = reference.gram(part)
            bias = ((result.diagonal() - exact.diagonal()) / exact.diagonal()).mean().item()
            error = reference.error_ratio(result, exact, reference.gram(part.abs()))
            rows.append(
                {"tokens": str(2**exponent), "flush": str(flush)}
                | {"error": f"{error:.4g}", "diagonal_bias": f"{bias:.4g}"}
            )
    return rows


def run_bench(run: Run) -> list[Row]:
    """The benches; they write CSV files of their own, and print their tables."""
    device = ["--device", run.device]
    small = ["--shape", "64,40", "--repeats", "2"] if run.dry else []
    models = [] if run.dry else [f"--model={name}" for name in gram_bench.MODELS]
    kinds = ["--dtype", "bf16", "--dtype", "fp32", "--csv", str(run.output / "gram.csv")]
    gram_code = gram_bench.main([*device, *small, *models, *kinds])
    small = ["--shape", "20,40", "--repeats", "2"] if run.dry else []
    absorb_code = absorb_bench.main([*device, *small, "--csv", str(run.output / "absorb.csv")])
    if gram_code or absorb_code:
        raise ArithmeticError("a result was wrong; see the tables above")
    return []


CANDIDATES = {
    torch.bfloat16: [
        tuning.GramConfig(*sizes, group, warps, stages)
        for sizes, warps in (((64, 128), 8), ((32, 128), 8), ((128, 128), 8), ((64, 64), 4))
        for stages in (3, 4)
        for group in (4, 8, 16)
    ],
    torch.float32: [
        tuning.GramConfig(tokens, channels, group, warps, stages)
        for tokens, channels, warps in ((32, 64, 4), (64, 64, 8), (32, 64, 8), (32, 128, 8))
        for stages in (2, 3)
        for group in (4, 8)
    ],
}


def run_tuning(run: Run) -> list[Row]:
    """Other launches on the shapes of real sites: time where the result is right and it fits."""
    rows: list[Row] = []
    for channels, (dtype, candidates) in itertools.product(
        (11_008, 4096, 1024), CANDIDATES.items()
    ):
        x = activations(run.size(32_768, 64), run.size(channels, 40), dtype, run.device)
        for config in candidates[: run.size(len(candidates), 1)]:
            if not run.in_time():
                return rows
            with mock.patch.object(tuning, "gram_config", lambda *_, config=config, **__: config):
                rows.append(_candidate(x, config))
    return rows


def _candidate(x: Tensor, config: tuning.GramConfig) -> Row:
    out = torch.zeros(gk.packed_numel(x.shape[1]), device=x.device)
    row = {"dtype": str(x.dtype).removeprefix("torch."), "tokens": str(x.shape[0])}
    row |= {"channels": str(x.shape[1]), "config": str(config)}
    try:
        gk.gram_(out, x)
        _assert_matches(gk.unpack(out, x.shape[1]), x)
    except Exception as problem:  # a candidate that does not fit or is wrong is a result, too
        return row | {"p50": "", "problem": str(problem).strip().splitlines()[-1]}
    seconds = gram_bench.time_in_turns({"grail": lambda y: gk.gram_(out, y)}, [x], 5)["grail"]
    p20, p50, p80 = gram_bench.quantiles(seconds)
    rate = 2.0 * x.shape[0] * x.shape[1] ** 2 / p50 / 1e12
    times = {"p20": f"{p20:.6g}", "p50": f"{p50:.6g}", "p80": f"{p80:.6g}"}
    return row | times | {"tf_eq": f"{rate:.4g}"}


STEPS: dict[str, Callable[[Run], list[Row]]] = {
    "tests": run_tests,
    "checks": run_checks,
    "accuracy": run_accuracy,
    "bench": run_bench,
    "tuning": run_tuning,
}


def write(path: Path, rows: list[Row], conditions: Row) -> None:
    """`rows` as CSV, each with the conditions of the run."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *conditions])
        writer.writeheader()
        writer.writerows(row | conditions for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; the exit code is 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=[*STEPS], default=[*STEPS])
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/gpu")
    parser.add_argument("--seconds", type=float, default=570, help="no measurement starts later")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU is visible to torch; --dry-run runs the same code on the CPU")
        return 2
    device = "cpu" if options.dry_run else "cuda"
    run = Run(device, options.dry_run, options.output, time.monotonic() + options.seconds)
    if options.digests:
        print("\n".join(f"{name} {digest}" for name, digest in digests(run).items()))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    conditions = gram_bench.machine(device)
    print(", ".join(f"{name} {value}" for name, value in conditions.items() if value))
    failed = [name for name in options.steps if not _step(name, run, conditions)]
    print(f"failed: {', '.join(failed)}" if failed else "every step passed")
    return int(bool(failed))


def _step(name: str, run: Run, conditions: Row) -> bool:
    """Run one step and write what it found; False, with the reason printed, if it failed."""
    begin = time.monotonic()
    try:
        rows = STEPS[name](run)
    except Exception:
        traceback.print_exc()
        return False
    finally:
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    if rows:
        write(run.output / f"{name}.csv", rows, conditions)
    print(f"{name}: {len(rows)} rows in {time.monotonic() - begin:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
