"""Tables of evaluation.csv: dense, pruned, the paper's and grail's model side by side.

`bench.quality.evaluation` writes the rows and prints these tables, `bench.report.evaluation` puts
them on a page. What is not measured is "–".
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from bench.quality.levers import nats, percent, signed
from bench.quality.tasks import TASKS
from bench.tools.measuring import Row
from bench.tools.texts import TEXTS
from grail.report.paired import BEYOND, Estimate, difference, share, weighted

DENSE, PRUNED = "dense", "pruned"
ORDER = (DENSE, PRUNED, "paper", "grail")  # of columns, those of other models after them
# Texts about Python by its authors: each is near the others, and none is off their domain.
NEAR = ("documentation", "technical", "passages", "python")
UNKNOWN = "–"

Table = tuple[list[str], list[list[str]]]


class Run(NamedTuple):
    """The text and settings of a compression; empty of folders, which do not name them."""

    calibration: str
    tokens: str
    sites: str
    keep: str

    def domain(self, text: str) -> str:
        """Returns "in", "near" or "off": how a text relates to the calibration."""
        names = self.calibration.split("+")
        if text in names:
            return "in"
        return "near" if text in NEAR and set(names) & set(NEAR) else "off"


DENSE_RUN = Run("", "", "", "")


class Scores:
    """The rows of evaluation.csv by run, model, text or task, and measure."""

    def __init__(self, rows: Sequence[Row]):
        self._rows: dict[tuple[Run, str], dict[tuple[str, str], Row]] = {}
        for row in rows:
            run = Run(*(row[name] for name in Run._fields))
            of = self._rows.setdefault((run, row["model"]), {})
            of[row["on"], row["measure"]] = row

    @property
    def runs(self) -> list[Run]:
        """Runs of models, in the order of the file; folders come as `DENSE_RUN`, if any do."""
        return list(dict.fromkeys(run for run, model in self._rows if model != DENSE))

    def models(self, run: Run) -> list[str]:
        """Names of the columns of a run: those of `ORDER`, measured or not, and others."""
        found = [model for of, model in self._rows if of == run]
        shown = ORDER if run != DENSE_RUN else (DENSE,)
        return [*shown, *(model for model in dict.fromkeys(found) if model not in shown)]

    def row(self, run: Run, model: str, on: str, measure: str) -> Row | None:
        """One row; that of the dense model for any run."""
        of = self._rows.get((DENSE_RUN if model == DENSE else run, model), {})
        return of.get((on, measure))

    def each(self, run: Run, model: str, on: str, measure: str) -> list[float]:
        """The values of single sequences, questions or prompts; empty if not measured."""
        row = self.row(run, model, on, measure)
        return [] if row is None else [float(value) for value in row["each"].split()]

    def texts(self, run: Run) -> list[str]:
        """Texts on which a compressed model of the run was measured: in, near and off domain."""
        compressed = [model for model in self.models(run) if model != DENSE]
        read = [text for text in TEXTS if self._known(run, compressed, text, "perplexity")]
        return [
            text for domain in ("in", "near", "off") for text in read if run.domain(text) == domain
        ]

    def tasks(self, run: Run) -> list[str]:
        """Tasks on which a compressed model of the run was measured."""
        compressed = [model for model in self.models(run) if model != DENSE]
        return [task for task in TASKS if self._known(run, compressed, task, "accuracy")]

    def _known(self, run: Run, models: Sequence[str], on: str, measure: str) -> bool:
        return any(self.row(run, model, on, measure) for model in models)

    def worse(self, run: Run, model: str) -> tuple[list[str], int]:
        """Texts on which a model is worse than the run's pruned one, and of how many.

        Worse is a paired difference of the losses above 2 standard errors.
        """
        rows = {text: self.row(run, model, text, "nats_over_pruned") for text in self.texts(run)}
        known = {text: row for text, row in rows.items() if row and row["value"] and row["error"]}
        found = [
            text
            for text, row in known.items()
            if float(row["value"]) > BEYOND * float(row["error"])
        ]
        return found, len(known)

    def sequences(self, run: Run) -> list[int]:
        """How many sequences of a text were measured, in rising order; one number if all agree."""
        rows = (self.row(run, DENSE, text, "perplexity") for text in self.texts(run))
        return sorted({int(row["count"]) for row in rows if row})

    def pooled(self, run: Run, model: str, domain: str, measure: str) -> list[float]:
        """Values of all sequences of a domain's texts; empty unless all texts are measured."""
        texts = [text for text in self.texts(run) if run.domain(text) == domain]
        parts = [self.each(run, model, text, measure) for text in texts]
        return [value for part in parts for value in part] if all(parts) else []


