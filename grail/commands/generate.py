"""`grail generate`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from grail.commands.console import notes_said
from grail.commands.options import Given, Printed, command, fields
from grail.commands.root import commands
from grail.files.mixture import named_texts
from grail.files.pretrained import Pretrained
from grail.files.text import SOURCES, Text
from grail.report.formatting import format_seconds
from grail.run.generation import generate_calibration
from grail.run.sampling import Sampling
from grail.runtime.settings import Runtime, setting


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `grail generate` itself; model, sampling and text add theirs."""

    output: Path = setting(
        ...,
        "File of JSON lines to create, for --calibration. A killed run resumes from "
        "OUTPUT.partial; a file of the same call is left as it is.",
        metavar="FILE",
    )
    prompts: list[str] | None = setting(
        None,
        f"Text whose first tokens are continued: {SOURCES}. May be given several times.",
        shown="none: sequences start from the begin-of-text token",
        metavar="TEXT",
    )


_NAMES = ("field", "split", "join")
_READING = fields(Text, *_NAMES)
_RUNTIME = fields(Runtime, "progress")


app = commands()


@command(app, Pretrained, GenerateOptions, Sampling, _READING, _RUNTIME, Printed)
def generate(given: Given) -> None:
    """Writes calibration text that MODEL draws itself.

    Example: `grail generate MODEL --tokens 64k --prompts text.txt --output generated.jsonl`

    Then `grail compress MODEL --calibration generated.jsonl …`, alone or with other texts.
    """
    model, asked = given.make(Pretrained), given.make(GenerateOptions)
    prompts = None
    if asked.prompts:
        reading = {name: value for name, value in given.of_text().items() if name in _NAMES}
        prompts = named_texts(asked.prompts, **reading, option="--prompts")
    given.require_used(dict.fromkeys(("prompt_tokens", *_NAMES), ("prompts",)))
    with notes_said():
        written = generate_calibration(
            model,
            asked.output,
            prompts=prompts,
            **given.of(Runtime),
            **given.of(Sampling),
        )
    if given.prints_json:
        typer.echo(json.dumps(asdict(written) | {"path": str(written.path)}, indent=2))
        return
    typer.echo(
        f"text    {asked.output} ({written.tokens:,} tokens in {written.documents:,} documents, "
        f"{written.sequences:,} sequences)"
    )
    if written.written:
        rate = written.written / written.seconds
        typer.echo(f"time    {format_seconds(written.seconds)}, {rate:,.0f} tokens a second")
    else:
        typer.echo("time    nothing was written: the file was there, of the same call")
