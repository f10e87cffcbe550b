"""`grail evaluate`."""

from dataclasses import asdict, dataclass, replace

import typer

from grail.commands.console import notes_said, print_table
from grail.commands.options import Given, Printed, command, fields
from grail.commands.root import commands
from grail.files.load import CheckpointWarning
from grail.files.pretrained import Pretrained
from grail.files.text import SOURCES, Text
from grail.report._evaluate import DenseReference
from grail.report._evaluate import evaluate as evaluate_model
from grail.report.formatting import format_bytes, format_count
from grail.report.report import strict_json
from grail.report.summary import evaluation_table
from grail.report.texts import joined, score_table, text_names
from grail.runtime.settings import setting


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `grail evaluate` itself; model and text add theirs."""

    text: list[str] = setting(
        ...,
        f"Held-out text: {SOURCES}. Give it several times for several texts. wikitext2 is measured "
        "as in the literature: all of the test split, in sequences of 2048 tokens.",
        metavar="TEXT",
    )
    against: str | None = setting(
        None,
        "The dense model, to measure how far MODEL's predictions are from its own: mean KL "
        "divergence in nats, and share of predictions with the same most likely token, with "
        "standard errors over sequences. It is loaded before MODEL.",
        metavar="MODEL",
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
    """Measures perplexity and size of MODEL, and its distance from the dense model.

    Example: `grail evaluate out/ --text heldout.txt --against MODEL`
    """
    model, asked = given.make(Pretrained), given.make(EvaluateOptions)
    how = given.of_text()
    texts = [
        Text.held_out(source, **how, option="--text").checked(model.source) for source in asked.text
    ]
    names = text_names(asked.text)
    device = model.computing
    dense = None if asked.against is None else replace(model, source=asked.against)
    references = [None] * len(texts) if dense is None else _references(dense, texts, device)
    typer.echo(f"Loading {model.source} …", err=True)
    with notes_said(CheckpointWarning):
        network, tokenizer = model.load(device)
    with notes_said():
        batches = [text.batches(network, tokenizer) for text in texts]
    rows = [
        evaluate_model(network, each, against=reference)
        for each, reference in zip(batches, references, strict=True)
    ]
    row = joined(dict(zip(names, rows, strict=True)))
    if given.prints_json:
        typer.echo(strict_json(asdict(row)))
    elif dense is None and len(texts) == 1:
        print_table(*evaluation_table({model.name: row}))
        typer.echo(f"{row.tokens:,} predicted tokens")
    else:
        print_table(*score_table(row))
        size = f"{format_count(row.parameters)} parameters, {format_bytes(row.bytes)} of weights"
        against = "" if dense is None else f"; KL and top-1 against {dense.name}"
        typer.echo(f"{model.name}: {size}{against}")


def _references(dense: Pretrained, texts: list[Text], device: str) -> list[DenseReference]:
    """Returns the dense model's outputs on each text; the model itself goes."""
    typer.echo(f"Loading {dense.source} …", err=True)
    with notes_said(CheckpointWarning):
        network, tokenizer = dense.load(device)
    with notes_said():
        return [DenseReference(network, text.batches(network, tokenizer)) for text in texts]
