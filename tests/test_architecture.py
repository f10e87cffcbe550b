"""docs/architecture.md names every module; no room imports from one that stands below it there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LEVELS = 11  # of rooms, each importing from those before it


def table(package):
    """Rows of a package's table: the room, and the modules that it names."""
    part = PAGE.split(f"\n## {package}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [(row[0].strip().strip("`/"), re.findall(r"`(\w+)`", row[-1])) for row in rows[2:]]


def modules(package):
    """Every source file of a package, by its room; those beside the rooms have none."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        inside = path.relative_to(ROOT / package).with_suffix("").parts
        room = inside[0] if len(inside) > 1 else ""
        if inside[-1] not in ("__init__", "__main__"):
            found.setdefault(room, []).append((inside[-1], path))
    return found


def imported(path):
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports would be overlooked here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows():
    """Each import of one room by another: (importing file, its row, the row of what it imports)."""
    order = {}
    for number, (room, names) in enumerate(table("grail")):
        order |= dict.fromkeys(names if room == "" else [room], number)
    for path in sorted((ROOT / "grail").rglob("*.py")):
        place = path.relative_to(ROOT / "grail").with_suffix("").parts[0]
        if place in ("__init__", "__main__"):
            continue
        for name in imported(path):
            other = name.split(".")[1] if name.startswith("grail.") else place
            yield path.relative_to(ROOT), name, order[place], order.get(other, order[place])


def test_the_page_names_every_module_once():
    for package in ("grail", "grail_kernels"):
        named = {}
        for room, names in table(package):
            named.setdefault(room, []).extend(names)
        there = {room: [name for name, _ in files] for room, files in modules(package).items()}
        assert {r: sorted(names) for r, names in named.items()} == {
            r: sorted(names) for r, names in there.items()
        }


def test_no_room_imports_from_one_below_it():
    upwards = [f"{path} imports {name}" for path, name, own, other in arrows() if other > own]
    assert upwards == []


def test_rooms_stand_on_few_levels():
    below = {}
    for _, _, own, other in arrows():
        below.setdefault(own, set()).update({other} - {own})
    depth = {}
    for row in sorted(below):
        depth[row] = 1 + max((depth.get(other, 1) for other in below[row]), default=0)
    assert max(depth.values()) <= LEVELS


def test_every_room_says_what_it_is_for_and_what_it_offers():
    for room in sorted((ROOT / "grail").iterdir()):
        if room.is_dir() and room.name != "__pycache__":
            tree = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
            names = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
            assert ast.get_docstring(tree), room
            assert "__all__" in names, room


def test_kernels_know_nothing_of_grail_and_neither_knows_the_benches():
    unwanted = {"grail": ("bench", "tests"), "grail_kernels": ("grail", "bench", "tests")}
    for package, others in unwanted.items():
        for path in (ROOT / package).rglob("*.py"):
            assert not [n for n in imported(path) if n.split(".")[0] in others], path
