"""`grail compress`."""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import typer

from grail.commands.console import phases, print_table, sizes
from grail.commands.options import READING, Given, Printed, RecipeFile, command
from grail.commands.root import commands, is_closed_pipe
from grail.errors import InputError
from grail.files.mixture import further_text
from grail.files.packing import Join
from grail.files.pretrained import Pretrained
from grail.files.text import EVALUATION_TOKENS, FURTHER_TOKENS, SOURCES
from grail.recipe import RECIPE, Recipe, merged
from grail.report.report import Report
from grail.report.summary import (
    comparison_tables,
    headline,
    quantising_sentence,
    resumed_sentence,
    size_sentence,
    stage_table,
    verdict,
)
from grail.report.texts import worse_sentence
from grail.run._collect import Collected
from grail.run.workflow import compress_checkpoint, started_by
from grail.runtime.processes import current_processes, launched
from grail.runtime.settings import Runtime, setting

_COMPARING = "Comparing on held-out text"


@dataclass(frozen=True)
class CompressOptions:
    """The options of `grail compress` itself; model, text, recipe and runtime add theirs."""

    output: Path = setting(
        ..., "Folder for model, report.json, report.html and recipe.json; new or empty."
    )
    calibration: list[str] | None = setting(
        None,
        f"Text to collect activations on: {SOURCES}. It should resemble the text that the model is "
        "used for. Given several times, the texts are mixed by --shares.",
        metavar="TEXT",
    )
    statistics: Path | None = setting(
        None,
        "Folder that grail stats wrote, instead of --calibration; needs --open-loop.",
    )
    guard: str | None = setting(
        None,
        "Text of a second kind, on which no site's output becomes worse than plain pruning's: it "
        "chooses, with the held-out sequences, what is auto, and is never fitted. Not with "
        "--statistics, --no-compensate or a given --alpha.",
        metavar="TEXT",
    )
    guard_tokens: int | None = setting(
        None, "Tokens of the guard text.", shown=f"{FURTHER_TOKENS}", metavar="COUNT"
    )
    select_on: list[str] | None = setting(
        None,
        "Text by which channels, and with --uneven widths, are chosen, instead of the "
        "calibration, which then only fits. Text of many kinds, given once for each, loses much "
        "less on kinds that the calibration lacks. Not with --statistics.",
        metavar="TEXT",
    )
    select_tokens: int | None = setting(
        None, "Tokens of that text in all.", shown=f"{FURTHER_TOKENS}", metavar="COUNT"
    )
    uneven: bool = setting(
        False,
        "Choose each block's width by the measured cost of narrowing it, at the total size that "
        "--keep gives; gains most on text unlike the calibration's. OUTPUT then has Python code of "
        "its own, with which transformers and vLLM load it (trust_remote_code; vLLM not if heads "
        "differ by block). With --sites mlp,heads one budget is divided over both; with --guard "
        "the cost is measured on both texts. Not with --statistics, --onload, --no-compensate or "
        "several processes.",
    )
    evaluate: list[str] | None = setting(
        None,
        "Held-out text on which the dense, the pruned and the restored model are compared; with "
        "--onload on the CPU. Give it several times for several texts, such as one like the "
        "calibration and one of another kind; the first is that of the headline. wikitext2 is "
        "measured as in the literature: all of the test split, joined by blank lines, in sequences "
        "of 2048 tokens.",
        metavar="TEXT",
        panel=_COMPARING,
    )
    evaluate_tokens: int | None = setting(
        None,
        "Tokens of the held-out text to predict.",
        shown=f"{EVALUATION_TOKENS}; all of wikitext2",
        metavar="COUNT",
        panel=_COMPARING,
    )
    evaluate_field: str | None = setting(
        None, "As --field, for the held-out text.", shown="--field", panel=_COMPARING
    )
    evaluate_split: str | None = setting(
        None, "Split of a held-out dataset.", shown="test, else validation", panel=_COMPARING
    )
    evaluate_join: Join | None = setting(
        None, "As --join, for the held-out text.", shown="--join", panel=_COMPARING
    )
    baseline: bool = setting(
        True, "With --evaluate: also measure plain pruning, in a run of its own.", panel=_COMPARING
    )


# How the held-out text is read, where not as the calibration.
_EVALUATED = ("tokens", "field", "split", "join")


app = commands()


