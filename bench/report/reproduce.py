"""The smallest honest version of each of the paper's tables, measured on this machine.

    make paper                                            measures, and writes paper-out/paper.md
    python -m bench.report.reproduce --output elsewhere   the same, in another folder
    python -m bench.report.reproduce --only resnet18      one of the experiments

Each experiment of the paper is measured in one or a few of its cells, with the networks, texts and
sizes of the committed tables, and each value is compared with the committed one. The page is
docs/paper.md with these values alone. A killed run resumes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.quality import paper, sweep
from bench.quality.paper import SHOWN
from bench.quality.sweep import Choice
from bench.report.paper import Page, Results
from bench.tools.commandline import CommandLine
from bench.tools.measuring import CONDITIONS, Table, committed, compared

# Columns that identify a row, of the scores and of the cost.
KEYS = (("selector", "keep", "variant", "samples"), ("network", "design"))
SAMPLES = (32, 128, 512)
ALPHAS = tuple(f"alpha={alpha:g}" for alpha in paper.ALPHAS)


class Experiment(NamedTuple):
    """One experiment of the paper: what it shows, its bench, and the rows that are measured."""

    shows: str
    bench: Callable[[Choice], None]
    choice: Choice


def _sweep(network: str) -> Callable[[Choice], None]:
    return lambda choice: sweep.table(network, choice)


def _studies(network: str) -> Callable[[Choice], None]:
    return lambda choice: sweep.studies(network, choice)


EXPERIMENTS: dict[str, Experiment] = {
    "resnet18": Experiment(
        "ResNet-18 by the L1 norm, with REPAIR, and without the closed loop",
        paper.resnet18,
        Choice(keeps=(0.5,), variants=tuple(paper.references())),
    ),
    "vit": Experiment(
        "ViT by selector",
        _sweep("vit"),
        Choice(selectors=("magnitude", "wanda"), keeps=(0.5, 0.3), variants=SHOWN),
    ),
    "clip": Experiment(
        "the vision tower of a CLIP by selector",
        paper.clip,
        Choice(selectors=("magnitude", "wanda"), keeps=(0.5, 0.3)),
    ),
    "alpha": Experiment(
        "the strength of the ridge, on ResNet-18",
        _studies("resnet18"),
        Choice(selectors=("wanda",), keeps=(0.5,), variants=ALPHAS),
    ),
    "samples": Experiment(
        "calibration samples, on ResNet-18",
        _studies("resnet18"),
        Choice(selectors=("wanda",), keeps=(0.5,), variants=("grail", "ours"), samples=SAMPLES),
    ),
    "cost": Experiment("time and memory of ResNet-18, ViT and CLIP", paper.cost, Choice()),
    "smollm2": Experiment(
        "a language model, MLPs and heads, in the domain of its calibration and off it",
        lambda choice: paper.measure_language("cells", choice),
        Choice(selectors=("wanda",), keeps=(0.5,)),
    ),
}


def differences(folder: Path) -> list[str]:
    """Returns how each score of the experiments' CSV files differs from the committed rows."""
    lines = []
    for path in sorted(folder.glob("*.csv")):
        rows = Table(path, ()).rows
        key = next((key for key in KEYS if rows and set(key) <= rows[0].keys()), None)
        if key is None:  # of another bench, or empty
            continue
        measures = [
            name
            for name in rows[0]
            if name not in (*key, *CONDITIONS, "mean_error") and not name.endswith("_seconds")
        ]
        lines += [f"{path.name}: {line}" for line in compared(rows, committed(path), key, measures)]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measures the experiments, writes the page and prints the differences."""
    parser = CommandLine(
        __doc__,
        "output",
        writes="CSV files, row by row, and paper.md, into --output",
        takes="up to 15 minutes on 2 cores",
        output={"default": Path("paper-out")},
    )
    parser.add_argument("--only", action="append", choices=EXPERIMENTS, help="may be repeated")
    options = parser.read(arguments)
    torch.manual_seed(0)
    for name in dict.fromkeys(options.only or EXPERIMENTS):
        experiment = EXPERIMENTS[name]
        print(f"\n{name}: {experiment.shows}", flush=True)
        start = time.perf_counter()
        experiment.bench(experiment.choice._replace(folder=options.output))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    page = options.output / "paper.md"
    page.write_text(Page(Results(options.output)).text(), encoding="utf-8")
    print("\nThese values beside the committed ones (1.000 is the same):")
    print("\n".join(differences(options.output)) or "none of these rows is committed")
    print(f"The tables: {page}")


if __name__ == "__main__":
    main()
