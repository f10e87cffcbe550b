"""The page of the commands, from the options of the command line itself.

    python -m bench.report.reference     writes docs/reference/commands.md

Texts and defaults are those of `grail COMMAND --help`.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from bench.tools.commandline import CommandLine
from bench.tools.measuring import ROOT
from bench.tools.tables import markdown

PAGE = ROOT / "docs" / "reference" / "commands.md"

HEAD = """# Commands

Written by `python -m bench.report.reference` from the help texts of the commands. Each ends with
exit code 0; with 2 after an error that you can correct, in one sentence on stderr, and a line
`help:` with the page that helps; with 1 after any other; with 130 after Ctrl-C. Results go to
stdout, progress to stderr. Tokens are counted as 65536, 64k or 1M, where k is 1024 and M 1024².
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Yields the name and the command of each page of help, such as "stats merge"."""
    from typer.main import get_command

    from grail.commands.root import COMMANDS

    for name in COMMANDS:
        found = get_command(importlib.import_module(f"grail.commands.{name}").app)
        if parts := getattr(found, "commands", None):
            yield from ((f"{name} {part}", command) for part, command in parts.items())
        else:
            yield name, found


def usage(name: str, command: Any) -> str:
    """Returns the line of a call: its arguments and the options that must be given."""
    words = ["grail", name]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            words.append(parameter.metavar)
        elif parameter.required:
            words.append(f"{parameter.opts[0]} {value_of(parameter)}")
    return " ".join([*words, "[OPTIONS]"])


def value_of(parameter: Any) -> str:
    """Returns the form of an option's value; nothing for a switch."""
    if getattr(parameter, "is_flag", False):
        return ""
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.type_descriptor.annotation
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def row(parameter: Any) -> list[str]:
    """Returns the row of an option: flags, default, help."""
    flags = "/".join([*parameter.opts, *parameter.secondary_opts])
    flags = f"{flags} {value_of(parameter)}".replace("|", "/").strip()
    shown = parameter.show_default
    if parameter.required:
        shown = "required"
    elif not isinstance(shown, str):
        shown = ""
    elif getattr(parameter, "is_flag", False) and not parameter.secondary_opts:
        shown = "off"
    return [f"`{flags}`", shown, parameter.help.replace("|", "\\|")]


def section(name: str, command: Any) -> str:
    """Returns what the page says of one command."""
    panels: dict[str, list[list[str]]] = {"Options": []}
    arguments = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            arguments.append(f"`{parameter.metavar}`: {parameter.help}")
        else:
            panel = parameter.rich_help_panel or "Options"
            panels.setdefault(panel, []).append(row(parameter))
    parts = [
        f"## grail {name}",
        command.help.strip(),
        f"```text\n{usage(name, command)}\n```",
        *arguments,
    ]
    for panel, rows in panels.items():  # every command has options outside of the panels
        parts += [f"**{panel}**", markdown(["option", "default", "what it does"], rows).strip()]
    return "\n\n".join(parts)


def page() -> str:
    """The whole page in Markdown."""
    return "\n\n".join([HEAD.strip(), *(section(*each) for each in commands())]) + "\n"


def main() -> None:
    """Writes the page."""
    CommandLine(__doc__, writes="docs/reference/commands.md", takes="a few seconds").read()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
