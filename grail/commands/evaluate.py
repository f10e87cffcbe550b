"""`grail evaluate`."""

from dataclasses import asdict, dataclass

import typer

from grail.commands.console import notes_said, print_table
from grail.commands.options import Given, Printed, command, fields
from grail.commands.root import commands
from grail.files.load import CheckpointWarning
from grail.files.pretrained import Pretrained
from grail.files.text import SOURCES, Text
from grail.report._evaluate import evaluate as evaluate_model
from grail.report.report import strict_json
from grail.report.summary import evaluation_table
from grail.runtime.settings import setting


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `grail evaluate` itself; model and text add theirs."""

    text: str = setting(
        ...,
        f"Held-out text: {SOURCES}. wikitext2 is measured as in the literature: all of the test "
        "split, in sequences of 2048 tokens.",
        metavar="TEXT",
    )
    tokens: int | None = setting(
        None,
        "Tokens to predict, such as 65536 or 64k.",
        shown="all",
        metavar="COUNT",
    )
    split: str | None = setting(
        None, "Split of a dataset.", shown="test, else validation", panel="Reading text"
    )


_READING = fields(Text, "field", "join", "sequence_length", "batch_size")


app = commands()


@command(app, Pretrained, EvaluateOptions, _READING, Printed)
def evaluate(given: Given) -> None:
    """Measures perplexity and size of MODEL on a text.

    Example: `grail evaluate out/ --text heldout.txt`
    """
    model, asked = given.make(Pretrained), given.make(EvaluateOptions)
    text = Text.held_out(asked.text, **given.of_text(), option="--text").checked(model.source)
    device = model.computing
    typer.echo(f"Loading {model.source} …", err=True)
    with notes_said(CheckpointWarning):
        network, tokenizer = model.load(device)
    with notes_said():
        batches = text.batches(network, tokenizer)
    row = evaluate_model(network, batches)
    if given.prints_json:
        typer.echo(strict_json(asdict(row)))
    else:
        print_table(*evaluation_table({model.name: row}))
        typer.echo(f"{row.tokens:,} predicted tokens")
