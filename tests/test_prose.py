"""The prose of pages, docstrings and help texts has none of the phrases that are read twice."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("grail", "grail_kernels", "bench", "examples")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]

# A phrase, and what to write.
PHRASES = {
    r"nothing but": "only, or a plain statement",
    r"in the place of": "instead of",
    r"as we suppose": "we suspect that",
    r"goes on\b": "resumes, continues",
    r"hears? of": "is called with, gets",
    r"\bno longer\b(?! than)": "what is so now (history belongs into the changelog)",
    r"\bsince then\b": "what is so now",
    r"\bwins? back\b": "recovers",
    r"\b(What|How) it (wins|tells|says|holds|hears)": "a noun",
    r"\bis to be\b": "should be, must be",
    r"\bas of old\b": "as before",
}
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks of code, which quote other things."""
    text = page.read_text(encoding="utf-8")
    return FENCED.sub(lambda block: "\n" * block[0].count("\n"), text)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """The line and text of each docstring of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node, clean=False)):
            yield getattr(node, "lineno", 1), text


def faults(text: str) -> list[str]:
    """The phrases of a text that should not be there, each with its remedy."""
    flat = " ".join(text.split())
    return [
        f"{found[0]!r}: write {remedy}"
        for phrase, remedy in PHRASES.items()
        for found in re.finditer(phrase, flat, re.IGNORECASE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_has_no_phrase_that_is_read_twice(page):
    assert faults(prose(page)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_have_none_either_and_begin_with_a_verb_or_noun(package):
    found = []
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == package:
            for line, text in docstrings(path):
                begins = re.match(r"\s*(What|Where)\b", text)
                said = faults(text) + ["begins with What or Where"] * bool(begins)
                found += [f"{path.relative_to(ROOT)}:{line}: {each}" for each in said]
    assert found == []


def test_a_phrase_is_found_over_a_line_break_and_not_in_code():
    assert len(faults("It stands in the\nplace of another.")) == 1
    assert faults("It replaces another.") == []
