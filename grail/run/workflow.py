"""`compress_checkpoint`: the whole workflow of the command line as one call.

load → calibrate → predict → [dense] → [pruned, compensated] → [uneven widths] → compress
     → restored → report, page → export, loaded again and compared
"""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from grail.algebra._fit import check_guard
from grail.arguments import as_path, require_switches
from grail.errors import InputError
from grail.files.load import CheckpointWarning
from grail.files.mixture import AnyText, Mixture, as_text, further_text
from grail.files.pretrained import Pretrained
from grail.files.provenance import provenance
from grail.files.text import Text
from grail.networks import find
from grail.recipe import AnyRecipe, Recipe, merged
from grail.report.formatting import format_bytes, format_seconds
from grail.report.page import page
from grail.report.report import Report
from grail.report.texts import text_names
from grail.run import resume_folder
from grail.run._collect import Collected
from grail.run._sensitivity import require_measurable
from grail.run.served import WidthWarning, refused
from grail.run.study import IMPORTING, LOADING, Prediction, Study, attribute, text_of
from grail.runtime.clock import Stages
from grail.runtime.folder import check_output
from grail.runtime.processes import current_processes
from grail.runtime.settings import Runtime
from grail_kernels import check_kind


def compress_checkpoint(
    source: str | Path | Pretrained,
    output: str | Path,
    calibration: AnyText | Collected,
    *,
    guard: AnyText | None = None,
    select_on: AnyText | None = None,
    evaluate: str | Path | Text | Sequence[str | Path | Text] | None = None,
    baseline: bool = True,
    uneven: bool = False,
    recipe: AnyRecipe = "default",
    runtime: Runtime | None = None,
    **overrides: Any,
) -> Report:
    """Compresses a causal language model of transformers into a folder that transformers loads.

    The folder holds safetensors, tokenizer, configuration, model card, report.json, report.html and
    recipe.json, and is written only after it has reloaded to bitwise the same logits.

    Args:
        source: a transformers folder, a hub name or a .gguf file; a `grail.Pretrained` also has
            device and dtype.
        output: folder to create; one that exists must be empty.
        calibration: a text, as a `grail.Text` with the way to read it; several texts, as a list
            of them, or a `grail.Mixture` with their shares of the tokens; or statistics of the
            dense network, `grail.Collected(folder)`, for the open loop.
        guard: a second kind of text, on which no site's output becomes worse than plain pruning's;
            see `grail.compress`. Read as the calibration, 16,384 tokens of it.
        select_on: text by which channels are selected, and uneven widths, instead of the
            calibration, which then only fits: the more kinds of text, the less the model loses on
            those that the calibration lacks. Read as the calibration, 16,384 tokens of it.
        evaluate: held-out text, on which the dense, the pruned and the restored model are compared;
            with `onload` on the CPU. Read as the calibration, 16,384 tokens of it; wikitext2 is
            measured as in the literature: all of the test split, joined by blank lines, in
            sequences of 2048 tokens. Of several texts, such as one like the calibration and one of
            another kind, the first is that of the headline.
        baseline: with `evaluate`, also measures plain pruning, in a run of its own.
        uneven: chooses each block's width by the measured cost of narrowing it, at the total size
            that `keep` gives; transformers then reads the folder with `trust_remote_code=True`. The
            cost is that on both texts where there is a guard.
        recipe, runtime, overrides: see `grail.compress`. `progress` also prints what is done on
            stderr. With `resume_dir` the same call resumes after a crash; the state is deleted once
            the model is written.

    Returns:
        The report that is written. In an initialised `torch.distributed` group all processes call
        this alike, and the first one writes.

    Raises:
        InputError, EmptyCalibrationError: before the model is loaded where it shows by then.
        ModelError, NonFiniteError, SolveError, StateError: nothing was written.
        OutOfMemoryError, RankError, ExportError: nothing was written.
    """
    if not isinstance(source, Pretrained):
        source = Pretrained(str(as_path("source", source)))
    output = as_path("output", output)
    require_switches(baseline=baseline, uneven=uneven)
    recipe, runtime = merged(recipe, runtime, overrides)
    calibration, evaluate = _texts(calibration, evaluate, recipe)
    further = (
        _further_text("guard", guard, calibration),
        _further_text("select_on", select_on, calibration),
    )
    call = _Call(source, output, calibration, evaluate, baseline, uneven, recipe, runtime, *further)
    processes = current_processes()
    done = call.done
    processes.require_equal("whether the run is done", done)
    if done:
        if processes.number == 0:
            resume_folder.clear(str(runtime.resume_dir))
        return Report.from_json(call.written.read_text(encoding="utf-8"))
    return _Work(call.checked(), _COMMAND.get() or repr(call), call.identity).run()


