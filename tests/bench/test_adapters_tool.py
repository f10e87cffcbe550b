"""The environments of adapters, with packages made here: no index is asked."""

import ast
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench.tools import adapters, environments
from bench.tools.adapters import LIBRARIES, Environment, Library

ROOT = Path(adapters.__file__).parents[2]
SILENT = environments.SILENCE * (1 + environments.AGAIN)  # seconds that one silent index costs


@pytest.fixture
def index(tmp_path, monkeypatch):
    """`index(name, version, text)`: writes a wheel of one module to the only place pip looks at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(adapters, "OWN", ())

    def write(name, version="1.0", text="", requires=""):
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
        wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        info = f"{name}-{version}.dist-info"
        files = {f"{name}.py": text, f"{info}/METADATA": about, f"{info}/WHEEL": wheel}
        record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            for file, content in [*files.items(), (f"{info}/RECORD", record)]:
                archive.writestr(file, content)

    return write


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """`environment(test=…)`: that of the package "peer" 1.0, whose adapter has this test."""
    monkeypatch.setattr(environments, "ROOT", tmp_path)

    def make(test="", version="1.0", shared=("pytest", "pytest-xdist"), others=()):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / "test_peer.py").write_text(test)
        library = Library("peer", version, "peer", others)
        return Environment("peer", library, tmp_path / "home", shared, tmp_path / "tests")

    return make


def peer_in(environment):
    """What the environment's interpreter prints of the peer."""
    code = "import peer, pytest; print(peer.__file__, pytest.__file__)"
    done = subprocess.run(
        [environment.python, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.split()


PASSES = "import peer\n\ndef test_it():\n    assert peer.ONE == 1\n"
FAILS = PASSES.replace("== 1", "== 2")
SKIPPED = "import pytest\n\npytest.importorskip('no_such_peer')\n" + PASSES
ONE_SKIPPED = PASSES + "\n@pytest.mark.skip\ndef test_other(): ...\n"


def test_a_library_is_installed_once_and_its_tests_are_run(index, environment, capfd):
    index("peer", "1.0", "ONE = 1")
    made = environment(f"import pytest\n{ONE_SKIPPED}")
    assert not made.ready
    assert adapters.run([made], test=True) == 0
    said = capfd.readouterr()
    assert "peer: installing peer==1.0 …" in said.out
    assert "peer: 1 passed, 1 skipped" in said.out
    assert "╔" not in said.err
    peer, own = peer_in(made)
    assert Path(peer).is_relative_to(made.folder)
    assert Path(own).resolve() == Path(pytest.__file__).resolve()
    assert adapters.run([made], test=False) == 0
    assert "peer: ready in" in capfd.readouterr().out
    assert not environment(version="1.1").ready
    assert "installed" in adapters.listed([made])


@pytest.mark.parametrize(
    ("test", "text", "said"),
    [
        (FAILS, "ONE = 1", "pytest ended with 1"),
        (SKIPPED, "ONE = 1", "no test ran, 1 skipped"),
        (ONE_SKIPPED.replace(PASSES, "import pytest\n"), "ONE = 1", "no test ran, 1 skipped"),
        (PASSES, "import no_such_module", "import peer fails"),
        ("", "ONE = 1", "no test ran, 0 skipped"),
    ],
    ids=["fails", "skipped", "each skipped", "no import", "no tests"],
)
def test_tests_that_fail_or_do_not_run_are_exit_code_1(test, text, said, index, environment, capfd):
    index("peer", "1.0", text)
    assert adapters.run([environment(test)], test=True) == 1
    caught = capfd.readouterr()
    assert "peer FAILED" in caught.err
    assert said in " ".join(caught.err.replace("║", " ").split())
    assert "failed: peer" in caught.out


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (None, "No matching distribution found for peer==1.0"),
        ("2.0", "No matching distribution found for peer==1.0"),
        ("1.0", "No matching distribution found for another"),
    ],
    ids=["no package", "a version that is gone", "a requirement that is gone"],
)
def test_what_cannot_be_installed_is_said_in_a_box_and_skipped(
    there, said, index, environment, capfd
):
    if there:
        index("peer", there, requires="Requires-Dist: another>=3\n")
    made = environment(FAILS)
    assert adapters.run([made], test=True) == 0
    caught = capfd.readouterr()
    box = [line for line in caught.err.splitlines() if line[:1] in "╔║╚"]
    assert len({len(line) for line in box}) == 1
    words = " ".join(" ".join(line.strip("╔═╗║╚╝ ") for line in box).split())
    assert words.startswith("peer IS NOT INSTALLED, ITS TESTS ARE SKIPPED: ")
    assert said in words
    assert "put peer==1.0 and what they need into a folder, and set PIP_FIND_LINKS" in words
    assert "not installed: peer" in caught.out
    assert not made.folder.exists()


