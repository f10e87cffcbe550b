"""Trials of Gram kernels for wide 16-bit activations, on a GPU of sm_90.

    python -m bench.kernels.trials --list          the candidates
    python -m bench.kernels.trials --only wide     those with that word in their names

Each candidate runs in a process of its own first: is it right, does it end, has it the same bits
again? One that hangs costs only its own time. Those that pass are timed in turns with `addmm`, and
the table is written after every shape. error: in eps = 2^-23 over all tokens; exact chains are
wrong from 16 on.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

import grail_kernels as gk
from bench.kernels.gram import Roof, measure_roof
from bench.tools import model
from bench.tools.commandline import CommandLine
from bench.tools.measuring import (
    ROOT,
    Row,
    machine,
    percentiles,
    quantiles,
    time_in_turns,
    write_rows,
)
from bench.tools.tables import aligned
from grail_kernels import reference, tuning
from grail_kernels.gram_call import GramCall

Add = Callable[[Tensor, Tensor], object]  # out [P], x [T, H]

# Tokens and channels, the ones that decide first.
SHAPES = (
    *((8192, 4096), (16_384, 11_008), (16_384, 4096), (8192, 11_008), (16_384, 14_336)),
    *((16_384, 8192), (8192, 2048), (65_536, 4096), (8192, 3072), (65_536, 1536)),
)
CHECKED_SHAPES = ((5000, 1008), (8192, 4096), (3000, 5136))
TOYS = ((300, 40),)
# Limits of the error: of chains of 256 tokens, and of one chain of 8192, each truncated.
ONE_CHAIN_LIMIT = 400.0
# Seconds that a check may take: compilers start at once, eight of them.
CHECK_SECONDS, CHECKS_AT_ONCE = 45.0, 8
# Seconds kept back to write the last table.
_MARGIN = 5.0


@dataclass(frozen=True)
class Candidate:
    """A way to add a Gram matrix, and the error that it may have in eps; None if it adds none."""

    add: Add
    limit: float | None = reference.ERROR_LIMIT


def candidates(device: str) -> dict[str, Candidate]:
    """Every candidate by name; on a CPU only what is shipped."""
    found = {"shipped": Candidate(lambda out, x: gk.gram_(out, x))}
    if device == "cpu":
        return found
    for group, slots in ((4, 8), (2, 8), (8, 8), (4, 6)):
        config = tuning.GramConfig("wide", 64, 256, group, 4, slots)
        found[f"wide group={group} slots={slots}"] = Candidate(Planned(config))
    for group in (4, 8):
        config = tuning.GramConfig("one chain", 64, 256, group, 4, stages=4)
        found[f"one chain group={group}"] = Candidate(Planned(config), ONE_CHAIN_LIMIT)
        config = replace(config, stages=0)
        found[f"copies only group={group}"] = Candidate(Planned(config), None)
    return found


class Planned:
    """Adds Gram matrices as `gram_` does, by a launch that the table need not list."""

    def __init__(self, config: tuning.GramConfig) -> None:
        self._config = config
        self._plans: dict[object, Callable[[GramCall, list[int]], None]] = {}

    def __call__(self, out: Tensor, x: Tensor) -> None:
        call = GramCall(out, x, None, None, None, None)
        form = (x.shape, x.stride(), x.dtype)
        plan = self._plans.get(form)
        if plan is None:
            plan = self._plans[form] = self._plan_of(call)
        plan(call, [0 if tensor is None else tensor.data_ptr() for tensor in call.tensors])

    def _plan_of(self, call: GramCall) -> Callable[[GramCall, list[int]], None]:
        from bench.kernels import one_chain
        from grail_kernels import gram_launch

        with (
            mock.patch.dict(gram_launch.KERNELS, {"one chain": one_chain}),
            mock.patch.object(tuning, "gram_launches", return_value=(self._config,)),
        ):
            return gram_launch.plan_of(call)


def activations(tokens: int, channels: int, device: str, seed: int = 0) -> Tensor:
    """Random activations [tokens, channels] with a mean, which shows a biased adder."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator, device=device)
    return x.add_(0.5).bfloat16()