# The origin that a report names; "" is the call itself.
_COMMAND = ContextVar("command", default="")


@contextmanager
def started_by(command: str) -> Iterator[None]:
    """Names a command in the reports of the calls inside, instead of these calls."""
    token = _COMMAND.set(command)
    try:
        yield
    finally:
        _COMMAND.reset(token)


def _texts(
    calibration: AnyText | Collected,
    evaluate: str | Path | Text | Sequence[str | Path | Text] | None,
    recipe: Recipe,
) -> tuple[Text | Mixture | Collected, tuple[Text, ...]]:
    """Returns the texts of a call, the sequences of the calibration drawn by the recipe's seed."""
    if not isinstance(calibration, Collected):
        calibration = as_text("calibration", calibration)
        if calibration.seed is None:
            calibration = replace(calibration, seed=recipe.seed)
    like = Text("") if isinstance(calibration, Collected) else calibration
    check_kind("evaluate", evaluate, (str, Path, Text, list, tuple, NoneType), "a text or several")
    several: Sequence[str | Path | Text]
    if evaluate is None:
        several = []
    else:
        several = [evaluate] if isinstance(evaluate, (str, Path, Text)) else evaluate
    texts = list[Text]()
    for text in several:
        if isinstance(text, (str, Path)):
            text = like.compared_on(str(text), {}, "evaluate")
        check_kind("evaluate", text, Text, "a text or several")
        assert isinstance(text, Text)
        texts.append(text)
    return calibration, tuple(texts)


def _further_text(
    name: str, text: AnyText | None, calibration: Text | Mixture | Collected
) -> Text | Mixture | None:
    """Returns a text with another purpose, read as the calibration where it has no way of its own.

    Args:
        name: of the argument.
    """
    if text is None:
        return None
    like = Text("") if isinstance(calibration, Collected) else calibration
    if isinstance(text, (str, Path)):
        return further_text(like, [str(text)], {}, name)
    if isinstance(text, (list, tuple)) and all(isinstance(each, (str, Path)) for each in text):
        return further_text(like, list(map(str, text)), {}, name)
    return as_text(name, text)


