"""Quantised files: the codes of a folder, or of an export that quantises it, bit by bit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import grail
from bench.tools import tiny
from grail.errors import ExportError, InputError
from grail.files.grids import FILE, grids_of
from grail.files.load import load_model
from grail.report.report import Report
from grail.serving import gguf_check
from grail.serving.gguf_writing import export_gguf

gguf = pytest.importorskip("gguf")
files = pytest.importorskip("tests.serving.gguf_files")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "head_dim": 8}
EVEN, UNEVEN = {"mlp": 0.5}, {"mlp": [0.75, 0.25]}
CASES = {
    "llama": ("llama", EVEN, {}, "llama"),
    "llama, uneven": ("llama", UNEVEN, {}, "deci"),
    "llama, heads": ("llama", {"mlp": 0.5, "heads": 0.5}, {}, "llama"),
    "qwen2, uneven": ("qwen2", UNEVEN, {}, "deci"),
    "qwen3, uneven": ("qwen3", UNEVEN, {"tie_word_embeddings": True}, "openelm"),
}


@pytest.fixture(autouse=True)
def without_runtime(monkeypatch, request):
    """Lets no test start llama.cpp that does not say so."""
    if "runtime" not in request.node.name:
        monkeypatch.setattr(gguf_check, "runtime", lambda: None)


@pytest.fixture
def make(tiny_model, tiny_batches, tmp_path):
    """Writes a folder of a compressed model; returns it and the dense model's file."""

    def made(family="llama", keep=EVEN, config=None, dtype=torch.float32, **settings):
        model = tiny_model(family, **{**SIZES, **(config or {})})
        like = files.dense_file(model, tmp_path / "dense.gguf")
        if dtype != torch.float32:  # a cast would round the rotary frequencies, too
            model.save_pretrained(tmp_path / "dense")
            model = type(model).from_pretrained(tmp_path / "dense", dtype=dtype)
        asked = {"keep": keep, "sites": tuple(keep), "multiple": 32, **settings}
        folder = files.compressed(model, tiny_batches(), tmp_path / "out", **asked)
        return folder, like

    return made


def kinds(path):
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def expected(folder, tokens):
    model, _ = load_model(folder)
    with torch.inference_mode():
        return model.double()(tokens[None]).logits[0].numpy()


@pytest.mark.parametrize("pad", [32, 256])
@pytest.mark.parametrize("name", CASES)
def test_a_quantised_folder_is_written_with_its_codes(name, pad, make, tmp_path):
    family, keep, config, architecture = CASES[name]
    folder, like = make(family, keep, config, quantize="q4_1")
    file = export_gguf(folder, tmp_path / "small.gguf", like, pad=pad)
    if pad == 256:  # all blocks have one width then
        architecture = files.ARCHITECTURES[family]
    assert (file.architecture, file.dtype) == (architecture, "q4_1")
    assert file.rounding.format == "q4_1"
    stored = kinds(file.path)
    assert {stored.pop("token_embd.weight"), stored.pop("output.weight", "Q8_0")} == {"Q8_0"}
    matrices = {
        kind for tensor, kind in stored.items() if "norm" not in tensor and "bias" not in tensor
    }
    assert matrices == {"Q4_1"}
    assert {kind for tensor, kind in stored.items() if "norm" in tensor or "bias" in tensor} == {
        "F32"
    }
    keys = files.keys(file.path)
    assert (keys["general.file_type"], keys["general.quantization_version"]) == (3, 2)
    tokens = torch.arange(3, 40)
    own, other = expected(folder, tokens), files.logits(file.path, tokens)
    assert np.abs(own - other).max() < 1e-4 * np.abs(own).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["q4_1", "q8_0"])
def test_the_folder_has_grids_and_plain_weights(form, dtype, make, tmp_path):
    folder, like = make(quantize=form, dtype=dtype)
    assert len(load_file(folder / FILE)) == 2 + 14
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    assert set(kinds(file.path).values()) == {"F32", "Q8_0"} | {form.upper()}
    model, _ = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {dtype}
    stored = torch.from_numpy(files.tensors(file.path)["blk.1.ffn_down.weight"])
    assert torch.equal(stored.to(dtype), model.model.layers[1].mlp.down_proj.weight)
    report = Report.from_json((folder / "report.json").read_text())
    assert len(report.quantized) == 16


