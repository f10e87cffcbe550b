"""Measures the source code: size, levels of imports, functions, public names, form of the words.

    python -m bench.tools.house                          this checkout
    python -m bench.tools.house 761d63c af25464          commits, beside the checkout
    python -m bench.tools.house --tree PATH              another checkout
    python -m bench.tools.house COMMIT --output bench/results           bench/results/house.csv

Rows of the table
  lines, code    as `wc -l` counts; without comments, docstrings and blank lines
  levels         modules in the longest chain of imports inside a package; a circle counts as one
  room levels    the same of rooms: folders and modules directly below the package
  upward         imports from a room that comes later in `ROOMS` (trees with these rooms only)
  function       longest, in lines of code, with its 95th percentile; CODE_LINES is no limit of
                 Triton kernels, which are compiled whole
  parameters     most of a function, without self; Triton kernels are left out
  complexity     highest: 1 + branches, loops, handlers, conditions and parts of boolean operators
  public         names of `dir(package)` without an underscore
  questions      docstrings that open with What, Where or How, or with Whether outside a property
  messages       texts of raised errors that start with a capital or end with a full stop
  private        reaches of tests into names with an underscore, of modules and objects
"""

import ast
import io
import math
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.tools.commandline import CommandLine
from bench.tools.measuring import ROOT, Row, commit, write_rows
from bench.tools.tables import aligned

PACKAGES = ("grail", "grail_kernels", "bench", "tests")
# In their order of dependency: a room imports from itself and from those before it.
ROOMS = {
    "grail": (
        *("version", "errors", "arguments", "runtime", "algebra", "select", "calibrate"),
        *("networks", "recipe", "statistics", "report", "files", "run", "serving"),
        *("__init__", "commands", "__main__"),
    ),
    "bench": ("tools", "kernels", "quality", "reliability", "report"),
}
# Limits that tests/bench/test_house.py holds.
CODE_LINES = 80
PARAMETERS = 11

Function = ast.FunctionDef | ast.AsyncFunctionDef
Graph = dict[str, set[str]]
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}
_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}


@dataclass(frozen=True)
class Measure:
    """Size of a function. `name` is that of its module and its own."""

    name: str
    code: int
    parameters: int
    complexity: int
    is_kernel: bool = False


@dataclass
class Module:
    """A parsed source file of a package."""

    name: str
    text: str
    tree: ast.Module = field(init=False)
    code: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        self.code = {
            line
            for token in tokens
            if token.type not in _NO_CODE
            for line in range(token.start[0], token.end[0] + 1)
        }
        for _, node in docstrings(self.tree):
            self.code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))

    def functions(self) -> Iterator[Measure]:
        """Every function and method, nested ones too."""
        for node, owner in _walk(self.tree):
            if isinstance(node, Function):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                yield Measure(
                    f"{self.name}.{node.name}",
                    len(self.code.intersection(lines)),
                    0 if _is_kernel(node) else _parameters(node, isinstance(owner, ast.ClassDef)),
                    complexity(node),
                    _is_kernel(node),
                )


def modules(folder: Path) -> dict[str, Module]:
    """Every module of a package by its dotted name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path.read_text(encoding="utf-8"))
    return found


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Constant]]:
    """Everything documented, with its docstring."""
    for owner in ast.walk(tree):
        if not isinstance(owner, (ast.Module, ast.ClassDef, Function)):
            continue
        match owner.body:
            case [ast.Expr(value=ast.Constant(value=str()) as node), *_]:
                yield owner, node


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity (McCabe 1976), functions inside included."""
    found = 1
    for node in ast.walk(function):
        found += isinstance(node, _BRANCHES)
        if isinstance(node, ast.BoolOp):
            found += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            found += 1 + len(node.ifs)
    return found


