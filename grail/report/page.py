"""A `Report` as one HTML file that a person understands: no script, no network, light and dark.

Bars are HTML, which a phone lays out as well. Plots are SVG written into the page: matplotlib draws
them in placeholder colours that are then replaced by the page's CSS variables, so one drawing is
legible on a light and on a dark screen.
"""

import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from grail.report import completions
from grail.report.formatting import format_bytes, format_count, format_number, format_seconds
from grail.report.report import Evaluation, InputReport, Report, SiteReport
from grail.report.summary import (
    before_after,
    compensates,
    error_pairs,
    evaluation_table,
    explanation,
    headline,
    keep_in_words,
    labelled,
    resumed_sentence,
    size_sentence,
    stage_table,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder drawn by matplotlib → CSS variable of the page.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_PRUNED, _RESTORED = "#050505", "#060606"
_VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _GRID: "grid",
    _PRUNED: "pruned",
    _RESTORED: "restored",
}
# Colour of a row by its role, a CSS variable.
_COLOURS = {
    "dense": "dense",
    "pruned": "pruned",
    "compensated": "restored",
    "restored": "restored",
}
_PHASES = {
    "forward": "forward passes",
    "gram": "Gram matrices",
    "select": "selection",
    "solve": "ridge solve",
    "absorb": "absorb",
    "checkpoint": "state for resuming",
    "other": "everything else",
}
_KINDS = {
    "mlp": "MLP channels",
    "heads": "attention heads",
    "experts": "experts' channels",
    "shared_experts": "shared experts' channels",
    "conv": "convolution channels",
}


def save_page(report: Report, path: str | Path) -> None:
    """Writes `page(report)` to `path`."""
    Path(path).write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """One self-contained HTML document that shows a report.

    Args:
        report: of a compression; evaluation, site errors and memory may be missing.

    Returns:
        The text of an HTML file without scripts and without references to other files.
    """
    name = str(report.model.get("name", "model"))
    body = "\n".join(
        [
            _header(report, name),
            _evaluation_section(report),
            _samples_section(report),
            _error_section(report),
            _width_section(report.sites),
            _cost_section(report),
            _notes_section(report.notes),
            _details_section(report),
        ]
    )
    return _DOCUMENT.format(title=escape(f"GRAIL: {name}"), style=_STYLE, body=body)


def _header(report: Report, name: str) -> str:
    settings, kinds = report.settings, dict.fromkeys(site.kind for site in report.sites)
    before, after = before_after(report.model.get("parameters"))
    facts = [
        f"keep {keep_in_words(settings['keep'], report.sites)}" if "keep" in settings else "",
        f"sites {', '.join(kinds)}" if kinds else "",
        f"selector {_text(settings['selector'])}" if "selector" in settings else "",
        f"{format_count(before)} → {format_count(after)} parameters" if before and after else "",
    ]
    figure, claim = headline(report)
    return (
        f"<header><p class='eyebrow'>GRAIL compression report</p><h1>{escape(name)}</h1>"
        f"<p class='facts'>{escape(' · '.join(fact for fact in facts if fact))}</p>"
        f"<p class='hero'><b>{escape(figure)}</b> <span>{escape(claim)}</span></p>"
        f"<p class='lead'>{escape(explanation(report))}</p>"
        + (f"<p class='lead'>{escape(line)}</p>" if (line := verdict(report)) else "")
        + "</header>"
    )


def _evaluation_section(report: Report) -> str:
    rows = report.evaluation
    if not rows:
        return ""
    header, table = evaluation_table(labelled(rows))
    tokens = next(iter(rows.values())).tokens
    caption = [
        f"Perplexity over {tokens:,} predicted tokens of held-out text; lower is better.",
        "Each narrowed model was calibrated in a run of its own, so one selector may choose other "
        "channels with compensation than without."
        if report.same_choice
        else "",
    ]
    if sizes := size_sentence(report):
        caption.append(f"On disk: {sizes}.")
    return _section(
        "Cost and savings",
        _table(header, table, numeric=True),
        _perplexity_bars(rows),
        caption=" ".join(filter(None, caption)),
    )


