"""`grail stats collect` and `grail stats merge`."""

from dataclasses import dataclass
from pathlib import Path

import typer

from grail.commands.console import notes_said
from grail.commands.options import READING, Given, RecipeFile, command, fields
from grail.commands.root import COMMANDS, commands
from grail.files.load import CheckpointWarning
from grail.files.pretrained import Pretrained
from grail.files.text import SOURCES
from grail.recipe import Recipe, merged
from grail.run._collect import READ
from grail.run._collect import collect as collect_statistics
from grail.run._collect import merge as merge_statistics
from grail.runtime.folder import check_output
from grail.runtime.settings import Runtime, setting


@dataclass(frozen=True)
class CollectOptions:
    """The options of `grail stats collect` itself; model, text and recipe add theirs."""

    calibration: list[str] = setting(
        ...,
        f"Text to collect activations on: {SOURCES}. Given several times, the texts are mixed by "
        "--shares.",
        metavar="TEXT",
    )
    output: Path = setting(..., "Folder for the statistics; new or empty.")


@dataclass(frozen=True)
class MergeOptions:
    """The options of `grail stats merge`."""

    folders: list[Path] = setting(..., "Folders that grail stats wrote.", flag="FOLDERS...")
    output: Path = setting(..., "Folder for the sum; new or empty.", flag="--output -o")


HELP = f"""{COMMANDS["stats"]}

Examples: `grail stats collect MODEL --calibration text.txt --output a/`,
`grail stats merge a/ b/ --output c/`
"""

app = commands(no_args_is_help=True, help=HELP)

_RECIPE = fields(Recipe, *READ, "seed")
_RUNTIME = fields(Runtime, "storage", "onload", "progress")


@command(app, Pretrained, CollectOptions, RecipeFile, READING, _RECIPE, _RUNTIME, name="collect")
def collect(given: Given) -> None:
    """Writes the Gram matrices of MODEL's sites on a text, in one pass over the dense model.

    Example: `grail stats collect MODEL --calibration text.txt --output a/`
    """
    model, asked = given.make(Pretrained), given.make(CollectOptions)
    check_output(asked.output)
    recipe, _ = merged(given.recipe, None, given.of(Recipe))
    text = given.calibration(asked.calibration, seed=recipe.seed).checked(model.source)
    device, runtime = model.computing, given.runtime(model)
    typer.echo(f"Loading {model.source} …", err=True)
    with notes_said(CheckpointWarning):
        network, tokenizer = model.load("cpu" if runtime.onload is not None else device)
    batches = text.batches(network, tokenizer)
    collect_statistics(network, batches, output=asked.output, recipe=recipe, runtime=runtime)
    typer.echo(f"statistics  {asked.output}")


@command(app, MergeOptions, name="merge")
def merge(given: Given) -> None:
    """Adds statistics of one model that were collected on different texts.

    Example: `grail stats merge a/ b/ --output c/`
    """
    asked = given.make(MergeOptions)
    merge_statistics(asked.folders, asked.output)
    typer.echo(f"statistics  {asked.output}")
