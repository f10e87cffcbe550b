"""Errors name a page of the documentation that exists, and the one that is of their cause."""

import ast
import pickle
import re
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch import nn

import grail
from grail import errors
from grail.adapters._library import Library
from grail.files.documents import load_texts

ROOT = Path(__file__).parents[1]
NAMES = ("page", "_PAGE")  # of a class; of the errors of a module
CLASSES = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]


def named() -> Iterator[tuple[str, str]]:
    """Yields file with line, and page, of each class and each raise that names one."""
    for package in ("grail", "grail_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_given = isinstance(node, ast.keyword) and node.arg == "page"
                is_set = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in NAMES
                value = node.value if is_given or is_set else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield f"{path.relative_to(ROOT)}:{value.lineno}", value.value


def sections(page: Path) -> set[str]:
    """The anchors of a page, as the site and a repository's view both make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_page_that_an_error_names_exists():
    found = [*named(), *((kind.__name__, kind.page) for kind in CLASSES)]
    assert len(found) > 40
    for where, page in found:
        path, _, section = page.partition("#")
        assert path.startswith("docs/"), where
        assert (ROOT / path).is_file(), f"{where} names {page}"
        assert not section or section in sections(ROOT / path), f"{where} names {page}"


def test_every_class_of_errors_names_a_page_of_its_own():
    assert len(CLASSES) == 12
    assert [kind.__name__ for kind in CLASSES if "page" not in vars(kind)] == []


def unknown_setting_in_a_file(folder: Path) -> None:
    path = folder / "recipe.json"
    path.write_text('{"kep": 0.5}', encoding="utf-8")
    grail.Recipe.load(path)


def damaged_text(folder: Path) -> None:
    (folder / "text.jsonl").write_text('{"text": "a"}\n{"text":', encoding="utf-8")
    list(load_texts(folder / "text.jsonl"))


CAUSES = {
    "unsupported model": (
        lambda _: grail.compress(nn.Linear(4, 4), [torch.zeros(2, 4)]),
        "docs/families.md",
    ),
    "nothing to trace": (
        lambda _: grail.trace(nn.Linear(4, 4)),
        "docs/networks.md#where-sites-come-from",
    ),
    "no such model": (
        lambda folder: grail.load_model(folder / "none"),
        "docs/guides/compress.md#the-command",
    ),
    "no such layer": (
        lambda _: grail.compress(
            nn.Linear(4, 4), [torch.zeros(2, 4)], sites=[grail.Site(["up"], ["down"])]
        ),
        "docs/networks.md#where-sites-come-from",
    ),
    "a text that is damaged": (damaged_text, "docs/texts.md"),
    "no such text": (lambda folder: [*load_texts(folder / "none.txt")], "docs/texts.md"),
    "unknown selector": (lambda _: grail.Recipe(selector="gredy"), "docs/reference/selectors.md"),
    "unknown setting": (
        lambda _: grail.Recipe.from_dict({"kep": 0.5}),
        "docs/reference/recipe.md",
    ),
    "unknown setting in a file": (unknown_setting_in_a_file, "docs/reference/recipe.md"),
    "unknown selector in a call": (
        lambda _: grail.compress(nn.Linear(4, 4), [torch.zeros(2, 4)], selector="gredy"),
        "docs/reference/selectors.md",
    ),
    "keep": (lambda _: grail.Recipe(keep=2.0), "docs/concepts/keep.md#which-keep"),
    "widths": (
        lambda _: grail.Recipe(multiple="ggu"),
        "docs/serving/index.md#which-widths-run-fast",
    ),
    "missing library": (
        lambda _: Library("no-such-library", ("1.0",)),
        "docs/adapters/index.md",
    ),
    "not finite": (
        lambda _: grail.Gram(2).update(torch.tensor([[1.0, float("nan")]])),
        "docs/promises.md#bad-data",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_an_error_names_the_page_of_its_cause(cause, tmp_path):
    call, page = CAUSES[cause]
    with pytest.raises(errors.GrailError) as raised:
        call(tmp_path)
    assert raised.value.page == page


def test_a_page_passes_through_pickle_and_is_no_part_of_the_message():
    error = errors.InputError("wrong", page="docs/texts.md")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.page) == ("wrong", "docs/texts.md")
    assert errors.InputError("wrong").page == errors.InputError.page


@pytest.fixture
def root():
    pytest.importorskip("typer")
    from grail.commands import root

    return root


def test_it_prints_the_page_and_ends_with_the_message(root, tmp_path):
    from typer.testing import CliRunner

    result = CliRunner().invoke(root.app, ["inspect", str(tmp_path / "none" / "model")])
    assert result.exit_code == 2
    *_, page, message = result.stderr.splitlines()
    assert message.startswith("grail: ")
    assert page == "help: docs/guides/compress.md#the-command"


def test_it_prints_the_address_where_the_package_names_its_documentation(root, monkeypatch):
    stored = Message()
    stored["Project-URL"] = "Repository, https://example.org/x"
    stored["Project-URL"] = "Documentation, https://example.org/grail/"
    monkeypatch.setattr(root, "metadata", lambda _: stored)
    assert root.address("docs/texts.md") == "https://example.org/grail/texts.html"
    shown = "https://example.org/grail/serving/gguf.html#options"
    assert root.address("docs/serving/gguf.md#options") == shown


def test_it_prints_the_path_where_the_package_is_not_installed(root, monkeypatch):
    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(root, "metadata", missing)
    assert root.address("docs/texts.md") == "docs/texts.md"
