"""Python code that stock transformers runs to load blocks of different widths.

A configuration of transformers holds one width for all blocks. The code adds a subclass of the
stock model that builds each block from settings of its own. It is the same for every model of a
family: weights and widths are in the other files. Two forms:

    DeciLM     `block_configs`, for the Llama shape: vLLM, SGLang and MLX have this architecture
    uneven     `block_widths`, for every other family whose configuration can build its blocks

`load` never runs a folder's code. It runs what `generate` returns, if the folder's is the same.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any

import torch
from torch import nn

from grail.errors import InputError, ModelError
from grail.networks.decoders import LAYOUTS

DECILM = "nemotron-nas"  # the model type that other libraries look for
STOCK = "stock_model_type"  # in config.json: the family whose subclass the code is
_CONFIG = "config.json"
_TEMPLATES = Path(__file__).parent / "templates"
_SHARE = """\
            for part in block.modules():
                if getattr(part, "config", None) is own:
                    part.config = config
"""
_UNUSUAL = "transformers has no language model of the usual form"
# transformers looks for a decorator in the text of the module.
_EXPERTS = """
    @classmethod
    def _can_set_experts_implementation(cls):
        return {stock}._can_set_experts_implementation()
"""

Settings = dict[str, Any]


@dataclass(frozen=True, eq=False)
class RemoteCode:
    """The code of a family in one form, and the names in it.

    Args:
        model_type: of the stock family.
        form: the model type that config.json gives, "nemotron-nas" or "uneven_<family>".
        files: the text of each file, by name.
        auto_map: the class that each of transformers' Auto classes makes.
    """

    model_type: str
    form: str
    files: Mapping[str, str]
    auto_map: Mapping[str, str]

    @property
    def causal(self) -> str:
        """The name of the language model's class."""
        return self.auto_map["AutoModelForCausalLM"].rpartition(".")[2]


@cache
def generate(model_type: str, form: str, path: str, block: str) -> RemoteCode:
    """Returns the code of a family of transformers.

    Args:
        form: "nemotron-nas", or another name for the form with `block_widths`.
        path: of the list of blocks in the base model.
        block: the name of their class.
    """
    stock = Stock.of(model_type)
    heads = LAYOUTS[model_type].heads if model_type in LAYOUTS else None
    decilm = form == DECILM
    stem = "decilm" if decilm else form.replace("-", "_")
    prefix = "DeciLM" if decilm else f"Uneven{stock.config.__name__.removesuffix('Config')}"
    configuration, modeling = f"configuration_{stem}", f"modeling_{stem}"
    causal = stock.causal.__name__
    names = {
        "family": model_type,
        "model_type": form,
        "module": stock.causal.__module__,
        "stock_config": stock.config.__name__,
        "stock_base": stock.base.__name__,
        "stock_causal": causal,
        "stock_block": block,
        "config": f"{prefix}Config",
        "base": f"{prefix}Model",
        "causal": f"{prefix}ForCausalLM",
        "configuration_file": configuration,
        "blocks": path,
        "prefix": stock.prefix,
        # A module that reads its widths when it runs keeps the configuration of its block.
        "share": "" if heads and heads.reads_config else _SHARE,
        "experts": _EXPERTS.format(stock=causal) if stock.sets_experts else "",
    }
    template = "configuration_decilm" if decilm else "configuration_uneven"
    files = {
        f"{configuration}.py": _filled(template, names),
        f"{modeling}.py": _filled("modeling", names),
    }
    auto_map = {
        "AutoConfig": f"{configuration}.{prefix}Config",
        "AutoModel": f"{modeling}.{prefix}Model",
        "AutoModelForCausalLM": f"{modeling}.{prefix}ForCausalLM",
    }
    return RemoteCode(model_type, form, files, auto_map)


def _filled(template: str, names: Mapping[str, str]) -> str:
    text = (_TEMPLATES / f"{template}.py.txt").read_text(encoding="utf-8")
    return Template(text).substitute(names)


@dataclass(frozen=True)
class Stock:
    """The classes of a family in transformers, and the names of those that can be its blocks.

    Raises:
        InputError: the family has no language model of the usual form.
    """

    config: Any
    base: Any
    causal: Any
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, model_type: str) -> "Stock":
        from transformers import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
        from transformers.models.auto.modeling_auto import MODEL_MAPPING as BASE

        try:
            config: Any = CONFIG_MAPPING[model_type]
            base: Any = BASE[config]
            causal: Any = CAUSAL[config]
            module = sys.modules[causal.__module__]
            blocks = sorted(name for name in base._no_split_modules or () if hasattr(module, name))
            there = getattr(module, base.__name__) is base
        except (KeyError, AttributeError) as error:
            raise InputError(f"{_UNUSUAL} for {model_type}") from error
        if not blocks or not there:
            raise InputError(f"{_UNUSUAL} for {model_type}")
        return cls(config, base, causal, tuple(blocks))

    @property
    def prefix(self) -> str:
        """The name of the base model in the language model."""
        return str(self.causal.base_model_prefix)

    @property
    def sets_experts(self) -> bool:
        """Whether the implementation of experts can be chosen."""
        return bool(self.causal._can_set_experts_implementation())

    def list_of_blocks(self, model: Any) -> tuple[str, str]:
        """Returns the path of the blocks in the base model, and the name of their class.

        Raises:
            InputError: there is no such list, or several.
        """
        kinds = {
            path: {type(block).__name__ for block in module}
            for path, module in getattr(model, self.prefix).named_modules()
            if isinstance(module, nn.ModuleList)
        }
        found = [(path, *of) for path, of in kinds.items() if len(of) == 1 and of & {*self.blocks}]
        if len(found) != 1:
            raise InputError(f"{type(model).__name__} has no single list of equal blocks")
        return found[0]


