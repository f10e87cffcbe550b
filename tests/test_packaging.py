"""Metadata and pins agree with each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench.tools.adapters import LIBRARIES

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
