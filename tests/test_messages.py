"""Messages of errors have one form: no capital, one sentence without full stop, "…; got …"."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for package in ("grail", "grail_kernels") for p in (ROOT / package).rglob("*.py"))
NAMES = {"GPU", "Linear", "NaN", "PEFT", "TF32"}  # that a message may begin with
HOLE = "\0"  # what an f-string fills in
FORM = {
    "begins with a capital": rf"(?!(?:{'|'.join(NAMES)})\b)[A-Z]",
    "ends with a full stop": r".*[^.…]\.$",
    "holds a full stop": r".*[a-z0-9)\0]\.\s",
    "says ', got'": r".*, got\b",
}


def error_classes(trees: list[ast.Module]) -> set[str]:
    """Names of the classes that derive from an error of ours or of Python, found by name."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"Exception", "ValueError", "RuntimeError", "TypeError"}
    while more := {name for name, of in bases.items() if of & found} - found:
        found |= more
    return found | {"typer.BadParameter"}


def texts(node: ast.AST | None, tree: ast.Module, depth: int = 3) -> Iterator[str]:
    """The texts that an expression can be, with a hole for each part that is not constant."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body, tree, depth)
        yield from texts(node.orelse, tree, depth)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts(value, tree, depth)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for left in texts(node.left, tree, depth):
            yield from (left + right for right in texts(node.right, tree, depth))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and depth:
        returned = [
            each.value
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == node.func.id
            for each in ast.walk(function)
            if isinstance(each, ast.Return)
        ]
        for value in returned:
            yield from texts(value, tree, depth - 1)
    else:
        yield HOLE


def messages(tree: ast.Module, errors: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each message that an error or a warning of a file is made with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func)
            if name in errors | {"super().__init__", "warnings.warn"}:
                yield from ((node.lineno, text) for text in texts(node.args[0], tree))


def test_messages_have_one_form():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    errors = error_classes(list(trees.values()))
    found = [
        (f"{path.relative_to(ROOT)}:{line}", text)
        for path, tree in trees.items()
        for line, text in messages(tree, errors)
    ]
    assert len(found) > 250
    offenders = [
        f"{place} {fault}: {text!r}"
        for place, text in found
        for fault, pattern in FORM.items()
        if re.match(pattern, text, re.DOTALL)
    ]
    assert offenders == [], "\n".join(offenders)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("raise InputError('The width is 3; give 4')", "begins with a capital"),
        ("raise InputError(f'{name} is 3.')", "ends with a full stop"),
        ("raise InputError(f'{name} is 3. Give 4')", "holds a full stop"),
        ("raise InputError('x' if a else f'b must be 4, got {b}')", "says ', got'"),
        ("def why():\n return 'Ends'\nraise InputError(why())", "begins with a capital"),
    ],
)
def test_another_form_is_found(code, fault):
    ((_, *_), *_) = found = list(messages(ast.parse(code), {"InputError"}))
    assert any(re.match(FORM[fault], text) for _, text in found)
