"""Shapes of real models, and the loop over cases that stops at a deadline and counts failures."""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from bench.tools.commandline import CommandLine, compare, sizes, write
from bench.tools.measuring import Row, machine

Measured = TypeVar("Measured")

# Consumer rows O and channels H of MLP sites; the quarter has Llama-2-7B's proportions.
MLP_SITES = {
    "smollm2-135m": (576, 1536),
    "qwen3-0.6b": (1024, 3072),
    "llama-2-7b-quarter": (1024, 2752),
    "llama-2-7b": (4096, 11008),
    "llama-3-8b": (4096, 14336),
}
GPU_MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-2-7b", "llama-3-8b")


def parse_mlp(
    doc: str | None,
    arguments: list[str] | None,
    on_cpu: tuple[str, ...],
    *shared: str,
    **settings: Any,
) -> argparse.Namespace:
    """The options of a bench of MLP sites; `shapes`: O and H of those named, or of usual ones."""
    names = ("model", "keep", *shared, "device", "threads", "repeats", "seconds")
    parser = CommandLine(doc, *names, model={"choices": [*MLP_SITES]}, **settings)
    parser.add_argument("--shape", action="append", type=sizes("O,H"), metavar="O,H", default=[])
    options = parser.read(arguments)
    usual = on_cpu if options.device == "cpu" else GPU_MODELS
    models = options.model or (() if options.shape else usual)
    options.shapes = [*options.shape, *(MLP_SITES[model] for model in models)]
    return options


def announce(device: str) -> None:
    """Prints the conditions of the machine."""
    print(", ".join(f"{name} {value}" for name, value in machine(device).items() if value))


def run(
    options: argparse.Namespace,
    cases: Iterable[tuple[str, Callable[[], list[Measured]]]],
    show: Callable[[list[Measured]], str],
    records: Callable[[list[Measured]], list[Row]] = list,
) -> int:
    """Measures case by case until `--seconds` are over, prints each, and saves it at once.

    Args:
        options: of the command line.
        cases: a name each, and a call that measures its rows. It raises ArithmeticError where a
            result is wrong: nothing is timed then.
        show: the rows of a case as text.
        records: all rows as those of a CSV; default: they are.

    Returns:
        The exit code: 1 if a result was wrong.
    """
    deadline = time.monotonic() + options.seconds
    rows: list[Measured] = []
    failed = False
    write(options, records(rows))
    for name, measure in cases:
        if time.monotonic() > deadline:
            print(f"{name}: left out, --seconds are over")
            continue
        try:
            found = measure()
        except ArithmeticError as wrong:
            print(wrong)
            failed = True
            continue
        rows += found
        print(show(found), flush=True)
        write(options, records(rows))
    compare(options, records(rows))
    return int(failed)
