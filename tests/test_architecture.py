"""docs/architecture.md has every module, and no module imports from what stands below it there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ENTRIES = {"__init__", "__main__"}


def table(package):
    """Rows of a package's table, each the modules in its cells of code."""
    part = PAGE.split(f"\n## {package}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [(row[0].strip(), re.findall(r"`(\w+)`", row[-2])) for row in rows[2:]]


def modules(package):
    """Every source file, by module; of a folder its own name."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        name = path.relative_to(ROOT / package).with_suffix("").parts[0]
        if name not in ENTRIES:
            found.setdefault(name, []).append(path)
    return found


def imported(path):
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports would be overlooked here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_page_has_every_module_once():
    for package in ("grail", "grail_kernels"):
        named = [module for _, names in table(package) for module in names]
        assert sorted(named) == sorted(modules(package))


def test_no_module_imports_from_a_section_below_its_own():
    section, place = -1, {}
    for title, names in table("grail"):
        section += bool(title)
        place |= dict.fromkeys(names, section)
    assert section > 3
    upwards = [
        f"{path.relative_to(ROOT)} imports {name}"
        for module, paths in modules("grail").items()
        for path in paths
        for name in imported(path)
        if name.startswith("grail.") and place.get(name.split(".")[1], 0) > place[module]
    ]
    assert upwards == []


def test_kernels_know_nothing_of_grail_and_neither_knows_the_benches():
    unwanted = {"grail": ("bench", "tests"), "grail_kernels": ("grail", "bench", "tests")}
    for package, others in unwanted.items():
        for paths in modules(package).values():
            for path in paths:
                assert not [n for n in imported(path) if n.split(".")[0] in others], path
