"""The tensors of a language model as stock llama.cpp reads them: names, order of rows, padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from grail.errors import ModelError

_PAGE = "docs/serving/gguf.md"  # of errors

_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_LINEAR = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
# Biases that the loader of an architecture reads; it refuses a file with others.
_BIASES = {
    "llama": _LINEAR,
    "deci": _LINEAR,
    "qwen2": _QKV,
    "qwen3": _QKV,
    "openelm": frozenset[str](),
}
# Architectures that rotate channels 2i and 2i + 1 of a head. transformers rotates i and i + d/2.
_INTERLEAVED = ("llama", "deci")
# The axis of the MLP's width in the tensors that have one.
_WIDTH_AXIS = {
    "ffn_gate.weight": 0,
    "ffn_up.weight": 0,
    "ffn_down.weight": 1,
    "ffn_gate.bias": 0,
    "ffn_up.bias": 0,
}


@dataclass(frozen=True)
class Family:
    """The architectures of llama.cpp that compute what a model type of transformers does."""

    even: str  # of the dense model
    uneven: str  # with a width, and a number of heads, per block


FAMILIES = {
    "llama": Family("llama", "deci"),
    "mistral": Family("llama", "deci"),
    "qwen2": Family("qwen2", "deci"),
    "qwen3": Family("qwen3", "openelm"),
}


def family_of(config: Any) -> Family:
    """Returns the family of a configuration; raises ModelError for a type without one."""
    kind = getattr(config, "stock_model_type", config.model_type)  # of a folder with its own code
    if kind in FAMILIES:
        return FAMILIES[kind]
    raise ModelError(
        f"no GGUF is written for models of type {kind}, only for "
        f"{', '.join(FAMILIES)}; where all blocks have one width, llama.cpp's own "
        "convert_hf_to_gguf.py may read the folder",
        page=_PAGE,
    )


@dataclass(frozen=True)
class Shape:
    """Sizes of the blocks: channels of each MLP, query heads, key and value heads."""

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: int

    @property
    def is_uneven(self) -> bool:
        """Whether blocks differ."""
        return any(len(set(sizes)) > 1 for sizes in (self.widths, self.heads, self.kv_heads))

    def padded(self, multiple: int) -> "Shape":
        """Returns the shape with each width rounded up."""
        widths = tuple(-(-width // multiple) * multiple for width in self.widths)
        return Shape(widths, self.heads, self.kv_heads, self.head_dim)


def measure(model: Any) -> Shape:
    """Returns the shape of a network of one of the families, read off its weights."""
    blocks = model.model.layers
    head_dim = int(blocks[0].self_attn.head_dim)
    attention = [block.self_attn for block in blocks]
    return Shape(
        tuple(block.mlp.down_proj.weight.shape[1] for block in blocks),
        tuple(part.q_proj.weight.shape[0] // head_dim for part in attention),
        tuple(part.k_proj.weight.shape[0] // head_dim for part in attention),
        head_dim,
    )


@dataclass(frozen=True)
class Part:
    """A tensor of the model, and how the file stores it."""

    name: str
    heads: int = 0  # whose rows are reordered; 0 leaves them
    axis: int = 0  # that is padded with zeros
    size: int = 0  # to so many channels; 0 leaves it

    def pack(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the file."""
        if self.heads:
            tensor = tensor.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if missing := max(0, self.size - tensor.shape[self.axis]):
            tensor = pad(
                tensor, (0, missing) if self.axis == tensor.dim() - 1 else (0, 0, 0, missing)
            )
        return tensor.contiguous()

    def unpack(self, stored: Tensor, like: Tensor) -> Tensor:
        """Returns the tensor of the model, of the shape of `like`, from that of the file.

        Raises:
            ValueError: channels that were added are not zero.
        """
        if self.size:
            length = like.shape[self.axis]
            if stored.narrow(self.axis, length, stored.shape[self.axis] - length).any():
                raise ValueError("channels that were added are not zero")
            stored = stored.narrow(self.axis, 0, length)
        if self.heads:
            stored = stored.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return stored


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: parts of the model, one below the other."""

    name: str
    parts: tuple[Part, ...]

    def pack(self, state: dict[str, Tensor]) -> Tensor:
        """Returns the values of the file."""
        return torch.cat([part.pack(state[part.name]) for part in self.parts])

    def unpack(self, stored: Tensor, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields name and values of each tensor of the model that the file's tensor holds."""
        rows = [part.pack(state[part.name]).shape[0] for part in self.parts]
        for part, rows_of_part in zip(self.parts, stored.split(rows), strict=True):
            yield part.name, part.unpack(rows_of_part, state[part.name])


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Returns the tensors of a model that a file holds; a tied output matrix is left out."""
    state = dict(model.state_dict())
    if is_tied(model):
        state.pop("lm_head.weight", None)
    return state


def is_tied(model: Any) -> bool:
    """Returns whether the output matrix is the embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def choose_architecture(model: Any, shape: Shape, names: Sequence[str]) -> str:
    """Returns the architecture of llama.cpp that computes what the model does.

    It is that of the dense model if all blocks are alike and its loader reads these tensors, else
    the one with sizes per block.

    Args:
        model: of one of the families.
        shape: with the widths of the file.
        names: of the tensors, as `file_names` gives them.

    Raises:
        ModelError: no architecture does, with the reason.
    """
    family, hidden = family_of(model.config), model.config.hidden_size
    biases = [name.split(".")[-2] for name in names if name.endswith(".bias")]
    reason = ""
    if shape.is_uneven:
        reason = "its blocks have different widths or numbers of heads"
    elif family.even == "qwen2" and shape.heads[0] * shape.head_dim != hidden:
        reason = "it has fewer heads than llama.cpp derives from its hidden size"
    elif odd := set(biases) - _BIASES[family.even]:
        reason = f"{min(odd)} has a bias, which the architecture {family.even} has not"
    if not reason:
        return family.even
    if family.uneven == "openelm" and not is_tied(model):
        raise ModelError(
            f"llama.cpp has no architecture for this {model.config.model_type} model: {reason}, "
            "and openelm, which would take that, has no output matrix apart from the embedding; "
            "compress it to one width for all blocks (without --uneven)",
            page=_PAGE,
        )
    if odd := set(biases) - _BIASES[family.uneven]:
        raise ModelError(
            f"llama.cpp has no architecture for this {model.config.model_type} model: {reason}, "
            f"and {family.uneven} reads no bias of {min(odd)}; compress it without biases, and to "
            "one width for all blocks if it has one",
            page=_PAGE,
        )
    return family.uneven