def domain_table(scores: Scores, run: Run) -> Table:
    """Returns the models side by side, in the calibration's domain and off it.

    Off the domain are all sequences of all such texts together: they have one length, and errors
    are over them all. What a model was not measured on all of them is unknown.
    """
    models = scores.models(run)
    domains = ("in", "off")
    header = ["", *(f"{domain} domain: {model}" for domain in domains for model in models)]
    lines = []
    for name, cell in _MEASURES.items():
        cells = [cell(scores, run, model, domain) for domain in domains for model in models]
        lines.append([name, *cells])
    return header, lines


def _perplexity(scores: Scores, run: Run, model: str, domain: str) -> str:
    losses = scores.pooled(run, model, domain, "perplexity")
    return f"{math.exp(statistics.fmean(losses)):.1f}" if losses else UNKNOWN


def _share(scores: Scores, run: Run, model: str, domain: str) -> str:
    names = (DENSE, PRUNED, model)
    losses = [scores.pooled(run, name, domain, "perplexity") for name in names]
    if model in names[:2] or not all(losses):
        return UNKNOWN
    return percent(share(*losses))


def _over_pruned(scores: Scores, run: Run, model: str, domain: str) -> str:
    own, plain = (scores.pooled(run, name, domain, "perplexity") for name in (model, PRUNED))
    if model in (DENSE, PRUNED) or not (own and plain):
        return UNKNOWN
    return signed(difference(own, plain))


def _mean(measure: str, shown: Callable[[Estimate], str]) -> Callable[[Scores, Run, str, str], str]:
    def cell(scores: Scores, run: Run, model: str, domain: str) -> str:
        each = scores.pooled(run, model, domain, measure)
        return shown(weighted(each, [1] * len(each))) if each else UNKNOWN

    return cell


def _tokens(estimate: Estimate) -> str:
    error = "" if estimate.error is None else f" ± {estimate.error:.1f}"
    return f"{estimate.value:.1f}{error}"


_MEASURES: dict[str, Callable[[Scores, Run, str, str], str]] = {
    "perplexity": _perplexity,
    "share": _share,
    "nats over pruned": _over_pruned,
    "KL": _mean("kl", nats),
    "top-1": _mean("top1", percent),
    "first divergence": _mean("first_divergence", _tokens),
}


def text_table(scores: Scores, run: Run) -> Table:
    """Returns each text: perplexity and share by model, KL and top-1 of the last model."""
    models = scores.models(run)
    *_, last = models
    lines = []
    for text in scores.texts(run):
        cells = []
        for model in models:
            value, back = (
                _number(scores.row(run, model, text, name)) for name in ("perplexity", "share")
            )
            shown = UNKNOWN if value is None else f"{value.value:.1f}"
            cells.append(shown if back is None else f"{shown} ({percent(back)})")
        for name, form in (("kl", nats), ("top1", percent)):
            found = _number(scores.row(run, last, text, name))
            cells.append(UNKNOWN if found is None else form(found))
        lines.append([text, run.domain(text) if run.calibration else UNKNOWN, *cells])
    return ["text", "domain", *models, f"KL, {last}", f"top-1, {last}"], lines


def task_table(scores: Scores, run: Run) -> Table:
    """Returns each task: the accuracy of a guess and of the models."""
    models = scores.models(run)
    lines = []
    for task in scores.tasks(run):
        found = [_number(scores.row(run, DENSE, task, "chance"))]
        found += [_number(scores.row(run, model, task, "accuracy")) for model in models]
        lines.append([task, *(UNKNOWN if one is None else percent(one) for one in found)])
    return ["task", "chance", *models], lines


def writing_table(scores: Scores, run: Run) -> Table:
    """Returns what the models write: the share of different 4-grams, and its likelihood."""
    models = scores.models(run)
    lines = []
    for measure, form in (("distinct4", percent), ("dense_nats", nats)):
        found = [_number(scores.row(run, model, "writing", measure)) for model in models]
        if any(found):
            lines.append([measure, *(UNKNOWN if one is None else form(one) for one in found)])
    return ["writing", *models], lines


def _number(row: Row | None) -> Estimate | None:
    """Returns the value of a row and its error; None of no row or one without a value."""
    if row is None or not row["value"]:
        return None
    return Estimate(float(row["value"]), float(row["error"]) if row["error"] else None)


def tables(scores: Scores, run: Run) -> Iterator[Table]:
    """Yields the tables of a run that have a row."""
    of_run = (domain_table, text_table, task_table, writing_table)
    for made in of_run if run.calibration else of_run[1:]:
        if (found := made(scores, run))[1]:
            yield found
