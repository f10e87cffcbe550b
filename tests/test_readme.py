"""README.md and docs/: numbers are those of the committed results, and what is named exists.

`tests/test_blocks.py` runs their blocks and commands.
"""

import re
from pathlib import Path

import grail
from bench.report import comparison

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for line in README.replace("\\\n", " ").splitlines()
    if line.startswith("    grail ")
]


def test_the_page_of_selectors_names_every_one_and_its_source():
    page = (ROOT / "docs" / "reference" / "selectors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([a-z0-9+-]+)`", page)) >= set(grail.select.names())
    modules = {grail.select.get(name).choose.__module__ for name in grail.select.names()}
    assert set(re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)) == modules


def test_the_pages_of_results_are_made_from_the_committed_csv():
    pages = comparison.pages()
    assert {path: path.read_text(encoding="utf-8") for path in pages} == pages
    assert {comparison.PAGE, *comparison.FOLDER.glob("*.md")} == pages.keys()


def test_its_exports_are_commands_of_the_pages_of_serving_whose_tests_run_them():
    pages = (ROOT / "docs" / "serving").glob("*.md")
    lines = {
        line.strip() for page in pages for line in page.read_text(encoding="utf-8").split("\n")
    }
    exports = [command.split("#")[0].strip() for command in COMMANDS if " export " in command]
    assert len(exports) == 3
    assert set(exports) <= lines


def test_its_files_exist_and_it_stays_short():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    assert len(README.splitlines()) <= 110


def test_every_promise_names_tests_that_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", README + PROMISES)
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