def _samples_section(report: Report) -> str:
    """Greedy completions of each model, one under the other."""
    if not report.samples:
        return ""
    labels = dict(zip(report.evaluation, labelled(report.evaluation), strict=True))
    parts = []
    for sample in report.samples:
        rest = "".join(
            f"<dt>{escape(labels.get(role, role))}</dt><dd>{escape(text)}</dd>"
            for role, text in sample.items()
            if role != "prompt"
        )
        parts.append(
            f"<dl><dt>prompt</dt><dd class='muted'>{escape(sample['prompt'])}</dd>{rest}</dl>"
        )
    return _section(
        "Sample completions",
        *parts,
        caption="Greedy decoding from the first tokens of sequences of the held-out text. Repeats "
        "in the table above: the share of 4-grams of tokens that occur earlier in the same "
        f"completion, over up to {completions.PROMPTS} completions.",
    )


def _error_section(report: Report) -> str:
    pairs = error_pairs(report.sites)
    if not pairs:
        return ""
    caption = (
        "Relative error of what each site hands to the next layer, on the calibration text: "
        "‖T − W′RX‖ / ‖T‖, where T is its own output WX, plus its drift from the dense network "
        "where that is followed. Lower is better"
    )
    if not compensates(report):
        return _section(
            "Output error by site",
            _error_plot(report.sites, compensated=False),
            caption=f"{caption}. Nothing was compensated.",
        )
    better = sum(after < before for before, after in pairs)
    return _section(
        "What compensation repairs",
        _error_plot(report.sites),
        caption=(
            f"{caption}; the distance between the points is what compensation took away. {better} "
            f"of {len(pairs)} sites improved." + _read_by(report.inputs)
        ),
    )


def _width_section(sites: Sequence[SiteReport]) -> str:
    """Only where sites of a kind keep different shares."""
    shares = {kind: _shares_kept(sites, kind) for kind in dict.fromkeys(s.kind for s in sites)}
    uneven = {kind: kept for kind, kept in shares.items() if len(set(kept.values())) > 1}
    if not uneven:
        return ""
    return _section(
        "Who keeps how much",
        _width_plot(uneven),
        caption="Share of the channels that each block keeps; the line is their median.",
    )


def _shares_kept(sites: Sequence[SiteReport], kind: str) -> dict[int, float]:
    """By block, the share of the channels that stays in its sites of that kind."""
    kept: dict[int, int] = {}
    channels: dict[int, int] = {}
    for site in sites:
        if site.kind == kind:
            kept[site.block] = kept.get(site.block, 0) + site.kept
            channels[site.block] = channels.get(site.block, 0) + site.channels
    return {block: kept[block] / channels[block] for block in kept}


def _read_by(inputs: Sequence[InputReport]) -> str:
    """What correcting attention came to."""
    if not inputs:
        return ""
    before, after = (
        statistics.median(getattr(row, name) for row in inputs)
        for name in ("baseline_error", "error")
    )
    return (
        f" Attention was corrected in {len(inputs)} blocks: what it reads differs from the dense "
        f"network's by {before:.1%} in the median, by {after:.1%} once projections see through it."
    )


def _cost_section(report: Report) -> str:
    plots = [_stages(report.stages), _time_bars(report.seconds), _memory_bars(report.memory)]
    if not any(plots):
        return ""
    captions = [
        resumed_sentence(report),
        _time_caption(report.seconds),
        _memory_caption(report.memory),
    ]
    return _section("Time and memory", *plots, caption=" ".join(filter(None, captions)))


def _stages(stages: Mapping[str, Mapping[str, float]]) -> str:
    if not stages:
        return ""
    title = "<figcaption>Wall time of the whole command by stage</figcaption>"
    return f"<figure>{title}{_table(*stage_table(stages), numeric=True)}</figure>"


