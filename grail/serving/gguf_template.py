"""The dense model's GGUF file: the template of the file of its compressed model.

Keys, tokenizer and chat template are copied from it, so it has to be of the same model.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grail.errors import InputError, one_line
from grail.runtime.folder import file_hash
from grail.serving.gguf_layout import Shape, family_of

# Of another model, the norms' weights differ by more than this share of their length.
_SAME_NORMS = 0.05
# Keys of a file that say how its own tensors are stored.
_OWN = ("general.alignment", "general.file_type", "general.quantization_version")
_OWN_PREFIXES = ("GGUF.", "split.", "quantize.")
_SIZES = (
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
)
_NORMAL = 1  # type of a token that is neither special nor added


class Template:
    """A GGUF file that is open for reading.

    Args:
        path: the file.

    Raises:
        InputError: no such file, or one that is not GGUF.
    """

    def __init__(self, path: Path):
        import gguf

        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such GGUF file; {HOW_TO_GET_ONE}")
        try:
            self.reader = gguf.GGUFReader(path)
            self.architecture = str(self.value("general.architecture"))
        except InputError:
            raise
        except Exception as error:  # of no common type
            raise InputError(f"{path} is not a GGUF file: {one_line(error)}") from error

    def value(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key; raises InputError if there is none and no default."""
        field = self.reader.get_field(key)
        if field is None and default is None:
            raise InputError(f"{self.path} has no {key}; give a complete GGUF file")
        return default if field is None else field.contents()

    def own(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key of the architecture."""
        return self.value(f"{self.architecture}.{key}", default)

    def copied(self, architecture: str) -> Iterator[tuple[str, Any, Any, Any]]:
        """Yields name, value, type and type of elements of the keys that another file repeats."""
        sizes = {f"{self.architecture}.{name}" for name in _SIZES}
        for name, field in self.reader.fields.items():
            if name.startswith(_OWN_PREFIXES) or name in {*_OWN, *sizes, "general.architecture"}:
                continue
            value, (kind, *of) = field.contents(), field.types
            if of and len(value) == 0:  # the writer refuses empty arrays
                continue
            if name.startswith(f"{self.architecture}."):
                name = f"{architecture}.{name.partition('.')[2]}"
            yield name, value, kind, of[-1] if of else None

    def tensor(self, name: str) -> np.ndarray | None:
        """Returns the values of a tensor, None if there is no such tensor."""
        import gguf

        for tensor in self.reader.tensors:
            if tensor.name == name:
                found = gguf.dequantize(tensor.data, tensor.tensor_type)
                return np.array(found, dtype=np.float32)
        return None


HOW_TO_GET_ONE = (
    "llama.cpp makes one of the dense model: python convert_hf_to_gguf.py MODEL --outfile "
    "dense.gguf"
)


def find_template(folder: Path) -> Path:
    """Returns the GGUF file that a folder's report names as the model that was compressed.

    Raises:
        InputError: there is none, or it changed since.
    """
    source, known = _origin(folder)
    if source is None:
        raise InputError(
            "the GGUF file of the dense model is needed, for its tokenizer and its keys: give it "
            f"as like (--like); {HOW_TO_GET_ONE}"
        )
    if not source.is_file():
        raise InputError(
            f"{folder} was made from {source}, which is not there from here; give the file as like "
            "(--like)"
        )
    if known != file_hash(source):
        raise InputError(
            f"{folder} was made from {source}, which changed since; give the file of the dense "
            "model as like (--like)"
        )
    return source


def _origin(folder: Path) -> tuple[Path | None, str]:
    """Returns the GGUF file that a report names, and its hash; None if it names none."""
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        model = report["provenance"]["model"]
        source = Path(model["source"])
        if source.suffix == ".gguf":
            return source, model["files"][source.name]["sha256"]
    return None, ""


def require_same_model(template: Template, model: Any, tokenizer: Any, shape: Shape) -> None:
    """Raises InputError unless a template is of the model that was compressed.

    Compares architecture, sizes, rotary settings, vocabulary and the weights of norms, which
    compression leaves as they are.
    """
    family, path = family_of(model.config), template.path
    if template.architecture != family.even:
        raise InputError(
            f"{path} is of the architecture {template.architecture}, and the model's is "
            f"{family.even}; give the GGUF file of the dense model"
        )
    for name, stored, own in _settings(template, model.config, shape):
        same = math.isclose(stored, own, rel_tol=1e-5) if isinstance(own, float) else stored == own
        if not same:
            raise InputError(
                f"{path} is of another model: its {name} is {stored}, the folder's {own}; give the "
                "GGUF file of the dense model"
            )
    _require_same_tokens(template, model, tokenizer)
    _require_same_norms(template, model)


def _settings(template: Template, config: Any, shape: Shape) -> Iterator[tuple[str, Any, Any]]:
    """Yields name, value in the template and value in the folder of settings that must agree."""
    hidden = template.own("embedding_length")
    heads = template.own("attention.head_count")
    yield "number of blocks", template.own("block_count"), config.num_hidden_layers
    yield "hidden size", hidden, config.hidden_size
    yield "head size", template.own("attention.key_length", hidden // heads), shape.head_dim
    yield (
        "epsilon of norms",
        template.own("attention.layer_norm_rms_epsilon"),
        float(config.rms_norm_eps),
    )
    rotary = getattr(config, "rope_parameters", None) or {}
    theta = rotary.get("rope_theta", getattr(config, "rope_theta", 10000.0))
    yield "rotary base", template.own("rope.freq_base", 10000.0), float(theta)
    scaling = template.own("rope.scaling.type", "none")
    if template.tensor("rope_freqs.weight") is not None:
        scaling = "llama3"
    own = rotary.get("rope_type", "default")
    yield "rotary scaling", scaling, "none" if own == "default" else own


def _require_same_tokens(template: Template, model: Any, tokenizer: Any) -> None:
    tokens = template.value("tokenizer.ggml.tokens")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokens) != rows:
        raise InputError(
            f"{template.path} is of another vocabulary: it has {len(tokens)} tokens, and the model "
            f"{rows}; give the GGUF file of the dense model"
        )
    kinds = template.value("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    own = {index: word for word, index in tokenizer.get_vocab().items()}
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        # Converters write special and added tokens in ways of their own.
        if kind == _NORMAL and index in own and _plain(token) != _plain(own[index]):
            raise InputError(
                f"{template.path} is of another tokenizer: its token {index} is {token!r}, and "
                f"that of the folder {own[index]!r}; give the GGUF file of the dense model"
            )


def _plain(token: str) -> str:
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


def _require_same_norms(template: Template, model: Any) -> None:
    names = {"output_norm.weight": model.model.norm}
    for index, block in enumerate(model.model.layers):
        names[f"blk.{index}.attn_norm.weight"] = block.input_layernorm
        names[f"blk.{index}.ffn_norm.weight"] = block.post_attention_layernorm
    for name, norm in names.items():
        stored = template.tensor(name)
        if stored is None:  # a file of the vocabulary alone
            continue
        own = norm.weight.detach().double().cpu()
        apart = torch.linalg.vector_norm(torch.from_numpy(stored).double() - own)
        if not apart <= _SAME_NORMS * torch.linalg.vector_norm(own):
            raise InputError(
                f"{template.path} is of another model of the same sizes: {name} differs; give the "
                "GGUF file of the dense model"
            )