def test_an_export_quantises_a_folder_that_is_not(make, tiny_batches, tmp_path):
    folder, like = make()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + n * n % 90}" for n in range(600)))
    calibration = grail.Text(str(text), tokens=128, sequence_length=32)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    file = export_gguf(
        folder,
        tmp_path / "small.gguf",
        like,
        quantize="q4_1",
        calibration=calibration,
        evaluate=grail.Text(str(text), tokens=256, sequence_length=32),
        progress=False,
    )
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    model, tokenizer = load_model(folder)
    grail.quantize(model, calibration.batches(model, tokenizer), "q4_1", progress=False)
    stored = files.tensors(file.path)
    for name, key in {"ffn_down": "mlp.down_proj", "attn_output": "self_attn.o_proj"}.items():
        weight = model.get_submodule(f"model.layers.1.{key}").weight
        assert np.array_equal(stored[f"blk.1.{name}.weight"], weight.detach().numpy())
    own, nearest = file.rounding.errors
    assert 0 < own < nearest
    assert file.rounding.perplexity.keys() == {"before", "nearest", "gptq"}
    assert len({*file.rounding.perplexity.values()}) == 3
    assert file.rounding.calibration["tokens"] == 128
    kept = grids_of(model)
    assert len(kept) == 16


def test_a_folder_that_was_edited_is_refused(make, tmp_path):
    folder, like = make(quantize="q8_0")
    report = folder / "report.json"
    text = report.read_text()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report.unlink()  # which has the hash of the weights
    with pytest.raises(
        InputError, match=r"was edited: model\.layers\.1\.mlp\.up_proj\.weight: 1 of"
    ):
        export_gguf(folder, tmp_path / "small.gguf", like)
    shutil.rmtree((folder / FILE).parent)
    assert export_gguf(folder, tmp_path / "plain.gguf", like).dtype == "float32"
    report.write_text(text)
    with pytest.raises(InputError, match="edited"):
        export_gguf(folder, tmp_path / "small.gguf", like)


def test_a_damaged_grid_is_refused(make, tmp_path):
    folder, like = make(quantize="q8_0")
    (folder / FILE).write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"grid\.safetensors is damaged"):
        export_gguf(folder, tmp_path / "small.gguf", like)


def test_weights_that_changed_after_quantising_are_not_exported(tiny_llama, tiny_batches, tmp_path):
    model = tiny_llama(**SIZES)
    grail.quantize(model, tiny_batches(), "q8_0", progress=False)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(ExportError, match="they changed after the model was quantised"):
        grail.export(model, tiny.tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(make, tmp_path):
    quantised, like = make(quantize="q4_1")
    target, text = tmp_path / "small.gguf", tmp_path / "text.txt"
    text.write_text("w3 w4 w5 " * 200)
    with pytest.raises(InputError, match="is quantised as q4_1, and q8_0 was asked for"):
        export_gguf(quantised, target, like, quantize="q8_0", calibration=text)
    with pytest.raises(InputError, match=r"calibration are for an export .*out is quantised"):
        export_gguf(quantised, target, like, quantize="q4_1", calibration=text)
    with pytest.raises(InputError, match=r"calibration and evaluate are for .* give quantize"):
        export_gguf(quantised, target, like, calibration=text, evaluate=text)
    shutil.rmtree(quantised)
    plain, like = make(multiple=8, keep={"mlp": [0.5, 0.3]})
    with pytest.raises(InputError, match="names no calibration text"):
        export_gguf(plain, target, like, quantize="q4_1")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj reads 40 channels, and GGUF"):
        export_gguf(
            plain,
            target,
            like,
            quantize="q4_1",
            calibration=grail.Text(str(text), tokens=64, sequence_length=32),
            progress=False,
        )
    with pytest.raises(InputError, match="quantize must be one of q4_1, q8_0"):
        export_gguf(plain, target, like, quantize="q4_k_m")
    assert not target.exists()


@pytest.mark.parametrize("keep", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("form", ["q4_1", "q8_0"])
def test_the_runtime_loads_what_is_written(form, keep, make, tmp_path):
    pytest.importorskip("llama_cpp")
    folder, like = make(keep=keep, quantize=form)
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    assert file.comparison is not None
    assert file.comparison.share < 0.05  # llama.cpp rounds activations to 8 bits as well
