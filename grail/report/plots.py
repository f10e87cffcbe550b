"""Plots of a report's page, drawn by matplotlib as SVG that is written into the page.

matplotlib draws in placeholder colours, which become the page's CSS variables, so one drawing is
legible on a light and on a dark screen.
"""

import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from grail.report import style
from grail.report.report import SiteReport
from grail.report.summary import error_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder drawn by matplotlib → CSS variable of the page.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_PRUNED, _RESTORED = "#050505", "#060606"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _PRUNED: "pruned", _RESTORED: "restored"}
_COLOURS = {role: placeholder for placeholder, role in _VARIABLES.items()}
_KINDS = {
    "mlp": "MLP channels",
    "heads": "attention heads",
    "experts": "experts' channels",
    "shared_experts": "shared experts' channels",
    "conv": "convolution channels",
}


@dataclass(frozen=True)
class Drawing:
    """A plot with its title."""

    title: str
    svg: Markup


def draw_widths(sites: Sequence[SiteReport]) -> Drawing | None:
    """Draws a panel for each kind of site, with a bar for each block; None if widths are even."""
    from matplotlib.ticker import PercentFormatter

    shares = {kind: _shares_kept(sites, kind) for kind in dict.fromkeys(s.kind for s in sites)}
    shares = {kind: kept for kind, kept in shares.items() if len(set(kept.values())) > 1}
    if not shares:
        return None
    summary = "; ".join(
        f"{_KINDS.get(kind, kind)} {min(kept.values()):.0%} to {max(kept.values()):.0%}"
        for kind, kept in shares.items()
    )
    with style.plotting(_COLOURS, "widths"):
        figure, panels = _figure(1.8 * len(shares) + 0.3, list(shares))
        for axes, by_block in zip(panels, shares.values(), strict=True):
            axes.bar(list(by_block), list(by_block.values()), width=0.7, color=_RESTORED)
            axes.axhline(statistics.median(by_block.values()), color=_MUTED, linewidth=1)
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        return _svg(figure, "widths", "Share of the channels that stays, by block", summary)


def _shares_kept(sites: Sequence[SiteReport], kind: str) -> dict[int, float]:
    """Returns, by block, the share of the channels that stays in its sites of that kind."""
    kept: dict[int, int] = {}
    channels: dict[int, int] = {}
    for site in sites:
        if site.kind == kind:
            kept[site.block] = kept.get(site.block, 0) + site.kept
            channels[site.block] = channels.get(site.block, 0) + site.channels
    return {block: kept[block] / channels[block] for block in kept}


def draw_errors(sites: Sequence[SiteReport], compensated: bool = True) -> Drawing:
    """Draws a panel for each kind of site: error before and after by block, joined by a stem.

    Args:
        sites: of a report; at least one has both errors.
        compensated: whether there is an error after.
    """
    pairs = error_pairs(sites)
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    summary = f"{len(pairs)} sites; median {before:.3f} with plain pruning"
    if compensated:
        summary += f", {after:.3f} compensated"
    kinds = list(dict.fromkeys(site.kind for site in sites if error_pairs([site])))
    with style.plotting(_COLOURS, "errors"):
        figure, panels = _figure(2.5 * len(kinds) + 0.45, kinds)
        for axes, kind in zip(panels, kinds, strict=True):
            _error_panel(axes, [site for site in sites if site.kind == kind], compensated)
        panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        return _svg(figure, "errors", "Relative output error by site", summary)


def _error_panel(axes: "Axes", sites: Sequence[SiteReport], compensated: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    known = [site for site in sites if error_pairs([site])]
    blocks = [site.block for site in known]
    before, after = zip(*error_pairs(known), strict=True)
    axes.plot(blocks, before, "o", color=_PRUNED, markersize=5, label="plain pruning")
    if compensated:
        axes.vlines(blocks, before, after, color=_GRID, linewidth=2.5, zorder=1)
        axes.plot(blocks, after, "o", color=_RESTORED, markersize=5, label="compensated")
    axes.set_ylim(0, 1.08 * max(*before, *after) or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(axis="y", linewidth=0.8)


def _figure(height: float, kinds: Sequence[str]) -> "tuple[Figure, list[Axes]]":
    """Makes a figure outside pyplot, `height` inches, with a bare panel for each kind of site."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, height), layout="constrained")
    panels = list(figure.subplots(len(kinds), 1, squeeze=False)[:, 0])
    for axes, kind in zip(panels, kinds, strict=True):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axes.set_title(_KINDS.get(kind, kind))
    panels[-1].set_xlabel("block")
    return figure, panels


def _svg(figure: "Figure", key: str, title: str, summary: str) -> Drawing:
    """Writes a figure as inline SVG with a title and a description for screen readers.

    Identifiers get `key` as a prefix: the page holds several drawings, and they must not collide.
    """
    buffer = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    drawing = style.with_font(buffer.getvalue(), "inherit")
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", drawing)
    for placeholder, variable in _VARIABLES.items():
        drawing = drawing.replace(placeholder, f"var(--{variable})")
    labels = Markup("<title>{}</title><desc>{}</desc>").format(title, summary)
    start = f'<svg role="img"{drawing[4 : drawing.index(">")]}>{labels}'
    return Drawing(title, Markup(start + drawing[drawing.index(">") + 1 :]))