def _time_caption(seconds: dict[str, float]) -> str:
    own = sum(seconds.get(phase, 0.0) for phase in ("gram", "select", "solve", "absorb"))
    forward = seconds.get("forward", 0.0)
    if not forward:
        return ""
    return f"GRAIL's own work took {own / forward:.0%} of the time of the forward passes."


def _memory_caption(memory: dict[str, int]) -> str:
    predicted, measured = memory.get("predicted_peak"), memory.get("measured_peak")
    if not predicted or not measured:
        return ""
    return f"The prediction of the peak is off by {predicted / measured - 1:+.1%}."


def _notes_section(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<section><h2>Notes</h2><ul>{items}</ul></section>"


def _keep(report: Report) -> str:
    return keep_in_words(report.settings.get("keep"), report.sites)


def _details_section(report: Report) -> str:
    settings = report.settings
    groups = {
        "Settings": {**settings, "keep": keep} if (keep := _keep(report)) else settings,
        "Model": report.model,
        "Calibration": report.calibration,
        "Origin": report.provenance,
        "Versions": report.versions,
    }
    tables = "".join(
        f"<h3>{title}</h3>"
        + _table(["", ""], [[key, _text(value)] for key, value in group.items()])
        for title, group in groups.items()
        if group
    )
    return (
        f"<details><summary>Settings, origin and versions</summary>{tables}</details>"
        f"<details><summary>All {len(report.sites)} sites</summary>{_site_table(report.sites)}"
        "</details>"
        + (
            f"<details><summary>What attention reads in {len(report.inputs)} blocks</summary>"
            f"{_input_table(report.inputs)}</details>"
            if report.inputs
            else ""
        )
    )


def _input_table(inputs: Sequence[InputReport]) -> str:
    header = ["attention", "tokens", "alpha", "drift undone", "drift", "error"]
    rows = [
        [
            row.name,
            f"{row.tokens:,}",
            "–" if row.alpha is None else f"{row.alpha:g}",
            f"{row.drift_correction:.0%}",
            f"{row.baseline_error:.4f}",
            f"{row.error:.4f}",
        ]
        for row in inputs
    ]
    return _table(header, rows, numeric=True)


def _site_table(sites: Sequence[SiteReport]) -> str:
    header = [
        "site",
        "kept",
        "of",
        "tokens",
        "alpha",
        "drift undone",
        "damping",
        "retries",
        "pruned error",
        "error",
    ]
    rows = [
        [
            site.name,
            f"{site.kept:,}",
            f"{site.channels:,}",
            f"{site.tokens:,}",
            "–" if site.alpha is None else f"{site.alpha:g}",
            f"{site.drift_correction:.0%}",
            f"{site.damping:.1e}",
            str(site.retries),
            *("–" if e is None else f"{e:.4f}" for e in (site.baseline_error, site.error)),
        ]
        for site in sites
    ]
    return _table(header, rows, numeric=True)


def _section(title: str, *parts: str, caption: str = "") -> str:
    note = f"<p class='caption'>{escape(caption)}</p>" if caption else ""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}{note}</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: bool = False) -> str:
    """An HTML table of text cells; `numeric` aligns all but the first column to the right."""
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    lines = (
        f"<tr><th scope='row'>{escape(first)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    kind = " class='numeric'" if numeric else ""
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f"<div class='scroll'><table{kind}>{top}<tbody>{''.join(lines)}</tbody></table></div>"


def _text(value: object) -> str:
    """A setting as a reader writes it: lists with commas, dictionaries as before → after."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else str(value)


def _perplexity_bars(evaluation: Mapping[str, Evaluation]) -> str:
    values = [row.perplexity for row in evaluation.values()]
    labels = [format_number(value) for value in values]
    names = list(labelled(evaluation))
    colours = [_COLOURS.get(role, "muted") for role in evaluation]
    title = "Perplexity"
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    if max(finite) > 20 * min(finite):  # else the small bars would all look alike
        title, values = "Perplexity, on a logarithmic scale", [math.log(value) for value in values]
    return _bars(title, names, values, labels, colours)


def _time_bars(seconds: Mapping[str, float]) -> str:
    """Every phase of a run, those without a name here by their own."""
    order = [*_PHASES, *(phase for phase in seconds if phase not in _PHASES)]
    phases = {p: seconds[p] for p in order if p in seconds and p != "total"}
    total = sum(phases.values())
    if not total:
        return ""
    names = [_PHASES.get(phase, phase) for phase in phases]
    labels = [f"{format_seconds(value)} ({value / total:.0%})" for value in phases.values()]
    colours = ["dense" if phase == "forward" else "restored" for phase in phases]
    title = f"Time of the compression by phase, {format_seconds(total)} in all"
    return _bars(title, names, list(phases.values()), labels, colours)


def _memory_bars(memory: Mapping[str, int]) -> str:
    names = {"predicted_peak": "predicted", "measured_peak": "measured"}
    known = {label: memory[key] for key, label in names.items() if memory.get(key)}
    if not known:
        return ""
    labels = [format_bytes(value) for value in known.values()]
    colours = ["dense" if name == "predicted" else "restored" for name in known]
    title = "Peak memory of the compression"
    return _bars(title, list(known), list(known.values()), labels, colours)


def _bars(
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    colours: Sequence[str],
) -> str:
    """Horizontal bars in proportion to `values`, one a name, each with its label after it."""
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    longest = max(finite) or 1.0
    rows = "".join(
        f"<div class='name'>{escape(name)}</div><div class='bar'>"
        f"<i style='width: {65 * max(value, 0) / longest:.4f}%; background: var(--{colour})'></i>"
        f"<span>{escape(label)}</span></div>"
        for name, value, label, colour in zip(names, finite, labels, colours, strict=True)
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><div class='bars'>{rows}</div></figure>"
    )


def _width_plot(shares: Mapping[str, Mapping[int, float]]) -> str:
    """One panel a kind of site: a bar for each block."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, panels = _figure(height=1.8 * len(shares) + 0.3, rows=len(shares))
    for axes, (kind, by_block) in zip(panels, shares.items(), strict=True):
        axes.bar(list(by_block), list(by_block.values()), width=0.7, color=_RESTORED)
        axes.axhline(statistics.median(by_block.values()), color=_MUTED, linewidth=1)
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        title = _KINDS.get(kind, kind)
        axes.set_title(title, loc="left", color=_INK, fontsize=10, parse_math=False)
    panels[-1].set_xlabel("block", color=_MUTED)
    summary = "; ".join(
        f"{_KINDS.get(kind, kind)} {min(s.values()):.0%} to {max(s.values()):.0%}"
        for kind, s in shares.items()
    )
    return _svg(figure, "widths", "Share of the channels that stays, by block", summary)


def _error_plot(sites: Sequence[SiteReport], compensated: bool = True) -> str:
    """One panel a kind of site: error before and after by block, joined by a stem.

    Args:
        sites: of a report.
        compensated: whether there is an error after.
    """
    from matplotlib.ticker import MaxNLocator

    kinds = list(dict.fromkeys(site.kind for site in sites if error_pairs([site])))
    figure, panels = _figure(height=2.5 * len(kinds) + 0.45, rows=len(kinds))
    for axes, kind in zip(panels, kinds, strict=True):
        known = [site for site in sites if site.kind == kind and error_pairs([site])]
        blocks = [site.block for site in known]
        before, after = zip(*error_pairs(known), strict=True)
        axes.plot(blocks, before, "o", color=_PRUNED, markersize=5, label="plain pruning")
        if compensated:
            axes.vlines(blocks, before, after, color=_GRID, linewidth=2.5, zorder=1)
            axes.plot(blocks, after, "o", color=_RESTORED, markersize=5, label="compensated")
        axes.set_ylim(0, 1.08 * max(*before, *after) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        title = _KINDS.get(kind, kind)
        axes.set_title(title, loc="left", color=_INK, fontsize=10, parse_math=False)
    panels[-1].set_xlabel("block", color=_MUTED)
    panels[0].legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        labelcolor=_INK,
    )
    pairs = error_pairs(sites)
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    summary = f"{len(pairs)} sites; median {before:.3f} with plain pruning"
    if compensated:
        summary += f", {after:.3f} compensated"
    return _svg(figure, "errors", "Relative output error by site", summary)


def _figure(height: float, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure outside pyplot, `height` inches, with the axes stripped to what is read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height), layout="constrained")
    panels = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for axes in panels:
        axes.set_facecolor("none")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(length=0, colors=_INK)
    return figure, panels


