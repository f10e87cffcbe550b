"""The limits of the source code, and the counts of `bench.tools.house` on small trees."""

import pytest

from bench.tools import house

FOUND = {package: house.modules(house.ROOT / package) for package in house.PACKAGES}


@pytest.mark.parametrize("package", house.PACKAGES)
def test_no_function_is_longer_than_the_limit(package):
    functions = [f for module in FOUND[package].values() for f in module.functions()]
    assert [
        (f.name, f.code) for f in functions if f.code > house.CODE_LINES and not f.is_kernel
    ] == []


@pytest.mark.parametrize("package", house.PACKAGES)
def test_no_function_has_more_parameters_than_the_limit(package):
    functions = [f for module in FOUND[package].values() for f in module.functions()]
    assert [(f.name, f.parameters) for f in functions if f.parameters > house.PARAMETERS] == []


@pytest.mark.parametrize("package", house.ROOMS)
def test_no_module_imports_from_a_later_room(package):
    assert house.upward(package, house.imports(FOUND[package])) == []


@pytest.fixture
def tree(tmp_path):
    """Writes the files of a package and parses it."""

    def make(package="grail", **files):
        for name, text in files.items():
            path = tmp_path / package / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return house.modules(tmp_path / package)

    return make


def test_code_is_counted_without_docstrings_comments_and_blank_lines(tree):
    text = '"""Module.\n\nMore.\n"""\n\n# note\nx = """a\nb"""  # two lines\n\n\n'
    text += 'def f(a, *b, c=1, **d):\n    """Text."""\n\n    return a\n'
    (module,) = tree(m=text).values()
    (function,) = module.functions()
    assert len(module.code) == 4
    assert (function.name, function.code, function.parameters) == ("grail.m.f", 2, 4)


def test_self_is_no_parameter_and_a_kernel_has_none(tree):
    text = "class A:\n    def f(self, a): ...\n    @staticmethod\n    def g(a): ...\n"
    text += "@triton.jit\ndef k(a, b): ...\n"
    (module,) = tree(m=text).values()
    assert [f.parameters for f in module.functions()] == [1, 1, 0]


def test_branches_conditions_and_loops_count_towards_complexity():
    import ast

    text = "def f(x):\n    if x and x > 1 or not x:\n        return [y for y in x if y]\n"
    text += "    try:\n        return 1 if x else 2\n    except E:\n        pass\n"
    # 1, the if, `and`, `or`, the loop of the list and its condition, the inner if, the handler.
    assert house.complexity(ast.parse(text)) == 8


def test_a_circle_is_one_level_and_types_alone_are_no_import(tree):
    found = tree(
        a="import grail.b\n",
        b="from grail import c\n",
        c="def f():\n    from grail.b import x\n    from grail.d import y\n",
        d="if TYPE_CHECKING:\n    import grail.a\n",
    )
    graph = house.imports(found)
    assert graph == {
        "grail.a": {"grail.b"},
        "grail.b": {"grail.c"},
        "grail.c": {"grail.b", "grail.d"},
        "grail.d": set(),
    }
    assert house.levels(graph) == 3


def test_an_import_from_a_later_room_is_found(tree, monkeypatch):
    monkeypatch.setitem(house.ROOMS, "grail", ("low", "high"))
    found = tree(
        low__in__m="from grail.high.n import f\n",
        high__in__n="import grail.low.m\nimport grail.high.o\n",
        high__in__o="",
    )
    assert house.upward("grail", house.imports(found)) == ["grail.low.m imports grail.high.n"]
    assert house.levels(house.rooms(house.imports(found))) == 1
    assert house.upward("grail", {"grail.low": set()}) is None


def test_questions_and_messages_are_found_by_their_form(tree):
    text = '"""Where it is."""\nclass A:\n    @property\n    def p(self):\n        """Whether."""\n'
    text += '    def q(self):\n        """Whether."""\n'
    text += 'def f():\n    """Does."""\n    raise E("Bad")\n    raise E(f"{x} is Bad")\n'
    text += '    raise E(f"it is {x}." "")\n    raise E("FLAP is {x}, …")\n'
    (module,) = tree(m=text).values()
    assert list(house.questions(module)) == ["grail.m:1", "grail.m:7"]
    assert list(house.messages(module)) == ["grail.m:10", "grail.m:12"]


def test_reaches_into_private_names_are_found(tree):
    text = "from grail.x import _a\nmodule._b\nself._c\nrow._replace\n"
    text += 'monkeypatch.setattr(module, "_d", 1)\nmodule.__name__\n'
    (module,) = tree(m=text).values()
    assert [reach.split()[1] for reach in house.reaches(module)] == ["_a", "_b", "_d"]


def test_the_committed_table_has_every_package_of_every_commit():
    import csv

    with (house.ROOT / "bench/results/house.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    commits = dict.fromkeys(row["commit"] for row in rows)
    assert [row["package"] for row in rows] == list(house.PACKAGES) * len(commits)
