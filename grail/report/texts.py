"""Scores on several held-out texts: their names, shares recovered, and the table by text."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from grail.report.formatting import format_number
from grail.report.paired import BEYOND, Estimate, difference, is_worse, share
from grail.report.report import Evaluation, Report, TextScore

Table = tuple[list[str], list[list[str]]]


def text_names(sources: Sequence[str]) -> list[str]:
    """Returns short names of texts: a file's name, the whole source where names are equal."""
    files = [Path(source).name if Path(source).exists() else source for source in sources]
    names: list[str] = []
    for source, name in zip(sources, files, strict=True):
        wanted = source if files.count(name) > 1 else name
        again = names.count(wanted)
        names.append(f"{wanted} ({again + 1})" if again else wanted)
    return names


def joined(rows: Mapping[str, Evaluation]) -> Evaluation:
    """Returns one evaluation of a model from those of each text, by name; the first one leads."""
    scores = [replace(row, text=name) for name, row in rows.items()]
    names = [field.name for field in fields(TextScore)]
    others = [TextScore(**{name: getattr(row, name) for name in names}) for row in scores[1:]]
    return replace(scores[0], others=others)


def add_comparisons(evaluation: Mapping[str, Evaluation]) -> None:
    """Writes into each row but "dense" and "pruned" how it compares with them on each text.

    That is the share recovered and the loss above the pruned model's, with standard errors.
    """
    dense, pruned = evaluation.get("dense"), evaluation.get("pruned")
    if dense is None or pruned is None:
        return
    for role, row in evaluation.items():
        if role in ("dense", "pruned"):
            continue
        for own, narrow, base in zip(row.scores, pruned.scores, dense.scores, strict=True):
            counts = own.predicted
            if found := share(base.losses, narrow.losses, own.losses, counts):
                own.recovered, own.recovered_error = found.value, found.error
            over = difference(own.losses, narrow.losses, counts)
            own.over_pruned, own.over_pruned_error = over.value, over.error


def several_texts(rows: Mapping[str, Evaluation]) -> bool:
    """Returns True if models were evaluated on more than one text."""
    return any(row.others for row in rows.values())


def text_table(rows: Mapping[str, Evaluation]) -> Table:
    """Returns the table of each model on each text, a block of rows for each text.

    Args:
        rows: by label.

    Returns:
        Header and rows. Of one text they lack its name and its perplexity, which stand in the table
        of models, and the rows in which nothing is known; without any row there is nothing to show.
    """
    several = several_texts(rows)
    header = ["model", *(["perplexity"] if several else []), "recovered", "KL", "top-1"]
    table = []
    for index in range(max((len(row.scores) for row in rows.values()), default=0)):
        for label, row in rows.items():
            score = row.scores[index]
            known = (score.recovered, score.kl, score.top1)
            if not several and known == (None, None, None):
                continue
            cells = [score.text, label, format_number(score.perplexity)] if several else [label]
            table.append([*cells, recovered_cell(score), *distance_cells(score)])
    return (["text"] if several else []) + header, table


def score_table(row: Evaluation) -> Table:
    """Returns the table of one model, a row for each text."""
    header = ["text", "perplexity", "KL", "top-1", "predicted tokens"]
    rows = [
        [s.text, format_number(s.perplexity), *distance_cells(s), f"{s.tokens:,}"]
        for s in row.scores
    ]
    return header, rows


def recovered_cell(score: TextScore) -> str:
    """Formats the share recovered with its standard error: "64 ± 2%", "–" where it is unknown."""
    if score.recovered is None:
        return "–"
    value = round(100 * score.recovered) + 0  # never -0%
    error = score.recovered_error
    return f"{value}%" if error is None else f"{value} ± {_digits(100 * error)}%"


def _digits(error: float) -> str:
    return f"{error:.1f}" if error < 1 else f"{error:.0f}"


def distance_cells(score: TextScore) -> list[str]:
    """Formats the distance from the dense model with its standard errors over sequences.

    Returns:
        KL in nats, "0.250 ± 0.012", and top-1 agreement, "62.5 ± 0.8%"; "–" where it is unknown.
    """
    divergence = "–" if score.kl is None else format_number(score.kl)
    if score.kl is not None and score.kl_error is not None:
        divergence += f" ± {_as_precise(score.kl_error, divergence)}"
    if score.top1 is None:
        return [divergence, "–"]
    error = "" if score.top1_error is None else f" ± {100 * score.top1_error:.1f}"
    return [divergence, f"{100 * score.top1:.1f}{error}%"]


def _as_precise(error: float, value: str) -> str:
    """Formats an error with the decimals of the value; more, if these show none of it."""
    decimals = len(value.partition(".")[2])
    return (
        f"{error:.{decimals}f}" if "e" not in value and error >= 10.0**-decimals else f"{error:.1g}"
    )


def worse_than_pruned(report: Report) -> dict[str, Estimate]:
    """Returns by text how much the report's model loses more than plain pruning, in nats a token.

    A quantised model is judged before it is rounded. A text counts where the paired difference of
    the losses exceeds 2 standard errors; "the held-out text" is a text without a name.
    """
    rows = report.evaluation
    own, pruned = rows.get("unquantised") or rows.get("restored"), rows.get("pruned")
    if own is None or pruned is None:
        return {}
    return {
        score.text or "the held-out text": difference(score.losses, plain.losses, score.predicted)
        for score, plain in zip(own.scores, pruned.scores, strict=True)
        if score.losses and plain.losses
        if is_worse(score.losses, plain.losses, counts=score.predicted)
    }


def worse_sentence(report: Report) -> str:
    """Names the texts of `worse_than_pruned`, with how much worse; empty without any."""
    if not (texts := worse_than_pruned(report)):
        return ""
    found = " and ".join(f"on {text} by {gap} nats a token" for text, gap in texts.items())
    return (
        f"The model is worse than plain pruning {found}, beyond {BEYOND:g} standard errors: "
        "calibrate on such text as well, or on text by the model itself (grail generate), or keep "
        "more."
    )
