"""One checkpoint compressed and compared: dense, pruned and compensated models on the same text.

Every narrowed model starts from the dense network, so a study asks for a fresh one after each run.
All that a command does is a stage with a predicted and a measured wall time.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from grail.algebra.grids import FORMATS
from grail.files import block_widths
from grail.files._export import export
from grail.files.grids import formats, grids_of, stored_bytes
from grail.files.provenance import text_source
from grail.networks import find
from grail.recipe import Recipe
from grail.report import completions
from grail.report._evaluate import DenseReference, bfloat16_bytes, evaluate, measure_size
from grail.report.report import Evaluation, Report, fitted_parts
from grail.report.texts import add_comparisons, joined
from grail.run._collect import Collected
from grail.run._compress import compress
from grail.run._inspect import Inspection, inspect
from grail.run._sensitivity import PROBES, UNDONE, sensitivity
from grail.run.quantizer import round_all
from grail.runtime.clock import Stages
from grail.runtime.settings import Runtime
from grail.runtime.transaction import Transaction

IMPORTING, LOADING, PREDICTING = "importing", "loading", "predicting"
RUNS = "runs to compare with"
PERPLEXITY, COMPLETIONS = "perplexity", "completions"
SENSITIVITY, COMPRESSING, WRITING = "loss by site", "compressing", "writing"

# Bytes a second at which an output is written, read again and compared. A guess: no disk is
# measured before a run.
_WRITTEN = 100e6


def text_of(source: str, batches: Sequence[Tensor] | Collected) -> dict[str, Any]:
    """Returns the provenance of a text, or of statistics that were collected from one."""
    if not isinstance(batches, Collected):
        return text_source(source, batches)
    tokens = sum(calibration["tokens"] for calibration in batches.calibrations)
    return {"source": source, "tokens": tokens, "collected": batches.calibrations}


def attribute(report: Report, name: str, origin: Mapping[str, Any]) -> None:
    """Writes into a report what its model is called and where all of it comes from."""
    report.model["name"] = name
    report.calibration["source"] = origin["calibration"]["source"]
    report.provenance = dict(origin)
    if files := origin["model"]["files"]:
        report.model["bytes"]["source"] = sum(file["bytes"] for file in files.values())


@dataclass(frozen=True)
class Prediction:
    """Wall seconds of a command by stage, and peak bytes and tokens of the compression itself."""

    seconds: Mapping[str, float]
    peak: int
    tokens: int
    output: int  # bytes of the weights

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


def baselines(recipe: Recipe, *, uneven: bool = False) -> dict[str, Recipe]:
    """Returns the runs that a model is compared with, by role of their row in a report.

    "pruned" is plain pruning with the selector of `recipe`, or Wanda's where that is greedy, which
    selects channels to be compensated. "compensated" is the same selector and widths as "pruned"
    with compensation, where the model itself has another selector or uneven widths.
    """
    recipe = replace(recipe, quantize=None)
    if not (recipe.compensate or recipe.fit_bias):
        return {}
    same = replace(recipe, selector="wanda") if recipe.selector == "greedy" else recipe
    plain = replace(
        same, compensate=False, fit_bias=False, token_weights=False, correct_attention=False
    )
    others = same is not recipe or uneven
    return {"pruned": plain, **({"compensated": same} if others else {})}


@dataclass
class Study:
    """Compresses fresh copies of one network and keeps what each of them is worth.

    Args:
        network: the dense network. The study should be all that holds it: a run uses it up.
        fresh: returns another; called once the last one is gone, for two would double the peak.
        tokenizer: of the network, for completions; None completes nothing.
        batches: calibration.
        heldout: batches of each held-out text, by its name; none evaluates nothing. The first one
            also gives the prompts of completions.
        stages: counts the time.
        runtime: how all runs are computed; the network's own run alone is resumed.
        say: called with the name of the next step.
        guard: batches of guard text, for the runs that can use one.
        select_on: batches by which channels and uneven widths are chosen, instead of the
            calibration.

    Memory: from the dense row on, the dense network's outputs are kept on the host, so that no
    other row needs a second pass of it: for each text its last hidden states [tokens, features] and
    the output layer [vocabulary, features], in the network's dtype (`references`). On a CPU they
    are part of the process's memory while it compresses.
    """

    network: Any
    fresh: Callable[[], Any]
    tokenizer: Any
    batches: list[Tensor] | Collected
    heldout: Mapping[str, Sequence[Tensor]]
    stages: Stages
    runtime: Runtime = Runtime()
    say: Callable[[str], None] = print
    rows: dict[str, Evaluation] = field(default_factory=dict)
    completions: dict[str, Tensor] = field(default_factory=dict)
    references: dict[str, DenseReference] = field(default_factory=dict)
    guard: Sequence[Tensor] = ()
    select_on: Sequence[Tensor] = ()

    @property
    def _first(self) -> Sequence[Tensor]:
        """The held-out text that comes first."""
        return next(iter(self.heldout.values()))

    def predict(self, recipe: Recipe, *, compare: bool, uneven: bool) -> Prediction:
        """Predicts the time of the whole command from trials on the dense network."""
        compare = compare and bool(self.heldout)
        others = list(baselines(recipe, uneven=uneven).values()) if compare else []
        rounds = compare and recipe.quantize is not None
        others += [replace(recipe, quantize=None)] * rounds
        with self.stages(PREDICTING):
            plan = self._inspect(recipe)
            spent = self.stages.seconds
            seconds = {IMPORTING: spent[IMPORTING]} if IMPORTING in spent else {}
            seconds[LOADING] = spent.get(LOADING, 0.0) * (1 + len(others))
            seconds[PREDICTING] = 0.0  # known when all the rest is
            models = ("dense" not in self.rows) + len(others) + rounds + 1
            seconds |= self._of_evaluations(models)
            if others:
                plans = [self._inspect(other) for other in others]
                seconds[RUNS] = sum(each.seconds["total"] for each in plans)
            if uneven:
                seconds[SENSITIVITY] = self._of_sensitivity(recipe, plan.seconds)
            seconds[COMPRESSING] = plan.seconds["total"]
            output = plan.savings[0].bytes
            seconds[WRITING] = output / _WRITTEN
        seconds[PREDICTING] = self.stages.seconds[PREDICTING]
        return Prediction(seconds, plan.memory["peak"], plan.tokens, output)

    def _inspect(self, recipe: Recipe) -> Inspection:
        rows, length, tokens = 1, 8, 0  # where sums were collected no text runs through the model
        if not isinstance(self.batches, Collected):
            (rows, length), tokens = self.batches[0].shape, _count(self.batches)
        return inspect(
            self.network,
            keeps=(recipe.keep,),
            tokens=tokens,
            sequence_length=length,
            batch_size=rows,
            guard_tokens=_count(self._guard_of(recipe) or ()) + _count(self.select_on),
            recipe=recipe,
            runtime=self.runtime,
        )

    def _of_evaluations(self, models: int) -> dict[str, float]:
        """Predicts evaluations of models of the network's size from one sequence and few tokens."""
        if not self.heldout:
            return {}
        tokens = sum(_count(batches) for batches in self.heldout.values())
        alone, compared = _rates(self.network, self._first)
        dense = "dense" not in self.rows
        seconds = {PERPLEXITY: (dense * alone + (models - dense) * compared) * tokens}
        if self._completes():
            starts = completions.prompts(self._first)
            few, more = (
                _timed(partial(completions.complete, self.network, starts, new)) for new in (1, 4)
            )
            each = max(0.0, more - few) / 3
            seconds[COMPLETIONS] = models * (few + each * (completions.NEW_TOKENS - 1))
        return seconds

    def _of_sensitivity(self, recipe: Recipe, run: Mapping[str, float]) -> float:
        """Predicts a pass with the Grams and solves of a run, and a few batches for each site."""
        assert not isinstance(self.batches, Collected)
        sites = recipe.all_sites(find(self.network, recipe.sites))
        probes = max(1, len(self.batches) // PROBES)
        probed = self.batches[:probes]
        tokens = _count(probed) + _count((self._guard_of(recipe) or ())[:probes])
        return run["total"] + (1 + len(sites)) * _rate(self.network, probed) * tokens

    def measure(self, role: str, recipe: Recipe | None = None) -> None:
        """Adds the row of the network, narrowed by `recipe`, if there is held-out text."""
        if not self.heldout:
            return
        with self.stages(PERPLEXITY):
            row = self._referred() if role == "dense" else self._evaluated()
        if recipe is not None:
            row = replace(row, **self._made_by(recipe), **self._rounded(role))
        if self._completes():
            with self.stages(COMPLETIONS):
                written = completions.complete(self.network, completions.prompts(self._first))
            self.completions[role] = written
            if (found := completions.repetition(written)) is not None:
                row.repetition, row.repetition_error = found
        self.rows[role] = row

    def _referred(self) -> Evaluation:
        """Evaluates the network, and keeps its outputs as those of the dense one."""
        progress = self.runtime.progress
        made = {
            name: DenseReference(self.network, batches, progress=progress)
            for name, batches in self.heldout.items()
        }
        # The network itself is soon narrowed, so a reference that runs it again is of no use.
        self.references = {name: each for name, each in made.items() if not each.runs_model}
        return joined({name: each.evaluation for name, each in made.items()})

    def _evaluated(self) -> Evaluation:
        progress = self.runtime.progress
        return joined(
            {
                name: evaluate(
                    self.network, batches, against=self.references.get(name), progress=progress
                )
                for name, batches in self.heldout.items()
            }
        )

    def compare(self, recipe: Recipe, *, uneven: bool = False) -> None:
        """Adds the rows of `baselines`; the network is a fresh one afterwards."""
        for role, other in baselines(recipe, uneven=uneven).items():
            self.say(f"Measuring the comparison: {self._label(other)} …")
            with self.stages(RUNS):
                runtime = replace(self.runtime, resume_dir=None)
                self._compress(other, runtime)
            self.measure(role, other)
            self.network = None
            with self.stages(LOADING):
                self.network = self.fresh()

    def compare_rounding(self, recipe: Recipe) -> None:
        """Adds the rows of a run that does not quantise, and of its model rounded to nearest.

        The network is a fresh one afterwards.
        """
        if recipe.quantize is None or not self.heldout:
            return
        plain = replace(recipe, quantize=None)
        self.say(f"Measuring the comparison: {self._label(plain)}, and rounded to nearest …")
        with self.stages(RUNS):
            runtime = replace(self.runtime, resume_dir=None)
            self._compress(plain, runtime)
        self.measure("unquantised", plain)
        with self.stages(RUNS), Transaction() as transaction:
            kind = FORMATS[recipe.quantize]
            round_all(self.network, find(self.network, recipe.sites), kind, transaction)
        self.measure("rounded", plain)
        self.network = None
        with self.stages(LOADING):
            self.network = self.fresh()

    def _compress(self, recipe: Recipe, runtime: Runtime) -> Report:
        return compress(
            self.network,
            self.batches,
            guard=self._guard_of(recipe),
            select_on=self.select_on or None,
            recipe=recipe,
            runtime=runtime,
        )

    def _guard_of(self, recipe: Recipe) -> Sequence[Tensor] | None:
        """Returns the guard text for a run that chooses how strongly to compensate."""
        return self.guard if self.guard and recipe.compensate and recipe.alpha == "auto" else None

    def _rounded(self, role: str) -> dict[str, Any]:
        """Returns the fields of a row that describe how the network is quantised."""
        if not (grids := grids_of(self.network)):
            return {}
        size = stored_bytes(self.network)
        return {"quantized": formats(grids)[0], "to_nearest": role == "rounded", "bytes": size}

    def uneven(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with a share for each site, by what narrowing it costs the network."""
        assert not isinstance(self.batches, Collected)
        with self.stages(SENSITIVITY):
            measured = sensitivity(
                self.network,
                self.select_on or self.batches,
                guard=self._guard_of(recipe),
                recipe=recipe,
                runtime=self.runtime,
            )
        undone = UNDONE if recipe.follows_drift else 0.0
        return replace(recipe, keep=measured.shares(undone=undone))

    def run(self, recipe: Recipe) -> Report:
        """Compresses the network itself and reports it with all measurements."""
        with self.stages(COMPRESSING):
            report = self._compress(recipe, self.runtime)
        self.stages.seconds[COMPRESSING] += report.resumed.get("seconds", 0.0)
        self.measure("restored" if recipe.compensate or recipe.fit_bias else "pruned", recipe)
        add_comparisons(self.rows)
        if self.rows and not self.references:
            report.notes.append(
                "KL and top-1 are not measured: this model's logits need more than its last hidden "
                "states; grail evaluate --against measures them."
            )
        report.evaluation, report.samples = dict(self.rows), self._samples()
        report.model["bytes"] = {
            "after": measure_size(self.network)[1],
            "bfloat16": bfloat16_bytes(self.network),
            **({"quantised": stored_bytes(self.network)} if recipe.quantize else {}),
        }
        return report

    def write(
        self,
        report: Report,
        prediction: Prediction,
        output: Path,
        page: Callable[[Report], str | None],
    ) -> None:
        """Writes the folder; its report has the time of all stages up to the report itself."""
        start = time.perf_counter()

        def finished() -> Report:
            self.stages.seconds[WRITING] = time.perf_counter() - start
            report.stages = _stages(prediction.seconds, self.stages.seconds)
            return report

        report.memory["predicted_peak"] = prediction.peak
        uneven = bool(reasons := report.model["beyond_configuration"])
        # What the notes advise is done here.
        report.notes = [note for note in report.notes if not note.startswith(tuple(reasons))]
        missing = block_widths.obstacle(self.network) if uneven else None
        how = "transformers loads it with trust_remote_code=True"
        if missing is not None:
            how = f"grail alone loads it, by grail.load_model, since {missing}"
        report.notes += [f"{reason}: {how}" for reason in reasons]
        export(self.network, self.tokenizer, output, report=finished, page=page, uneven=uneven)

    def _label(self, recipe: Recipe) -> str:
        return Evaluation(0.0, 0, 0, 0, **self._made_by(recipe)).label

    def _made_by(self, recipe: Recipe) -> dict[str, Any]:
        """Returns the fields of a row that describe how a recipe narrowed the network."""
        shares = recipe.keep if isinstance(recipe.keep, Mapping) else {}
        kinds = find(self.network, recipe.sites).kinds
        return {
            "selector": recipe.as_dict()["selector"],
            "compensation": fitted_parts(recipe.compensate, recipe.fit_bias),
            "uneven": not shares.keys() <= set(kinds)
            or any(isinstance(share, Sequence) for share in shares.values()),
        }

    def _completes(self) -> bool:
        return self.tokenizer is not None and self.network.can_generate()

    def _samples(self) -> list[dict[str, str]]:
        """Returns the first completions of the dense, the pruned and the final model, as text."""
        roles = ("dense", "pruned", "restored")
        shown = {role: rows for role, rows in self.completions.items() if role in roles}
        if not shown:
            return []
        tokens = {"prompt": completions.prompts(self._first), **shown}
        texts = {
            role: [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
            for role, rows in tokens.items()
        }
        count = min(completions.SHOWN, len(texts["prompt"]))
        return [{role: rows[i] for role, rows in texts.items()} for i in range(count)]


def _stages(
    predicted: Mapping[str, float], measured: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    columns = {"predicted": predicted, "measured": measured}
    rows = {
        stage: {column: of[stage] for column, of in columns.items() if stage in of}
        for stage in [*predicted, *(stage for stage in measured if stage not in predicted)]
    }
    return {**rows, "total": {column: sum(of.values()) for column, of in columns.items()}}


def _count(batches: Sequence[Tensor]) -> int:
    return sum(batch.numel() for batch in batches)


def _rate(network: Any, batches: Sequence[Tensor]) -> float:
    """Seconds a token of evaluating a network, from one sequence."""
    sequence = batches[0][:1]
    return _timed(lambda: evaluate(network, [sequence], progress=False)) / sequence.numel()


def _rates(network: Any, batches: Sequence[Tensor]) -> tuple[float, float]:
    """Seconds a token of evaluating a network alone, and against a dense one's known outputs."""
    sequence = batches[0][:1]
    reference = DenseReference(network, [sequence], progress=False)
    against = None if reference.runs_model else reference
    compared = _timed(lambda: evaluate(network, [sequence], against=against, progress=False))
    return _rate(network, batches), compared / sequence.numel()


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
