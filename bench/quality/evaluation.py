"""Scores of compressed language models that a user notices, in and off the calibration's domain.

    python -m bench.quality.evaluation                            all models, texts and tasks
    python -m bench.quality.evaluation --calibration passages --model pruned --model grail
    python -m bench.quality.evaluation --model dense --on brown --on agreement
    python -m bench.quality.evaluation --folder OUT
    python -m bench.quality.evaluation --quick                    less of everything
    python -m bench.quality.evaluation --show                     only the tables

SmolLM2-135M is compressed with each calibration text, and measured beside the dense model; so is
every folder with a compressed SmolLM2-135M. A killed run resumes. Texts, tasks and measures are
described in docs/benches.md. Other benches call `scores_of`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.quality import endtoend, generating, tasks
from bench.quality.endtoend import LENGTH, WRITTEN, Subject
from bench.quality.endtoend import TEXTS as CACHE
from bench.quality.suite_tables import Scores, tables
from bench.tools.commandline import CommandLine
from bench.tools.measuring import Table
from bench.tools.tables import aligned
from bench.tools.texts import TEXTS
from grail.errors import InputError
from grail.files.load import load_model
from grail.report import paired
from grail.report._evaluate import DenseReference, evaluate
from grail.report.completions import complete

# `python` and `technical` are the text of `passages`, cut otherwise.
READ = tuple(name for name in TEXTS if name not in {"python", "technical"})
WRITING = "writing"
PROMPT = 32  # tokens
# Sequences of a text, questions of a task, prompts of a text.
FULL = {"sequences": 12, "questions": 200, "prompts": 8}
QUICK = {"sequences": 6, "questions": 100, "prompts": 4}  # 5 minutes of a core for a model
MODELS: dict[str, dict[str, Any]] = {
    "pruned": endtoend.MODELS["pruned"],
    "paper": endtoend.MODELS["paper"],
    "grail": endtoend.MODELS["restored"],
}
KEY = ("model", "calibration", "tokens", "sites", "keep", "on", "measure")


class Score(NamedTuple):
    """One measure of a model.

    Attributes:
        on: a text, a task or `WRITING`.
        measure: see docs/benches.md.
        value: its value; None where it is not defined.
        error: standard error over sequences, questions or texts; None where it has none.
        each: of each sequence, question or text, in their order, where others are paired with it.
    """

    on: str
    measure: str
    value: float | None
    error: float | None = None
    each: tuple[float, ...] = ()


class Suite:
    """Everything that models are measured on, made once from the dense model.

    Args:
        dense: the dense model, which stays as it is.
        batches: by name, held-out sequences of a text, each a batch [1, tokens].
        questions: by name, tasks; those that the dense model does not solve are left out.
        prompts: starts of texts that models continue, of each text.
        new: tokens that they add.
    """

    def __init__(
        self,
        dense: Any,
        batches: Mapping[str, Sequence[Tensor]],
        questions: Mapping[str, tasks.Task],
        *,
        prompts: int = 8,
        new: int = 48,
    ):
        self.dense, self.batches, self.questions = dense, dict(batches), dict(questions)
        self.prompts, self.new = prompts, new
        self._references: dict[str, DenseReference] = {}
        self._greedy: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Texts, tasks and `WRITING`, in the order of measuring."""
        return (*self.batches, *self.questions, *([WRITING] if self.prompts else []))

    def measures(self, on: str, dense: bool = False) -> tuple[str, ...]:
        """Names of the measures, in the order in which `score` returns them."""
        if on in self.batches:
            compared = ("nats_lost", "nats_over_pruned", "share", "kl", "top1")
            written = ("first_divergence",) if self.prompts else ()
            return ("perplexity",) if dense else ("perplexity", *compared, *written)
        if on in self.questions:
            return ("accuracy", "chance" if dense else "accuracy_lost")
        return ("distinct4", "dense_nats")

    def count(self, on: str, measure: str) -> int | None:
        """The number of sequences, questions or prompts of a measure; None: not of this suite."""
        if on in self.batches:
            batches = len(self.batches[on])
            if measure != "first_divergence":
                return batches
            return min(self.prompts, batches) or None
        if on in self.questions:
            return len(self.questions[on].questions)
        return len(self._mixed_starts) if on in self.names else None

    def score(self, model: Any, on: str, known: "Known | None" = None) -> list[Score]:
        """Measures a model on one text, task or in writing.

        Args:
            model: the dense model or a compressed one.
            on: of `names`.
            known: scores of the dense and the pruned model, which others are paired with.
        """
        known = known or Known({}, {})
        if on in self.batches:
            scores = self._read(model, on, known)
        elif on in self.questions:
            scores = self._answer(model, on, known)
        else:
            scores = self._write(model)
        assert [s.measure for s in scores] == list(self.measures(on, model is self.dense))
        return scores

    def _read(self, model: Any, text: str, known: "Known") -> list[Score]:
        batches = self.batches[text]
        if text not in self._references:
            self._references[text] = DenseReference(self.dense, batches, progress=False)
        reference = self._references[text]
        if model is self.dense:
            found = reference.evaluation
            return [Score(text, "perplexity", found.perplexity, None, tuple(found.losses))]
        found = evaluate(model, batches, against=reference, progress=False)
        losses, dense, pruned = found.losses, reference.evaluation.losses, known.pruned.get(text)
        scores = [
            Score(text, "perplexity", found.perplexity, None, tuple(losses)),
            _estimate(text, "nats_lost", paired.difference(losses, dense)),
            _estimate(text, "nats_over_pruned", pruned and paired.difference(losses, pruned)),
            _estimate(text, "share", pruned and paired.share(dense, pruned, losses)),
            Score(text, "kl", found.kl, found.kl_error, tuple(found.divergences)),
            Score(text, "top1", found.top1, found.top1_error, tuple(found.agreements)),
        ]
        if self.prompts:
            starts = self._starts(text)
            if text not in self._greedy:
                self._greedy[text] = complete(self.dense, starts, self.new)
            counts = generating.first_divergence(model, starts, self._greedy[text])
            scores.append(_mean(text, "first_divergence", [float(count) for count in counts]))
        return scores

    def _answer(self, model: Any, task: str, known: "Known") -> list[Score]:
        found = self.questions[task].scores(model)
        accuracy = _mean(task, "accuracy", found)
        if model is self.dense:
            return [accuracy, Score(task, "chance", self.questions[task].chance)]
        dense = known.dense.get(task)
        lost = dense and paired.difference(dense, found)
        return [accuracy, _estimate(task, "accuracy_lost", lost)]

    def _write(self, model: Any) -> list[Score]:
        starts = self._mixed_starts
        texts = generating.sample(model, starts, self.new)
        return [
            _mean(WRITING, "distinct4", generating.distinct(texts.tolist())),
            _mean(WRITING, "dense_nats", generating.surprise(self.dense, starts, texts)),
        ]

    def _starts(self, text: str) -> Tensor:
        return torch.cat([batch[:1, :PROMPT] for batch in self.batches[text][: self.prompts]])

    @cached_property
    def _mixed_starts(self) -> Tensor:
        """Three times as many prompts as of one text, of all texts in turn."""
        by_text = [self._starts(text) for text in self.batches]
        turns = max(map(len, by_text))
        mixed = [starts[turn] for turn in range(turns) for starts in by_text if turn < len(starts)]
        return torch.stack(mixed[: 3 * self.prompts])


