"""A `Report` as one HTML file that a person understands, from the template report.html.j2."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grail.report import completions, style
from grail.report.formatting import format_bytes, format_count, format_number, format_seconds
from grail.report.plots import draw_errors, draw_widths
from grail.report.report import Evaluation, InputReport, Report, SiteReport
from grail.report.summary import (
    before_after,
    comparison_tables,
    compensates,
    error_pairs,
    explanation,
    headline,
    keep_in_words,
    labelled,
    quantising_sentence,
    resumed_sentence,
    size_sentence,
    stage_table,
    verdict,
    widths_sentence,
)
from grail.report.texts import several_texts, worse_sentence

if TYPE_CHECKING:
    from jinja2 import Template

# CSS variable of a row's colour, by its role.
_COLOURS = {"dense": "dense", "pruned": "pruned", "compensated": "restored", "restored": "restored"}
_PHASES = {
    "forward": "forward passes",
    "gram": "Gram matrices",
    "select": "selection",
    "solve": "ridge solve",
    "refit": "refit of producers",
    "absorb": "absorb",
    "checkpoint": "state for resuming",
    "other": "everything else",
}


@dataclass(frozen=True)
class _Table:
    """Cells of text; `numeric` aligns all but the first `words` columns to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True
    words: int = 1


@dataclass(frozen=True)
class _Bar:
    """A horizontal bar, `width` percent of its column, with a label after it."""

    name: str
    width: float
    label: str
    colour: str


_Bars = tuple[str, list[_Bar]]  # with their title


def page(report: Report) -> str:
    """Returns one self-contained HTML document that shows a report.

    Args:
        report: of a compression; evaluation, site errors and memory may be missing.

    Returns:
        The text of an HTML file without scripts and without references to other files.
    """
    figure, claim = headline(report)
    return _template().render(
        style=style,
        name=str(report.model.get("name", "model")),
        facts=_facts(report),
        figure=figure,
        claim=claim,
        lead=[line for line in _lead(report) if line],
        evaluation=_evaluation(report),
        samples=_samples(report),
        prompts=completions.PROMPTS,
        errors=_errors(report),
        inputs=_inputs(report.inputs),
        widths=draw_widths(report.sites),
        stages=_Table(*stage_table(report.stages)) if report.stages else None,
        time=_time_bars(report.seconds),
        memory=_memory_bars(report.memory),
        costs=_costs(report),
        notes=report.notes,
        details=_details(report),
        sites=_site_table(report.sites),
    )


