"""Encoders: BERT's family, vision transformers, and the towers of CLIP.

The vision transformers of timm and torchvision, which have no configuration, are recognised by
their form.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from grail.errors import ModelError
from grail.networks.site import Architecture
from grail.networks.transformer import (
    Heads,
    Layout,
    Mlp,
    ProbeSpec,
    Settings,
    Transformer,
    has,
    numbers,
    setting,
)

# Post-norm: the norm after a layer reads the residual sum.
_BERT = Layout(
    blocks="encoder.layer",
    attention="attention.self",
    mlp=Mlp(("intermediate.dense",), "output.dense", probe=ProbeSpec("output.LayerNorm")),
    heads=Heads(
        projections=("attention.self.query", "attention.self.key", "attention.self.value"),
        consumer="attention.output.dense",
        probe=ProbeSpec("attention.output.LayerNorm"),
        head_dim="attention_head_size",
        sizes=numbers("num_attention_heads", "all_head_size"),
    ),
)
_DISTILBERT = Layout(
    blocks="transformer.layer",
    attention="attention",
    mlp=Mlp(
        ("ffn.lin1",),
        "ffn.lin2",
        config=setting("hidden_dim"),
        probe=ProbeSpec("output_layer_norm"),
    ),
    heads=Heads(
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        consumer="attention.out_lin",
        probe=ProbeSpec("sa_layer_norm"),
        head_dim="attention_head_size",
        sizes=numbers("n_heads"),
    ),
)
_VIT = Layout(
    blocks="layers",
    attention="attention",
    mlp=Mlp(("mlp.fc1",), "mlp.fc2"),
    heads=Heads(
        projections=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        consumer="attention.o_proj",
        probe=ProbeSpec("layernorm_after"),
        sizes=numbers("num_attention_heads"),
        config=numbers("num_attention_heads", "head_dim"),
    ),
)
_CLIP = Layout(
    blocks="encoder.layers",
    attention="self_attn",
    mlp=Mlp(("mlp.fc1",), "mlp.fc2"),
    heads=Heads(
        projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.out_proj",
        probe=ProbeSpec("layer_norm2"),
        sizes=numbers("num_heads"),
    ),
)


def _unless_shared(config: Any, kept: int) -> Settings:
    """Returns no setting where SigLIP's pooling head has an MLP by the same setting."""
    return {} if config.vision_use_head else {"intermediate_size": kept}


def _mlp_ratio(config: Any, kept: int) -> Settings:
    """Returns DINOv2's setting, which holds whole multiples of hidden_size alone."""
    ratio, rest = divmod(kept, config.hidden_size)
    return {} if rest else {"mlp_ratio": ratio}


_SIGLIP_VISION = replace(_CLIP, mlp=replace(_CLIP.mlp, config=_unless_shared))
assert _VIT.heads is not None
_DINOV2 = replace(
    _VIT,
    blocks="encoder.layer",
    mlp=Mlp(
        ("mlp.fc1",),
        "mlp.fc2",
        config=_mlp_ratio,
        probe=ProbeSpec("", scale="layer_scale2.lambda1"),
    ),
    heads=replace(_VIT.heads, probe=ProbeSpec("norm2", scale="layer_scale1.lambda1")),
)
_DINOV2_GATED = replace(
    _DINOV2,
    mlp=replace(
        _DINOV2.mlp,
        producers=("mlp.gate_proj", "mlp.up_proj"),
        consumer="mlp.down_proj",
        config=lambda config, kept: {},  # a third of a whole multiple, rounded
    ),
)

_TIMM = Layout(
    blocks="blocks",
    attention="attn",
    mlp=Mlp(("mlp.fc1",), "mlp.fc2"),
    heads=Heads(
        projections=("attn.qkv",),
        consumer="attn.proj",
        probe=ProbeSpec("norm2"),
        sizes=numbers("num_heads", "attn_dim"),
    ),
)
_TORCHVISION = Layout(
    blocks="encoder.layers",
    attention="self_attention",
    mlp=Mlp(("mlp.0",), "mlp.3"),
    no_heads="nn.MultiheadAttention keeps its heads in line with the width of its input, and calls "
    "no module for its projections",
)

LAYOUTS = {
    "bert": _BERT,
    "camembert": _BERT,
    "clip_text_model": _CLIP,
    "clip_vision_model": _CLIP,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "distilbert": _DISTILBERT,
    "electra": _BERT,
    "roberta": _BERT,
    "siglip_text_model": _CLIP,
    "siglip_vision_model": _SIGLIP_VISION,
    "timm's VisionTransformer": _TIMM,
    "torchvision's VisionTransformer": _TORCHVISION,
    "vit": _VIT,
    "xlm-roberta": _BERT,
}
_TOWERS = ("vision_model", "text_model")


def architecture(model: Any) -> Architecture | None:
    """Returns its blocks and sites, if it is one of `LAYOUTS`.

    Raises:
        ModelError: a model with a tower for images and another for text.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", "")
    if model_type in ("clip", "siglip"):
        towers = [f"model.{name}" for name in _TOWERS if hasattr(model, name)]
        raise ModelError(
            f"{type(model).__name__} is made of towers, each with inputs of its own; compress "
            f"{' and '.join(towers)} one after the other, as models of their own"
        )
    if type(model).__name__ == "VisionTransformer":
        layout = _by_form(model)
    elif model_type == "dinov2" and config.use_swiglu_ffn:
        layout = _DINOV2_GATED
    else:
        layout = LAYOUTS.get(model_type)
    return None if layout is None else Transformer(model, layout)


def _by_form(model: Any) -> Layout | None:
    """Returns the layout of a vision transformer of timm or torchvision."""
    if _first_block(model, _TORCHVISION) is not None:
        return _TORCHVISION
    block = _first_block(model, _TIMM)
    if type(block).__name__ != "Block":
        return None
    if not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity):
        return None  # it normalises the channels of the site
    scaled = hasattr(getattr(block, "ls1", None), "gamma")
    layout = _scaled(_TIMM, "ls1.gamma", "ls2.gamma") if scaled else _TIMM
    if not hasattr(block.attn, "attn_dim"):
        return replace(layout, no_heads="this version of timm ties them to the embedding's width")
    if not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity):
        return replace(layout, no_heads="their outputs are normalised all at once")
    return layout


def _first_block(model: nn.Module, layout: Layout) -> Any:
    """Returns the first block of a model, if it has the modules of the layout."""
    if not has(model, layout.blocks):
        return None
    paths = (layout.attention, *layout.mlp.producers, layout.mlp.consumer)
    paths += layout.heads.projections if layout.heads is not None else ()
    block = next(model.get_submodule(layout.blocks).children(), None)
    return block if block is not None and all(has(block, path) for path in paths) else None


def _scaled(layout: Layout, heads: str, mlp: str) -> Layout:
    """Returns the layout with layer scales at these paths."""
    assert layout.heads is not None
    assert layout.mlp.probe is not None
    return replace(
        layout,
        mlp=replace(layout.mlp, probe=replace(layout.mlp.probe, scale=mlp)),
        heads=replace(layout.heads, probe=replace(layout.heads.probe, scale=heads)),
    )