def _svg(figure: "Figure", key: str, title: str, summary: str) -> str:
    """The figure as inline SVG with a title and a description for screen readers.

    Identifiers get `key` as a prefix: the page holds several drawings, and they must not collide.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text (small, searchable, in the page's font); the salt makes the file reproducible.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r" font-family: [^;]*;", "", drawing)  # the page's own font
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", drawing)
    for placeholder, variable in _VARIABLES.items():
        drawing = drawing.replace(placeholder, f"var(--{variable})")
    labels = f"<title>{escape(title)}</title><desc>{escape(summary)}</desc>"
    drawing = re.sub(r"<svg([^>]*)>", rf'<svg role="img"\g<1>>{labels}', drawing, count=1)
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>"


_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1d2329;
  --muted: #5d6872; --grid: #d9dcdf; --dense: #7d8b99; --pruned: #c8643c; --restored: #1f7a72; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --card: #1c2228; --ink: #e8ebee;
  --muted: #9aa6b1; --grid: #3a434c; --dense: #8c9aa8; --pruned: #e58a62; --restored: #4dbdb1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .1rem 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .9rem; }
h3 { font-size: .95rem; margin: 1.3rem 0 .4rem; }
.eyebrow, .facts, .caption, .lead { color: var(--muted); margin: 0; }
.eyebrow { font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; }
.caption { font-size: .88rem; margin-top: .8rem; } .lead + .lead { margin-top: .6rem; }
.hero { margin: 1.6rem 0 .5rem; font-size: 1.3rem; line-height: 1.15; }
.hero b { font-size: 3.6rem; color: var(--restored); margin-right: .4rem; letter-spacing: -.02em; }
section, details { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem;
  padding: 1.3rem 1.4rem; margin-top: 1.2rem; }
summary { cursor: pointer; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
th[scope=col] { color: var(--muted); font-weight: 500; }
td { overflow-wrap: anywhere; }
.numeric td, .numeric th[scope=col] + th { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th:first-child { padding-left: 0; } th:last-child, td:last-child { padding-right: 0; }
figure { margin: 1.4rem 0 0; } h2 + figure { margin-top: 0; }
figcaption { font-size: .92rem; font-weight: 600; margin-bottom: .4rem; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; }
.bars { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .35rem .8rem;
  align-items: center; font-size: .92rem; }
.bar { display: flex; align-items: center; gap: .5rem; white-space: nowrap; }
.bar i { height: 1.15rem; min-width: 1px; border-radius: .15rem; }
dl { margin: 0 0 1.2rem; font-size: .92rem; overflow-wrap: anywhere; }
dt { color: var(--muted); font-size: .85rem; margin-top: .5rem; }
dd { margin: 0; white-space: pre-wrap; } dd.muted { color: var(--muted); }
ul { margin: 0; padding-left: 1.2rem; }
@media (max-width: 32rem) { main { padding: 1.5rem .75rem 2rem; }
  section, details { padding: 1rem .9rem; } .hero b { font-size: 2.8rem; }
  table { font-size: .72rem; } th, td { padding: .35rem .2rem; }
  .numeric th[scope=col] { white-space: normal; }
  .bars { grid-template-columns: minmax(0, 7.5rem) minmax(0, 1fr); } }
@media print { body { background: none; } section, details { break-inside: avoid; } }
"""

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
