"""A `Report` as one HTML file that a person understands: no script, no network, light and dark.

Plots are SVG written into the page. Matplotlib draws them in placeholder colours that are then
replaced by the page's CSS variables, so one drawing is legible on a light and on a dark screen.
"""

import io
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grail.report import Evaluation, InputReport, Report, SiteReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder drawn by matplotlib → CSS variable of the page.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_DENSE, _PRUNED, _RESTORED = "#040404", "#050505", "#060606"
_VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _GRID: "grid",
    _DENSE: "dense",
    _PRUNED: "pruned",
    _RESTORED: "restored",
}
_MODELS = {"dense": _DENSE, "pruned": _PRUNED, "restored": _RESTORED}
_PHASES = {
    "forward": "forward passes",
    "gram": "Gram matrices",
    "select": "selection",
    "solve": "ridge solve",
    "absorb": "absorb",
    "other": "everything else",
}
_FEW = 4  # shares that are listed; as many kinds may be narrowed at once
_KINDS = {
    "mlp": "MLP channels",
    "heads": "attention heads",
    "experts": "experts' channels",
    "shared_experts": "shared experts' channels",
    "conv": "convolution channels",
}


def headline(report: Report) -> tuple[str, str]:
    """The one figure that sums a run up, and what it says: ("64%", "of the lost … came back")."""
    share = report.recovered
    if share is not None:
        return f"{share:.0%}", "of the lost log-perplexity came back"
    pairs = _error_pairs(report.sites)
    if pairs and report.settings.get("compensate", True):
        ratio = statistics.median(after / before if before else 1.0 for before, after in pairs)
        return f"{ratio:.2f}×", "the output error of plain pruning, in the median site"
    before, after = _before_after(report.model.get("parameters"))
    if before and after:
        return f"{after / before:.0%}", "of the parameters are left"
    return str(len(report.sites)), "sites compressed"


def evaluation_table(
    evaluation: dict[str, Evaluation],
) -> tuple[list[str], list[list[str]]]:
    """Header and text rows of the table of evaluated models, for a page or a terminal."""
    header = ["model", "perplexity", "parameters", "bytes on disk", "tokens/s"]
    rows = [
        [
            name,
            format_number(row.perplexity),
            format_count(row.parameters),
            format_bytes(row.bytes),
            format_number(row.tokens_per_second),
        ]
        for name, row in evaluation.items()
    ]
    return header, rows


def format_bytes(count: float) -> str:
    """`count` bytes with a decimal unit: 269060552 → "269 MB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def format_count(count: float) -> str:
    """`count` things, shortened: 134515008 → "135 M"."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def format_number(value: float) -> str:
    """Three significant digits, and below 10⁹ never fewer than the integer part: 25.7, 1234."""
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits < 6 and abs(value) < 1e9 else f"{value:.2e}"


