"""Measured speeds as a table, a CSV file and a figure."""

import csv
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from grail.errors import ExportError, InputError, ModelError
from grail.report import style
from grail.report.formatting import format_bytes, format_number
from grail.runtime.folder import complete_file, require_new_file
from grail.serving.speed import SpeedRow

FIGURES = (".svg", ".png", ".pdf")
# Of the files, and of the one they are compared with.
_BAR, _OTHER = style.LIGHT["restored"], style.LIGHT["dense"]


def require_writable(table: Path | None, figure: Path | None) -> None:
    """Checks, before anything is measured, that a CSV file and a figure can be written.

    Raises:
        InputError: one exists, or the figure's suffix is not known.
        ModelError: matplotlib is not installed.
    """
    for path in filter(None, (table, figure)):
        require_new_file(path)
    if figure is None:
        return
    if figure.suffix not in FIGURES:
        raise InputError(f"a figure ends in {', '.join(FIGURES)}; got {figure}")
    if find_spec("matplotlib") is None:
        raise ModelError(
            "drawing needs matplotlib: pip install 'grail-kernels[report]'",
            page="docs/index.md#install",
        )


def labels(rows: Sequence[SpeedRow]) -> dict[str, str]:
    """Returns by file its name without folders, or with them where two would be the same."""
    short = {row.file: Path(row.file).absolute().name for row in rows}
    names = list(short.values())
    return {file: name if names.count(name) == 1 else file for file, name in short.items()}


def tables(rows: Sequence[SpeedRow]) -> list[tuple[list[str], list[list[str]]]]:
    """Returns header and rows of a table for each batch size: a row for each file.

    The first two columns are text. The runtime stands beside the weights if there are several.
    """
    shown, found = labels(rows), []
    several = len({row.runtime for row in rows}) > 1
    for batch in dict.fromkeys(row.batch for row in rows):
        here = [row for row in rows if row.batch == batch]
        phases = list(dict.fromkeys(row.phase for row in here))
        header = [f"batch {batch}", "weights", "size"]
        for phase in phases:
            header += [f"{phase} {_unit(phase)}", "×"]
        lines = []
        for start in range(0, len(here), len(phases)):
            row = here[start]
            weights = f"{_short(row.runtime)} {row.form}" if several else row.form
            line = [shown[row.file], weights, format_bytes(row.bytes)]
            for row in here[start : start + len(phases)]:
                line += [f"{format_number(row.per_second)} ±{row.spread:.0%}", f"{row.ratio:.2f}"]
            lines.append(line)
        found.append((header, lines))
    return found


def conditions(rows: Sequence[SpeedRow], one_by_one: bool = False) -> str:
    """Returns how rows were measured: runtimes, work, threads, order, and what × is."""
    row = rows[0]
    parts = [*sorted({row.runtime for row in rows})]
    if row.phase != "forward":
        parts.append(f"{row.prompt} prompt and {row.new} new tokens")
    parts.append("1 thread" if row.threads == 1 else f"{row.threads} threads")
    order = "one file after the other" if one_by_one else "files in turn"
    clock, rounds = "CPU" if row.threads == 1 else "wall", len(row.wall)
    medians = f"medians of {rounds} rounds" if rounds > 1 else "one round"
    return (
        f"{', '.join(parts)}; {medians}, {order}; ± half the range; × by "
        f"{clock} time, {labels(rows)[row.against]} = 1"
    )


def save_table(rows: Sequence[SpeedRow], path: Path) -> None:
    """Writes rows as CSV, with the seconds of the rounds; the file is whole or absent."""
    facts = [row.facts() for row in rows]
    with (
        complete_file(path, ExportError, size=0) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(facts[0]))
        writer.writeheader()
        for fact in facts:
            writer.writerow({name: _cell(value) for name, value in fact.items()})


def _cell(value: object) -> object:
    if isinstance(value, tuple):
        return " ".join(f"{each:.6f}" for each in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def draw(rows: Sequence[SpeedRow], path: Path) -> None:
    """Draws a panel of bars for each batch size and phase; the file is whole or absent."""
    from matplotlib.figure import Figure

    shown, panels = labels(rows), list(dict.fromkeys((row.batch, row.phase) for row in rows))
    files = len(rows) // len(panels)
    with (
        style.plotting(style.LIGHT, "speed"),
        complete_file(path, ExportError, size=0) as partial,
    ):
        figure = Figure(figsize=(7, (0.35 * files + 0.8) * len(panels)), layout="constrained")
        each = figure.subplots(len(panels), squeeze=False).flat
        for axes, panel in zip(each, panels, strict=True):
            here = [row for row in rows if (row.batch, row.phase) == panel]
            speeds = [row.per_second for row in here]
            colours = [_OTHER if row.file == row.against else _BAR for row in here]
            bars = axes.barh(range(files), speeds, color=colours)
            axes.bar_label(bars, [f"{row.ratio:.2f}×" for row in here], padding=3)
            axes.set_yticks(range(files), [f"{shown[row.file]} ({row.form})" for row in here])
            axes.invert_yaxis()
            axes.margins(x=0.12)
            axes.set_title(f"{panel[1]}, batch {panel[0]}: {_unit(panel[1])}")
        figure.savefig(partial, dpi=150)


def _short(runtime: str) -> str:
    return runtime.split()[0].replace("llama-cpp-python", "llama.cpp")


def _unit(phase: str) -> str:
    return "img/s" if phase == "forward" else "t/s"
