"""A GGUF file holds the network of its folder, in a form that stock llama.cpp loads."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import grail
from grail.errors import ExportError, InputError, ModelError
from grail.files.load import load_model
from grail.serving import gguf_check, gguf_writing
from grail.serving.gguf_check import Comparison, compare
from grail.serving.gguf_writing import check_gguf, export_gguf

gguf = pytest.importorskip("gguf")
files = pytest.importorskip("tests.serving.gguf_files")

BLOCKS = {"mlp": [0.9, 0.4], "heads": [1.0, 2 / 3]}
# family, settings of the model, keep, further settings, architecture of the file
CASES = {
    "llama": ("llama", {}, {"mlp": 0.5}, {}, "llama"),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, {"mlp": 0.5}, {}, "llama"),
    "llama, heads": ("llama", {}, {"mlp": 0.5, "heads": 2 / 3}, {}, "llama"),
    "llama, uneven": ("llama", {}, {"mlp": [0.9, 0.4]}, {}, "deci"),
    "llama, uneven heads": ("llama", {"tie_word_embeddings": True}, BLOCKS, {}, "deci"),
    "llama, biases": ("llama", {}, {"mlp": 0.5, "heads": 2 / 3}, {"fit_bias": True}, "llama"),
    "llama, uneven, biases": ("llama", {}, BLOCKS, {"fit_bias": True}, "deci"),
    "llama, biases of its own": (
        "llama",
        {"mlp_bias": True, "attention_bias": True},
        BLOCKS,
        {},
        "deci",
    ),
    "llama, large heads": ("llama", {"head_dim": 16}, BLOCKS, {}, "deci"),
    "mistral": ("mistral", {}, {"mlp": 0.5}, {}, "llama"),
    "mistral, uneven": ("mistral", {}, BLOCKS, {}, "deci"),
    "qwen2": ("qwen2", {}, {"mlp": 0.5}, {}, "qwen2"),
    "qwen2, heads": ("qwen2", {}, {"mlp": 0.5, "heads": 2 / 3}, {}, "deci"),
    "qwen2, uneven": ("qwen2", {}, BLOCKS, {}, "deci"),
    "qwen3": ("qwen3", {}, {"mlp": 0.5, "heads": 2 / 3}, {}, "qwen3"),
    "qwen3, large heads": ("qwen3", {"head_dim": 16}, {"mlp": 0.5, "heads": 2 / 3}, {}, "qwen3"),
    "qwen3, uneven": ("qwen3", {"tie_word_embeddings": True}, BLOCKS, {}, "openelm"),
}


@pytest.fixture
def make(tiny_model, tiny_batches, tmp_path):
    """Writes a compressed folder and the dense model's file; returns both paths."""

    def made(family="llama", config=None, keep=None, settings=None, **changes):
        model = tiny_model(family, **(config or {}))
        like = files.dense_file(model, tmp_path / "dense.gguf", **changes)
        keep = {"mlp": 0.5} if keep is None else keep
        asked = {"keep": keep, "sites": tuple(keep), **(settings or {})}
        return files.compressed(model, tiny_batches(), tmp_path / "out", **asked), like

    return made


@pytest.fixture(autouse=True)
def without_runtime(monkeypatch, request):
    """Lets no test start llama.cpp that does not say so."""
    if "runtime" not in request.node.name:
        monkeypatch.setattr(gguf_check, "runtime", lambda: None)


def expected(folder, tokens):
    model, _ = load_model(folder)
    with torch.inference_mode():
        return model.double()(tokens[None]).logits[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_folder_does(make, tiny_batches, tmp_path, case):
    family, config, keep, settings, architecture = CASES[case]
    folder, like = make(family, config, keep, settings)
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    assert files.keys(file.path)["general.architecture"] == file.architecture == architecture
    tokens = tiny_batches()[0][0]
    own, found = expected(folder, tokens), files.logits(file.path, tokens)
    assert np.abs(own - found).max() <= 2e-6 * np.abs(own).max()  # transformers' angles are fp32


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_an_even_file_as_the_same_network(make, tiny_batches, tmp_path, family):
    from transformers import AutoModelForCausalLM

    folder, like = make(family)
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.path.name)
    tokens = tiny_batches()[0]
    assert torch.allclose(read(tokens).logits, load_model(folder)[0](tokens).logits, atol=1e-5)


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("case", CASES)
def test_runtime_agrees(make, tmp_path, case, record_property):
    family, config, keep, settings, _ = CASES[case]
    folder, like = make(family, config, keep, settings)
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    files.require_agreement(file, record_property)


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_runtime_agrees_on_16_bit(make, tmp_path, dtype):
    folder, like = make(keep=BLOCKS)
    file = export_gguf(folder, tmp_path / "small.gguf", like, dtype=dtype)
    assert file.comparison.is_close
    assert check_gguf(folder, file.path) == file.comparison


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_runtime_refuses_and_nothing_is_written(make, tmp_path, monkeypatch):
    folder, like = make(keep=BLOCKS)
    monkeypatch.setattr(gguf_writing, "choose_architecture", lambda *_: "llama")
    with pytest.raises(ExportError, match=r"does not run small.gguf .*it says: .*wrong shape"):
        export_gguf(folder, tmp_path / "small.gguf", like)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.gguf", "out"]


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_runtime_reads_a_path_of_any_letters(make, tmp_path):
    folder, like = make()
    (tmp_path / "a folder").mkdir()
    file = export_gguf(folder, tmp_path / "a folder" / "grüße 模型.gguf", like)
    assert file.comparison.is_close


