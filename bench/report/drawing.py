"""The form of every figure of bench/results: a finding as title, its conditions, a legend, panels.

Colours, font and lines are those of a run's page (`grail.report.style`).
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from grail.report import style

WIDTH = 6.5  # inches; text has at least 9 points
TITLE_LETTERS, LETTERS = 68, 86  # of a line of the title, and of other text
MARGIN = 0.06  # inches
INK, MUTED, GRID = (style.LIGHT[role] for role in ("ink", "muted", "grid"))
DENSE, PRUNED, OURS = (style.LIGHT[role] for role in ("dense", "pruned", "restored"))
PAPER, OTHER, FURTHER = "#8465a8", "#d39a2d", "#3f73b5"
# Of a selector alone, in the paper's way, and with the defaults: colour and marker.
LOOKS: dict[str, dict[str, Any]] = {
    "own": {"color": PRUNED, "marker": "o", "markerfacecolor": "white", "label": "alone"},
    "grail": {"color": PAPER, "marker": "D", "markersize": 4, "label": "the paper's way"},
    "ours": {"color": OURS, "marker": "o", "label": "grail's defaults"},
}


def framed(
    title: str,
    under: str,
    rows: int = 1,
    columns: int = 1,
    height: float = 2.6,
    legend: Sequence[dict[str, Any]] = (),
    **shared: Any,
) -> tuple[Any, list[Any]]:
    """Makes a figure below its title, and its panels from top left on.

    Args:
        title: the finding; wrapped, without a full stop.
        under: conditions, below it.
        rows: of panels.
        columns: of panels.
        height: of a panel, in inches.
        legend: settings of a line for each entry, with `label`.
        shared: settings of `subplots`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    whole = {"break_on_hyphens": False}
    first, second = (
        textwrap.wrap(title, TITLE_LETTERS, **whole),
        textwrap.wrap(under, LETTERS, **whole),
    )
    places = [MARGIN, MARGIN + 0.2 * len(first)]
    places.append(places[1] + 0.16 * len(second) + 0.03)
    lines = _legend_columns([entry["label"] for entry in legend])
    head = places[2] + 0.18 * (-(-len(legend) // lines) if legend else 0) + MARGIN
    total = head + height * rows
    figure = Figure(figsize=(WIDTH, total), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / total), wspace=0.06)
    at = [1 - place / total for place in places]
    left = MARGIN / WIDTH
    weight = {"fontsize": 11, "fontweight": "bold", "linespacing": 1.2}
    figure.text(left, at[0], "\n".join(first), va="top", **weight)
    figure.text(left, at[1], "\n".join(second), va="top", color=MUTED)
    if legend:
        box = figure.legend(
            handles=[Line2D([], [], **{"linestyle": "none"} | entry) for entry in legend],
            loc="upper left",
            bbox_to_anchor=(left, at[2]),
            ncols=lines,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.8,
            handletextpad=0.5,
            columnspacing=1.5,
        )
        box.set_in_layout(False)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def _legend_columns(labels: Sequence[str]) -> int:
    """Returns how many entries of a legend stand in a line, in as few lines as fit."""
    for lines in range(1, len(labels) + 1):
        columns = -(-len(labels) // lines)
        widest = [
            max(map(len, labels[i * lines : (i + 1) * lines]), default=0) for i in range(columns)
        ]
        if sum(widest) + 7 * columns <= LETTERS:
            return columns
    return 1


def line(panel: Any, points: Iterable[tuple[float, float]], **look: Any) -> None:
    """Draws points in their order along the axis, joined; nothing where there are none."""
    if ordered := sorted(points):
        panel.plot(*zip(*ordered, strict=True), **look)


def name_lines(panel: Any, ends: dict[str, tuple[float, float]], colours: dict[str, str]) -> None:
    """Writes the name of each line right of its end, apart from each other on a drawn panel."""
    panel.figure.canvas.draw()
    pixels = {name: panel.transData.transform(end)[1] for name, end in ends.items()}
    apart = 10.5 * panel.figure.dpi / 72
    last = float("-inf")
    for name in sorted(pixels, key=lambda name: pixels[name]):
        moved = max(pixels[name], last + apart)
        last = moved
        panel.annotate(
            name,
            ends[name],
            xytext=(6, (moved - pixels[name]) * 72 / panel.figure.dpi),
            textcoords="offset points",
            color=colours[name],
            va="center",
        )


def number_axis(
    axis: Any, ticks: Iterable[float], name: Callable[[float], str] = "{:,g}".format
) -> None:
    """Sets the ticks of an axis, each a number as it is read."""
    places = list(ticks)
    axis.set_ticks(places, [name(place) for place in places])
    axis.set_ticks([], minor=True)


def decades(low: float, high: float, steps: Sequence[float] = (1,)) -> list[float]:
    """Returns the ticks of a logarithmic axis between two values."""
    return [
        tick
        for power in range(-12, 13)
        for step in steps
        if low <= (tick := step * 10.0**power) <= high
    ]
