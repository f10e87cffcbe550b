"""The widths of a model's blocks, as settings of its stock configuration.

A width that differs by block is expressed by the settings that make a stock block have the shapes
of the narrow one. `grail.files.remote_code` has the code that builds blocks from them.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from grail.algebra.width import HeadWidth, Width
from grail.errors import GrailError, InputError, one_line
from grail.files.remote_code import DECILM, RemoteCode, Settings, Stock, generate
from grail.networks import find
from grail.networks.decoders import LAYOUTS
from grail.networks.transformer import Transformer

_TRIALS = 1000  # of settings for a block
_MULTIPLE = 256  # of the widths that DeciLM's ffn_mult can express
_LLAMA_SHAPE = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Expressed:
    """A model's widths in the form of remote code.

    Args:
        settings: what config.json holds beyond the model's configuration.
        not_decilm: why the form is not DeciLM's; "" where it is.
    """

    code: RemoteCode
    settings: Settings
    not_decilm: str = ""

    @property
    def decilm(self) -> bool:
        """Whether libraries that know DeciLM load the model natively."""
        return not self.not_decilm

    @property
    def by_ffn_mult(self) -> bool:
        """Whether every width is a multiple of 256, in which SGLang and MLX count."""
        blocks: Sequence[Settings] = self.settings.get("block_configs", ())
        return bool(blocks) and all("ffn_mult" in block["ffn"] for block in blocks)


def express(model: Any) -> Expressed:
    """Returns the widths of a language model as its remote code needs them.

    Raises:
        InputError: the widths cannot be expressed, with the layer or the reason by name.
    """
    config = model.config
    stock = Stock.of(getattr(config, "model_type", ""))
    if type(model) is not stock.causal or type(config) is not stock.config:
        raise InputError(f"{type(model).__name__} is not {stock.causal.__name__} of transformers")
    if getattr(config, "is_heterogeneous", False):
        raise InputError(f"{type(config).__name__} has settings by layer of its own")
    path, block_name = stock.list_of_blocks(model)
    found = find(model)
    assert isinstance(found, Transformer)
    _require_heads_at_construction(found)
    settings = _filled(_settings(found), config)
    common = _common(settings)
    for number, (block, own) in enumerate(zip(found.blocks, settings, strict=True)):
        _require_built(block, _with(config, {**common, **own}), number)
    blocks = [{k: v for k, v in own.items() if k not in common} for own in settings]
    changed = {k: v for k, v in common.items() if getattr(config, k, None) != v}
    reason = _not_decilm(_with(config, changed), blocks)
    form = f"uneven_{config.model_type}" if reason else DECILM
    code = generate(config.model_type, form, path, block_name)
    if reason:
        changed["block_widths"] = blocks
    else:
        changed |= _decilm(_with(config, changed), blocks)
    return Expressed(code, changed, reason)


def _require_heads_at_construction(found: Transformer) -> None:
    """Raises InputError for attention that reads its heads in the configuration while it runs.

    Of `LAYOUTS` the code takes care; of other families it is not known without a model.
    """
    if found.config.model_type in LAYOUTS or "heads" not in found.kinds:
        return
    heads = [site for sites in found.sites(("heads",)) for site in sites]
    widths = {site.width(1, None) for site in heads}
    if len(widths) > 1 and any(getattr(site, "settings", None) for site in heads):
        raise InputError(f"attention of {found.name} reads its heads while it runs")


def _settings(found: Transformer) -> list[Settings]:
    """Returns the settings of each block's widths, by the family or by trial of the numbers."""
    if found.config.model_type in LAYOUTS:
        return found.settings_by_block()
    settings: list[Settings] = []
    for number, (block, sites) in enumerate(
        zip(found.blocks, found.sites(found.kinds), strict=True)
    ):
        widths = {site.kind: site.width(1, None) for site in sites}
        before = settings[-1].keys() if settings else ()
        settings.append(_tried(block, found.config, number, list(widths.values()), before))
    return settings


def _tried(
    block: nn.Module, config: Any, number: int, widths: Sequence[Width], first: Collection[str]
) -> Settings:
    """Returns settings with which a stock block has the shapes of a block; none if none has.

    Args:
        widths: of the block's kinds of sites.
        first: names that are tried before others.
    """
    wanted = _shapes(block)
    names = [name for name, value in vars(config).items() if type(value) is int]
    names.sort(key=lambda name: (name not in first, "intermediate" not in name))
    options: list[list[Settings]] = []
    for width in widths:
        if isinstance(width, HeadWidth):
            counts = {
                "num_attention_heads": width.kept_groups * width.kept_queries,
                "num_key_value_heads": width.kept_groups,
                "head_dim": width.head_dim,
            }
            options.append([{}, {k: v for k, v in counts.items() if hasattr(config, k)}])
        else:
            options.append([{}, *({name: width.kept} for name in names)])
    for several in islice(itertools.product(*options), _TRIALS):
        found = {name: value for part in several for name, value in part.items()}
        with suppress(Exception):  # a class can raise anything at such settings
            if _stock_shapes(block, _with(config, found), number) == wanted:
                return found
    return {}