class Known(NamedTuple):
    """Losses and task scores of the dense and of the pruned model, from `each_of`."""

    dense: Mapping[str, Sequence[float]]
    pruned: Mapping[str, Sequence[float]]


def _estimate(on: str, measure: str, found: paired.Estimate | None) -> Score:
    return Score(on, measure, found and found.value, found and found.error)


def _mean(on: str, measure: str, each: Sequence[float]) -> Score:
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    return Score(on, measure, statistics.fmean(each), error, tuple(each))


def scores_of(
    model: Any, suite: Suite, known: Known | None = None, on: Sequence[str] | None = None
) -> list[Score]:
    """Measures a model on all of a suite, or on some of it.

    Args:
        model: the suite's dense model or a compressed one.
        suite: what to measure.
        known: of the dense and the pruned model, from `each_of`.
        on: of the names of the suite.
    """
    return [score for name in on or suite.names for score in suite.score(model, name, known)]


def each_of(scores: Sequence[Score]) -> dict[str, tuple[float, ...]]:
    """By text or task, losses or scores of each sequence or question, for `Known`."""
    return {s.on: s.each for s in scores if s.measure in {"perplexity", "accuracy"}}


def suite_of(
    subject: Subject,
    texts: Sequence[str] = READ,
    named: Sequence[str] = tuple(tasks.TASKS),
    *,
    sequences: int = 12,
    questions: int = 200,
    prompts: int = 8,
) -> Suite:
    """The suite of SmolLM2-135M.

    Args:
        subject: the dense model and its texts.
        texts: of `READ` or other texts of `bench.tools.texts`.
        named: of `tasks.TASKS`.
        sequences: of 1024 held-out tokens of each text.
        questions: of each task at the most.
        prompts: of each text; 0 measures no writing.
    """
    batches = {name: subject.batches(name, "heldout", sequences * LENGTH) for name in texts}
    made = {name: tasks.build(name, subject.tokenizer, CACHE, questions) for name in named}
    return Suite(subject.model, batches, made, prompts=prompts)


