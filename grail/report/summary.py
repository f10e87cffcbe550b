"""Tables and sentences about a `Report`, shared by page, terminal and model card."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from grail.algebra.targets import RULES
from grail.report.formatting import format_bytes, format_count, format_number, format_seconds
from grail.report.report import Evaluation, Report, SiteReport, TextScore, mean_errors
from grail.report.texts import several_texts, text_table

CLOSE = 1.25  # ratio to the dense model's perplexity up to which a model is close to it
# A model repeats itself if its repetition exceeds the dense model's by this much, and by more than
# twice the standard error of the difference.
REPEATS = 0.1
LEAST_TOKENS = 1000  # predicted, else a model is not judged
WIDEST_ERROR = 0.1  # standard error of the difference, beyond which repetition is not judged


def headline(report: Report) -> tuple[str, str]:
    """Returns the one figure that sums a run up, and its meaning: ("64%", "of the lost …")."""
    share, same = report.recovered, report.same_choice
    if share is not None and same is not None:
        row = report.evaluation[same]
        selector, on = row.selector or "same selector", f" on {row.text}" if row.others else ""
        others = "".join(f"; {_on_text(score)}" for score in row.others)
        if round(share, 2) < 0:
            return f"{-share:.0%} worse", (
                f"than plain pruning ({selector}){on}, in shares of the log-perplexity that it "
                f"lost{others}"
            )
        return f"{max(share, 0.0):.0%}", (  # never -0%
            f"of the log-perplexity lost by pruning ({selector}) is recovered{on}{others}"
        )
    pairs = error_pairs(report.sites)
    if pairs and compensates(report):
        ratio = statistics.median(after / before if before else 1.0 for before, after in pairs)
        return f"{ratio:.2f}×", "the output error of plain pruning, in the median site"
    before, after = before_after(report.model.get("parameters"))
    if before and after:
        return f"{after / before:.0%}", "of the parameters are left"
    return str(len(report.sites)), "sites compressed"


def _on_text(score: TextScore) -> str:
    if score.recovered is None:
        return f"no share on {score.text}"
    if round(score.recovered, 2) < 0:
        return f"{-score.recovered:.0%} worse than pruning on {score.text}"
    return f"{max(score.recovered, 0.0):.0%} on {score.text}"


def explanation(report: Report) -> str:
    """Describes the comparison: each row, the share recovered, and the row it is relative to."""
    rows, same = report.evaluation, report.same_choice
    if report.recovered is None or same is None:
        return _no_share(report)
    share, names = report.recovered, dict(zip(rows, labelled(rows), strict=True))
    values = ", ".join(
        f"{names[role]} {format_number(rows[role].perplexity)}"
        for role in ("dense", "pruned", same)
    )
    on = rows[same].text if rows[same].others else "held-out text"
    text = (
        f"Perplexity on {on}: {values}. "
        f"With the same selector, compensation {_change(share)} the lost log-perplexity, "
        "ln(pruned/compensated) / ln(pruned/dense)."
    )
    if same != "restored" and (all_in := report.share("restored")) is not None:
        text += (
            f" The model of this report is {names['restored']}: "
            f"{format_number(rows['restored'].perplexity)}, {_together(all_in)}."
        )
    return text


def _change(share: float) -> str:
    if round(share, 2) < 0:
        return f"made this text worse than plain pruning did, by {-share:.0%} of"
    return f"recovers {max(share, 0.0):.0%} of"


def _together(share: float) -> str:
    if round(share, 2) < 0:
        return "worse than the pruned one by selection and compensation together"
    return f"{max(share, 0.0):.0%} by selection and compensation together"


def _no_share(report: Report) -> str:
    if not compensates(report):
        return "This run is plain pruning: nothing was compensated."
    if report.evaluation.keys() >= {"dense", "pruned", "restored"}:
        return (
            "There is no share of the lost log-perplexity to report: it needs a dense model that "
            "is better than the pruned one, and finite perplexities of models of one selector."
        )
    if report.evaluation:
        return "The model was not compared with plain pruning."
    return "The models were not compared on held-out text: give --evaluate TEXT to do so."


def labelled(evaluation: Mapping[str, Evaluation], prefix: str = "") -> dict[str, Evaluation]:
    """Names rows by their labels instead of by their roles, if they have a selector."""
    return {
        prefix + (role if row.selector is None else row.label): row
        for role, row in evaluation.items()
    }


def evaluation_table(rows: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Returns header and text rows of the table of evaluated models.

    Perplexities of several texts stand in `text_table` alone.
    """
    perplexity = not several_texts(rows)
    header = ["model", *(["perplexity"] if perplexity else []), "parameters", "weights"]
    repeats = any(row.repetition is not None for row in rows.values())
    table = []
    for name, row in rows.items():
        cells = [name, *([format_number(row.perplexity)] if perplexity else [])]
        cells += [format_count(row.parameters), format_bytes(row.bytes)]
        if repeats:
            cells.append("–" if row.repetition is None else _percent(row))
        table.append(cells)
    return header + ["repeats"] * repeats, table


