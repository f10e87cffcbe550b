"""What every bench shares: times in turns, the machine's name, rows of CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Seconds between two calls on a CPU. OpenBLAS's threads spin for up to 2^28 cycles before they
# sleep: without a pause NumPy and SciPy would take cores from whoever comes next.
PAUSE = 0.2

Call = Callable[[Tensor], Tensor]
Row = dict[str, str]


def command_line(doc: str | None, *, writes: str, takes: str) -> argparse.ArgumentParser:
    """The parser of a bench; its help adds to the docstring what is written and how long it takes.

    Call it before any work, so that `--help` touches nothing.
    """
    return argparse.ArgumentParser(
        description=doc,
        epilog=f"writes: {writes}\ntakes: {takes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def time_in_turns(
    calls: dict[str, Call], inputs: list[Tensor], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, every provider once per round, inputs rotating."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            x = inputs[round_number % len(inputs)]
            if not x.is_cuda:
                time.sleep(PAUSE)
            elapsed = seconds_of(call, x)
            if round_number:  # the first round compiles and allocates
                seconds[name].append(elapsed)
    return seconds


def seconds_of(call: Call, x: Tensor) -> float:
    """How long one call takes, on the clock of the device of `x`."""
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


def settle(device: str) -> None:
    """Wait until `device` has done all that it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]


def machine(device: str) -> Row:
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


def write_rows(path: Path, rows: list[Row]) -> None:
    """Rows as CSV, with a column for every key that one of them has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
