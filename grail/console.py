"""Tables for a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(header: list[str], rows: list[list[str]], words: int = 1) -> None:
    """A table whose first `words` columns are text and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < words else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)
