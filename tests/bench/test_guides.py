"""The pages with numbers: every one is of a CSV, and a missing one is said."""

import pytest

from bench.report import guides, reference


@pytest.fixture(scope="module")
def numbers() -> guides.Numbers:
    return guides.Numbers()


@pytest.mark.parametrize("name", guides.PAGES)
def test_the_committed_pages_are_the_generated_ones(name):
    assert guides.path(name).read_text(encoding="utf-8") == guides.page(name)


@pytest.mark.parametrize("name", guides.PAGES)
def test_every_cell_of_the_committed_pages_was_measured(name):
    assert f"| {guides.MISSING}" not in guides.page(name)


def test_a_perplexity_is_that_of_its_row(numbers):
    row = numbers.row("brown", 0.5, "restored")
    assert numbers.perplexity("brown", 0.5, "restored") == f"{float(row['perplexity']):.1f}"
    assert numbers.perplexity("brown", 1, "dense", "mlp,heads") == numbers.perplexity(
        "brown", 1, "dense"
    )
    share = numbers.share("brown", 0.5, "restored")
    assert numbers.cell("brown", 0.5, "restored").endswith(f" ({share})")
    assert numbers.share("brown", 0.5, "pruned") == "0%"


def test_what_no_row_has_is_said(numbers):
    for shown in (
        numbers.perplexity("brown", 0.35, "restored"),
        numbers.share("brown", 0.35, "restored"),
        numbers.cell("nothing", 0.5, "restored"),
        numbers.parameters("brown", 0.35),
    ):
        assert shown == guides.MISSING


def test_tables_have_a_row_for_each_keep_and_each_size(numbers):
    lines = numbers.by_keep("brown").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {keep:g}" for keep in guides.KEEPS]
    assert guides.MISSING not in numbers.by_tokens()
    assert len(numbers.by_tokens().splitlines()) == 2 + len(guides.SEQUENCES)


def test_the_committed_page_of_commands_is_the_generated_one():
    pytest.importorskip("typer")
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page()


def test_every_option_of_a_command_has_a_row_with_its_help():
    pytest.importorskip("typer")
    for name, command in reference.commands():
        text = reference.section(name, command)
        for parameter in command.params:
            shown = parameter.metavar if parameter.param_type_name == "argument" else None
            assert f"`{shown or parameter.opts[0]}" in text
            assert parameter.help.replace("|", "\\|") in text