class Measured:
    """Rows of a file: scores that are known, names that are missing, new scores.

    Raises:
        InputError: the file has scores of other numbers of sequences, questions or prompts, with
            which those of the suite cannot be paired.
    """

    def __init__(self, path: Path, suite: Suite):
        self.suite, self.table = suite, Table(path, KEY)
        for row in self.table.rows:
            here = suite.count(row["on"], row["measure"])
            if here is not None and row["count"] and int(row["count"]) != here:
                raise InputError(
                    f"{path} has {row['measure']} of {row['on']} over {row['count']}, and this run "
                    f"measures {here}; give the sizes that the file was made with (--quick, "
                    "--sequences, --questions, --prompts) or another --output"
                )

    def each(self, of: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
        """`each_of` the rows of a model."""
        rows = [row for row in self.table.rows if all(row[k] == str(v) for k, v in of.items())]
        scores = [
            Score(row["on"], row["measure"], None, None, tuple(map(float, row["each"].split())))
            for row in rows
        ]
        return each_of(scores)

    def missing(self, of: Mapping[str, Any], on: Sequence[str], dense: bool) -> list[str]:
        """Names of `on` that lack a row of the model."""
        return [
            name
            for name in on
            if any(
                self._key(of, name, measure) not in self.table
                for measure in self.suite.measures(name, dense)
            )
        ]

    def add(self, of: Mapping[str, Any], score: Score) -> None:
        """Writes a row, if it is not there."""
        if self._key(of, score.on, score.measure) in self.table:
            return
        numbers = {
            name: "" if value is None else f"{value:.5g}"
            for name, value in (("value", score.value), ("error", score.error))
        }
        count = len(score.each) or ""
        each = " ".join(f"{value:.7g}" for value in score.each)
        row = {**of, "on": score.on, "measure": score.measure, **numbers, "count": count}
        self.table.add({**row, "each": each})

    def _key(self, of: Mapping[str, Any], on: str, measure: str) -> tuple[Any, ...]:
        return (*of.values(), on, measure)


def described(
    model: str, calibration: str = "", tokens: int | str = "", sites: str = "", keep: Any = ""
) -> dict[str, Any]:
    """The columns that identify a model; of the dense model and of a folder its name alone."""
    return dict(zip(KEY, (model, calibration, tokens, sites, keep), strict=False))


def solved(scores: Mapping[str, Sequence[float]], questions: Mapping[str, tasks.Task]) -> list[str]:
    """Tasks on which the dense model, of these scores, beats chance."""
    return [name for name, t in questions.items() if tasks.beats_chance(scores[name], t.chance)]


def mixture(subject: Subject, texts: str, tokens: int) -> list[Tensor]:
    """Calibration sequences of one text or of several in turn, "passages+brown", of each as many.

    Args:
        subject: the dense model and its texts.
        texts: names of texts, with "+" between.
        tokens: of all, rounded up to whole sequences of each.
    """
    names = texts.split("+")
    parts = [subject.batches(name, "calibration", tokens // len(names)) for name in names]
    return [batch for turn in zip_longest(*parts) for batch in turn if batch is not None]


def measure(
    out: Measured,
    subject: Subject,
    runs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    folders: Sequence[Path],
) -> None:
    """Measures what is missing: the dense model, runs of compression, and folders.

    Args:
        out: the file.
        subject: the dense model and its texts.
        runs: of each compressed model its description and the settings of `grail.compress`; the
            pruned one of a calibration comes before the others.
        folders: with models, compressed from the dense one.
    """
    suite, dense = out.suite, described("dense")
    for name in out.missing(dense, suite.names, dense=True):
        for score in suite.score(suite.dense, name):
            out.add(dense, score)
    known = out.each(dense)
    kept = solved(known, suite.questions)
    for name in suite.questions:
        if name not in kept:
            print(f"{name}: left out, the dense model does not beat chance by five standard errors")
    on = [name for name in suite.names if name in kept or name not in suite.questions]
    for of, settings in runs:
        pruned = out.each({**of, "model": "pruned"})
        if missing := out.missing(of, on, dense=False):
            batches = mixture(subject, of["calibration"], of["tokens"])
            model, _ = subject.compressed(batches, **settings)
            for name in missing:
                for score in suite.score(model, name, Known(known, pruned)):
                    out.add(of, score)
            del model
    for folder in folders:
        of = described(folder.name)
        if missing := out.missing(of, on, dense=False):
            model, _ = load_model(folder)
            for name in missing:
                for score in suite.score(model, name, Known(known, {})):
                    out.add(of, score)


def show(path: Path) -> None:
    """Prints the tables of a file."""
    scores = Scores(Table(path, KEY).rows)
    for run in scores.runs:
        print(f"\n{', '.join(filter(None, run)) or 'folders'}")
        for header, rows in tables(scores, run):
            print(f"\n{aligned(header, rows)}")


def main(arguments: list[str] | None = None) -> None:
    """Measures the dense model, and compressed ones beside it."""
    parser = CommandLine(
        __doc__,
        *("keep", "model"),
        rows="evaluation",
        takes="11 minutes of a core for a model, 5 with --quick, and its compression",
        model={
            "choices": ["dense", *MODELS],
            "help": "beside the dense model; may be repeated (default all)",
        },
    )
    parser.add_argument(
        "--calibration",
        action="append",
        help="a text, several as in passages+brown, or with text that the model writes as in "
        "passages+written; may be repeated (default passages, brown)",
    )
    parser.add_argument("--tokens", type=int, default=16 * LENGTH, help="default %(default)s")
    parser.add_argument("--sites", default="mlp", help="mlp, heads or mlp,heads (default mlp)")
    parser.add_argument("--folder", action="append", type=Path, help="a model; may be repeated")
    parser.add_argument("--on", action="append", help="a text, task or writing (default all)")
    parser.add_argument("--quick", action="store_true", help="the smaller defaults of these sizes:")
    for name, of in (("sequences", "a text"), ("questions", "a task"), ("prompts", "a text")):
        sizes = f"default {FULL[name]}; with --quick {QUICK[name]}"
        parser.add_argument(f"--{name}", type=int, help=f"of {of} ({sizes})")
    parser.add_argument("--show", action="store_true", help="measure nothing, print the tables")
    options = parser.read(arguments)
    if options.show:
        show(options.output)
        return
    on = options.on or [*READ, *tasks.TASKS, WRITING]
    allowed = (*TEXTS, *tasks.TASKS, WRITING)
    if unknown := [name for name in on if name not in allowed]:
        parser.error(f"--on: {unknown[0]} is none of {', '.join(allowed)}")
    if WRITING in on and not set(on) & set(TEXTS):
        parser.error("--on writing needs a text whose starts are continued, as in --on brown")
    calibrated = [name for texts in options.calibration or [] for name in texts.split("+")]
    sources = (*TEXTS, WRITTEN)
    if wrong := [name for name in calibrated if name not in sources]:
        parser.error(f"--calibration: {wrong[0]} is none of {', '.join(sources)}")
    calibrations = [] if options.folder else ["passages", "brown"]
    runs = [
        (
            described(name, text, options.tokens, options.sites, options.keep),
            {"keep": options.keep, "sites": tuple(options.sites.split(",")), **settings},
        )
        for text in options.calibration or calibrations
        for name, settings in MODELS.items()
        if name in (options.model or MODELS)
    ]
    size = QUICK if options.quick else FULL
    size = size | {name: n for name in size if (n := getattr(options, name)) is not None}
    subject = Subject()
    suite = suite_of(
        subject,
        [name for name in TEXTS if name in on],
        [name for name in tasks.TASKS if name in on],
        sequences=size["sequences"],
        questions=size["questions"],
        prompts=size["prompts"] if WRITING in on else 0,
    )
    torch.manual_seed(0)
    measure(Measured(options.output, suite), subject, runs, options.folder or [])
    show(options.output)


if __name__ == "__main__":
    main()
