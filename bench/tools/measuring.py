"""Shared by every bench: times in turns, the conditions of the machine, rows of CSV."""

import csv
import datetime
import functools
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grail.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
# Seconds of work that a GPU gets between two events: many short calls in a row, so that launching
# one hides behind the one before.
QUEUED = 4e-3
# Seconds between two calls on a CPU. OpenBLAS's threads spin for up to 2^28 cycles before they
# sleep: without a pause NumPy and SciPy would take cores from the next provider.
PAUSE = 0.2
PERCENTILES = ("p20", "p50", "p80")
# Columns of the machine and the software, which no comparison of rows reads.
CONDITIONS = (
    *("device", "threads", "load", "python", "torch", "triton", "commit", "date"),
    *("openblas", "gptqmodel", "llmcompressor"),  # of single benches
)

Call = Callable[[Tensor], Tensor]
Row = dict[str, str]


def time_in_turns(
    calls: dict[str, Call], inputs: list[Tensor], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, every provider once per round, inputs rotating.

    On a GPU short calls are queued, several a round; the first of all is in no time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    queued = dict.fromkeys(calls, 1)
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            x = inputs[round_number % len(inputs)]
            if not x.is_cuda:
                time.sleep(PAUSE)
            elapsed = seconds_of(call, x, queued[name])
            if round_number:  # the first round compiles and allocates
                seconds[name].append(elapsed)
            elif x.is_cuda:
                queued[name] = math.ceil(QUEUED / seconds_of(call, x))
    return seconds


def seconds_of(call: Call, x: Tensor, queued: int = 1) -> float:
    """Seconds of one call on the clock of the device of `x`; on a GPU, of so many in a row."""
    if not x.is_cuda:
        start = time.perf_counter()
        call(x)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(queued):
        call(x)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / queued


def settle(device: str) -> None:
    """Waits until `device` has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def bare_seconds(model: Any, batches: list[Tensor], device: str = "cpu") -> float:
    """Seconds of a dense decoder over all batches, without logits, after one that warms up."""
    with torch.no_grad():
        model.model(batches[0].to(device), use_cache=False)
        settle(device)
        start = time.perf_counter()
        for batch in batches:
            model.model(batch.to(device), use_cache=False)
        settle(device)
    return time.perf_counter() - start


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]


def percentiles(seconds: list[float]) -> Row:
    """The columns p20, p50 and p80 of a CSV."""
    return {n: f"{v:.6g}" for n, v in zip(PERCENTILES, quantiles(seconds), strict=True)}


@functools.cache  # the commit whose code was loaded, not that of an hour later
def commit(tree: Path = ROOT) -> str:
    """The commit of a checkout, marked where files differ from it."""
    git = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def machine(device: str) -> Row:
    """The conditions that belong beside every number."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",  # above `threads`, others were using the processor
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


# By vendor and family, the first model number of each microarchitecture, in rising order.
# Source: the models' numbers in Linux, arch/x86/include/asm/intel-family.h and kernel/cpu/amd.c.
_MICROARCHITECTURES = {
    ("AuthenticAMD", 23): {0x00: "Zen", 0x30: "Zen 2"},
    ("AuthenticAMD", 25): {0x00: "Zen 3", 0x10: "Zen 4", 0x20: "Zen 3", 0x60: "Zen 4"},
    ("AuthenticAMD", 26): {0x00: "Zen 5"},
    ("GenuineIntel", 6): {
        0x55: "Skylake or Cascade Lake",
        0x56: "",
        0x6A: "Ice Lake",
        0x6D: "",
        0x8F: "Sapphire Rapids",
        0x90: "",
        0xAD: "Granite Rapids",
        0xAF: "",
        0xCF: "Emerald Rapids",
        0xD0: "",
    },
}


def _processor() -> str:
    """The processor's name, and its microarchitecture: virtual machines hide the model's number."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    fields = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())  # of the first core
    return describe_processor(fields) if "model name" in fields else platform.processor()


def describe_processor(fields: dict[str, str]) -> str:
    """The name of a processor from its fields in /proc/cpuinfo."""
    name, family = fields["model name"], fields.get("cpu family", "")
    if not family.isdecimal() or not fields.get("model", "").isdecimal():
        return name
    known = _MICROARCHITECTURES.get((fields.get("vendor_id", ""), int(family)), {})
    first = max((number for number in known if number <= int(fields["model"])), default=None)
    return f"{name} ({known[first]})" if first is not None and known[first] else name


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


class Table:
    """A CSV that grows by rows and is never measured twice. `key`: columns that identify a row.

    Rows may bring columns that the file does not have yet; these are empty in the rows before.
    Of a file that is not the committed one of its name, each new row is compared with that. A last
    line that a killed process left incomplete is no row, and the next one replaces it.

    Raises:
        InputError: the file lacks a column of the key.
    """

    def __init__(self, path: Path, key: tuple[str, ...]):
        self.path, self.key = path, key
        self.rows, _ = _complete_rows(path)
        missing = [name for name in key if self.rows and name not in self.rows[0]]
        if missing:
            raise InputError(
                f"{path} has no column {', '.join(missing)}: it is the file of another bench; give "
                "--output another file or folder"
            )
        self._committed = committed(path)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return any(tuple(row[k] for k in self.key) == tuple(map(str, key)) for row in self.rows)

    def measured(self, *key: Any) -> bool:
        """Returns whether a row is there, and says so."""
        if key not in self:
            return False
        found = ", ".join(f"{k}={v}" for k, v in zip(self.key, key, strict=True))
        print(f"already measured in {self.path}: {found}", flush=True)
        return True

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row at once, with threads, torch and commit; the first brings the header.

        A row with new columns has the file written anew, under another name until it is whole.
        """
        row = row | {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        text = {k: str(v) for k, v in row.items()}
        # Of the file as it is now: another process may have added rows.
        found, is_cut = _complete_rows(self.path)
        columns = list(found[0] if found else row)
        if is_cut or not found or not text.keys() <= set(columns):
            whole = self.path.with_suffix(".partial")
            write_rows(whole, [*found, text])
            whole.replace(self.path)
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, fieldnames=columns).writerow(text)
        self.rows.append(text)
        print(", ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        measures = [k for k in text if k not in (*self.key, *CONDITIONS)]
        for line in compared([text], self._committed, self.key, measures):
            print(f"    {line}", flush=True)


def _complete_rows(path: Path) -> tuple[list[Row], bool]:
    """Returns the rows of a CSV, and whether its last line is incomplete, which is left out."""
    if not path.exists():
        return [], False
    rows, is_cut = read_rows(path), not path.read_bytes().endswith(b"\n")
    return rows[:-1] if is_cut else rows, is_cut


def committed(path: Path) -> list[Row]:
    """Returns the rows of the committed CSV of the same name; none if `path` is that one."""
    for known in (RESULTS / path.name, RESULTS / "gpu" / path.name):
        if known.exists():
            return [] if known == path.resolve() else read_rows(known)
    return []


def compared(
    rows: Iterable[Row], known: list[Row], key: Iterable[str], measures: Iterable[str]
) -> Iterator[str]:
    """Yields a line for each measure: how the rows differ from committed ones of the same key.

    Of several rows the line has the median, the smallest and the largest ratio; of texts, how many
    are the same. Where no committed row has the key of one of the rows, a line says so.
    """
    key = tuple(key)
    of = {tuple(row.get(k, "") for k in key): row for row in known}
    found = [(row, of.get(tuple(row.get(k, "") for k in key))) for row in rows]
    pairs = [(row, other) for row, other in found if other]
    if known and not pairs:
        yield f"no committed row has the same {', '.join(key)}"
        return
    for name in measures:
        values = [(row.get(name), other.get(name)) for row, other in pairs]
        if any(map(any, values)):  # not a column that neither has
            yield from _differences(name, values)


def _differences(name: str, values: list[tuple[str | None, str | None]]) -> Iterator[str]:
    """Yields how values, each with the committed one, differ."""
    numbers = [(_number(new), _number(old)) for new, old in values]
    found = [(new, old) for new, old in numbers if new is not None and old is not None]
    ratios = sorted(new / old for new, old in found if old)
    if len(values) > 1 and not any(number is not None for pair in numbers for number in pair):
        same = sum(new == old for new, old in values)
        yield f"{name}: {same} of {len(values)} rows have the committed value"
    elif len(found) == 1:
        ((new, old),) = found
        change = f" ({new / old - 1:+.2%})" if old else ""
        yield f"{name}: {new:g}, committed {old:g}{change}"
    elif ratios:
        yield (
            f"{name}: {statistics.median(ratios):.3f} of the committed value in the median of "
            f"{len(ratios)} rows, {ratios[0]:.3f} to {ratios[-1]:.3f}"
        )
    zeros = [new for new, old in found if not old]
    if len(found) > 1 and zeros:
        yield f"{name}: {zeros.count(0)} of {len(zeros)} rows are 0, as the committed ones"
    if odd := sum((new is None) != (old is None) for new, old in numbers):
        yield f"{name}: in {odd} of {len(values)} rows one of the two is no finite number"


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