@dataclass(frozen=True)
class _Call:
    """The arguments of `compress_checkpoint`."""

    source: Pretrained
    output: Path
    calibration: Text | Mixture | Collected
    evaluate: tuple[Text, ...]
    baseline: bool
    uneven: bool
    recipe: Recipe
    runtime: Runtime
    guard: Text | Mixture | None = None
    select_on: Text | Mixture | None = None

    def __repr__(self) -> str:
        left_out = {"runtime", *(name for name, text in self.further.items() if text is None)}
        given = {name: value for name, value in vars(self).items() if name not in left_out}
        return f"grail.compress_checkpoint({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    @property
    def further(self) -> dict[str, Text | Mixture | None]:
        """The texts with another purpose than the calibration's, by argument."""
        return {"guard": self.guard, "select_on": self.select_on}

    @property
    def written(self) -> Path:
        """The report of the output."""
        return self.output / "report.json"

    @property
    def done(self) -> bool:
        """Whether a run of the same call was killed right after it had written all."""
        folder = self.runtime.resume_dir
        if folder is None or not resume_folder.announced(folder, self.identity):
            return False
        return self.written.exists()

    @property
    def identity(self) -> dict[str, str]:
        """The description by which a resumed call is recognised."""
        return {"call": repr(self)}

    def checked(self) -> "_Call":
        """Returns the call with texts that can be read.

        Raises:
            InputError: settings that exclude each other, an output in use, texts that cannot be
                read.
        """
        collected, onloads = (
            isinstance(self.calibration, Collected),
            self.runtime.onload is not None,
        )
        if self.uneven and (collected or onloads or current_processes().count > 1):
            raise InputError(
                "uneven runs the whole model on calibration text, in one process: give no "
                "statistics and no onload"
            )
        if self.uneven and not self.recipe.compensate:
            raise InputError(
                "uneven measures what sites cost once compensated: leave compensate on"
            )
        if self.uneven and isinstance(self.recipe.keep, Mapping):
            raise InputError(
                f"uneven divides one share among the blocks; got keep={self.recipe.keep!r}: give "
                "one share, or leave uneven out to use these"
            )
        if collected and self.recipe.closed_loop:
            raise InputError(
                "statistics are of the dense network: give --open-loop (closed_loop=False)"
            )
        for name, text in self.further.items():
            if collected and text is not None:
                raise InputError(
                    f"{name} is text that runs through the network with the calibration, and "
                    "statistics come without one: give --calibration (calibration=), or leave it "
                    "out"
                )
        if self.guard is not None:
            check_guard(self.recipe.alpha, self.recipe.compensate)
        folder = self.runtime.resume_dir
        check_output(self.output, apart=None if folder is None else Path(folder))
        calibration = self.calibration
        if not isinstance(calibration, Collected):
            calibration = calibration.checked(self.source.source)
        evaluate = tuple(text.checked(self.source.source) for text in self.evaluate)
        guard, select_on = (
            None if text is None else text.checked(self.source.source)
            for text in self.further.values()
        )
        _ = self.source.computing
        return replace(
            self, calibration=calibration, evaluate=evaluate, guard=guard, select_on=select_on
        )

    def load(self) -> tuple[Any, Any]:
        """Returns model and tokenizer, where blocks are brought to a device on the host."""
        self.say(f"Loading {self.source.source} …")
        return self.source.load("cpu" if self.runtime.onload is not None else None)

    def say(self, text: str) -> None:
        """Prints what is about to be done."""
        if self.runtime.progress and current_processes().number == 0:
            print(text, file=sys.stderr)


