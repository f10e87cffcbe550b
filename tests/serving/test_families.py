"""Every family in every form: the architecture of its file or why there is none, and in llama.cpp.

Files are quantised by llama.cpp's library, so that padding shows: no matrix falls back to a larger
format. Runs of llama.cpp need llama-cpp-python and are skipped without it.
"""

from __future__ import annotations

import ctypes
import importlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import grail
from grail.errors import GrailError
from grail.files.load import load_model
from grail.serving import gguf_check
from grail.serving.gguf_writing import check_gguf, export_gguf

gguf = pytest.importorskip("gguf")
files = pytest.importorskip("tests.serving.gguf_files")

needs_runtime = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
# Sizes that are multiples of 32, so that each matrix can be stored in blocks of 32.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# What is compressed: widths in blocks of one size or not, whole groups of heads, fitted biases.
FORMS = {
    "even": {"keep": {"mlp": 0.5}},
    "heads": {"keep": {"mlp": 0.5, "heads": 0.5}},
    "even, biases": {"keep": {"mlp": 0.5}, "fit_bias": True},
    "uneven": {"keep": {"mlp": [0.9, 0.4]}},
    "uneven, heads": {"keep": {"mlp": [0.9, 0.4], "heads": 0.5}},
    "uneven heads": {"keep": {"mlp": 0.5, "heads": [1.0, 0.5]}},
    "uneven, biases": {"keep": {"mlp": [0.9, 0.4], "heads": [1.0, 0.5]}, "fit_bias": True},
}
ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
}
APART = "openelm, which would take that, has no output matrix apart from the embedding"
LLAMA = dict.fromkeys(("even", "heads", "even, biases"), "llama")
LLAMA |= dict.fromkeys((form for form in FORMS if form not in LLAMA), "deci")
QWEN2 = {form: "qwen2" if form.startswith("even") else "deci" for form in FORMS}
QWEN3 = {"even": "qwen3", "heads": "qwen3", "even, biases": "qwen3"}
QWEN3 |= dict.fromkeys((form for form in FORMS if form not in QWEN3), "openelm")
# By family and form the architecture.
EXPECTED = {
    **dict.fromkeys(("llama", "llama, tied", "mistral"), LLAMA),
    **dict.fromkeys(("qwen2", "qwen2, tied"), QWEN2),
    "qwen3, tied": QWEN3,
    "qwen3": QWEN3 | dict.fromkeys((form for form in FORMS if "uneven" in form), APART),
}
CASES = [(family, form) for family in FAMILIES for form in FORMS]
# Largest difference as a share of the largest logit: llama.cpp rounds inputs to 8 bits as well.
TOLERANCES = {"Q8_0": 0.1, "Q4_1": 0.6, "Q4_0": 0.6}
# A third of them without llama.cpp, each form and each family at least once.
SOME = CASES[::3]


@pytest.fixture
def make(tiny_model, tiny_batches, tmp_path):
    """Writes a compressed folder and the dense model's file; returns both paths."""

    def made(family, form, **sizes):
        kind, config = FAMILIES.get(family, (family, {}))
        model = tiny_model(kind, **SIZES | config | sizes)
        like = None
        if kind in files.ARCHITECTURES:
            like = files.dense_file(model, tmp_path / "dense.gguf")
        settings = FORMS[form]
        settings = {**settings, "sites": tuple(settings["keep"])}
        return files.compressed(model, tiny_batches(), tmp_path / "out", **settings), like

    return made


def check_case(make, tmp_path, family, form):
    """Writes a file and returns folder and file; Nones where there is none, for the right reason.

    Attention of Mistral, Qwen2 and Qwen3 has no output biases in transformers, nor have their MLPs,
    so that fitted biases are refused before there is a folder.
    """
    expected = EXPECTED[family][form]
    if form.endswith("biases") and family.startswith(("mistral", "qwen")):
        with pytest.raises(GrailError, match="bias"):
            make(family, form)
        return None, None
    folder, like = make(family, form)
    if " " in expected:
        with pytest.raises(GrailError, match=expected):
            export_gguf(folder, tmp_path / "small.gguf", like)
        assert not (tmp_path / "small.gguf").exists()
        return None, None
    file = export_gguf(folder, tmp_path / "small.gguf", like)
    assert file.architecture == expected
    return folder, file


@pytest.mark.parametrize(("family", "form"), SOME)
def test_the_file_is_what_the_folder_computes(
    make, tiny_batches, tmp_path, monkeypatch, family, form
):
    monkeypatch.setattr(gguf_check, "runtime", lambda: None)
    folder, file = check_case(make, tmp_path, family, form)
    if file is None:
        return
    tokens = tiny_batches()[0][0]
    with torch.inference_mode():
        own = load_model(folder)[0].double()(tokens[None]).logits[0].numpy()
    found = files.logits(file.path, tokens)
    assert np.abs(own - found).max() <= 2e-6 * np.abs(own).max()