def format_seconds(seconds: float) -> str:
    """A wall time: 0.42 s, 42.1 s, 3 min 05 s."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _scaled(value: float, units: Sequence[str]) -> str:
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    text = format_number(value) if power else str(round(value))
    return f"{text} {units[power]}".rstrip()


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
            _evaluation_section(report.evaluation),
            _error_section(report.sites, report.inputs),
            _width_section(report.sites),
            _cost_section(report),
            _notes_section(report.notes),
            _details_section(report),
        ]
    )
    return _DOCUMENT.format(title=escape(f"GRAIL: {name}"), style=_STYLE, body=body)


def _header(report: Report, name: str) -> str:
    settings = report.settings
    before, after = _before_after(report.model.get("parameters"))
    facts = [
        f"keep {_shares(settings['keep'])}" if "keep" in settings else "",
        f"sites {_text(settings['sites'])}" if "sites" in settings else "",
        f"selector {_text(settings['selector'])}" if "selector" in settings else "",
        f"{format_count(before)} → {format_count(after)} parameters" if before and after else "",
    ]
    figure, claim = headline(report)
    return (
        f"<header><p class='eyebrow'>GRAIL compression report</p><h1>{escape(name)}</h1>"
        f"<p class='facts'>{escape(' · '.join(fact for fact in facts if fact))}</p>"
        f"<p class='hero'><b>{escape(figure)}</b> <span>{escape(claim)}</span></p>"
        f"<p class='lead'>{_explanation(report)}</p></header>"
    )


def _shares(keep: Any) -> str:
    """One share, those of kinds, or of shares by site the range."""
    if not isinstance(keep, Mapping) or len(keep) <= _FEW:
        return str(keep)
    listed = (share if isinstance(share, Sequence) else (share,) for share in keep.values())
    shares = list(itertools.chain(*listed))
    return f"{min(shares):.2f} to {max(shares):.2f}, by site"


def _explanation(report: Report) -> str:
    rows, share = report.evaluation, report.recovered
    if share is not None:
        dense, pruned, restored = (format_number(rows[name].perplexity) for name in _MODELS)
        verdict = "" if share >= 0 else " Restoration made this text worse than plain pruning."
        return (
            f"On held-out text the dense model has a perplexity of {dense}. Plain pruning raises "
            f"it to {pruned}; the same pruning with GRAIL's closed-form compensation gives "
            f"{restored}. The share is ln(pruned/restored)&thinsp;/&thinsp;ln(pruned/dense)."
            + verdict
        )
    if rows.keys() >= set(_MODELS):
        return (
            "There is no share of the lost log-perplexity to report: it needs a dense model that "
            "is better than the pruned one, and a finite perplexity of all three."
        )
    if report.settings.get("compensate") is False:
        return "This run is plain pruning: nothing was compensated."
    return "The models were not compared on held-out text: give --evaluate TEXT to do so."


def _evaluation_section(evaluation: dict[str, Evaluation]) -> str:
    if not evaluation:
        return ""
    header, rows = evaluation_table(evaluation)
    tokens = next(iter(evaluation.values())).tokens
    return _section(
        "What it cost and what it saved",
        _table(header, rows, numeric=True),
        _perplexity_plot(evaluation),
        caption=f"Perplexity over {tokens:,} predicted tokens of held-out text; lower is better.",
    )


def _error_section(sites: Sequence[SiteReport], inputs: Sequence[InputReport]) -> str:
    pairs = _error_pairs(sites)
    if not pairs:
        return ""
    better = sum(after < before for before, after in pairs)
    return _section(
        "What compensation repairs",
        _error_plot(sites),
        caption=(
            "Relative error of what each site hands to the next layer, on the calibration text: "
            "‖T − W′RX‖ / ‖T‖, where T is its own output WX, plus its drift from the dense network "
            "where that is followed. Lower is better; the distance between the points is what "
            f"compensation took away. {better} of {len(pairs)} sites improved." + _read_by(inputs)
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
    plots = [_time_plot(report.seconds), _memory_plot(report.memory)]
    if not any(plots):
        return ""
    captions = [_time_caption(report.seconds), _memory_caption(report.memory)]
    return _section("Time and memory", *plots, caption=" ".join(filter(None, captions)))


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


def _details_section(report: Report) -> str:
    groups = {
        "Settings": report.settings,
        "Model": report.model,
        "Calibration": report.calibration,
        "Versions": report.versions,
    }
    tables = "".join(
        f"<h3>{title}</h3>"
        + _table(["", ""], [[key, _text(value)] for key, value in group.items()])
        for title, group in groups.items()
        if group
    )
    return (
        f"<details><summary>Settings and versions</summary>{tables}</details>"
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


def _before_after(value: object) -> tuple[float, float]:
    if isinstance(value, dict):
        return value.get("before", 0), value.get("after", 0)
    return 0, 0


def _error_pairs(sites: Sequence[SiteReport]) -> list[tuple[float, float]]:
    """(plain pruning, compensated) of every site that knows both and was touched."""
    return [
        (site.baseline_error, site.error)
        for site in sites
        if site.baseline_error is not None and site.error is not None
        if site.kept < site.channels or site.baseline_error > 0
    ]


def _perplexity_plot(evaluation: dict[str, Evaluation]) -> str:
    values = [row.perplexity for row in evaluation.values()]
    labels = [format_number(value) for value in values]
    colours = [_MODELS[name] for name in evaluation]
    title = "Perplexity"
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    if max(finite) > 20 * min(finite):  # else the small bars would all look alike
        title, values = "Perplexity, on a logarithmic scale", [math.log(value) for value in values]
    return _bars("perplexity", title, list(evaluation), values, labels, colours)


def _time_plot(seconds: dict[str, float]) -> str:
    phases = {label: seconds[phase] for phase, label in _PHASES.items() if phase in seconds}
    total = sum(phases.values())
    if not total:
        return ""
    labels = [f"{format_seconds(value)}  ({value / total:.0%})" for value in phases.values()]
    colours = [_DENSE if name == _PHASES["forward"] else _RESTORED for name in phases]
    title = f"Time by phase, {format_seconds(total)} in all"
    return _bars("time", title, list(phases), list(phases.values()), labels, colours)


def _memory_plot(memory: dict[str, int]) -> str:
    names = {"predicted_peak": "predicted", "measured_peak": "measured"}
    known = {label: memory[key] for key, label in names.items() if memory.get(key)}
    if not known:
        return ""
    labels = [format_bytes(value) for value in known.values()]
    colours = [_DENSE if name == "predicted" else _RESTORED for name in known]
    return _bars("memory", "Peak memory", list(known), list(known.values()), labels, colours)


def _bars(
    key: str,
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    colours: Sequence[str],
) -> str:
    """Horizontal bars, one a name, each with its label behind it."""
    figure, (axes,) = _figure(height=0.2 + 0.36 * len(names))
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    axes.barh(range(len(names)), finite, height=0.62, color=colours)
    longest = max(finite) or 1.0
    for row, (value, label) in enumerate(zip(finite, labels, strict=True)):
        axes.text(
            value + 0.012 * longest,
            row,
            label,
            va="center",
            color=_INK,
            parse_math=False,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * longest)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    summary = "; ".join(f"{name} {label}" for name, label in zip(names, labels, strict=True))
    return _svg(figure, key, title, summary)


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


def _error_plot(sites: Sequence[SiteReport]) -> str:
    """One panel a kind of site: error before and after by block, joined by a stem."""
    from matplotlib.ticker import MaxNLocator

    kinds = list(dict.fromkeys(site.kind for site in sites if _error_pairs([site])))
    figure, panels = _figure(height=2.5 * len(kinds) + 0.45, rows=len(kinds))
    for axes, kind in zip(panels, kinds, strict=True):
        known = [site for site in sites if site.kind == kind and _error_pairs([site])]
        blocks = [site.block for site in known]
        before, after = zip(*_error_pairs(known), strict=True)
        axes.vlines(blocks, before, after, color=_GRID, linewidth=2.5, zorder=1)
        axes.plot(blocks, before, "o", color=_PRUNED, markersize=5, label="plain pruning")
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
    pairs = _error_pairs(sites)
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    summary = f"{len(pairs)} sites; median {before:.3f} with plain pruning, {after:.3f} compensated"
    return _svg(figure, "errors", "Relative output error by site", summary)


def _figure(height: float, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure outside pyplot, `height` inches, with the axes stripped to what is read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
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
.caption { font-size: .88rem; margin-top: .8rem; }
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
figure { margin: 1.4rem 0 0; overflow-x: auto; } h2 + figure { margin-top: 0; }
figcaption { font-size: .92rem; font-weight: 600; margin-bottom: .4rem; }
svg { display: block; width: 100%; min-width: 30rem; height: auto; }
ul { margin: 0; padding-left: 1.2rem; }
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