def _lead(report: Report) -> tuple[str, ...]:
    """Returns the sentences below the headline; some may be empty."""
    rounding = quantising_sentence(report)
    return (
        explanation(report),
        worse_sentence(report),
        rounding and f"{rounding}.",
        verdict(report),
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not for `import grail`

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("report.html.j2")


def _facts(report: Report) -> list[str]:
    settings = report.settings
    before, after = before_after(report.model.get("parameters"))
    facts = [f"keep {_keep(report)}"] if "keep" in settings else []
    if kinds := dict.fromkeys(site.kind for site in report.sites):
        facts.append(f"sites {', '.join(kinds)}")
    if "selector" in settings:
        facts.append(f"selector {_text(settings['selector'])}")
    if before and after:
        facts.append(f"{format_count(before)} → {format_count(after)} parameters")
    return facts


def _evaluation(report: Report) -> dict[str, Any] | None:
    rows = report.evaluation
    if not rows:
        return None
    scores = next(iter(rows.values())).scores
    names = [f" of {score.text}" if len(scores) > 1 else " of held-out text" for score in scores]
    tables = comparison_tables(rows)
    return {
        "tables": [_Table(header, cells, words=words) for header, cells, words in tables],
        "bars": [_perplexity_bars(rows, index) for index in range(len(scores))],
        "tokens": ", ".join(
            f"{score.tokens:,} predicted tokens{name}"
            for score, name in zip(scores, names, strict=True)
        ),
        "distance": any(row.kl is not None for row in rows.values()),
        "shares": any(row.recovered is not None for row in rows.values()),
        "several_runs": report.same_choice is not None,
        "size": size_sentence(report),
        "widths": widths_sentence(report),
    }


def _samples(report: Report) -> list[dict[str, Any]]:
    """Returns prompts with the greedy completions of each model, by its label."""
    labels = dict(zip(report.evaluation, labelled(report.evaluation), strict=True))
    return [
        {
            "prompt": sample["prompt"],
            "completions": [
                (labels.get(role, role), text) for role, text in sample.items() if role != "prompt"
            ],
        }
        for sample in report.samples
    ]


def _errors(report: Report) -> dict[str, Any] | None:
    pairs = error_pairs(report.sites)
    if not pairs:
        return None
    compensated = compensates(report)
    return {
        "drawing": draw_errors(report.sites, compensated),
        "compensated": compensated,
        "improved": sum(after < before for before, after in pairs),
        "sites": len(pairs),
    }


def _inputs(inputs: Sequence[InputReport]) -> dict[str, Any] | None:
    """Returns the table of attention's inputs, and their median errors before and after."""
    if not inputs:
        return None
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
    return {
        "table": _Table(["attention", "tokens", "alpha", "drift undone", "drift", "error"], rows),
        "before": f"{statistics.median(row.baseline_error for row in inputs):.1%}",
        "after": f"{statistics.median(row.error for row in inputs):.1%}",
    }


def _costs(report: Report) -> list[str]:
    """Returns sentences about time and memory."""
    sentences = [resumed_sentence(report)]
    own = sum(
        report.seconds.get(phase, 0.0) for phase in ("gram", "select", "solve", "refit", "absorb")
    )
    if forward := report.seconds.get("forward"):
        sentences.append(
            f"GRAIL's own work took {own / forward:.0%} of the time of the forward passes."
        )
    predicted, measured = map(report.memory.get, ("predicted_peak", "measured_peak"))
    if predicted and measured:
        sentences.append(f"The prediction of the peak is off by {predicted / measured - 1:+.1%}.")
    return [sentence for sentence in sentences if sentence]


def _details(report: Report) -> dict[str, _Table]:
    keep = {"keep": _keep(report)} if _keep(report) else {}
    groups = {
        "Settings": {**report.settings, **keep},
        "Model": report.model,
        "Calibration": report.calibration,
        "Origin": report.provenance,
        "Versions": report.versions,
    }
    return {
        title: _Table([], [[key, _text(value)] for key, value in group.items()], numeric=False)
        for title, group in groups.items()
    }


def _keep(report: Report) -> str:
    return keep_in_words(report.settings.get("keep"), report.sites)


def _site_table(sites: Sequence[SiteReport]) -> _Table:
    header = [
        *("site", "kept", "of", "tokens", "alpha", "drift undone", "damping", "retries"),
        *("pruned error", "error"),
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
    return _Table(header, rows)


def _text(value: object) -> str:
    """Formats a setting: lists with commas, dictionaries as key and value."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else str(value)


def _perplexity_bars(evaluation: Mapping[str, Evaluation], index: int) -> _Bars:
    """Returns bars of the perplexities on the text of that index."""
    scores = [row.scores[index] for row in evaluation.values()]
    values = [score.perplexity for score in scores]
    labels = [format_number(value) for value in values]
    colours = [_COLOURS.get(role, "muted") for role in evaluation]
    title = f"Perplexity on {scores[0].text}" if several_texts(evaluation) else "Perplexity"
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    if max(finite) > 20 * min(finite):  # else the small bars would all look alike
        title, values = f"{title}, on a logarithmic scale", [math.log(value) for value in values]
    return title, _bars(labelled(evaluation), values, labels, colours)


def _time_bars(seconds: Mapping[str, float]) -> _Bars | None:
    """Returns a bar for each phase of a run; phases unknown here have their own name."""
    order = [*_PHASES, *(phase for phase in seconds if phase not in _PHASES)]
    phases = {p: seconds[p] for p in order if p in seconds and p != "total"}
    total = sum(phases.values())
    if not total:
        return None
    labels = [f"{format_seconds(value)} ({value / total:.0%})" for value in phases.values()]
    colours = ["dense" if phase == "forward" else "restored" for phase in phases]
    names = [_PHASES.get(phase, phase) for phase in phases]
    title = f"Time of the compression by phase, {format_seconds(total)} in all"
    return title, _bars(names, list(phases.values()), labels, colours)


def _memory_bars(memory: Mapping[str, int]) -> _Bars | None:
    names = {"predicted_peak": "predicted", "measured_peak": "measured"}
    known = {label: memory[key] for key, label in names.items() if memory.get(key)}
    if not known:
        return None
    labels = [format_bytes(value) for value in known.values()]
    colours = ["dense" if name == "predicted" else "restored" for name in known]
    title = "Peak memory of the compression"
    return title, _bars(known, list(known.values()), labels, colours)


def _bars(
    names: Iterable[str], values: Sequence[float], labels: Sequence[str], colours: Sequence[str]
) -> list[_Bar]:
    """Returns bars in proportion to `values`; the longest leaves room for its label."""
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    longest = max(finite) or 1.0
    widths = [65 * max(value, 0) / longest for value in finite]
    return [_Bar(*row) for row in zip(names, widths, labels, colours, strict=True)]