# A llama_cpp that fails, and what is told of it.
FAILING = {
    "an error of its own": (
        "import sys; print('load: error loading model: bad shape', file=sys.stderr); 1 / 0",
        r"small.gguf \(exit code 1\); it says: load: error loading model: bad shape",
    ),
    "a crash": (
        "import os, sys; print('GGML_ASSERT(a) failed', file=sys.stderr); os.abort()",
        r"small.gguf \(exit code -6\); it says: GGML_ASSERT\(a\) failed",
    ),
    "silence": ("import os; os._exit(3)", r"small.gguf \(exit code 3\); it says: nothing"),
    "other logits": (
        """
class Llama:
    def __init__(self, **_):
        import numpy
        self.scores = numpy.zeros((999, 5), dtype=numpy.float32)
    def n_vocab(self): return 5
    def reset(self): pass
    def eval(self, tokens): pass
""",
        r"logits of shape \(4, 64, 5\) from small.gguf, and the folder \(4, 64, 97\)",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_a_failing_program_says_is_quoted(make, tmp_path, monkeypatch, case):
    folder, like = make()
    code, message = FAILING[case]
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "llama_cpp.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(fake))
    monkeypatch.setattr(gguf_check, "runtime", lambda: "llama-cpp-python 0")
    with pytest.raises(ExportError, match=message):
        export_gguf(folder, tmp_path / "small.gguf", like)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.gguf", "fake", "out"]


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_runtime_tells_another_network(make, tiny_model, tiny_batches, tmp_path):
    folder, like = make()
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    other = tiny_model("llama", seed=1)
    other = files.compressed(other, tiny_batches(), tmp_path / "other", keep=0.5)
    with pytest.raises(ExportError, match="is not the network of the folder"):
        check_gguf(other, file.path)


@pytest.mark.parametrize("pad", [32, 256])
def test_widths_are_multiples_and_what_was_added_is_zero(make, tmp_path, pad):
    folder, like = make(keep={"mlp": [0.9, 0.4]})
    file = export_gguf(folder, tmp_path / "small.gguf", like, pad=pad)
    widths = [72, 32]
    assert file.widths == tuple(-(-width // pad) * pad for width in widths)
    assert file.channels_added == sum(file.widths) - sum(widths)
    found = files.tensors(file.path)
    for block, width in enumerate(widths):
        for name, axis in (("ffn_gate", 0), ("ffn_up", 0), ("ffn_down", 1)):
            weight = np.moveaxis(found[f"blk.{block}.{name}.weight"], axis, 0)
            assert len(weight) % pad == 0
            assert not weight[width:].any()


def test_widths_that_padding_makes_equal_are_even(make, tmp_path):
    folder, like = make(keep={"mlp": [0.7, 0.6]})  # 56 and 48 of 80
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    assert (file.architecture, file.widths) == ("llama", (64, 64))


def test_keys_and_tokenizer_are_the_dense_model_s(make, tmp_path):
    folder, like = make(keep=BLOCKS)
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    dense, small = files.keys(like), files.keys(file.path)
    for name in ("general.name", "tokenizer.chat_template", "tokenizer.ggml.tokens"):
        assert small[name] == dense[name]
    assert small["deci.rope.freq_base"] == dense["llama.rope.freq_base"]
    assert small["deci.feed_forward_length"] == [96, 32]
    assert small["deci.attention.head_count"] == [6, 4]
    assert small["deci.attention.head_count_kv"] == [3, 2]
    assert small["general.file_type"] == 0  # all float32
    assert not [name for name in small if name.startswith(("llama.", "quantize."))]


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_matrices_of_16_bit(make, tmp_path, dtype, kind):
    folder, like = make(keep=BLOCKS)
    file = export_gguf(folder, tmp_path / "small.gguf", like, dtype=dtype)
    for tensor in gguf.GGUFReader(file.path).tensors:
        assert tensor.tensor_type.name == (kind if len(tensor.shape) > 1 else "F32")
    model, _ = load_model(folder)
    down = model.model.layers[0].mlp.down_proj.weight.detach().to(getattr(torch, dtype))
    assert np.array_equal(files.tensors(file.path)["blk.0.ffn_down.weight"][:, :72], down.double())


def test_a_16_bit_folder_is_written_without_loss(tiny_folder, tmp_path, tiny_batches):
    like = files.dense_file(load_model(tiny_folder)[0], tmp_path / "dense.gguf")
    model, _ = load_model(tiny_folder, dtype=torch.bfloat16)
    folder = files.compressed(model, tiny_batches(), tmp_path / "out", keep=0.5)
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    down = load_model(folder)[0].model.layers[1].mlp.down_proj.weight
    assert down.dtype == torch.bfloat16
    stored = files.tensors(file.path)["blk.1.ffn_down.weight"]
    assert np.array_equal(stored[:, : down.shape[1]], down.detach().double().numpy())


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("keep", [{"mlp": 0.5}, BLOCKS], ids=["even", "uneven"])
def test_frequencies_of_the_dense_file_are_copied(make, tiny_batches, tmp_path, keep):
    folder, like = make(config={"rope_parameters": LLAMA3}, keep=keep)
    with pytest.raises(InputError, match="its rotary scaling is none, the folder's llama3"):
        export_gguf(folder, tmp_path / "small.gguf", like)
    file = export_gguf(folder, tmp_path / "small.gguf", with_frequencies(folder, like))
    tokens = tiny_batches()[0][0]
    own, found = expected(folder, tokens), files.logits(file.path, tokens)
    assert np.abs(own - found).max() <= 2e-6 * np.abs(own).max()


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("keep", [{"mlp": 0.5}, BLOCKS], ids=["even", "uneven"])
def test_runtime_agrees_on_frequencies_of_the_file(make, tmp_path, keep):
    folder, like = make(config={"rope_parameters": LLAMA3}, keep=keep)
    file = export_gguf(folder, tmp_path / "small.gguf", with_frequencies(folder, like))
    assert file.comparison.is_close


def with_frequencies(folder, like):
    """The dense model's file with the divisors of its angles, as the converter adds."""
    own = load_model(folder)[0].model.rotary_emb.inv_freq.double()
    factors = (10000.0 ** (-torch.arange(0, 8, 2) / 8) / own).float().numpy()
    assert factors.max() == pytest.approx(8)
    return files.copy_with_tensor(like, "rope_freqs.weight", factors)


def test_the_file_that_was_compressed_is_the_template(make, tmp_path):
    folder, like = make()
    report = folder / "report.json"
    origin = {"source": str(like), "files": {like.name: {"sha256": file_hash(like), "bytes": 0}}}
    edit(report, provenance={"model": origin})
    assert export_gguf(folder, tmp_path / "small.gguf").template == like
    like.write_bytes(like.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"which changed since; give .*--like"):
        export_gguf(folder, tmp_path / "other.gguf")
    like.unlink()
    with pytest.raises(InputError, match=r"which is not there from here; give .*--like"):
        export_gguf(folder, tmp_path / "other.gguf")


def test_without_a_template_the_message_says_how_to_get_one(make, tmp_path):
    folder, _ = make()
    with pytest.raises(InputError, match=r"--like.*convert_hf_to_gguf.py MODEL --outfile"):
        export_gguf(folder, tmp_path / "small.gguf")
    with pytest.raises(InputError, match=r"no such GGUF file.*convert_hf_to_gguf.py"):
        export_gguf(folder, tmp_path / "small.gguf", tmp_path / "nowhere.gguf")


def file_hash(path: Path) -> str:
    from grail.runtime.folder import file_hash

    return file_hash(path)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


OTHERS = {
    "architecture": ({"architecture": "qwen2"}, "architecture qwen2, and the model's is llama"),
    "hidden size": ({"embedding_length": 64}, "hidden size is 64, the folder's 48"),
    "blocks": ({"block_count": 3}, "number of blocks is 3, the folder's 2"),
    "head size": ({"key_length": 16}, "head size is 16, the folder's 8"),
    "epsilon": ({"layer_norm_rms_eps": 1e-4}, "epsilon of norms is"),
    "base": ({"rope_freq_base": 5e5}, "rotary base is 500000.0, the folder's 10000.0"),
    "scaling": (
        {"rope_scaling_type": gguf.RopeScalingType.YARN},
        "rotary scaling is yarn, the folder's none",
    ),
    "vocabulary": ({"token_list": ["<unk>", "<s>", "</s>", "w3"]}, "it has 4 tokens, and .* 97"),
    "tokenizer": (
        {"token_list": ["<unk>", "<s>", "</s>", *(f"v{i}" for i in range(3, 97))]},
        "its token 3 is 'v3', and that of the folder 'w3'",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_template_of_another_model_is_refused(make, tmp_path, case):
    changes, message = OTHERS[case]
    folder, like = make(**changes)
    with pytest.raises(InputError, match=message):
        export_gguf(folder, tmp_path / "small.gguf", like)
    assert not (tmp_path / "small.gguf").exists()


def test_a_template_of_another_model_of_the_same_sizes_is_refused(make, tiny_model, tmp_path):
    folder, _ = make()
    other = files.dense_file(tiny_model("llama", seed=5), tmp_path / "other.gguf")
    with pytest.raises(InputError, match="another model of the same sizes"):
        export_gguf(folder, tmp_path / "small.gguf", other)


def test_a_template_of_a_fine_tuned_model_is_taken(make, tiny_model, tmp_path):
    folder, _ = make()
    tuned = tiny_model("llama")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    like = files.dense_file(tuned, tmp_path / "tuned.gguf")
    assert export_gguf(folder, tmp_path / "small.gguf", like).path.is_file()


REFUSED = {
    "untied Qwen3": ("qwen3", {"tie_word_embeddings": False}, BLOCKS, {}, "no output matrix apart"),
    "biases of Qwen3": (
        "qwen3",
        {"tie_word_embeddings": True, "attention_bias": True},
        {"mlp": 0.5},
        {},
        "openelm reads no bias of attn_k; compress it without biases",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_that_llama_cpp_cannot_hold_is_refused(make, tmp_path, case):
    family, config, keep, settings, message = REFUSED[case]
    folder, like = make(family, config, keep, settings)
    with pytest.raises(ModelError, match=message):
        export_gguf(folder, tmp_path / "small.gguf", like)


@pytest.mark.parametrize("uneven", [False, True])
def test_another_family_is_refused(tiny_model, make, tiny_batches, tmp_path, uneven):
    _, like = make()
    model = tiny_model("gemma2")
    keep = {"mlp": [0.9, 0.4] if uneven else 0.5}
    folder = files.compressed(model, tiny_batches(), tmp_path / "gemma", keep=keep)
    with pytest.raises(ModelError, match="models of type gemma2, only for llama, mistral"):
        export_gguf(folder, tmp_path / "small.gguf", like)


def test_a_target_that_exists_is_refused(make, tmp_path):
    folder, like = make()
    target = tmp_path / "small.gguf"
    target.write_text("mine")
    with pytest.raises(InputError, match=r"small.gguf exists already; name a new file"):
        export_gguf(folder, target, like)
    assert target.read_text() == "mine"
    with pytest.raises(InputError, match="nowhere is no folder"):
        export_gguf(folder, tmp_path / "nowhere" / "small.gguf", like)


def test_a_target_made_meanwhile_stays(make, tmp_path, monkeypatch):
    folder, like = make()
    target = tmp_path / "small.gguf"
    monkeypatch.setattr(gguf_writing, "compare", lambda *_: target.write_text("mine") and None)
    with pytest.raises(InputError, match="exists already"):
        export_gguf(folder, target, like)
    assert target.read_text() == "mine"


def test_a_file_that_differs_from_the_folder_is_not_kept(make, tmp_path, monkeypatch):
    folder, like = make(keep=BLOCKS)
    write = gguf_writing._write

    def damaging(path, *arguments):
        write(path, *arguments)
        (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_k.weight")
        with open(path, "r+b") as file:
            file.seek(tensor.data_offset + 5)
            byte = file.read(1)
            file.seek(tensor.data_offset + 5)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(gguf_writing, "_write", damaging)
    with pytest.raises(ExportError, match=r"the values of model.layers.1.self_attn.k_proj.weight"):
        export_gguf(folder, tmp_path / "small.gguf", like)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.gguf", "out"]


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_padding_that_is_not_zero_is_not_kept(make, tmp_path, monkeypatch, value):
    folder, like = make(keep=BLOCKS)
    pad = torch.nn.functional.pad
    monkeypatch.setattr(
        "grail.serving.gguf_layout.pad", lambda tensor, sizes: pad(tensor, sizes, value=value)
    )
    with pytest.raises(ExportError, match="channels that were added are not zero"):
        export_gguf(folder, tmp_path / "small.gguf", like)


def test_a_weight_beyond_float16_is_refused(make, tmp_path):
    folder, like = make()
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    folder = grail.export(model, tokenizer, tmp_path / "large")
    with pytest.raises(ExportError, match="beyond the range of float16"):
        export_gguf(folder, tmp_path / "small.gguf", like, dtype="float16")
    assert export_gguf(folder, tmp_path / "small.gguf", like).path.is_file()


def test_too_little_disk_is_said_before_writing(make, tmp_path, monkeypatch):
    folder, like = make()
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 10}))
    assert usage
    with pytest.raises(ExportError, match=r"needs 32 MiB and the disk has 0 MiB free"):
        export_gguf(folder, tmp_path / "small.gguf", like)


def test_an_edited_folder_is_refused(make, tmp_path):
    folder, like = make()
    report = json.loads((folder / "report.json").read_text())
    report["model"]["parameters"]["after"] += 1
    edit(folder / "report.json", model=report["model"])
    with pytest.raises(InputError, match="was edited: its report gives"):
        export_gguf(folder, tmp_path / "small.gguf", like)


@pytest.mark.parametrize("keep", [{"mlp": 0.5}, BLOCKS], ids=["even", "uneven"])
def test_a_folder_of_other_weights_is_refused(make, tmp_path, keep):
    folder, like = make(keep=keep)
    report = json.loads((folder / "report.json").read_text())
    (name,) = report["files"]
    assert report["files"][name]["sha256"] == file_hash(folder / name)
    weights = (folder / name).rename(tmp_path / "weights")
    with pytest.raises(InputError, match=r"was edited: model.safetensors is not there, which"):
        export_gguf(folder, tmp_path / "small.gguf", like)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=r"was edited: model.safetensors is another file than"):
        export_gguf(folder, tmp_path / "small.gguf", like)
    shutil.copy(weights, folder / name)
    edit(folder / "report.json", files={})  # as earlier versions wrote it
    assert export_gguf(folder, tmp_path / "small.gguf", like).path.is_file()


def test_the_disk_needs_room_for_the_bytes_of_the_dtype(make, tmp_path, monkeypatch):
    folder, like = make(keep=BLOCKS)
    asked, complete = [], gguf_writing.complete_file
    monkeypatch.setattr(
        gguf_writing,
        "complete_file",
        lambda *args, size: asked.append(size) or complete(*args, size=size),
    )
    for dtype in ("float32", "float16"):
        file = export_gguf(folder, tmp_path / f"{dtype}.gguf", like, dtype=dtype)
        written = gguf.GGUFReader(file.path).tensors
        assert asked.pop() == sum(int(tensor.n_bytes) for tensor in written)


def test_a_check_without_llama_cpp_says_so(make, tmp_path):
    folder, like = make()
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    assert file.comparison is None
    assert check_gguf(folder, file.path) is None
    assert compare(load_model(folder)[0], file.path, "float32") is None


def test_a_check_of_another_vocabulary_is_refused(make, tmp_path):
    folder, _ = make()
    other = make_other(tmp_path)
    with pytest.raises(InputError, match=r"has 4 tokens, and the model of .* 97"):
        check_gguf(folder, other)


def make_other(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_token_list(["a", "b", "c", "d"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "other.gguf"


def test_how_close_is_close():
    def comparison(dtype="float32", difference=1e-4, agreement=1.0):
        return Comparison("a runtime", dtype, 100, difference, 2.0, agreement)

    assert comparison().is_close
    assert not comparison(difference=3e-4).is_close
    assert not comparison(difference=float("inf")).is_close
    assert not comparison(agreement=0.99).is_close
    assert comparison("float16", 1e-2).is_close
    assert comparison("quantised", 1.0, 0.2).is_close
    assert "not judged" in str(comparison("quantised", 1.0, 0.2))
    assert "5.0e-05 of the largest logit" in str(comparison())


def test_a_folder_that_is_none_is_refused(make, tmp_path):
    _, like = make()
    with pytest.raises(InputError, match="no such folder"):
        export_gguf(tmp_path / "nowhere", tmp_path / "small.gguf", like)
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(InputError, match=r"text.gguf is not a GGUF file"):
        export_gguf(tmp_path / "out", tmp_path / "small.gguf", tmp_path / "text.gguf")
