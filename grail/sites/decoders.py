"""Decoder-only language models of transformers."""

from typing import Any

from grail.sites.site import Architecture
from grail.sites.transformer import Heads, Layout, Mlp, Seen, Transformer

# head_dim would else be derived from hidden_size / heads.
_GROUPED_CONFIG = {
    "num_attention_heads": lambda width: width.kept_groups * width.kept_queries,
    "num_key_value_heads": lambda width: width.kept_groups,
    "head_dim": lambda width: width.head_dim,
}

_LLAMA = Layout(
    blocks=("model.layers", "layers"),
    mlp=Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", sizes=("mlp.intermediate_size",)),
    heads=Heads(
        attention="self_attn",
        projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.o_proj",
        landing=Seen("post_attention_layernorm"),
        sizes={"num_key_value_groups": lambda width: width.kept_queries},
        config=_GROUPED_CONFIG,
    ),
)

LAYOUTS = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


def architecture(model: Any) -> Architecture | None:
    """Its blocks and sites, if it is one of `LAYOUTS`."""
    layout = LAYOUTS.get(getattr(getattr(model, "config", None), "model_type", ""))
    return None if layout is None else Transformer(model, layout)
