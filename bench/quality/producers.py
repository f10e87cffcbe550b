"""Producers that are refitted, against the defaults, on networks of vision and sentences.

    python -m bench.quality.producers               every network that is not in the CSV
    python -m bench.quality.producers resnet18      one of them
    python -m bench.quality.producers --show        only the table

Each network at one share of its channels, selected by `greedy`, with `refit_producers` at 3 and 8
steps. Values are paired with those of the defaults by image, crop or sentence. Results are
bench/results/producers.csv, row by row; the scores also become rows of studies_NETWORK.csv. A
killed run resumes. The networks and measures are described in docs/benches.md.
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.quality.sweep import SUBJECTS, Bench, refitted
from bench.tools.commandline import CommandLine
from bench.tools.measuring import Row, Table
from bench.tools.tables import aligned
from grail.report.paired import difference

KEY = ("network", "keep", "steps", "measure")
SELECTOR = "greedy"
# Of each network the share that stays, and the steps.
CELLS: dict[str, tuple[float, tuple[int, ...]]] = {
    "vit": (0.3, (3, 8)),
    "minilm": (0.5, (3, 8)),
    "resnet18": (0.3, (3, 8)),
    "efficientnet": (0.5, (3,)),
}


def measure(name: str, table: Table) -> None:
    """Adds the rows of a network, unless they are there."""
    keep, of_network = CELLS[name]
    if all(any(_is(row, name, steps) for row in table.rows) for steps in of_network):
        print(f"already measured in {table.path}: {name}")
        return
    bench = Bench(SUBJECTS[name](), table.path.parent / f"studies_{name}.csv")
    assert bench.subject.each is not None
    base: dict[str, Tensor] = {}
    for steps in (0, *of_network):
        variant, settings = refitted(steps) if steps else ("ours", {})
        start = time.process_time()
        network, report = bench.compressed(SELECTOR, keep, settings)
        seconds = time.process_time() - start
        bench.note(SELECTOR, keep, variant, network, report)
        found = bench.subject.each(network)
        base = base or found
        _add(table, (name, keep, steps), found, base, bench.subject.samples, seconds)


def _add(
    table: Table,
    key: tuple[str, float, int],
    found: dict[str, Tensor],
    base: dict[str, Tensor],
    samples: int,
    seconds: float,
) -> None:
    """Adds the rows of a compressed network, unless they are there."""
    for measured, values in found.items():
        if (*key, measured) in table:
            continue
        gain = difference(values.tolist(), base[measured].tolist())
        table.add(
            {
                **dict(zip(KEY, (*key, measured), strict=True)),
                "value": round(values.mean().item(), 6),
                "gain": round(gain.value, 6),
                "gain_error": round(gain.error or 0.0, 6),
                "count": len(values),
                "samples": samples,
                "cpu_seconds": round(seconds, 1),
            }
        )


def _is(row: Row, name: str, steps: int) -> bool:
    return (row["network"], int(row["steps"])) == (name, steps)


def lines(rows: list[Row]) -> Iterator[list[str]]:
    """Yields a line for each network, number of steps and measure."""
    for row in rows:
        gain = "" if row["steps"] == "0" else f"{float(row['gain']):+.4f} ± {row['gain_error']}"
        of = (row["network"], row["keep"], row["steps"], row["measure"])
        yield [*of, f"{float(row['value']):.4f}", gain, row["cpu_seconds"]]


def main() -> None:
    """Measures what is missing, and prints the table."""
    parser = CommandLine(
        __doc__,
        rows="*",
        writes="producers.csv and studies_NETWORK.csv, row by row",
        takes="ten minutes on one core",
    )
    parser.add_argument("network", nargs="?", choices=CELLS, help="default: all")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.read()
    torch.manual_seed(0)
    table = Table(options.output / "producers.csv", KEY)
    for name in () if options.show else CELLS:
        if options.network in (None, name):
            measure(name, table)
    header = [*KEY, "value", "gain over the defaults", "CPU seconds"]
    print(aligned(header, list(lines(table.rows)), words=1))


if __name__ == "__main__":
    main()