def comparison_tables(
    evaluation: Mapping[str, Evaluation],
) -> list[tuple[list[str], list[list[str]], int]]:
    """Returns the tables of evaluated models: header, rows and how many first columns are words.

    Of one text the models come first, and then what each recovers and its distance from the dense
    model; of several the scores on each text come first.
    """
    rows = labelled(evaluation)
    models, (header, scores) = evaluation_table(rows), text_table(rows)
    several = several_texts(rows)
    by_text = [(header, scores, 2 if several else 1)] if scores else []
    return [*by_text, (*models, 1)] if several else [(*models, 1), *by_text]


def size_sentence(report: Report) -> str:
    """Describes the bytes of source, output, and output in bfloat16, as far as known."""
    sizes = report.model.get("bytes") or {}
    output, dtype = sizes.get("after"), report.model.get("dtype", "")
    if not output:
        return ""
    parts = [f"source {format_bytes(sizes['source'])}"] if sizes.get("source") else []
    parts.append(f"output {format_bytes(output)} ({dtype})")
    if sizes.get("quantised"):
        parts.append(f"as GGUF {format_bytes(sizes['quantised'])}")
    text = ", ".join(parts)
    half = sizes.get("bfloat16", output)
    if half < output:
        text += f"; with --dtype bfloat16 it would be {format_bytes(half)}"
    if sizes.get("source", math.inf) < output:
        text += "; the source holds fewer bits a weight than the output"
    return text


def quantising_sentence(report: Report) -> str:
    """Describes what rounding the matrices costs, by GPTQ beside rounding to nearest."""
    errors = mean_errors(report.quantized)
    if errors is None:
        return ""
    rows = [row for row in report.quantized if row.error is not None]
    text = (
        f"{len(rows)} matrices in {rows[0].format}: mean error of a layer's output {errors[0]:.3g} "
        f"by GPTQ, {errors[1]:.3g} rounded to nearest"
    )
    if (share := report.rounding_recovered) is not None:
        text += f"; GPTQ recovers {share:.0%} of the log-perplexity that rounding to nearest loses"
    return text


def widths_sentence(report: Report) -> str:
    """Describes what the widths of a model's MLPs fit: blocks, groups, numbers of GPUs."""
    widths = [site.kept for site in report.sites if site.kind == "mlp"]
    if not widths:
        return ""
    common = math.gcd(*widths)
    fits: dict[str, list[str]] = {}
    for rule in RULES:
        if common % (rule.parts * rule.multiple) == 0:
            fits.setdefault(rule.use, []).append(str(rule.number))
    words = {
        "GGUF blocks": "GGUF blocks of {}",
        "groups": "groups of {}",
        "tensor parallel": "tensor parallelism on {} GPUs",
    }
    found = [
        text.format(" and ".join(filter(None, (", ".join(fits[use][:-1]), fits[use][-1]))))
        for use, text in words.items()
        if use in fits
    ]
    fitting = f", which fits {', '.join(found)}" if found else ""
    return f"MLP widths are multiples of {common}{fitting}"


def verdict(report: Report) -> str:
    """Judges the model of a report against the dense one, by perplexity and repetition."""
    dense = report.evaluation.get("dense")
    narrow = report.evaluation.get("restored") or report.evaluation.get("pruned")
    if dense is None or narrow is None or dense.repetition is None or narrow.repetition is None:
        return ""
    ratio = narrow.perplexity / dense.perplexity
    keep = keep_in_words(report.settings.get("keep"), report.sites)
    return (
        f"{f'Keep {keep}: ' if keep else ''}{ratio:.2f} times the dense model's perplexity, "
        f"{_percent(narrow)} of the 4-grams in greedy completions repeat earlier ones (dense "
        f"{_percent(dense)}); {_judgement(ratio, narrow, dense)}."
    )