def write(code: RemoteCode, settings: Settings, folder: Path) -> None:
    """Adds code and settings to a folder that `save_pretrained` of the stock model wrote."""
    for name, text in code.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    path = folder / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= settings | {
        "architectures": [code.causal],
        "auto_map": dict(code.auto_map),
        "model_type": code.form,
        STOCK: code.model_type,
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_written(folder: str | Path) -> bool:
    """Returns whether `write` made a folder, or transformers saved such a model again."""
    return _family(folder) is not None


def _family(folder: str | Path) -> tuple[str, str, Mapping[str, Any]] | None:
    """Returns the stock family, the form, and config.json of a folder of remote code."""
    try:
        config = json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))
        stock, form = config[STOCK], config["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(stock, str) or form not in (DECILM, f"uneven_{stock}"):
        return None
    with suppress(InputError):  # not a family of this version of transformers
        Stock.of(stock)
        return stock, form, config
    return None


def edited(folder: str | Path) -> str | None:
    """Returns the name of the file of a folder that is not as grail writes it; None if all are."""
    found = _family(folder)
    assert found is not None
    config = found[2]
    code = _code_of(folder)
    for name, text in code.files.items():
        path = Path(folder) / name
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            return name
    named = config.get("auto_map") or {}
    same = (str(named.get(k)).rpartition("--")[2] == made for k, made in code.auto_map.items())
    return None if all(same) else _CONFIG


def load(folder: str | Path, **options: Any) -> Any:
    """Loads a model as its stock class, with blocks of their own widths.

    Args:
        options: of `from_pretrained`, which include `output_loading_info=True`.

    Returns:
        The model, and transformers' account of its weights.

    Raises:
        ModelError: the folder's code is not what grail generates. None of it is run.
    """
    found = _family(folder)
    assert found is not None
    if name := edited(folder):
        raise ModelError(
            f"{folder}: {name} is not as grail writes it for such a model; to run the code as it "
            "is, read it, then give --trust-remote-code (load_model(trust_remote_code=True))"
        )
    config_class, causal = _classes(_code_of(folder))
    config = config_class.from_pretrained(folder)
    model, account = causal.from_pretrained(folder, config=config, **options)
    _make_stock(model, Stock.of(found[0]))
    return model, account


def stock_config(folder: str | Path) -> Any:
    """Returns the stock configuration of a folder of remote code, without its widths."""
    found = _family(folder)
    assert found is not None
    stock = Stock.of(found[0]).config
    config, _ = stock.get_config_dict(folder)
    return stock.from_dict({k: v for k, v in config.items() if k not in (*_OWN, "model_type")})


_OWN = ("auto_map", "block_configs", "block_widths", STOCK)


def _code_of(folder: str | Path) -> RemoteCode:
    """Returns the code that grail generates for a folder."""
    found = _family(folder)
    assert found is not None
    model_type, form, _ = found
    stock = Stock.of(model_type)
    if model_type in LAYOUTS:
        return generate(model_type, form, LAYOUTS[model_type].blocks, *stock.blocks)
    with torch.device("meta"):
        model = stock.causal(stock_config(folder))
    return generate(model_type, form, *stock.list_of_blocks(model))


@cache
def _classes(code: RemoteCode) -> tuple[Any, Any]:
    """Runs generated code as a package of its own; returns the classes of configuration and model.

    The package stays in `sys.modules`, where relative imports, dataclasses and pickle look for it.
    """
    package = ModuleType(f"grail_remote_code_{code.form}_{code.model_type}".replace("-", "_"))
    package.__path__ = []
    sys.modules[package.__name__] = package
    for file, text in code.files.items():
        module = ModuleType(f"{package.__name__}.{file.removesuffix('.py')}")
        module.__package__ = package.__name__
        sys.modules[module.__name__] = module
        exec(compile(text, file, "exec"), vars(module))

    def named(auto: str) -> Any:
        file, _, name = code.auto_map[auto].partition(".")
        return getattr(sys.modules[f"{package.__name__}.{file}"], name)

    return named("AutoConfig"), named("AutoModelForCausalLM")


def _make_stock(model: Any, stock: Stock) -> None:
    """Turns a model of generated classes, which add construction alone, into a stock one."""
    base = getattr(model, stock.prefix)
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    for config in configs.values():
        for name in (*_OWN, "model_type"):
            vars(config).pop(name, None)
        config.architectures = [stock.causal.__name__]
        config.__class__ = stock.config
    model.__class__, base.__class__ = stock.causal, stock.base
