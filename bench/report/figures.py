"""Every figure of the benches, drawn from its CSV alone, beside it.

    python -m bench.report.figures              draw all of bench/results again
    python -m bench.report.figures FILE.csv     draw one

The title of a figure is what its numbers show. The bench of a CSV is named on its page; a GPU's
come from `python bench/on_gpu.py`.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.report.kernel_figures import accuracy, memory, phases, ridge, roof
from bench.report.networks import NETWORKS, has_axes
from bench.report.quality_figures import calibration, keep_ratios, selectors, serving, studies
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, Row, read_rows
from grail.report import style

# By the name of a CSV, or its first word: the other words are passed on.
FIGURES: dict[str, Callable[[list[Row], str], Any]] = {
    "accuracy": accuracy,
    "gram": roof,
    "ridge": ridge,
    "calibrate": phases,
    "memory": memory,
    "selectors": selectors,
    "studies": studies,
    "levers": keep_ratios,
    "smollm2_calibration": calibration,
    "serving": serving,
}


def kind(path: Path) -> tuple[str, str]:
    """The figure of a CSV, "" if it has none, and the network that it is of."""
    if path.stem in FIGURES:
        return path.stem, ""
    first, _, name = path.stem.partition("_")
    measured = name == "cpu" or name in NETWORKS
    return (first, name) if first in FIGURES and measured else ("", "")


def drawable(folder: Path) -> list[Path]:
    """The CSV files under `folder` that have a figure."""
    return [
        path
        for path in sorted(folder.rglob("*.csv"))
        if (of := kind(path)[0]) and (of != "studies" or has_axes(read_rows(path)))
    ]


def draw(path: Path) -> Path:
    """Draws the figure of a CSV beside it; the same numbers give the same file."""
    of, name = kind(path)
    text = io.StringIO()
    with style.plotting(style.LIGHT, "grail"):
        figure = FIGURES[of](read_rows(path), name)
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = path.with_suffix(".svg")
    drawn.write_text(style.with_font(text.getvalue()), encoding="utf-8")
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Draws; each figure lies beside its CSV."""
    takes = "less than a minute"
    parser = CommandLine(__doc__, writes="an SVG beside every CSV", takes=takes)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.csv")
    for path in parser.read(arguments).files or drawable(RESULTS):
        if not kind(path)[0]:
            parser.error(f"{path.name} has no figure; those with one: {', '.join(FIGURES)}")
        print(draw(path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
