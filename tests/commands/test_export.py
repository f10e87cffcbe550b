"""`grail export`: what it writes, prints and refuses."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from grail.files.load import load_model
from grail.serving import gguf_check, gguf_writing
from grail.serving.gguf_check import Comparison
from grail.serving.gguf_layout import entries, file_names, measure, stored_tensors
from tests.commands.test_cli import grail, refusal

gguf = pytest.importorskip("gguf")
files = pytest.importorskip("tests.serving.gguf_files")

ROOT = Path(__file__).parents[2]
FOUND = Comparison("llama-cpp-python 1.2.3", "float32", 256, 2e-5, 4.0, 1.0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory, tiny_llama, tiny_batches):
    """The dense model's file, and an uneven folder; tests only read them."""
    root = tmp_path_factory.mktemp("export")
    model = tiny_llama()
    like = files.dense_file(model, root / "dense.gguf")
    keep = {"mlp": [0.9, 0.4]}
    return files.compressed(model, tiny_batches(), root / "out", keep=keep), like


@pytest.fixture
def runtime(monkeypatch):
    """Sets what llama.cpp finds; None as if it were not installed."""

    def found(comparison):
        monkeypatch.setattr(gguf_writing, "compare", lambda *_: comparison)

    monkeypatch.setattr(gguf_check, "runtime", lambda: None)
    return found


def test_writes_a_file_and_says_what_is_in_it(paths, tmp_path, runtime):
    folder, like = paths
    runtime(FOUND)
    target = tmp_path / "small.gguf"
    result = grail("export", folder, "--gguf", target, "--like", like)
    assert result.exit_code == 0, result.output
    assert f"gguf    {target} (" in result.stdout
    assert "form    architecture deci, 2 blocks, MLP width 32 to 96" in result.stdout
    assert "(128 channels, 24 of them zero)" in result.stdout
    assert "check   largest logit difference 5.0e-06 of the largest logit" in result.stdout
    assert "100.0% of 256 positions (llama-cpp-python 1.2.3)" in result.stdout
    assert files.keys(target)["deci.feed_forward_length"] == [96, 32]


def test_says_that_a_file_was_not_verified(paths, tmp_path, runtime):
    folder, like = paths
    target = tmp_path / "small.gguf"
    options = ["--pad", 256, "--dtype", "float16"]
    result = grail("export", folder, "--gguf", target, "--like", like, *options)
    assert "check   not verified in llama.cpp: pip install llama-cpp-python" in result.stdout
    assert "architecture llama, 2 blocks, MLP width 256 (512 channels" in result.stdout
    assert files.keys(target)["general.file_type"] == 1
    result = grail("export", folder, "--check", target)
    assert "check   not verified in llama.cpp" in result.stdout


def test_json_has_the_same_facts(paths, tmp_path, runtime):
    folder, like = paths
    runtime(FOUND)
    result = grail("export", folder, "--gguf", tmp_path / "a.gguf", "--like", like, "--json")
    facts = json.loads(result.stdout)
    assert (facts["architecture"], facts["widths"]) == ("deci", [96, 32])
    assert facts["comparison"]["share"] == 5e-6
    assert facts["bytes"] == (tmp_path / "a.gguf").stat().st_size
    result = grail("export", folder, "--check", tmp_path / "a.gguf", "--json")
    assert json.loads(result.stdout)["comparison"]["agreement"] == 1


