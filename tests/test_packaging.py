"""Metadata and pins agree with each other."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(lines):
    """Requirements by name."""
    parsed = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement.name: requirement for requirement in parsed}


def test_every_dependency_is_pinned_within_its_range():
    pins = requirements((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for name, requirement in requirements([*PROJECT["dependencies"], *extras]).items():
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert pin.version in requirement.specifier
        assert "+" not in pin.version  # a local version would bind everyone to one build


def test_import_needs_no_extra():
    core = requirements(PROJECT["dependencies"])
    assert set(core) == {"torch", "triton", "numpy", "safetensors", "tqdm"}


def test_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [PROJECT["version"]]
