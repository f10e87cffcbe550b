"""GGUF files of tiny dense models, and what llama.cpp's graphs compute of a file, in fp64.

The graphs are written down from the architectures' definitions and read nothing but the file, so
that they share no code with what writes it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import grail
from bench.tools import tiny

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
INTERLEAVED = ("llama", "deci")
NORMS = {
    "output_norm.weight": "model.norm.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
}


def dense_file(model: Any, path: Path, **changes: Any) -> Path:
    """Writes what a template needs: keys, tokenizer, and the norms of a dense model.

    `changes` are values of keys, of those without an architecture's name: `rope_freq_base=1e5`.
    """
    config = model.config
    heads, vocabulary = config.num_attention_heads, tiny.tokenizer().get_vocab()
    writer = gguf.GGUFWriter(path, changes.pop("architecture", ARCHITECTURES[config.model_type]))
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": float(config.rope_parameters["rope_theta"]),
        "token_list": sorted(vocabulary, key=vocabulary.__getitem__),
        **changes,
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    count = len(values["token_list"])
    writer.add_name("tiny")
    writer.add_tokenizer_model("llama")
    writer.add_token_scores([-float(index) for index in range(count)])
    writer.add_token_types([2, 3, 3] + [1] * (count - 3))
    writer.add_chat_template("{{ messages }}")
    writer.add_string("quantize.imatrix.file", "of another file")
    writer.add_file_type(7)
    state = model.state_dict()
    for stored, name in NORMS.items():
        for block in range(config.num_hidden_layers if "{}" in stored else 1):
            writer.add_tensor(stored.format(block), state[name.format(block)].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def copy_with_tensor(path: Path, name: str, values: np.ndarray) -> Path:
    """Writes a file again, with one tensor more."""
    reader, copy = gguf.GGUFReader(path), path.with_name(f"more-{path.name}")
    writer = gguf.GGUFWriter(copy, reader.get_field("general.architecture").contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind, *of = field.types
            writer.add_key_value(key, field.contents(), kind, sub_type=of[-1] if of else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def compressed(model: Any, batches: Any, folder: Path, **settings: Any) -> Path:
    """Compresses a model and exports it as a folder."""
    settings = {"multiple": 1, "progress": False, **settings}
    report = grail.compress(model, batches, **settings)
    uneven = bool(report.model["beyond_configuration"])
    return grail.export(model, tiny.tokenizer(), folder, report, uneven=uneven)


def keys(path: Path) -> dict[str, Any]:
    """Returns the values of a file's keys."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file in fp64."""
    return {
        tensor.name: np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float64)
        for tensor in gguf.GGUFReader(path).tensors
    }


def logits(path: Path, tokens: torch.Tensor) -> np.ndarray:
    """Returns the logits [tokens, vocabulary] of one sequence [tokens], in fp64."""
    values, t = keys(path), tensors(path)
    kind = values["general.architecture"]

    def of(name: str, block: int = 0) -> Any:
        value = values[f"{kind}.{name}"]
        return value[block] if isinstance(value, list) else value

    size, epsilon = of("attention.key_length"), of("attention.layer_norm_rms_epsilon")
    frequencies = of("rope.freq_base") ** (-np.arange(0, size, 2) / size)
    frequencies = frequencies / t.get("rope_freqs.weight", 1)
    rotate = rotary(np.arange(len(tokens))[:, None] * frequencies, kind in INTERLEAVED)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
        return x / scale * t[f"{name}.weight"]

    x = t["token_embd.weight"][tokens.numpy()]
    for block in range(of("block_count")):
        at = f"blk.{block}"
        heads, groups = of("attention.head_count", block), of("attention.head_count_kv", block)
        assert t[f"{at}.ffn_gate.weight"].shape[0] == of("feed_forward_length", block)
        read = norm(x, f"{at}.attn_norm")
        if f"{at}.attn_qkv.weight" in t:
            sizes = np.cumsum([heads * size, groups * size])
            q, k, v = np.split(linear(read, f"{at}.attn_qkv"), sizes, axis=1)
        else:
            q, k, v = (linear(read, f"{at}.attn_{part}") for part in "qkv")
        q, k, v = (part.reshape(len(tokens), -1, size) for part in (q, k, v))
        assert q.shape[1] == heads
        if f"{at}.attn_q_norm.weight" in t:
            q, k = norm(q, f"{at}.attn_q_norm"), norm(k, f"{at}.attn_k_norm")
        attended = attention(rotate(q), rotate(k), v)
        x = x + linear(attended, f"{at}.attn_output")
        read = norm(x, f"{at}.ffn_norm")
        gate, up = linear(read, f"{at}.ffn_gate"), linear(read, f"{at}.ffn_up")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{at}.ffn_down")
    output = t.get("output.weight", t["token_embd.weight"])
    return norm(x, "output_norm") @ output.T


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns causal attention [tokens, heads · size]."""
    k, v = (part.repeat(q.shape[1] // part.shape[1], axis=1) for part in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[2])
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1)


def rotary(angles: np.ndarray, interleaved: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the rotation of [tokens, heads, size], of neighbouring channels or of halves."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotate(x: np.ndarray) -> np.ndarray:
        shape = (*x.shape[:2], -1, 2) if interleaved else (*x.shape[:2], 2, -1)
        axis = 3 if interleaved else 2
        a, b = np.moveaxis(x.reshape(shape), axis, 0)
        return np.stack([a * cos - b * sin, a * sin + b * cos], axis).reshape(x.shape)

    return rotate


def require_agreement(file, record_property):
    """Records what llama.cpp made of a file in float32, and asserts that it is the folder."""
    record_property("architecture", file.architecture)
    record_property("difference", f"{file.comparison.share:.1e}")
    record_property("agreement", file.comparison.agreement)
    record_property("runtime", file.comparison.runtime)
    assert file.comparison.share <= 1e-4
    assert file.comparison.agreement >= 0.999
