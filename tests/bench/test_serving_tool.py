"""The environment of runtimes, with packages and a compiler made here: no index is asked."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from bench.tools import environments, serving
from bench.tools.measuring import read_rows
from bench.tools.serving import Environment, Runtime

ROOT = Path(serving.__file__).parents[2]
PEERS = {"peer": Runtime("peer", ("peer==1.0",)), "absent": Runtime("absent", ("absent==1.0",))}
BUILT = {"llama.cpp": Runtime("llama_cpp", (), "llama-cpp-python==1.0")}
# Configures by leaving a mark, and builds what CMake would.
CMAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
if [ "$1" = --build ]; then
    [ -e "$CALLS.fails" ] && { echo "error: no such register" >&2; exit 1; }
    mkdir -p "$2/bin"
    echo library > "$2/bin/libllama.so"
    for tool in llama-quantize llama-imatrix llama-perplexity llama-completion llama-bench; do
        printf '#!/bin/sh\\necho this is %s' $tool > "$2/bin/$tool"
        chmod +x "$2/bin/$tool"
    done
else
    mkdir -p "$4"
fi
"""
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder, "llama_cpp_python-1.0.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 1.0\\n"
    )
    return info.name
"""


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """The only place where pip looks: a wheel of the module "peer"."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {
        "peer.py": "ONE = 1",
        "peer-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: peer\nVersion: 1.0\n",
        "peer-1.0.dist-info/WHEEL": wheel,
    }
    files["peer-1.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
    with zipfile.ZipFile(folder / "peer-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder


@pytest.fixture
def source(wheels, tmp_path, monkeypatch):
    """A source distribution, a compiler and a CMake; returns the list of CMake's calls."""
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 1.0\n",
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\n"
        "backend-path = ['.']\n",
        "backend.py": BACKEND,
        "llama_cpp/__init__.py": "from pathlib import Path\n"
        "TEXT = Path(__file__).parent.joinpath('lib', 'libllama.so').read_text()",
        "vendor/llama.cpp/CMakeLists.txt": "",
    }
    with tarfile.open(wheels / "llama_cpp_python-1.0.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    programs, calls = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    for name, text in (("cmake", CMAKE), ("ninja", "#!/bin/sh\n"), ("c++", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(calls))
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def words(text):
    """The text of a box."""
    return " ".join(" ".join(line.strip("╔═╗║╚╝ ") for line in text.splitlines()).split())


def test_a_runtime_is_installed_once_and_one_that_is_missing_is_skipped(wheels, tmp_path, capfd):
    made = Environment(tmp_path / "home", tmp_path / "cache", PEERS)
    assert serving.run(made, ["peer", "absent"], test=False) == 0
    said = capfd.readouterr()
    assert "absent IS NOT INSTALLED, WHAT NEEDS IT IS SKIPPED" in words(said.err)
    assert "No matching distribution found for absent==1.0" in words(said.err)
    assert (made.has("peer"), made.has("absent")) == (True, False)
    # What the running environment has is there, and the checkout.
    code = "import peer, torch, pytest, grail; print(peer.__file__, grail.__file__)"
    done = made.run_python("-c", code + "; import sys; sys.exit(peer.ONE)")
    assert done.returncode == 1
    assert serving.run(made, ["peer"], test=False) == 0
    assert "peer: ready" in capfd.readouterr().out
    other = {"peer": Runtime("peer", ("peer==1.0", "absent==1.0"))}
    assert not Environment(tmp_path / "home", tmp_path / "cache", other).has("peer")
    assert "peer     peer==1.0    installed" in serving.listed(made)


def test_llama_cpp_is_compiled_once_for_all_checkouts(source, tmp_path, capfd):
    for home in ("first", "second"):
        made = Environment(tmp_path / home, tmp_path / "cache", BUILT)
        assert serving.run(made, ["llama.cpp"], test=False) == 0
        assert made.has("llama.cpp"), capfd.readouterr()
        code = (
            "import importlib.metadata as m, llama_cpp;"
            "print(m.version('llama_cpp_python'), llama_cpp.TEXT)"
        )
        done = subprocess.run([made.python, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["1.0", "library"]
        tool = made.python.with_name("llama-quantize")
        assert subprocess.check_output([tool], text=True) == "this is llama-quantize\n"
    configured, built = source()
    assert "-DBUILD_SHARED_LIBS=ON" in configured
    assert built.split()[2:] == ["--target", "llama", *serving.TOOLS]
    (cached,) = (tmp_path / "cache").iterdir()
    assert cached.name.startswith("llama-cpp-python-1.0-")
    assert sorted(path.name for path in cached.iterdir()) == ["lock", "result"]


def test_a_build_that_fails_is_skipped_and_resumed(source, tmp_path, wheels, capfd):
    made = Environment(tmp_path / "home", tmp_path / "cache", BUILT)
    (tmp_path / "calls.fails").touch()
    assert serving.run(made, ["llama.cpp"], test=False) == 0
    assert "IS SKIPPED: error: no such register" in words(capfd.readouterr().err)
    assert not made.has("llama.cpp")
    (tmp_path / "calls.fails").unlink()
    (wheels / "llama_cpp_python-1.0.tar.gz").unlink()  # its source was unpacked
    assert serving.run(made, ["llama.cpp"], test=False) == 0
    assert made.has("llama.cpp")
    (cached,) = (tmp_path / "cache").iterdir()
    os.rename(cached, tmp_path / "elsewhere")  # a cache that was emptied
    assert not made.has("llama.cpp")


def test_a_machine_without_a_compiler_is_told(source, tmp_path, capfd, monkeypatch):
    real = serving.shutil.which
    monkeypatch.setattr(serving.shutil, "which", lambda name: name != "c++" and real(name))
    made = Environment(tmp_path / "home", tmp_path / "cache", BUILT)
    assert serving.run(made, ["llama.cpp"], test=False) == 0
    assert "no C++ compiler (c++): install one, such as" in words(capfd.readouterr().err)
    assert source() == []


@pytest.mark.parametrize(("test", "code"), [("assert peer.ONE", 0), ("assert not peer.ONE", 1)])
def test_a_failing_test_is_exit_code_1(wheels, tmp_path, capfd, monkeypatch, test, code):
    recorded = "record_property('difference', 2e-6)"
    (tmp_path / "test_it.py").write_text(
        f"import peer\n\ndef test_it(record_property):\n    {recorded}\n    {test}\n"
    )
    monkeypatch.setattr(serving, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(serving, "TESTS", ("test_it.py",))
    made = Environment(tmp_path / "home", tmp_path / "cache", PEERS)
    table = tmp_path / "families.csv"
    assert serving.run(made, ["peer"], test=True, write=table) == code
    said = capfd.readouterr()
    assert ("serving: 1 passed, 0 skipped" in said.out) == (code == 0)
    assert ("pytest ended with 1" in words(said.err)) == (code == 1)
    assert table.exists() == (code == 0)
    if code == 0:
        (row,) = read_rows(table)
        assert (row["case"], row["difference"]) == ("test_it", "2e-06")


def test_without_any_runtime_nothing_is_tested(wheels, tmp_path, capfd):
    made = Environment(tmp_path / "home", tmp_path / "cache", PEERS)
    assert serving.run(made, ["absent"], test=True) == 0
    assert "NOTHING IS TESTED: no runtime is there" in words(capfd.readouterr().err)


def test_a_build_is_of_one_kind_of_processor(tmp_path):
    (tmp_path / "a").write_text("processor: 0\nflags : sse avx\nprocessor: 1\nflags : sse\n")
    (tmp_path / "b").write_text("model name : other\nflags : avx sse\n")
    (tmp_path / "c").write_text("flags : sse\n")
    names = [serving.processor(tmp_path / name) for name in "abc"]
    assert names[0] == names[1] != names[2]
    assert serving.processor(tmp_path / "absent") not in names


def test_the_cache_is_the_user_s_or_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("GRAIL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert serving.cache_folder() == tmp_path / "grail"
    monkeypatch.setenv("GRAIL_CACHE", str(tmp_path / "named"))
    assert serving.cache_folder() == tmp_path / "named"


def test_the_command_line_refuses_other_names(capsys):
    with pytest.raises(SystemExit) as ended:
        serving.main(["ollama"])
    assert ended.value.code == 2
    assert "ollama: no such runtime; choose of llama.cpp, ONNX" in capsys.readouterr().err


def test_make_calls_it_and_git_ignores_it():
    assert "/.serving/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "serving", "SERVING=--test", f"VENV={sys.prefix}"]
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].endswith("-m bench.tools.serving --test")