@command(app, Pretrained, CompressOptions, RecipeFile, READING, Recipe, Runtime, Printed)
def compress(given: Given) -> None:
    """Compresses MODEL and writes a plain folder that transformers loads.

    Example: `grail compress MODEL --keep 0.75 --calibration text.txt --output out/`

    Add `--evaluate heldout.txt` for the perplexity of the dense, pruned and restored model, and
    `--evaluate other.txt` for that on a text of another kind.
    """
    asked, model = given.make(CompressOptions), given.make(Pretrained)
    recipe, _ = merged(given.recipe, None, given.of(Recipe))
    model = replace(model, device=given.context.with_resource(launched(model.device)))
    if (not asked.calibration) == (asked.statistics is None):
        raise InputError("give either --calibration or --statistics")
    _refuse_idle_options(given, asked)
    calibration = given.calibration(asked.calibration or [""])
    own = {name: getattr(asked, f"evaluate_{name}") for name in _EVALUATED}
    own = {name: value for name, value in own.items() if value is not None}
    evaluate = [
        calibration.compared_on(text, own, "--evaluate") for text in asked.evaluate or []
    ] or None
    further = {
        name: further_text(calibration, texts, {} if tokens is None else {"tokens": tokens}, option)
        for name, option, texts, tokens in (
            ("guard", "--guard", [asked.guard] if asked.guard else [], asked.guard_tokens),
            ("select_on", "--select-on", asked.select_on or [], asked.select_tokens),
        )
        if texts
    }
    with started_by(given.command_line()):
        report = compress_checkpoint(
            model,
            asked.output,
            calibration if asked.statistics is None else Collected(asked.statistics),
            guard=further.get("guard"),
            select_on=further.get("select_on"),
            evaluate=evaluate,
            baseline=asked.baseline,
            uneven=asked.uneven,
            recipe=recipe,
            runtime=given.runtime(model),
        )
    if current_processes().number == 0:
        _print_result(report, asked.output, given.prints_json)


def _refuse_idle_options(given: Given, asked: CompressOptions) -> None:
    """Raises InputError for options that were given and that nothing would read."""
    idle = given.options(*(f"evaluate_{name}" for name in _EVALUATED))
    if idle and not asked.evaluate:
        raise InputError(f"{', '.join(idle)} is of the held-out text: give --evaluate with it")
    given.require_used({"guard_tokens": ["guard"], "select_tokens": ["select_on"]})
    if asked.statistics is not None:
        shared = () if asked.evaluate else ("sequence_length", "field", "join")
        if idle := given.options("tokens", "split", "shares", *shared):
            raise InputError(
                f"{', '.join(idle)} is of the calibration text, which --statistics take the place "
                "of: leave it out"
            )


def _print_result(report: Report, output: Path, as_json: bool) -> None:
    """Prints what is written by now; where that fails, the run has succeeded all the same."""
    try:
        if as_json:
            typer.echo(report.to_json(), nl=False)
        else:
            _print_report(report, output)
    except OSError as error:
        if is_closed_pipe(error):
            raise
        _discard(sys.stdout)
        typer.echo(
            f"grail: the report cannot be printed ({error.strerror}); model and report are "
            f"complete in {output}",
            err=True,
        )


def _discard(stream: TextIO) -> None:
    """Lets what a stream still holds go nowhere: writing it would fail again at the exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _print_report(report: Report, output: Path) -> None:
    for header, rows, words in comparison_tables(report.evaluation):
        print_table(header, rows, words)
    typer.echo(" ".join(headline(report)))
    if line := worse_sentence(report):
        typer.echo(line)
    if line := quantising_sentence(report):
        typer.echo(f"{line}.")
    if line := verdict(report):
        typer.echo(line)
    print_table(*stage_table(report.stages))
    if line := resumed_sentence(report):
        typer.echo(line)
    typer.echo(f"phases  {phases(report.seconds)}")
    typer.echo(f"memory  {sizes(report.memory)}")
    if line := size_sentence(report):
        typer.echo(f"disk    {line}")
    for note in report.notes:
        typer.echo(f"note    {note}")
    typer.echo(f"model   {output}")
    for path in sorted(output.glob("report.*")):
        typer.echo(f"report  {path}")
    for name, file in (("recipe", RECIPE), ("card", "README.md")):
        if (output / file).is_file():
            typer.echo(f"{name:8}{output / file}")
