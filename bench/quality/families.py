"""Every causal language model of transformers, made tiny and at random: what grail narrows of it.

    python -m bench.quality.families    writes docs/families.md

The sizes of a model's configuration are replaced by small ones, chosen by name: that is all that is
known of a family here.
"""

import copy
import inspect
import logging
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import grail
from bench.tools.measuring import command_line
from grail.errors import InputError, ModelError
from grail.networks import find

VOCABULARY = 97
LARGEST = 5e6  # parameters of a tiny model
# By the name of a setting. Sizes differ from one another, so that one cannot stand for another.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 48,
    "d_model": 48,
    "n_embd": 48,
    "dim": 48,
    "intermediate_size": 80,
    "ffn_dim": 80,
    "d_ff": 80,
    "decoder_ffn_dim": 80,
    "encoder_ffn_dim": 80,
    "ffn_hidden_size": 80,
    "n_inner": 80,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "intermediate_size_mlp": 80,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 6,
    "n_head": 6,
    "n_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_attention_heads": 6,
    "num_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "kv_channels": 8,
    "global_head_dim": 8,
    "swa_head_dim": 8,
    "v_head_dim": 12,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 20,
    "kv_lora_rank": 20,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "mamba_d_state": 8,
    "mamba_n_heads": 6,
    "mamba_num_heads": 6,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 96,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "conv_dim": 48,
    "embedding_size": 48,
    "word_embed_proj_dim": 48,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What the names do not tell.
OWN: dict[str, dict[str, Any]] = {
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {"n_shared_experts": 1, "num_key_value_heads": 3},
    "dots3_note_text": {"num_key_value_heads": 6},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"residual_multiplier": 0.5},
    "granitemoehybrid": {"layer_types": ["attention", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """The model types of all causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a type, two blocks deep."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[model_type]
    settings = {**_small(kind), **OWN.get(model_type, {}), **changes}
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(kind(**settings))
    if (size := sum(parameter.numel() for parameter in made.parameters())) > LARGEST:
        raise ValueError(f"a model of {size:.1e} parameters is not tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(kind(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                elif float(parameter.std()) == 0:
                    parameter.copy_(torch.randn_like(parameter) / 10)
    return model.float().eval()


def _small(kind: Any) -> dict[str, Any]:
    """Small values of the settings that a class of configurations has."""
    known = set(inspect.signature(kind).parameters) | set(vars(kind())) | set(kind.attribute_map)
    settings = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # every head has keys and values of its own
        settings["num_key_value_heads"] = settings.get("num_attention_heads")
    for name, part in getattr(kind, "sub_configs", {}).items():
        if part.__name__ != "AutoConfig":
            settings[name] = _small(part)
    return settings


def quiet() -> None:
    """Silences what transformers says of sizes and missing kernels."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


KINDS = {"mlp": "MLP", "heads": "heads", "experts": "experts", "shared_experts": "shared experts"}
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = """# Families of language models

Every causal language model of transformers {version}, tried as a tiny random model; written by
`python -m bench.quality.families`. Models are recognised by the form of their blocks, and each kind of
site is narrowed on a few tokens before it is offered ([how](../grail/sites/structure.py)). So a
model of another type but of the same form is taken, too.

**stock**: the narrow model is reloaded by transformers itself, to the same outputs.
**grail.save**: its configuration has no place for the widths of that kind alone, and the report
says so; `grail.save` and `grail.load` keep it. `grail compress` writes its folder so by itself, and
`grail.load_model` reads it.

| model type | MLP | heads | experts | shared experts | left as they are |
|---|---|---|---|---|---|
{supported}

Refused, with the reason:

| model type | reason |
|---|---|
{refused}

Not tried, since no small model of it can be made by sizes alone: {untried}.
"""


@dataclass(frozen=True)
class Family:
    """A model type and its sites. `kinds`: how each is reloaded, by name."""

    model_type: str
    kinds: Mapping[str, str]
    reason: str = ""
    tried: bool = True

    @property
    def row(self) -> str:
        """Its line of a table."""
        cells = [self.kinds.get(kind, "–") for kind in KINDS] if self.kinds else []
        return f"| {' | '.join([f'`{self.model_type}`', *cells, self.reason])} |"


def family(model_type: str) -> Family:
    """Tries a model type."""
    try:
        model = tiny(model_type)
    except Exception:  # whatever a configuration raises for sizes that do not suit it
        return Family(model_type, {}, tried=False)
    try:
        kinds = find(model).kinds
    except ModelError as error:
        reason = re.split("; let a trace find|; find the sites by", str(error).partition(": ")[2])[
            0
        ]
        return Family(model_type, {}, reason or str(error))
    left = {kind: reason for kind, reason in reasons(model).items() if kind not in kinds}
    return Family(
        model_type,
        {kind: reloaded(model, kind) for kind in kinds},
        "; ".join(f"{KINDS[kind]}: {reason}" for kind, reason in sorted(left.items())),
    )


def reasons(model: Any) -> dict[str, str]:
    """Why kinds of sites are refused, where the reason is more than that there are none."""
    architecture: Any = find(model)
    found: dict[str, str] = dict(getattr(architecture, "reasons", {}))
    try:
        architecture.check_kinds(("heads",))
    except InputError as error:
        found.setdefault("heads", str(error).partition("narrowed: ")[2])
    return found


def reloaded(model: Any, kind: str) -> str:
    """Narrows a copy, and says by what it is read again."""
    narrow, batch = copy.deepcopy(model), tokens()
    settings = {"selector": "magnitude", "compensate": False, "progress": False}
    report = grail.compress(narrow, [batch], keep=0.5, sites=(kind,), **settings)
    if any("the configuration cannot hold" in note for note in report.notes):
        return "grail.save"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        narrow.save_pretrained(folder)
        again = type(narrow).from_pretrained(folder).eval()
        if not torch.equal(again(**batch)[0], narrow(**batch)[0]):
            raise RuntimeError(f"{model.config.model_type}: {kind} reload to other outputs")
    return "stock"


def tokens(seed: int = 0, rows: int = 2, length: int = 16) -> dict[str, Any]:
    """A batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "use_cache": False}


def main() -> int:
    """Writes the page."""
    command_line(__doc__, writes="docs/families.md", takes="2 minutes").parse_args()
    quiet()
    torch.set_num_threads(1)  # such small models gain nothing by more
    found = [family(model_type) for model_type in model_types()]
    page = HEAD.format(
        version=metadata.version("transformers"),
        supported="\n".join(f.row for f in found if f.kinds),
        refused="\n".join(f.row for f in found if f.tried and not f.kinds),
        untried=", ".join(f"`{f.model_type}`" for f in found if not f.tried),
    )
    PAGE.write_text(page, encoding="utf-8")
    print(f"{sum(bool(f.kinds) for f in found)} of {len(found)} model types: {PAGE.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