def test_another_network_is_an_error(paths, tmp_path, runtime):
    folder, like = paths
    runtime(Comparison("llama-cpp-python 1.2.3", "float32", 256, 2.0, 4.0, 0.1))
    said = refusal(grail("export", folder, "--gguf", tmp_path / "a.gguf", "--like", like))
    assert "is not the network of the folder: largest logit difference 5.0e-01" in said
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --gguf FILE, --imatrix FILE or --onnx FILE to write one, or --check FILE"),
        (
            ["--gguf", "a.gguf", "--check", "b.gguf"],
            "give --gguf FILE, --imatrix FILE or --onnx FILE to write",
        ),
        (
            ["--check", "b.gguf", "--pad", "32"],
            "--pad is used with --gguf or --imatrix: give that as well",
        ),
        (["--check", "b.gguf"], "b.gguf: no such GGUF file"),
        (["--gguf", "a.gguf"], "give it as like (--like)"),
        (["--gguf", "a.gguf", "--pad", "48"], "'48' is not one of '32', '256'"),
        (["--gguf", "a.gguf", "--dtype", "int4"], "'int4' is not one of"),
    ],
)
def test_what_does_not_fit_together_is_refused(paths, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(grail("export", paths[0], *options))
    assert list(tmp_path.iterdir()) == []


def test_the_page_s_commands_run_as_typed(tiny_llama, tmp_path, runtime, monkeypatch):
    """The source was GGUF, so that the report names the template."""
    monkeypatch.chdir(tmp_path)
    model = tiny_llama(tie_word_embeddings=True)
    write_whole(model, tmp_path / "dense.gguf")
    (tmp_path / "text.txt").write_text("abcd e hijk cd abba xyz " * 200)
    page = (ROOT / "docs" / "serving" / "gguf.md").read_text(encoding="utf-8")
    lines = [line.split() for line in page.splitlines() if line.startswith("    grail ")]
    few = ["--tokens", "128", "--sequence-length", "16"]
    assert {line[1] for line in lines} == {"compress", "export"}
    batch = torch.arange(3, 19)
    compared = 0
    for _, name, *words in lines:
        for option, output in itertools.pairwise(words):
            if option in ("--gguf", "--imatrix"):
                (tmp_path / output).unlink(missing_ok=True)
        done = grail(name, *words, *(few if name == "compress" else ()))
        assert done.exit_code == 0, done.output
        if "--gguf" in words and "--quantize" not in words:
            own = load_model("out")[0](batch[None]).logits[0].detach().numpy()
            assert abs(files.logits(tmp_path / "small.gguf", batch) - own).max() <= 1e-4
            compared += 1
    assert compared >= 2


def write_whole(model, path):
    """Writes a dense model of the Llama family with a tokenizer of characters."""
    tokens = [*map(chr, range(33, 127)), "ab", "cd", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"]
    template = gguf.GGUFReader(files.dense_file(model, path.with_suffix(".keys")))
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in template.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = stored_tensors(model)
    for entry in entries(file_names(model), measure(model), "llama"):
        writer.add_tensor(entry.name, entry.pack(state).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_quantises_and_says_what_that_costs(tmp_path, tiny_llama, tiny_batches, runtime):
    model = tiny_llama(hidden_size=64, head_dim=8, num_attention_heads=8, num_key_value_heads=4)
    like = files.dense_file(model, tmp_path / "dense.gguf")
    folder = files.compressed(model, tiny_batches(), tmp_path / "out", keep=0.4, multiple=32)
    text, target = tmp_path / "text.txt", tmp_path / "small.gguf"
    text.write_text(" ".join(f"w{3 + n * n % 90}" for n in range(300)))
    options = ["--like", like, "--calibration", text, "--tokens", 64, "--sequence-length", 32]
    runtime(None)
    result = grail(
        "export", folder, "--gguf", target, *options, "--quantize", "q4_1", "--evaluate", text
    )
    assert result.exit_code == 0, result.output
    assert "kB, q4_1)" in result.stdout
    assert "of a layer's output by GPTQ" in result.stdout
    assert "text    perplexity" in result.stdout
    again = grail(
        "export", folder, "--gguf", tmp_path / "b.gguf", *options, "--quantize", "q8_0", "--json"
    )
    found = json.loads(again.stdout)
    assert (found["dtype"], found["rounding"]["format"]) == ("q8_0", "q8_0")
    assert len(found["rounding"]["layers"]) == 16
    assert found["rounding"]["perplexity"] == {}


def test_refuses_options_of_quantising_without_it(paths, tmp_path, runtime):
    folder, like = paths
    runtime(None)
    given = ["export", folder, "--gguf", tmp_path / "small.gguf", "--like", like]
    assert "--calibration is used with --imatrix or --quantize" in refusal(
        grail(*given, "--calibration", "text.txt")
    )
    assert "--evaluate is used with --quantize" in refusal(grail(*given, "--evaluate", "t.txt"))
    assert "q4_k_m" in refusal(grail(*given, "--quantize", "q4_k_m"))


def test_the_commands_of_the_page_of_quantising_run_as_typed(
    tiny_llama, tmp_path, runtime, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    runtime(None)
    sizes = {"hidden_size": 64, "head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_llama(tie_word_embeddings=True, intermediate_size=64, **sizes)
    write_whole(model, tmp_path / "dense.gguf")
    (tmp_path / "text.txt").write_text("abcd e hijk cd abba xyz " * 200)
    page = (ROOT / "docs" / "serving" / "quantising.md").read_text(encoding="utf-8")
    lines = [line.split() for line in page.splitlines() if line.startswith("    grail ")]
    few = ["--tokens", "128", "--sequence-length", "16"]
    assert [line[1] for line in lines] == ["compress", "export", "compress", "export"]
    for _, name, *words in lines:
        done = grail(name, *words, *(few if name == "compress" else ()))
        assert done.exit_code == 0, done.output
    assert "+ q4_1" not in done.stdout
    assert "text    perplexity" in done.stdout
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader("small.gguf").tensors}
    assert stored["blk.1.ffn_down.weight"] == "Q4_1"
    assert stored == {t.name: t.tensor_type.name for t in gguf.GGUFReader("other.gguf").tensors}
