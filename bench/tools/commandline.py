"""The command lines of the benchmarks: one parser, and the options that several of them share."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.tools.measuring import RESULTS, Row, machine, write_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARED: dict[str, dict[str, Any]] = {
    "device": {"choices": ["cpu", "cuda"], "help": "default: the GPU if there is one"},
    "threads": {"type": int, "help": "of torch; default: as many as torch takes"},
    "repeats": {"type": int, "default": 7, "help": "timed rounds (default %(default)s)"},
    "seconds": {"type": float, "default": math.inf, "help": "no case starts later than this"},
    "keep": {"type": float, "default": 0.5, "help": "share of channels (default %(default)s)"},
    "dtype": {"action": "append", "choices": [*DTYPES], "help": "may be repeated"},
    "model": {"action": "append", "help": "may be repeated"},
    "trials": {"type": int, "help": "default %(default)s"},
    "output": {"type": Path, "help": "folder for files (default %(default)s)"},
    "dry_run": {"action": "store_true", "help": "on the CPU, at toy sizes"},
    "write": {
        "type": Path,
        "nargs": "?",
        "const": Path(),
        "metavar": "FILE.csv",
        "help": "write every number here; without a name, into the committed file",
    },
}


class CommandLine(argparse.ArgumentParser):
    """The parser of a bench.

    Its help adds to the docstring what is written and how long it takes. Made and read before any
    work, so that `--help` touches nothing.

    Args:
        doc: of the bench.
        shared: options of `SHARED`.
        takes: how long it takes.
        writes: what it writes; default, a table to the screen and what `--write` names.
        results: name of the committed CSV, without `.csv`. A "{device}" in it becomes `_cpu`; on
            a GPU it falls away, and the file lies in the folder gpu.
        settings: changed settings of shared options, by name.
    """

    def __init__(
        self,
        doc: str | None,
        *shared: str,
        takes: str,
        writes: str = "",
        results: str = "",
        **settings: dict[str, Any],
    ):
        self._results = results
        if not writes:
            writes = f"a table to the screen; with --write {self._committed('cpu')}, or a file"
        super().__init__(
            description=doc,
            epilog=f"writes: {writes}\ntakes: {takes}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name in shared:
            self.add_argument(
                f"--{name.replace('_', '-')}", **SHARED[name] | settings.get(name, {})
            )

    def read(self, arguments: list[str] | None = None) -> argparse.Namespace:
        """The options, checked and with defaults filled in; an error ends the process with 2."""
        options = self.parse_args(arguments)
        device = getattr(options, "device", "cpu")
        if device is None:
            device = options.device = "cuda" if torch.cuda.is_available() else "cpu"
        if getattr(options, "repeats", 2) < 2:
            self.error("--repeats: percentiles need at least 2 rounds")
        keep = getattr(options, "keep", None)
        if keep is not None and not 0 < keep < 1:
            self.error("--keep lies between 0 and 1")
        if getattr(options, "threads", None):
            torch.set_num_threads(options.threads)
        if getattr(options, "write", None) == Path():
            options.write = RESULTS.parents[1] / self._committed(device)
        return options

    def _committed(self, device: str) -> Path:
        name = self._results.replace("{device}", "_cpu" if device == "cpu" else "")
        folder = "gpu" if name != self._results and device != "cpu" else ""
        return Path("bench/results") / folder / f"{name}.csv"


def save(options: argparse.Namespace, rows: list[Row]) -> None:
    """Writes rows to `--write`, each with the conditions of the machine."""
    if options.write and rows:
        conditions = machine(getattr(options, "device", "cpu"))
        write_rows(options.write, [row | conditions for row in rows])


def sizes(example: str) -> Callable[[str], tuple[int, ...]]:
    """The type of an argument of as many positive numbers, with commas between, as `example`."""

    def read(text: str) -> tuple[int, ...]:
        numbers = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
        if len(numbers) != len(example.split(",")) or min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not {example}, each of them positive")
        return numbers

    return read
