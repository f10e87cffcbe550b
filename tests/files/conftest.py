"""Room for the code that transformers copies out of folders."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Code that comes with models is imported from a folder of this test."""
    folder = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    # transformers appends its folder, behind those of earlier tests.
    others = [path for path in sys.path if not Path(path, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", others)
    kept = {name: module for name, module in sys.modules.items() if _is_copied(name)}
    for name in kept:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if _is_copied(name)]:
        del sys.modules[name]
    sys.modules.update(kept)


def _is_copied(name):
    return name.split(".")[0] == "transformers_modules"
