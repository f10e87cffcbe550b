"""The tables in docs/reference/recipe.md: `python -m tests.settings` writes them anew."""

import dataclasses
from pathlib import Path

from grail.recipe import Recipe
from grail.runtime.settings import Runtime, shown_default

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "recipe.md"


def table(kind: type) -> str:
    """The settings of one dataclass as Markdown."""
    lines = ["| setting | command line | default | what it does |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        flag = field.metadata["flag"]
        flag = f"--{field.name.replace('_', '-')}" if flag == "" else flag
        words = field.metadata["help"].replace("|", "\\|")
        shown = f"`{flag}`" if flag else "–"
        lines.append(f"| `{field.name}` | {shown} | {shown_default(field)} | {words} |")
    return "\n".join(lines)


def rewritten(page: str) -> str:
    """The page with the tables of the settings as they are."""
    for kind in (Recipe, Runtime):
        before, rest = page.split(f"<!-- {kind.__name__} -->\n")
        _, after = rest.split(f"\n<!-- end of {kind.__name__} -->")
        whole = f"<!-- {kind.__name__} -->\n{table(kind)}\n<!-- end of {kind.__name__} -->"
        page = before + whole + after
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
