"""Decoder-only language models of transformers."""

from dataclasses import replace
from typing import Any

from grail.networks.site import Architecture
from grail.networks.transformer import (
    BLOCK_OUTPUT,
    Heads,
    Layout,
    Mixture,
    Mlp,
    ProbeSpec,
    Transformer,
    numbers,
    setting,
)

# Without head_dim it would be derived from hidden_size / heads.
_GROUPED_CONFIG = numbers("num_attention_heads", "num_key_value_heads", "head_dim")

_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Layout(
    blocks="layers",
    attention="self_attn",
    mlp=Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", sizes=("mlp.intermediate_size",)),
    heads=Heads(
        projections=_PROJECTIONS,
        consumer="self_attn.o_proj",
        probe=ProbeSpec("post_attention_layernorm"),
        sizes=numbers("num_key_value_groups"),
        config=_GROUPED_CONFIG,
    ),
)


def _with_heads(layout: Layout, **changes: Any) -> Layout:
    assert layout.heads is not None
    return replace(layout, heads=replace(layout.heads, **changes))


def _with_probes(layout: Layout, heads: ProbeSpec, mlp: ProbeSpec) -> Layout:
    return _with_heads(replace(layout, mlp=replace(layout.mlp, probe=mlp)), probe=heads)


def _without_heads(layout: Layout, why: str) -> Layout:
    return replace(layout, no_heads=why)


# A norm lies between a consumer and the stream, so drift is measured before it.
_SANDWICH = _with_probes(
    _LLAMA, ProbeSpec("self_attn.o_proj", output=True), ProbeSpec("mlp.down_proj", output=True)
)
_OLMO2 = _without_heads(_SANDWICH, "its queries and keys are normalised over all heads at once")
_GRANITE = _with_probes(
    _LLAMA,
    ProbeSpec("post_attention_layernorm", scale="residual_multiplier"),
    replace(BLOCK_OUTPUT, scale="residual_multiplier"),
)
_STABLELM = _with_heads(
    _LLAMA, sizes=numbers("num_heads", "num_key_value_heads", "num_key_value_groups"), config=None
)
_COHERE = _with_heads(_LLAMA, probe=BLOCK_OUTPUT)
_STARCODER2 = replace(_LLAMA, mlp=Mlp(("mlp.c_fc",), "mlp.c_proj"))
_PHI = replace(
    _with_heads(_LLAMA, consumer="self_attn.dense", probe=BLOCK_OUTPUT),
    mlp=Mlp(("mlp.fc1",), "mlp.fc2"),
)
_PHI3 = replace(
    _with_heads(
        _LLAMA,
        projections=("self_attn.qkv_proj",),
        sizes=numbers("num_key_value_heads", "num_key_value_groups"),
        reads_config=True,
    ),
    mlp=Mlp(("mlp.gate_up_proj",), "mlp.down_proj", fused=2),
)
_MIXTRAL = replace(_LLAMA, experts=Mixture("mlp.experts", setting("intermediate_size")))
_QWEN3_MOE = replace(_LLAMA, experts=Mixture("mlp.experts", setting("moe_intermediate_size")))
_QWEN2_MOE = replace(
    _QWEN3_MOE,
    # A gate scales its output, so the routed experts correct its drift.
    shared_experts=Mlp(
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        "mlp.shared_expert.down_proj",
        config=setting("shared_expert_intermediate_size"),
        sizes=("mlp.shared_expert.intermediate_size",),
        probe=None,
    ),
)
_GPT2 = Layout(
    blocks="h",
    attention="attn",
    mlp=Mlp(("mlp.c_fc",), "mlp.c_proj", config=setting("n_inner")),
    heads=Heads(
        projections=("attn.c_attn",),
        consumer="attn.c_proj",
        probe=ProbeSpec("ln_2"),
        sizes=numbers("num_heads", "split_size"),
    ),
)
_OPT = Layout(
    blocks="decoder.layers",
    attention="self_attn",
    mlp=Mlp(("fc1",), "fc2", config=setting("ffn_dim")),
    heads=Heads(
        projections=_PROJECTIONS,
        consumer="self_attn.out_proj",
        probe=ProbeSpec("final_layer_norm"),
        sizes=numbers("num_heads"),
    ),
)
_OPT_POST_NORM = _with_probes(
    _OPT, ProbeSpec("self_attn_layer_norm"), ProbeSpec("final_layer_norm")
)
_GPT_NEOX = Layout(
    blocks="layers",
    attention="attention",
    mlp=Mlp(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    heads=Heads(
        projections=("attention.query_key_value",),
        consumer="attention.dense",
        probe=ProbeSpec("post_attention_layernorm"),
        interleaved=True,
        head_dim="head_size",
    ),
)

LAYOUTS = {
    "cohere": _COHERE,
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "granite": _GRANITE,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "olmo": _LLAMA,
    "olmo2": _OLMO2,
    "opt": _OPT,
    "phi": _PHI,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _QWEN3_MOE,
    "smollm3": _LLAMA,
    "stablelm": _STABLELM,
    "starcoder2": _STARCODER2,
}


def architecture(model: Any) -> Architecture | None:
    """Returns its blocks and sites, if it is one of `LAYOUTS`."""
    config = getattr(model, "config", None)
    layout = LAYOUTS.get(getattr(config, "model_type", ""))
    return None if layout is None else Transformer(model, _variant(layout, config))


def _variant(layout: Layout, config: Any) -> Layout:
    """Returns a family's layout as its configuration modifies it."""
    if layout is _OPT and not config.do_layer_norm_before:
        return _OPT_POST_NORM
    if getattr(config, "use_parallel_residual", False):
        layout = _with_heads(layout, probe=BLOCK_OUTPUT)
    if getattr(config, "qk_layernorm", False) and layout is _PHI:
        return _with_heads(layout, config=None)  # the norms' width is hidden_size / heads
    if getattr(config, "qk_layernorm", False) or getattr(config, "use_qk_norm", False):
        return _without_heads(layout, "its queries and keys have a norm for each head")
    return layout