def _walk(tree: ast.AST, owner: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Every node below `tree`, with the node that contains it."""
    for node in ast.iter_child_nodes(tree):
        yield node, tree
        yield from _walk(node)


def _parameters(function: Function, method: bool) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    stars = (arguments.vararg is not None) + (arguments.kwarg is not None)
    static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    return len(named) + stars - (method and not static)


def _is_kernel(function: Function) -> bool:
    jits = ("triton.jit", "gluon.jit")
    return any(jit in ast.unparse(d) for d in function.decorator_list for jit in jits)


def imports(package: dict[str, Module]) -> Graph:
    """By module, the modules of the package that it imports, wherever in its text."""
    return {name: set(_imported(module, package)) for name, module in package.items()}


def _imported(module: Module, package: dict[str, Module]) -> Iterator[str]:
    typing_only = {
        inner
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(module.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            of = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in package else str(node.module) for name in of]
        if node not in typing_only:
            yield from (name for name in names if name in package and name != module.name)


def rooms(graph: Graph) -> Graph:
    """The same imports between rooms."""
    found: Graph = {}
    for name, others in graph.items():
        found.setdefault(_room(name), set()).update(map(_room, others))
    return {room: others - {room} for room, others in found.items()}


def _room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def levels(graph: Graph) -> int:
    """Nodes in the longest chain; nodes that reach each other count as one."""
    reached = {node: _reachable(graph, node) for node in graph}
    depth: dict[str, int] = {}
    # Of two that are no circle, the one that is reached reaches fewer.
    for node in sorted(graph, key=lambda n: len(reached[n] | {n})):
        below = [depth[n] for n in reached[node] if n in depth and node not in reached[n]]
        depth[node] = 1 + max(below, default=0)
    return max(depth.values(), default=0)


def _reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        new = graph.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def upward(package: str, graph: Graph) -> list[str] | None:
    """Imports from a later room, as "module imports module"; None for a tree without the rooms."""
    order = {room: number for number, room in enumerate(ROOMS.get(package, ()))}
    if not order or not order.keys() <= rooms(graph).keys():
        return None
    last = len(order)
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if order.get(_room(other), last) > order.get(_room(name), last)
    ]


def questions(module: Module) -> Iterator[str]:
    """Docstrings that open with a question word."""
    for owner, node in docstrings(module.tree):
        first = "".join(re.findall(r"^\s*(\w+)", str(node.value)))
        decorators = getattr(owner, "decorator_list", ())
        is_property = any("property" in ast.unparse(d) for d in decorators)
        if first in ("What", "Where", "How") or (first == "Whether" and not is_property):
            yield f"{module.name}:{node.lineno}"


def messages(module: Module) -> Iterator[str]:
    """Messages of raised errors that start with a capital or end with a full stop."""
    for node in ast.walk(module.tree):
        match node:
            case ast.Raise(exc=ast.Call(args=[first, *_])):
                parts = list(_literals(first))
                if parts and (re.match(r"[A-Z][a-z]", parts[0]) or parts[-1].endswith(".")):
                    yield f"{module.name}:{node.lineno}"


def _literals(node: ast.expr) -> Iterator[str]:
    """The texts of a message in order; a value among them is empty."""
    match node:
        case ast.Constant(value=str() as text):
            yield text
        case ast.JoinedStr(values=values):
            for value in values:
                yield from _literals(value)
        case ast.BinOp(left=left, right=right):
            yield from _literals(left)
            yield from _literals(right)
        case _:
            yield ""


def reaches(module: Module) -> Iterator[str]:
    """Uses of names with an underscore that are not the module's own."""
    for node in ast.walk(module.tree):
        if not isinstance(node, (ast.expr, ast.stmt)):
            continue
        names: Iterable[str] = ()
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(attr=attribute):
                names = (attribute,)
            case ast.ImportFrom(names=aliases):
                names = (alias.name for alias in aliases)
            case ast.Call(args=[_, ast.Constant(value=str() as text), *_]):
                # monkeypatch.setattr(owner, "_name", …)
                names = (text,) if ast.unparse(node.func).endswith(("setattr", "object")) else ()
        for name in names:
            if re.match(r"_[a-zA-Z]", name) and name not in _NAMED_TUPLES:
                yield f"{module.name}:{node.lineno} {name}"


def public_names(package: str, tree: Path) -> str:
    """The number of names of `dir(package)` without an underscore, from a process of its own."""
    program = f"import {package}; print(sum(n[0] != '_' for n in dir({package})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True)
    return done.stdout.strip()


def measure(package: str, tree: Path) -> Row:
    """One row of the table."""
    found = modules(tree / package)
    graph = imports(found)
    functions = [function for module in found.values() for function in module.functions()]
    sizes = sorted(function.code for function in functions)
    longest = max(functions, key=lambda f: f.code)
    widest = max(functions, key=lambda f: f.parameters)
    hardest = max(functions, key=lambda f: f.complexity)
    climbs = upward(package, graph)
    has_face = package in ("grail", "grail_kernels")
    counts: dict[str, object] = {
        "package": package,
        "files": len(found),
        "lines": sum(module.text.count("\n") for module in found.values()),
        "code": sum(len(module.code) for module in found.values()),
        "levels": levels(graph),
        "room levels": levels(rooms(graph)),
        "upward": "" if climbs is None else len(climbs),
        "function": longest.code,
        "longest": longest.name,
        "p95": sizes[math.ceil(0.95 * len(sizes)) - 1],
        "parameters": widest.parameters,
        "most": widest.name,
        "complexity": hardest.complexity,
        "hardest": hardest.name,
        "public": public_names(package, tree) if has_face else "",
        "docstrings": sum(len(list(docstrings(module.tree))) for module in found.values()),
        "questions": sum(len(list(questions(module))) for module in found.values()),
        "messages": sum(len(list(messages(module))) for module in found.values()),
        "private": sum(len(list(reaches(m))) for m in found.values()) if package == "tests" else "",
    }
    return {name: str(value) for name, value in counts.items()}


def measure_tree(tree: Path, commit: str) -> list[Row]:
    """The rows of all packages of a tree."""
    return [
        {"commit": commit} | measure(package, tree)
        for package in PACKAGES
        if (tree / package).is_dir()
    ]


def measure_commit(commit: str) -> list[Row]:
    """The rows of a commit of this repository, from an archive that is unpacked for it."""
    git = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, *PACKAGES]
    archive = subprocess.run(git, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        return measure_tree(Path(folder), commit)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, writes."""
    parser = CommandLine(__doc__, takes="half a minute a tree", results="house")
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="measured before the tree")
    parser.add_argument("--tree", type=Path, default=ROOT, help="default: this checkout")
    options = parser.read(arguments)
    rows = [row for commit in options.commits for row in measure_commit(commit)]
    rows += measure_tree(options.tree, commit(options.tree))
    for package in PACKAGES:
        if of_package := [row for row in rows if row["package"] == package]:
            first, *others = ([name, *(row[name] for row in of_package)] for name in rows[0])
            print(aligned(first, others, words=len(first)), end="\n\n")
    if options.output:
        write_rows(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
