"""Hashes are those that other tools find, and a commit is claimed only where it is known."""

import hashlib
import json
import struct
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

import grail
from grail.files.provenance import PACKAGE, commit, provenance, text_source, weight_files


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b.safetensors", "a.safetensors", "x.bin"], ["a.safetensors", "b.safetensors"]),
        (["pytorch_model.bin", "config.json"], ["pytorch_model.bin"]),
        (["config.json"], []),
        (["consolidated.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["adapter.bin", "optimizer.bin", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["training_args.bin", "a.gguf"], ["a.gguf"]),
    ],
    ids=[
        "safetensors first",
        "pickles",
        "no weights",
        "another copy",
        "state of an optimizer",
        "both",
        "GGUF",
    ],
)
def test_a_models_files_are_hashed(names, expected, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    files = provenance("grail", str(tmp_path))["model"]["files"]
    assert files == {
        name: {"bytes": len(name), "sha256": sha256(name.encode())} for name in expected
    }


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_those_of_the_index(name, tmp_path):
    stem, ending = name.split(".")
    shards = [f"{stem}-{number}-of-3.{ending}" for number in (1, 2, 3)]
    for shard in (*shards, f"{stem}-1-of-2.{ending}", f"consolidated.{ending}"):
        (tmp_path / shard).write_bytes(b"weights")
    index = {"weight_map": {f"layer.{n}": shard for n, shard in enumerate([*shards, shards[0]])}}
    (tmp_path / f"{name}.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(str(tmp_path))] == shards


def test_a_single_file_is_a_model_of_its_own(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"weights")
    (tmp_path / "b.gguf").write_bytes(b"others")
    found = provenance("grail compress …", str(tmp_path / "a.gguf"))
    assert found["model"]["files"] == {"a.gguf": {"bytes": 7, "sha256": sha256(b"weights")}}
    assert found["command"] == "grail compress …"
    passed = datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])
    assert 0 <= passed.total_seconds() < 60


def test_a_name_that_is_nowhere_has_no_files():
    assert weight_files("nobody/nothing-of-that-name") == []


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_token_ids_are_hashed_row_after_row_however_they_are_batched(batches, tmp_path):
    tokens = torch.arange(5 * 7).view(5, 7) * 1001
    (tmp_path / "a.txt").write_text("text")
    found = text_source(str(tmp_path / "a.txt"), tokens.split(batches))
    assert found == {
        "source": str(tmp_path / "a.txt"),
        "sha256": sha256(b"text"),
        "tokens": 35,
        "tokens_sha256": sha256(struct.pack("<35q", *tokens.flatten().tolist())),
    }
    assert "sha256" not in text_source("name/of-a-dataset", [tokens])


@pytest.fixture
def repository(tmp_path):
    """A folder in the place of the package, under git; runs git there."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    return git


def test_the_commit_is_that_of_the_packages_own_repository(repository, tmp_path):
    package = tmp_path / "package"
    assert commit(package) is None  # not tracked: a repository that only surrounds the package
    repository("add", ".")
    repository("commit", "-m", "first")
    head = repository("rev-parse", "HEAD")
    assert commit(package) == head
    (package / "__init__.py").write_text("changed")
    assert commit(package) == f"{head}+changes"


def test_the_commit_is_of_the_whole_package():
    assert Path(grail.__file__).parent == PACKAGE


def test_without_git_no_commit_is_claimed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() is None