def obstacle(model: Any) -> str | None:
    """Returns the reason why a model's widths cannot be expressed by remote code, if any."""
    try:
        express(model)
    except GrailError as error:
        return str(error)
    return None


def _filled(settings: Sequence[Settings], config: Any) -> list[Settings]:
    """Adds to each block the settings that other blocks have, as the configuration gives them."""
    names = {name: getattr(config, name, None) for own in settings for name in own}
    shared = {name: value for name, value in names.items() if value is not None}
    return [{**shared, **own} for own in settings]


def _common(settings: Sequence[Settings]) -> Settings:
    """Returns the settings that have one value in all blocks that have them."""
    values: dict[str, set[Any]] = {}
    for own in settings:
        for name, value in own.items():
            values.setdefault(name, set()).add(value)
    return {name: found.pop() for name, found in values.items() if len(found) == 1}


def _with(config: Any, settings: Settings) -> Any:
    """Returns a copy of a configuration with other settings."""
    own = copy.copy(config)
    for name, value in settings.items():
        setattr(own, name, value)
    return own


def _require_built(block: Any, config: Any, number: int) -> None:
    """Raises InputError if a stock block of this configuration has other parameters."""
    try:
        built, there = _stock_shapes(block, config, number), _shapes(block)
    except Exception as error:  # a class can raise anything
        raise InputError(f"no {type(block).__name__} can be made: {one_line(error)}") from error
    odd = [name for name in there.keys() | built.keys() if there.get(name) != built.get(name)]
    if odd:
        name = min(odd)
        raise InputError(
            f"{name} of block {number} is {there.get(name, 'not there')}, and a stock "
            f"{type(block).__name__} can only have {built.get(name, 'none')}"
        )


def _stock_shapes(block: Any, config: Any, number: int) -> dict[str, list[int]]:
    with torch.device("meta"):
        return _shapes(type(block)(config, number))


def _shapes(block: nn.Module) -> dict[str, list[int]]:
    """Returns the shapes of parameters and buffers; some models add buffers to their blocks."""
    tensors = itertools.chain(block.named_parameters(), block.named_buffers())
    return {name: list(tensor.shape) for name, tensor in tensors}


def _not_decilm(config: Any, blocks: Sequence[Settings]) -> str:
    """Returns the reason why a model is not of the form that DeciLM has; "" if it is."""
    family = config.model_type
    if family not in _LLAMA_SHAPE:
        return f"{family} is not of the Llama shape"
    differing = Counter(name for own in blocks for name in own)
    for name in differing.keys() - {"intermediate_size", "num_key_value_heads"}:
        return f"{name} differs by block"
    sliding = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "use_sliding_window", True) and getattr(
        config, "sliding_window", None
    )
    if windowed or "sliding_attention" in sliding:
        return "its attention has a sliding window"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    return ""


def _decilm(config: Any, blocks: Sequence[Settings]) -> Settings:
    """Returns the settings that DeciLM's configuration has beyond the stock one."""
    heads = config.num_attention_heads

    def groups(own: Settings) -> int:
        return int(own.get("num_key_value_heads", config.num_key_value_heads))

    def width(own: Settings) -> int:
        return int(own.get("intermediate_size", config.intermediate_size))

    none = {"no_op": False, "replace_with_linear": False}
    found: Settings = {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": heads // groups(own), **none},
                "ffn": {**_ffn(width(own), config.hidden_size), **none},
            }
            for own in blocks
        ]
    }
    if config.model_type == "qwen2":  # biases of query, key and value, as vLLM names them
        found["qkv_bias"] = True
    return found


def _ffn(width: int, hidden_size: int) -> Settings:
    """Returns a width as DeciLM's `ffn_mult` where that is exact: the multiples of 256.

    Readers take int(2·ffn_mult·hidden_size/3), rounded up to a multiple of 256; the middle of that
    interval is written.
    """
    if width % _MULTIPLE:
        return {"intermediate_size": width}
    return {"ffn_mult": 3 * (width - _MULTIPLE // 2) / (2 * hidden_size)}
