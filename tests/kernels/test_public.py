"""The public face of `grail_kernels`: all that `grail` uses, and nothing behind it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import grail_kernels as gk

ROOT = Path(__file__).parents[2]


def used_names(tree: ast.AST) -> Iterator[str]:
    """What a file uses of `grail_kernels`, however it imports it."""
    aliases = {"grail_kernels"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "grail_kernels":
                    aliases.add(alias.asname or alias.name)
                elif alias.name.startswith("grail_kernels."):
                    yield alias.name.removeprefix("grail_kernels.")
        elif isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            if package == "grail_kernels":
                yield from [module] if module else [alias.name for alias in node.names]
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name)) if name in aliases:
                yield node.attr


def test_grail_uses_public_names_alone() -> None:
    reached = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "grail").rglob("*.py"))
        for name in used_names(ast.parse(path.read_text(encoding="utf-8")))
        if name not in gk.__all__
    ]
    assert reached == []


def test_a_reach_into_a_module_is_found() -> None:
    code = "import grail_kernels as gk\nfrom grail_kernels.tiles import strips\ngk.tiles.pack"
    assert list(used_names(ast.parse(code))) == ["tiles", "tiles"]


def test_no_function_hides_a_module_of_its_name() -> None:
    modules = {
        name.removeprefix("grail_kernels.")
        for name in sys.modules
        if name.startswith("grail_kernels.")
    }
    assert {name for name in modules if not isinstance(getattr(gk, name), ModuleType)} == set()