@needs_runtime
@pytest.mark.parametrize(("family", "form"), CASES)
def test_llama_cpp_agrees_in_every_format(
    make, tiny_batches, tmp_path, family, form, record_property
):
    folder, file = check_case(make, tmp_path, family, form)
    if file is None:
        return
    files.require_agreement(file, record_property)
    for kind, most in TOLERANCES.items() if form == "uneven, heads" else [("Q8_0", 0.1)]:
        small = quantised(file.path, kind)
        stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(small).tensors}
        odd = {name: of for name, of in stored.items() if is_matrix_of_block(name) and of != kind}
        assert not odd, odd
        assert check_gguf(folder, small).share <= most


@needs_runtime
def test_llama_cpp_stores_k_quants_without_falling_back(make, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 32}
    folder, like = make("llama", "uneven", **sizes)
    file = export_gguf(folder, tmp_path / "small.gguf", like, pad=256)
    assert file.widths == (768, 256)
    small = quantised(file.path, "Q4_K_M")
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(small).tensors}
    assert {of for name, of in stored.items() if is_matrix_of_block(name)} <= {"Q4_K", "Q6_K"}
    assert check_gguf(folder, small).share <= 0.6


def is_matrix_of_block(name):
    return name.startswith("blk.") and name.endswith(".weight") and "norm" not in name


def quantised(path, kind):
    """Quantises a file by llama.cpp's library."""
    llama_cpp = importlib.import_module("llama_cpp")
    target = path.with_name(f"{kind}.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    name = "LLAMA_FTYPE_MOSTLY_" + kind
    settings.ftype, settings.nthread = getattr(llama_cpp, name), 1
    code = llama_cpp.llama_model_quantize(
        str(path).encode(), str(target).encode(), ctypes.byref(settings)
    )
    assert code == 0
    return target


def test_llama_3_s_rotary_scaling(make, tmp_path, monkeypatch):
    """Its frequencies are a tensor of the template, which is copied."""
    monkeypatch.setattr(gguf_check, "runtime", lambda: None)
    folder, like = make("llama", "uneven", rope_parameters=ROTARY)
    with pytest.raises(GrailError, match="rotary scaling is none, the folder's llama3"):
        export_gguf(folder, tmp_path / "small.gguf", like)
    factors = files.copy_with_tensor(like, "rope_freqs.weight", llama3_factors())
    file = export_gguf(folder, tmp_path / "small.gguf", factors)
    tokens = torch.arange(3, 67)
    with torch.inference_mode():
        own = load_model(folder)[0].double()(tokens[None]).logits[0].numpy()
    assert np.abs(own - files.logits(file.path, tokens)).max() <= 2e-6 * np.abs(own).max()


@needs_runtime
def test_llama_cpp_scales_as_llama_3_does(make, tmp_path):
    folder, like = make("llama", "uneven", rope_parameters=ROTARY)
    factors = files.copy_with_tensor(like, "rope_freqs.weight", llama3_factors())
    assert export_gguf(folder, tmp_path / "small.gguf", factors).comparison.share <= 1e-4


def llama3_factors(size=8):
    """Returns the divisors of frequencies [size / 2] that the converter writes (Llama 3.1)."""
    low, high = ROTARY["low_freq_factor"], ROTARY["high_freq_factor"]
    length, factor = ROTARY["original_max_position_embeddings"], ROTARY["factor"]
    found = []
    for frequency in ROTARY["rope_theta"] ** (-np.arange(0, size, 2) / size):
        wavelength = 2 * np.pi / frequency
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


OTHERS = ("gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3", "starcoder2")


@pytest.mark.parametrize("form", ["even", "uneven"])
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_refused_with_the_reason(make, tmp_path, family, form):
    folder, _ = make(family, form)
    message = f"no GGUF is written for models of type {family}, only for llama, mistral, qwen2"
    like = files.dense_file(llama(make, tmp_path), tmp_path / "like.gguf")
    with pytest.raises(GrailError, match=message):
        export_gguf(folder, tmp_path / "small.gguf", like)
    assert not (tmp_path / "small.gguf").exists()


def llama(make, tmp_path):
    """A model of another family, whose file no refusal may depend on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=128, **SIZES)
    return LlamaForCausalLM(config)


def test_the_reason_is_given_in_one_sentence(make, tmp_path):
    folder, like = make("qwen3", "uneven")
    with pytest.raises(grail.GrailError) as refusal:
        export_gguf(folder, tmp_path / "small.gguf", like)
    assert str(refusal.value) == (
        "llama.cpp has no architecture for this qwen3 model: its blocks have different widths or "
        "numbers of heads, and openelm, which would take that, has no output matrix apart from "
        "the embedding; compress it to one width for all blocks (without --uneven)"
    )
