"""Tables and lines for a terminal."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grail.report.formatting import format_bytes, format_seconds
from grail.run.workflow import warnings_as_notes

_GAP = 3  # characters between two columns
_WORDS = 12  # to which a column of text may shrink, for its lines to stay readable


def print_table(header: list[str], rows: list[list[str]], words: int = 1) -> None:
    """Prints a table whose first `words` columns are text and the others numbers.

    Text is wrapped where the terminal is too narrow for the table. Where that is not enough, each
    row becomes a list of its cells, one a line: no number is ever cut.
    """
    console = Console(highlight=False)
    columns = [[name, *cells] for name, *cells in zip(header, *rows, strict=True)]
    widths = [_longest(cells) for cells in columns]
    least = [min(width, _WORDS) for width in widths[:words]] + widths[words:]
    if sum(least) + _GAP * len(least) > console.width:
        for first, *rest in rows:
            console.print(escape(f"{header[0]} {first}".strip()), soft_wrap=True)
            for name, cell in zip(header[1:], rest, strict=True):
                console.print(escape(f"  {name}: {cell}"), soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        if number < words:
            table.add_column(name, overflow="fold", min_width=least[number])
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _longest(cells: Iterable[str]) -> int:
    return max(map(cell_len, cells))


def phases(seconds: Mapping[str, float]) -> str:
    """Returns seconds by phase as a line that begins with their total."""
    parts = (f"{name} {format_seconds(v)}" for name, v in seconds.items() if name != "total")
    return f"{format_seconds(seconds['total'])}: {', '.join(parts)}"


def sizes(memory: Mapping[str, int]) -> str:
    """Returns sizes as a line; leaves out zeros, of a platform without measures of memory."""
    known = {name.replace("_", " "): value for name, value in memory.items() if value}
    return ", ".join(f"{name} {format_bytes(value)}" for name, value in known.items())


@contextmanager
def notes_said(kind: type[UserWarning] = UserWarning) -> Iterator[None]:
    """Prints the library's own warnings on stderr."""
    with warnings_as_notes(kind) as notes:
        yield
    for note in notes:
        typer.echo(f"note    {note}", err=True)
