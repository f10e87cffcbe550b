"""The command lines of the benchmarks: one parser, and the options that several of them share."""

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.tools.measuring import (
    CONDITIONS,
    PERCENTILES,
    RESULTS,
    Row,
    committed,
    compared,
    machine,
    write_rows,
)

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
}


class CommandLine(argparse.ArgumentParser):
    """The parser of a bench.

    Its help adds to the docstring what is written and how long it takes. Made and read before any
    work, so that `--help` touches nothing. A bench with `results` or `rows` has `--output`: a
    folder or a CSV file. Rows written elsewhere than into bench/results are compared with those
    that are committed there.

    Args:
        doc: of the bench.
        shared: options of `SHARED`.
        takes: how long it takes.
        writes: what it writes; default, as `results` or `rows` say.
        results: name of the CSV, without `.csv`, which is written at the end and with `--output`
            only. A "{device}" in it becomes `_cpu`; on a GPU it falls away, and the committed file
            lies in the folder gpu.
        rows: name of the CSV that grows row by row, in bench/results or `--output`, so that a
            killed run resumes. With a "*" in it these are several, and `--output` is their folder.
        instead: names in place of `results`, by the option that is given.
        settings: changed settings of shared options, by name.
    """

    def __init__(
        self,
        doc: str | None,
        *shared: str,
        takes: str,
        writes: str = "",
        results: str = "",
        rows: str = "",
        instead: Mapping[str, str] | None = None,
        **settings: dict[str, Any],
    ):
        self._results, self._rows, self._instead = results, rows, instead or {}
        if not writes and rows:
            writes = f"bench/results/{rows}.csv, row by row; with --output elsewhere"
        elif not writes:
            writes = f"a table to the screen; with --output FOLDER, {self._committed('cpu').name}"
        super().__init__(
            description=doc,
            epilog=f"writes: {writes}\ntakes: {takes}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name in shared:
            self.add_argument(
                f"--{name.replace('_', '-')}", **SHARED[name] | settings.get(name, {})
            )
        if results or rows:
            into = "bench/results; the committed CSV" if rows else "nothing is written"
            self.add_argument(
                "--output",
                type=Path,
                default=RESULTS if rows else None,
                metavar="FOLDER" if "*" in rows else "FOLDER or FILE.csv",
                help=f"for the rows, which are compared with the committed ones (default: {into})",
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
        for option, name in self._instead.items():
            if getattr(options, option):
                self._results = name
        output = getattr(options, "output", None)
        if (self._results or self._rows) and output:
            options.output = output = self._path(output, device)
        if output:
            is_file = bool(self._results or self._rows) and "*" not in self._rows
            self._require_writable(output, is_file=is_file)
        return options

    def _require_writable(self, output: Path, *, is_file: bool) -> None:
        """Ends the process, before any work, where `--output` could not be written after it."""
        if is_file and output.is_dir():
            self.error(f"--output: {output} is a folder; give a file that ends in .csv")
        folder = output.parent if is_file else output
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir():
            self.error(f"--output: {nearest} is a file; give a folder")
        for path in (nearest, output):
            if path.exists() and not os.access(path, os.W_OK):
                self.error(f"--output: {path} cannot be written; give another folder")

    def _path(self, output: Path, device: str) -> Path:
        """Returns the file or, of several files, the folder."""
        if "*" in self._rows:
            if output.suffix == ".csv":
                self.error("--output: this bench writes several files; give a folder")
            return output
        if output.suffix == ".csv":
            return output
        known = self._committed(device)
        return known if output.resolve() == RESULTS else output / known.name

    def _committed(self, device: str) -> Path:
        name = (self._results or self._rows).replace("{device}", "_cpu" if device == "cpu" else "")
        folder = RESULTS / "gpu" if "{device}" in self._results and device != "cpu" else RESULTS
        return folder / f"{name}.csv"


MEASURES = (*PERCENTILES, "error", "ratio", "memory")


def save(options: argparse.Namespace, rows: list[Row], measures: Sequence[str] = MEASURES) -> None:
    """Writes all rows of a bench to `--output`, and compares them with the committed ones.

    Args:
        options: of the bench.
        rows: all of them.
        measures: the measured columns; all others, but for the conditions, identify a row.
    """
    write(options, rows)
    compare(options, rows, measures)


def write(options: argparse.Namespace, rows: list[Row]) -> None:
    """Writes the rows so far to `--output`, each with the conditions of the machine."""
    if options.output and rows:
        conditions = machine(getattr(options, "device", "cpu"))
        write_rows(options.output, [row | conditions for row in rows])


def compare(
    options: argparse.Namespace, rows: list[Row], measures: Sequence[str] = MEASURES
) -> None:
    """Prints how the rows in `--output` differ from the committed ones, as `save` describes."""
    if not options.output or not rows:
        return
    key = [name for name in rows[0] if name not in (*measures, *CONDITIONS)]
    for line in compared(rows, committed(options.output), key, measures):
        print(f"beside the committed CSV: {line}")


def sizes(example: str) -> Callable[[str], tuple[int, ...]]:
    """The type of an argument of as many positive numbers, with commas between, as `example`."""

    def read(text: str) -> tuple[int, ...]:
        numbers = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
        if len(numbers) != len(example.split(",")) or min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not {example}, each of them positive")
        return numbers

    return read
