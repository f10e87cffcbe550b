"""`grail inspect`."""

import json
from dataclasses import asdict, dataclass

import typer

from grail.algebra.targets import RULES
from grail.algebra.width import check_keep
from grail.commands.console import notes_said, phases, print_table, sizes
from grail.commands.options import Given, Printed, RecipeFile, command, fields
from grail.commands.root import commands
from grail.files.load import CheckpointWarning, length_of_sequences
from grail.files.pretrained import Pretrained
from grail.files.text import CALIBRATION_TOKENS, Text
from grail.recipe import Recipe, merged
from grail.report.formatting import format_bytes, format_count
from grail.run._inspect import KEEPS, Inspection
from grail.run._inspect import inspect as inspect_model
from grail.run.workflow import predicted
from grail.runtime.settings import Runtime, setting


@dataclass(frozen=True)
class InspectOptions:
    """The options of `grail inspect` itself; model, text, recipe and runtime add theirs."""

    keep: list[float] | None = setting(
        None,
        "Share of channels that stays, in (0, 1]; several as 0.5,0.7. Memory and time are "
        "predicted for the first given, else for the share of the recipe.",
        shown=", ".join(map(str, KEEPS)),
        metavar="SHARES",
    )
    sites: str | None = setting(
        None,
        "Kinds of sites to narrow: mlp, heads, experts, shared_experts; several as mlp,heads.",
        shown="all",
        metavar="KINDS",
    )
    tokens: int | None = setting(
        CALIBRATION_TOKENS,
        "Calibration tokens of the run whose memory and time are predicted, such as 65536 or 64k.",
        metavar="COUNT",
    )


_READING = fields(Text, "sequence_length", "batch_size")
_RUNTIME = fields(Runtime, "storage", "onload")


app = commands()


@command(app, Pretrained, InspectOptions, RecipeFile, _READING, Recipe, _RUNTIME, Printed)
def inspect(given: Given) -> None:
    """Shows the sites of MODEL, what each keep ratio saves, and what a run would cost.

    Example: `grail inspect MODEL --keep 0.75,0.5 --sites mlp`

    Nothing is changed or written.
    """
    model, text = given.make(Pretrained), Text("", **given.of_text())
    device = model.computing
    settings = given.of(Recipe)
    keeps = [share for shares in settings.pop("keep", ()) for share in shares]
    for share in keeps:
        check_keep(share)
    settings |= {"keep": keeps[0]} if keeps else {}
    merged(given.recipe, None, settings)  # refuses wrong ones before the model is loaded
    runtime = given.runtime(model)
    typer.echo(f"Loading {model.source} …", err=True)
    with notes_said(CheckpointWarning):
        network, _ = model.load("cpu" if runtime.onload is not None else device)
    inspection = inspect_model(
        network,
        keeps=keeps or KEEPS,
        tokens=text.tokens or CALIBRATION_TOKENS,
        sequence_length=length_of_sequences(network, text.sequence_length),
        batch_size=text.batch_size,
        recipe=given.context.params["recipe"],
        runtime=runtime,
        **settings,
    )
    inspection.name = model.name
    if given.prints_json:
        typer.echo(json.dumps(asdict(inspection), indent=2))
    else:
        _print_inspection(inspection)


def _print_inspection(inspection: Inspection) -> None:
    typer.echo(
        f"{inspection.name}: {format_count(inspection.parameters)} parameters, "
        f"{format_bytes(inspection.bytes)}"
    )
    print_table(
        ["sites", "count", "width of each"],
        [[site.kind, str(site.count), site.structure] for site in inspection.sites],
        words=3,
    )
    kinds = [site.kind for site in inspection.sites]
    print_table(
        ["keep", *kinds, "parameters", "bytes", "saved"],
        [
            [
                f"{saving.keep:g}",
                *(saving.widths[kind] for kind in kinds),
                format_count(saving.parameters),
                format_bytes(saving.bytes),
                f"{1 - saving.bytes / inspection.bytes:.0%}",
            ]
            for saving in inspection.savings
        ],
        words=1 + len(kinds),
    )
    _print_fits(inspection)
    peak, seconds = inspection.memory["peak"], inspection.seconds["total"]
    typer.echo(predicted(inspection.keep, peak, seconds, f"{inspection.tokens:,} tokens"))
    typer.echo(f"memory  {sizes(inspection.memory)}")
    typer.echo(f"time    {phases(inspection.seconds)}")
    for note in inspection.notes:
        typer.echo(f"note    {note}")


def _print_fits(inspection: Inspection) -> None:
    """Prints what the narrowed widths fit: groups of quantisers, blocks, numbers of GPUs."""
    if not all(saving.fits for saving in inspection.savings):
        return
    uses = list(dict.fromkeys(rule.use for rule in RULES))
    print_table(
        ["keep", "fits", *uses],
        [
            [f"{saving.keep:g}", site.kind]
            + [_fitting(use, saving.fits[site.kind], site.count) for use in uses]
            for saving in inspection.savings
            for site in inspection.sites
        ],
        words=2 + len(uses),
    )


def _fitting(use: str, counts: dict[str, int], sites: int) -> str:
    """Returns the numbers of one use that widths fit; how many do where that is not all."""
    found = [(rule.number, counts[str(rule)]) for rule in RULES if rule.use == use]
    words = [
        f"{number}" if count == sites else f"{number} ({count} of {sites})"
        for number, count in found
        if count
    ]
    return ", ".join(words) or "–"