def _judgement(ratio: float, narrow: Evaluation, dense: Evaluation) -> str:
    if narrow.tokens < LEAST_TOKENS:
        return f"too few tokens to judge ({narrow.tokens:,} predicted; give {LEAST_TOKENS:,})"
    more, error = _repeats_more(narrow, dense)
    faults = ["predicts clearly worse than the dense model"] * (not ratio <= CLOSE)
    faults += ["repeats itself"] * (more > max(REPEATS, 2 * error))
    if faults:
        return f"it {' and '.join(faults)}, so keep more or fine-tune it before use"
    if error > WIDEST_ERROR or more > REPEATS:
        return (
            "too few tokens to judge its repetition, whose difference from the dense model's has a "
            f"standard error of {error:.0%}"
            if math.isfinite(error)
            else "too few tokens to judge its repetition"
        )
    return "usable as it is"


def _repeats_more(narrow: Evaluation, dense: Evaluation) -> tuple[float, float]:
    """Returns the difference in repetition, and its standard error."""
    assert narrow.repetition is not None
    assert dense.repetition is not None
    errors = (narrow.repetition_error, dense.repetition_error)
    error = math.inf if None in errors else math.hypot(*(e or 0.0 for e in errors))
    return narrow.repetition - dense.repetition, error


def _percent(row: Evaluation) -> str:
    """Formats repetition with its standard error: "25 ± 4%"."""
    error = "" if row.repetition_error is None else f" ± {100 * row.repetition_error:.0f}"
    return f"{100 * (row.repetition or 0):.0f}{error}%"


def keep_in_words(keep: object, sites: Sequence[SiteReport]) -> str:
    """Formats one share, shares by kind, or the mean and range of many."""
    if keep is None:
        return ""
    if not isinstance(keep, Mapping):
        return str(keep)
    kinds = {site.kind for site in sites}
    if keep.keys() <= kinds and all(isinstance(share, float | int) for share in keep.values()):
        return ", ".join(f"{kind} {share:g}" for kind, share in keep.items())
    shares = [site.kept / site.channels for site in sites]
    if not shares:
        return "by site"
    mean = sum(site.kept for site in sites) / sum(site.channels for site in sites)
    return f"{mean:.2f} on average, {min(shares):.2f} to {max(shares):.2f} by site"


def stage_table(stages: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of predicted and measured wall times by stage of the command."""
    rows = [
        [stage, *(_seconds(times.get(column)) for column in ("predicted", "measured"))]
        for stage, times in stages.items()
    ]
    return ["stage", "predicted", "measured"], rows


def resumed_sentence(report: Report) -> str:
    """Names the block after which a run was resumed, and the times that include earlier runs."""
    if not (resumed := report.resumed):
        return ""
    return (
        f"Resumed after block {resumed['after']:.0f} of {resumed['of']:.0f}: the time of "
        f"compressing includes {format_seconds(resumed['seconds'])} of the runs before; other "
        "stages are those of the last run alone."
    )


def compensates(report: Report) -> bool:
    """Returns True if a run fitted weights or biases, False for plain pruning."""
    settings = report.settings
    return bool(settings.get("compensate", True) or settings.get("fit_bias", False))


def _seconds(value: float | None) -> str:
    return "–" if value is None else format_seconds(value)


def before_after(value: object) -> tuple[float, float]:
    """Returns the numbers of {"before": …, "after": …}; zeros for anything else."""
    if isinstance(value, Mapping):
        return value.get("before", 0), value.get("after", 0)
    return 0, 0


def error_pairs(sites: Iterable[SiteReport]) -> list[tuple[float, float]]:
    """Returns (plain pruning, compensated) for every site that has both and was changed."""
    return [
        (site.baseline_error, site.error)
        for site in sites
        if site.baseline_error is not None and site.error is not None
        if site.kept < site.channels or site.baseline_error > 0
    ]
