"""Every page of help has an example, and the parser of that very command reads it."""

import re
import shlex

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer.main

from bench.report import reference
from grail.commands import app
from grail.commands.root import root
from grail.commands.stats import app as stats
from tests.bench.test_bench import SCRIPTS, printed_help
from tests.parsers import read_by_its_parser

HELP = {
    "": root.__doc__,
    "stats": typer.main.get_command(stats).help,
    **{name: command.help for name, command in reference.commands()},
}
# An example of a bench, without the words beside it.
EXAMPLE = r"^    (?:\S*/)?python (-m bench\.\S+|bench/\S+\.py)(.*?)(?: {2}|$)"


def examples_of(page: str) -> list[str]:
    """The command lines of a page of help of `grail`."""
    return [" ".join(found.split()) for found in re.findall(r"`(grail [a-z]+ [^`…]+)`", page)]


def read(words: list[str]) -> None:
    """Reads a command line of `grail` as a call would, without calling."""
    group = typer.main.get_command(app)
    context = group.make_context("grail", [], resilient_parsing=True)
    while hasattr(group, "get_command"):
        name, group, words = group.resolve_command(context, words)
        if hasattr(group, "get_command"):
            context = group.make_context(name, [], resilient_parsing=True, parent=context)
    group.make_context(name, words, parent=context)


@pytest.mark.parametrize("name", HELP, ids=lambda name: name or "grail")
def test_the_help_of_a_command_has_examples_that_it_reads(name):
    examples = examples_of(HELP[name])
    assert [each for each in examples if each.startswith(f"grail {name}".rstrip())]
    for example in examples:
        read(shlex.split(example)[1:])


@pytest.mark.parametrize(
    "line", ["compress MODEL --kep 0.5 --output out/", "compress MODEL", "bench", "stats merge a/"]
)
def test_an_example_that_would_be_refused_is_found(line):
    with pytest.raises(Exception, match=r"(?i)no such option|missing"):
        read(line.split())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_of_a_bench_has_examples_that_it_reads(name, monkeypatch, capsys):
    page = printed_help(name, "--help", monkeypatch, capsys)
    found = re.findall(EXAMPLE, page, re.MULTILINE)
    assert found
    assert any(name.rpartition(".")[2] in call for call, _ in found)
    for call, arguments in found:
        read_by_its_parser([*call.split(), *shlex.split(arguments)], name)
