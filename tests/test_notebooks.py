"""The notebooks run from the first cell to the last, and are stored without outputs."""

import json
import re
from pathlib import Path

import pytest

import grail

pytest.importorskip("transformers")

from tests.prepared import inside

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    """The texts of the cells of a kind."""
    book = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Executes the code cells of a notebook, with no names given, in a folder of its own."""
    monkeypatch.setattr(grail.select, "_registry", dict(grail.select._registry))

    def run(path):
        names = {}
        with monkeypatch.context() as patch, inside(tmp_path):
            patch.syspath_prepend(str(ROOT))  # as ".." is for a notebook where it lies
            for number, code in enumerate(cells(path, "code")):
                exec(compile(code, f"{path.name}, code cell {number + 1}", "exec"), names)
        return names

    return run


def test_a_model_is_compressed_and_answers(run, capsys):
    names = run(ROOT / "notebooks" / "compress_and_chat.ipynb")
    printed = capsys.readouterr().out
    assert all(site.kept == 120 for site in names["report"].sites)  # 0.75 of 160
    assert names["narrow"].parameters < names["dense"].evaluation.parameters
    assert names["narrow"].kl > 0
    assert len(names["chat"]("Again?", new_tokens=8)) > 0
    assert "config.json" in printed.splitlines()[-1]


def test_the_grams_of_the_loop_are_exact(run):
    names = run(ROOT / "notebooks" / "gram_in_your_loop.ipynb")
    assert [len(group) for group in names["grams"].groups] == [3, 1, 2, 1]
    assert float(names["error"]) < 16
    assert names["gram"].tokens == len(names["x"]) == 2048
    assert names["fit"].error < names["fit"].baseline_error


def test_the_selector_is_compared_with_the_built_in_ones(run):
    names = run(ROOT / "notebooks" / "new_selector.ipynb")
    rows = names["rows"]
    assert len(rows) == 10
    assert rows["one-shot", True] != rows["magnitude", True]
    assert rows["random", False] != rows["random", True]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    for cell in book["cells"]:
        assert cell.get("execution_count") is None
        assert cell.get("outputs", []) == []
        assert cell["metadata"] == {}


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_notebooks_begin_with_a_title_and_the_model_and_link_to_what_exists(path):
    assert cells(path, "markdown")[0].startswith("# ")
    assert cells(path, "code")[0].startswith('MODEL = "tiny"')
    for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", "".join(cells(path, "markdown"))):
        assert (path.parent / link).exists(), link


def test_every_notebook_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in BOOKS if path.name not in source] == []
