"""Every causal language model of transformers, tiny and random: the sites that grail narrows.

    python -m bench.quality.families    writes docs/families.md, whose text is in families.md.j2

The sizes of a configuration are replaced by small ones, chosen by name; nothing else is known of a
family here.
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
from bench.tools.commandline import CommandLine
from bench.tools.measuring import ROOT
from bench.tools.pages import fill
from bench.tools.tables import markdown
from bench.tools.tiny import SIZES, VOCABULARY, randomised
from grail.errors import InputError, ModelError
from grail.networks import find

LARGEST = 5e6  # parameters of a tiny model
# Settings that a name alone does not give.
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
    return randomised(lambda: AutoModelForCausalLM.from_config(kind(**settings)), seed, fill=True)


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
    """Silences the warnings of transformers about sizes and missing kernels."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


KINDS = {"mlp": "MLP", "heads": "heads", "experts": "experts", "shared_experts": "shared experts"}
PAGE = ROOT / "docs" / "families.md"


@dataclass(frozen=True)
class Family:
    """A model type and its sites. `kinds`: how each is reloaded, by name."""

    model_type: str
    kinds: Mapping[str, str]
    reason: str = ""
    tried: bool = True

    @property
    def row(self) -> list[str]:
        """Its line of a table."""
        cells = [self.kinds.get(kind, "–") for kind in KINDS] if self.kinds else []
        return [f"`{self.model_type}`", *cells, self.reason]


def family(model_type: str) -> Family:
    """Tries a model type."""
    try:
        model = tiny(model_type)
    except Exception:  # whatever a configuration raises for sizes that do not suit it
        return Family(model_type, {}, tried=False)
    try:
        kinds = find(model).kinds
    except ModelError as error:
        said = str(error).partition(": ")[2]
        reason, *_ = re.split("; let a trace find|; find the sites by", said)
        return Family(model_type, {}, reason or str(error))
    left = {kind: reason for kind, reason in reasons(model).items() if kind not in kinds}
    return Family(
        model_type,
        {kind: reloaded(model, kind) for kind in kinds},
        "; ".join(f"{KINDS[kind]}: {reason}" for kind, reason in sorted(left.items())),
    )


def reasons(model: Any) -> dict[str, str]:
    """Reasons of refused kinds of sites, other than that there are none."""
    architecture: Any = find(model)
    found: dict[str, str] = dict(getattr(architecture, "reasons", {}))
    try:
        architecture.check_kinds(("heads",))
    except InputError as error:
        found.setdefault("heads", str(error).partition("narrowed: ")[2])
    return found


def reloaded(model: Any, kind: str) -> str:
    """Narrows a copy and returns what reloads it: "stock" transformers, or `grail.save`."""
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


def page(found: list[Family], version: str) -> str:
    """The page of families, tried with a version of transformers."""
    return fill(
        Path(__file__).with_name("families.md.j2"),
        version=version,
        supported=markdown(
            ["model type", *KINDS.values(), "left as they are"], [f.row for f in found if f.kinds]
        ),
        refused=markdown(
            ["model type", "reason"], [f.row for f in found if f.tried and not f.kinds]
        ),
        untried=", ".join(f"`{f.model_type}`" for f in found if not f.tried),
    )


def main() -> int:
    """Writes the page."""
    CommandLine(__doc__, writes="docs/families.md", takes="2 minutes").read()
    quiet()
    torch.set_num_threads(1)  # such small models gain nothing by more
    found = [family(model_type) for model_type in model_types()]
    PAGE.write_text(page(found, metadata.version("transformers")), encoding="utf-8")
    print(f"{sum(bool(f.kinds) for f in found)} of {len(found)} model types: {PAGE.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