def test_an_index_that_is_silent_costs_little(environment, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        monkeypatch.setattr(environments, "SILENCE", 1)
        monkeypatch.setattr(environments, "AGAIN", 0)
        assert adapters.run([environment()], test=True) == 0
    assert "IS NOT INSTALLED" in capfd.readouterr().err
    assert SILENT <= 60  # there may be two of them


def test_an_installation_that_takes_too_long_is_ended(index, environment, monkeypatch, capfd):
    index("peer", "1.0")
    monkeypatch.setattr(environments, "LONGEST", 0.01)
    made = environment()
    assert adapters.run([made], test=True) == 0
    assert "took longer than 0 s" in capfd.readouterr().err
    assert not made.folder.exists()


def test_a_shared_torch_is_never_replaced(index, environment, capfd):
    torch = importlib.metadata.version("torch")
    index("peer", "1.0", requires="Requires-Dist: torch>=900\n")
    index("torch", "900.0")
    made = environment(shared=("torch",))
    assert adapters.run([made], test=False) == 0
    said = " ".join(capfd.readouterr().err.replace("║", " ").split())
    assert "IS NOT INSTALLED" in said
    assert torch.partition("+")[0] in adapters.needed(["torch"])["torch"].version


def test_torchvision_of_another_torch_can_be_imported(index, environment):
    declares = 'import torch\n\n@torch.library.register_fake("torchvision::nms")\ndef f(): ...\n'
    index("peer")
    index("torchvision", text=declares)
    made = environment(shared=("torch",), others=("torchvision",))
    assert adapters.run([made], test=False) == 0
    subprocess.run([made.python, "-c", "import torchvision"], check=True, cwd="/")
    index("torchvision")  # one that can be imported is left alone
    (made.folder / "installed").unlink()
    assert adapters.run([made], test=False) == 0
    assert not list(made.folder.rglob("sitecustomize.py"))


def test_what_torch_needs_is_found_by_metadata_and_names_match_whole():
    found = adapters.needed(["torch"])
    assert found.keys() >= {"torch", "sympy", "mpmath", "typing-extensions", "jinja2", "markupsafe"}
    assert "torch-pruning" not in found
    assert adapters.distributions(["typing_extensions", "no-such-package"]).keys() == {
        "typing-extensions"
    }
    names = {path.name for path in adapters.top_level(found["typing-extensions"])}
    assert {name for name in names if not name.endswith(".dist-info")} == {"typing_extensions.py"}
    assert all(path.exists() for each in found.values() for path in adapters.top_level(each))


def test_the_command_line_refuses_other_names_and_lists_all(capsys):
    with pytest.raises(SystemExit) as ended:
        adapters.main(["llm-compressor"])
    assert ended.value.code == 2
    assert "choose of llmcompressor, torch-pruning" in capsys.readouterr().err
    assert adapters.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(library.requirements[0] in listed for library in LIBRARIES.values())


def test_every_version_of_the_table_is_pinned_and_one_that_the_adapter_knows():
    tested = {}
    for path in (ROOT / "grail" / "adapters").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Library":
                package, versions = map(ast.literal_eval, node.args)
                tested[package] = versions
    for library in LIBRARIES.values():
        assert library.version in tested.get(library.package, [library.version])
        for other in library.others:
            (pin,) = Requirement(other).specifier
            assert pin.operator == "=="


def test_ci_tests_two_libraries_beside_them():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make adapters ADAPTERS='--test llmcompressor torch-pruning'" in ci
    # A make around these tests, as in CI, would have this one print the folder it enters.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", "adapters", "ADAPTERS=--test modelopt", f"VENV={sys.prefix}"],
        cwd=ROOT,
        env=outside,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].endswith("-m bench.tools.adapters --test modelopt")


def test_git_ignores_the_environments():
    assert "/.adapters/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


PAGE = (ROOT / "docs" / "adapters" / "index.md").read_text(encoding="utf-8")


def test_the_page_has_every_library_at_its_version_and_stays_short():
    rows = [line for line in PAGE.splitlines() if line.startswith("|")][2:]
    for library in LIBRARIES.values():
        (row,) = (row for row in rows if f"| {library.package} {library.version} |" in row)
        assert f"({library.module}.md)" in row
    for row in rows:
        (name,) = re.findall(r"\]\((\w+)\.md\)", row)
        page, adapter = ROOT / "docs/adapters" / f"{name}.md", ROOT / f"grail/adapters/{name}.py"
        assert page.is_file() == adapter.is_file()
        assert row.split("|")[3].count("<br>") == 2  # three lines
    assert len(PAGE.splitlines()) <= 50