class _Work:
    """A checked call while it is carried out."""

    def __init__(self, call: _Call, command: str, identity: dict[str, str]):
        self.call, self.stages, self.notes = call, Stages(), list[str]()
        self._identity = identity
        self._origin = provenance(command, call.source.source)

    def run(self) -> Report:
        """Compresses, measures and writes; see `compress_checkpoint`."""
        call, recipe = self.call, self.call.recipe
        study = self._study()
        prediction = self._predicted(study)
        if not call.uneven:
            self._warn(study, recipe)
        if study.heldout:
            call.say("Measuring the dense model …")
            study.measure("dense")
        if study.heldout and call.baseline:
            with _warned():
                study.compare(recipe, uneven=call.uneven)
        if call.uneven:
            call.say("Measuring what the model loses by each site …")
            self.notes.append(
                f"Blocks keep more or less, {recipe.keep:g} of all together, by what narrowing "
                'each of them costs. Rows without "uneven" have even widths.'
            )
            recipe = study.uneven(recipe)
            self._warn(study, recipe)
        if call.baseline:
            with _warned():
                study.compare_rounding(recipe)
        call.say("Compressing …")
        with _warned():
            report = study.run(recipe)
        attribute(report, call.source.name, self._origin)
        report.notes += self.notes
        self._write(study, report, prediction)
        return report

    def _study(self) -> Study:
        """Returns the model and its texts, loaded."""
        call = self.call
        with self.stages(IMPORTING), suppress(ImportError):  # once, where a network is loaded often
            import_module("transformers.modeling_utils")
        with self.stages(LOADING), warnings_as_notes(CheckpointWarning) as unused:
            network, tokenizer = call.load()
        with warnings_as_notes() as notes:
            batches = self._batches(network, tokenizer)
        names = text_names([text.source for text in call.evaluate])
        with warnings_as_notes() as others:
            heldout = {
                name: text.batches(network, tokenizer)
                for name, text in zip(names, call.evaluate, strict=True)
            }
        self.notes += unused + notes + [f"Held-out text: {note}" for note in others]
        further = {
            name: self._further(name, text, network, tokenizer)
            for name, text in call.further.items()
        }
        of_run = None if isinstance(call.calibration, Collected) else call.calibration
        for name, text in zip(names, call.evaluate, strict=True):
            which = f"held-out text {name}" if len(names) > 1 else "held-out text"
            for role, other in {"calibration": of_run, **call.further}.items():
                if other is not None and other.is_same_text(text):
                    self.notes.append(
                        f"The {which} is the {role} text: the comparison is too kind."
                    )
        if call.uneven:
            require_measurable(find(network, call.recipe.sites), call.recipe)
        origins = [
            text_of(text.source, batches) | text.reading
            for text, batches in zip(call.evaluate, heldout.values(), strict=True)
        ]
        if origins:
            self._origin["evaluation"] = origins[0]
        if others_read := origins[1:]:
            self._origin["further_evaluations"] = others_read
        return Study(
            network,
            lambda: call.load()[0],
            tokenizer,
            batches,
            heldout,
            self.stages,
            call.runtime,
            call.say,
            guard=further["guard"],
            select_on=further["select_on"],
        )

    def _further(
        self, name: str, text: Text | Mixture | None, network: Any, tokenizer: Any
    ) -> list[Tensor]:
        """Returns a text with another purpose than the calibration's, and the report names it."""
        if text is None:
            return []
        with warnings_as_notes() as notes:
            batches, self._origin[name] = text.read(network, tokenizer)
        self.notes += [f"Text of {name}: {note}" for note in notes]
        return batches

    def _batches(self, network: Any, tokenizer: Any) -> list[Tensor] | Collected:
        """Returns the calibration of the network."""
        text = self.call.calibration
        if isinstance(text, Collected):
            self._origin["calibration"] = text_of(str(text.folder), text)
            return text
        batches, self._origin["calibration"] = text.read(network, tokenizer)
        return batches

    def _predicted(self, study: Study) -> Prediction:
        """Predicts and prints the cost of the run; refuses it where the disk is full."""
        call, recipe = self.call, self.call.recipe
        prediction = study.predict(recipe, compare=call.baseline, uneven=call.uneven)
        check_output(call.output, prediction.output)
        statistics = "statistics of " if isinstance(call.calibration, Collected) else ""
        used = f"{statistics}{self._origin['calibration']['tokens']:,} tokens"
        call.say(predicted(recipe.keep, prediction.peak, prediction.total, used))
        stages = (f"{name} {format_seconds(value)}" for name, value in prediction.seconds.items())
        call.say(f"Time by stage: {', '.join(stages)}.")
        return prediction

    def _warn(self, study: Study, recipe: Recipe) -> None:
        """Says before a run which of its widths quantisers refuse."""
        architecture = find(study.network, recipe.sites)
        widths = recipe.widths(architecture)
        sites = [(site, widths[site.name]) for site in recipe.all_sites(architecture)]
        for sentence in refused(study.network, recipe, sites):
            if self.call.runtime.progress:
                self.call.say(f"Warning: {sentence}.")
            elif current_processes().number == 0:
                warnings.warn(sentence, WidthWarning, stacklevel=2)

    def _write(self, study: Study, report: Report, prediction: Prediction) -> None:
        """Writes the output, in the first of several processes, for which the others wait."""
        call, processes = self.call, current_processes()
        call.say("Writing, and loading again to compare …")
        with processes.together():
            if processes.number > 0:
                return
            folder = call.runtime.resume_dir
            if folder is not None:
                resume_folder.announce(folder, self._identity)
            study.write(report, prediction, call.output, page_or_note)
            if folder is not None:
                resume_folder.clear(folder)


@contextmanager
def _warned() -> Iterator[None]:
    """Lets runs repeat no warning of widths."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WidthWarning)
        yield


def page_or_note(report: Report) -> str | None:
    """Returns the report as HTML; without plots to draw it adds a note and returns None."""
    if find_spec("matplotlib") is None:
        report.notes.append("No report.html: its plots need pip install 'grail-kernels[report]'.")
        return None
    return page(report)


def predicted(keep: object, peak: float, seconds: float, text: str) -> str:
    """Returns a sentence with the predicted memory and time of a run."""
    return (
        f"Predicted for keep={keep}, {text}: peak memory {format_bytes(peak)}, time "
        f"{format_seconds(seconds)}."
    )


@contextmanager
def warnings_as_notes(kind: type[UserWarning] = UserWarning) -> Iterator[list[str]]:
    """Collects the library's own warnings, for the report as well as for a screen."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kind)
        yield notes
    notes += [str(warning.message) for warning in caught]