def file_names(model: Any) -> dict[str, str]:
    """Returns the name in the file of each tensor of a model.

    Raises:
        ModelError: a tensor that the model's architecture of llama.cpp has no name for.
    """
    import gguf

    architecture = gguf.MODEL_ARCH[family_of(model.config).even.upper()]
    table = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    found: dict[str, str] = {}
    for name in stored_tensors(model):
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ModelError(f"llama.cpp has no place for {name} of this model", page=_PAGE)
        found[name] = stored
    return found


def entries(names: dict[str, str], shape: Shape, architecture: str) -> list[Entry]:
    """Returns the tensors of the file, in its order.

    Args:
        names: of the tensors in the file by those in the model, as `file_names` gives them.
        shape: with the widths of the file.
        architecture: of llama.cpp.
    """
    found: dict[str, list[Part]] = {}
    for name, stored in names.items():
        prefix, _, kind = stored.partition("blk.")[2].partition(".")
        block = int(prefix) if prefix else 0
        heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(kind.split(".")[0])
        reordered = heads[block] if heads and architecture in _INTERLEAVED else 0
        part = Part(name, heads=reordered)
        if kind in _WIDTH_AXIS:
            part = Part(name, axis=_WIDTH_AXIS[kind], size=shape.widths[block])
        if architecture == "openelm" and kind.split(".")[0] in _QKV:
            stored = f"blk.{block}.attn_qkv.weight"
        found.setdefault(stored, []).append(part)
    return [
        Entry(stored, tuple(sorted(parts, key=_fused_order))) for stored, parts in found.items()
    ]


def _fused_order(part: Part) -> int:
    """Returns the place of a part among queries, keys and values."""
    places = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
    return next((place for name, place in places.items() if f".{name}." in part.name), 0)
