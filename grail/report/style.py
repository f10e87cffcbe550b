"""One style of pages and plots: colours by role on light and dark, font, matplotlib's settings."""

import re
from contextlib import AbstractContextManager
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
LIGHT = {
    "paper": "#fbfaf7",
    "card": "#ffffff",
    "ink": "#1d2329",
    "muted": "#5d6872",
    "grid": "#d9dcdf",
    "dense": "#7d8b99",
    "pruned": "#c8643c",
    "restored": "#1f7a72",
}
DARK = {
    "paper": "#14181c",
    "card": "#1c2228",
    "ink": "#e8ebee",
    "muted": "#9aa6b1",
    "grid": "#3a434c",
    "dense": "#8c9aa8",
    "pruned": "#e58a62",
    "restored": "#4dbdb1",
}


def css(colours: dict[str, str]) -> str:
    """Returns the colours as CSS variables, by role."""
    return " ".join(f"--{role}: {colour};" for role, colour in colours.items())


def with_font(svg: str, font: str = FONT) -> str:
    """Returns an SVG of matplotlib with its text in another font."""
    return re.sub(r'font-family: [^;"]*', f"font-family: {font}", svg)


def plotting(colours: dict[str, str], key: str) -> AbstractContextManager[None]:
    """Returns a context in which matplotlib draws and writes in this style.

    Text stays text: small, searchable, in the font of the reader.

    Args:
        colours: by role; ink, muted and grid are used.
        key: salt of the identifiers in an SVG, which makes the file reproducible.
    """
    from matplotlib import rc_context

    settings: Any = {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlecolor": colours["ink"],
        "axes.facecolor": "none",
        "axes.edgecolor": colours["grid"],
        "axes.labelcolor": colours["muted"],
        "axes.axisbelow": True,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.color": colours["grid"],
        "legend.frameon": False,
        "legend.labelcolor": colours["ink"],
        "text.color": colours["ink"],
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": key,
    }
    for axis in ("xtick", "ytick"):
        ticks = {"color": colours["ink"], "major.size": 0, "minor.size": 0}
        settings |= {f"{axis}.{name}": value for name, value in ticks.items()}
    context: AbstractContextManager[None] = rc_context(settings)
    return context