def error(out: Tensor, x: Tensor) -> float:
    """The error ratio of `out` [P] on the first, the middle and the last 64 rows; NaN is inf."""
    channels = x.shape[1]
    found = gk.unpack(out, channels)
    worst = 0.0
    for first in (0, channels // 2, channels - 64):
        rows = slice(max(first, 0), first + 64)
        exact = x[:, rows].double().T @ x.double()
        magnitude = x[:, rows].double().abs().T @ x.double().abs()
        worst = max(worst, reference.error_ratio(found[rows], exact, magnitude))
    return worst


def check(name: str, device: str) -> None:
    """Adds with a candidate twice, into memory that is poisoned around.

    Raises:
        ArithmeticError: a result is off, not the same again, or outside of its memory.
    """
    candidate = candidates(device)[name]
    for tokens, channels in TOYS if device == "cpu" else CHECKED_SHAPES:
        x = activations(tokens, channels, device)
        results = []
        for _ in range(2):
            size = gk.packed_numel(channels)
            whole = torch.full((size + 64,), torch.nan, device=device)
            out = whole[32 : 32 + size].zero_()
            candidate.add(out, x)
            results.append(gk.unpack(out, channels))
            if not whole[:32].isnan().all() or not whole[32 + size :].isnan().all():
                raise ArithmeticError(f"{tokens} x {channels}: wrote outside of its memory")
        if not torch.equal(*results):
            raise ArithmeticError(f"{tokens} x {channels}: not the same bits again")
        ratio = error(gk.pack(results[0]), x)
        if candidate.limit and not ratio < candidate.limit:
            raise ArithmeticError(f"{tokens} x {channels}: off by {ratio:.1f} eps")


def passing(names: list[str], device: str, deadline: float) -> list[str]:
    """The candidates that pass their check, each in a process of its own, some at once."""
    waiting, running, good = list(names), {}, set()
    while waiting or running:
        while waiting and len(running) < CHECKS_AT_ONCE:
            command = [sys.executable, "-m", "bench.kernels.trials", "--device", device]
            process = subprocess.Popen(
                [*command, "--check", waiting[0]],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running[waiting.pop(0)] = process, time.monotonic()
        time.sleep(0.05)
        for name, (process, begun) in list(running.items()):
            late = time.monotonic() > min(begun + CHECK_SECONDS, deadline)
            if process.poll() is None and not late:
                continue
            if late:
                process.kill()
            told, _ = process.communicate()
            del running[name]
            if process.returncode == 0:
                good.add(name)
            reason = "does not end" if late else told.strip()[-300:]
            print(f"{name}: {'right' if name in good else reason}", flush=True)
    return [name for name in names if name in good]


def timed(good: dict[str, Candidate], tokens: int, channels: int, device: str) -> list[Row]:
    """A row for each candidate on a shape, and for `addmm`; 2 rounds on a CPU."""
    inputs = [activations(tokens, channels, device, seed) for seed in range(2)]
    out = torch.zeros(gk.packed_numel(channels), device=device)
    dense = torch.zeros(channels, channels, device=device)

    def addmm(x: Tensor) -> Tensor:
        if device == "cpu":
            return dense.addmm_(x.float().T, x.float())
        return torch.addmm(dense, x.T, x, out_dtype=torch.float32, out=dense)

    def added(add: Add, x: Tensor) -> Tensor:
        add(out, x)
        return out

    calls = {"addmm": addmm} | {n: partial(added, c.add) for n, c in good.items()}
    seconds = time_in_turns(calls, inputs, 2 if device == "cpu" else 6)
    medians = {name: quantiles(found)[1] for name, found in seconds.items()}
    rows = []
    for name in sorted(medians, key=medians.__getitem__):
        row = {"kernel": "trial", "provider": name, "metric": "time", "unit": "s"}
        row |= {"tokens": str(tokens), "channels": str(channels)} | percentiles(seconds[name])
        row |= {"x addmm": f"{medians['addmm'] / medians[name]:.3f}"}
        row |= {"TF-eq": f"{2 * tokens * channels**2 / medians[name] / 1e12:.3f}", "error": ""}
        if name in good and good[name].limit:
            out.zero_()
            good[name].add(out, inputs[0])
            row["error"] = f"{error(out, inputs[0]):.3g}"
        rows.append(row)
    return rows


def predicted(tokens: int, channels: int, roof: Roof) -> Row:
    """The row of the model of time for the wide kernel, at the rates of this machine."""
    gpu = replace(model.GPUS["h200"], products=roof.flops, bandwidth=roof.bandwidth)
    seconds = gpu.predict_wide(tokens, channels).seconds
    row = {"kernel": "trial", "provider": "model of wide", "metric": "model", "unit": "s"}
    return row | {"tokens": str(tokens), "channels": str(channels), "p50": f"{seconds:.6g}"}


def measure(options: argparse.Namespace) -> list[Row]:
    """Checks the candidates, then times those that passed; `--output` has every shape so far."""
    deadline = time.monotonic() + options.seconds - _MARGIN
    device = options.device
    found = candidates(device)
    names = [n for n in found if not options.only or any(word in n for word in options.only)]
    good = {name: found[name] for name in passing(names, device, deadline)}
    roof = measure_roof(torch.bfloat16, device)
    case = {"kernel": "roof", "provider": "torch"}
    rows = [
        case | {"metric": "product", "unit": "FLOP/s", "p50": f"{roof.flops:.6g}"},
        case | {"metric": "copy", "unit": "B/s", "p50": f"{roof.bandwidth:.6g}"},
    ]
    columns = ("provider", "p50", "x addmm", "TF-eq", "error")
    for tokens, channels in TOYS if device == "cpu" else SHAPES:
        if time.monotonic() > deadline:
            print(f"{tokens} x {channels}: left out, --seconds are over")
            continue
        of_shape = timed(good, tokens, channels, device)
        print(f"\n{tokens} tokens x {channels} channels, s")
        print(aligned(columns, [[row[c] for c in columns] for row in of_shape]), flush=True)
        rows += [*of_shape, predicted(tokens, channels, roof)]
        if options.output:
            write_rows(options.output, [row | machine(device) for row in rows])
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Checks and times, or lists; the exit code is 1 if the shipped kernel failed its check."""
    parser = CommandLine(
        __doc__,
        *("device", "seconds"),
        takes="some 2 minutes of a GPU",
        results="wide{device}",
        seconds={"default": 150.0, "help": "of all (default %(default)s)"},
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="of the names to try")
    parser.add_argument("--list", action="store_true", help="print the candidates")
    parser.add_argument("--check", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.read(arguments)
    if options.list:
        print("\n".join(candidates("cuda")))
    elif options.check:
        check(options.check, options.device)
    else:
        rows = measure(options)
        return int(not any(row["provider"] == "shipped" for row in rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
