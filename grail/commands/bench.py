"""`grail bench`."""

from dataclasses import dataclass
from pathlib import Path

import typer

from grail.commands.console import print_table
from grail.commands.options import Given, Printed, command
from grail.commands.root import commands
from grail.report.report import strict_json
from grail.runtime.settings import setting
from grail.serving.speed import measure_speed, remarks
from grail.serving.speed_report import conditions, draw, require_writable, save_table, tables


@dataclass(frozen=True)
class BenchOptions:
    """The options of `grail bench`."""

    files: list[str] = setting(
        ...,
        "Folders that transformers loads, .gguf files (llama.cpp), or .onnx files of vision "
        "networks (ONNX Runtime).",
        flag="FILES",
    )
    against: str | None = setting(
        None,
        "The file whose speed is 1.00, such as the dense model. It is measured with the others.",
        shown="the first of FILES",
        metavar="FILE",
    )
    prompt: int = setting(256, "Tokens of each prompt.", least=1)
    new: int = setting(64, "New tokens after each prompt, read one at a time.", least=1)
    batches: tuple[int, ...] = setting(
        (1, 8), "Sequences, or images, at a time.", shown="1,8", flag="--batch", metavar="SIZES"
    )
    rounds: int = setting(5, "Measurements of each file; the median counts.", least=1)
    threads: int = setting(
        1, "Threads of each runtime. With one, ratios are by CPU time and repeat best.", least=1
    )
    one_by_one: bool = setting(
        False,
        "Hold one model in memory at a time, and measure it to the end. Ratios then drift with the "
        "machine.",
        flag="--one-by-one",
        panel="Running",
    )
    trust_remote_code: bool = setting(
        False,
        "Run the Python code that comes with a model, with all your rights: read it first. Folders "
        "of grail need none.",
        flag="--trust-remote-code",
        panel="Running",
    )
    csv: Path | None = setting(None, "CSV file to create, with every round.", metavar="FILE")
    plot: Path | None = setting(
        None, "Figure to create: .svg, .png or .pdf. Needs matplotlib.", metavar="FILE"
    )


app = commands()


@command(app, BenchOptions, Printed)
def bench(given: Given) -> None:
    """Measures how fast models run: prefill and decode, in the runtimes that serve them.

    Examples: `grail bench out/ --against MODEL`, `grail bench small.gguf --against dense.gguf`

    Runs on the CPU. Files take turns, so compare those of one run, and of one runtime.
    """
    asked = given.of(BenchOptions)
    table, figure = asked.pop("csv", None), asked.pop("plot", None)
    require_writable(table, figure)
    rows = measure_speed(asked.pop("files"), **asked)
    if table is not None:
        save_table(rows, table)
    if figure is not None:
        draw(rows, figure)
    if given.prints_json:
        typer.echo(strict_json([row.facts() for row in rows]))
        return
    for header, lines in tables(rows):
        print_table(header, lines, words=2)
    typer.echo(conditions(rows, asked.get("one_by_one", False)))
    for remark in remarks(rows):
        typer.echo(f"note    {remark}", err=True)
