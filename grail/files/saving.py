"""Saves a narrowed network of any kind, and loads it into a dense one.

For networks without `save_pretrained`. A folder holds the weights as safetensors and the widths as
JSON: no code, no pickle.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grail.arguments import as_path, require_model, require_usable
from grail.errors import ExportError, InputError
from grail.files.provenance import hashes
from grail.networks.configuration import own_configuration
from grail.recipe import save_beside
from grail.report.card import card
from grail.report.report import Report
from grail.runtime.folder import complete, file_hash
from grail.runtime.transaction import Transaction
from grail_kernels import check_kind, kind_of

FORMAT = 2  # of the JSON
_USUAL: Any = {"device": "meta", "memory_format": torch.contiguous_format}
WEIGHTS, WIDTHS = "model.safetensors", "grail.json"


def save(model: nn.Module, output: str | Path, report: Report | None = None) -> Path:
    """Writes `model` into a new folder that is complete, or is not there at all.

    `grail.load` reads it back. Language models of transformers are better exported by
    `grail.export`, which `grail.load_model` reads back without a factory.

    Args:
        model: any network.
        output: folder to create; one that exists must be empty.
        report: written as `report.json`, its settings as `recipe.json`, and in words as the model
            card `README.md`. Its `files` are set to the hashes of the weights.

    Returns:
        The path of the folder.

    Raises:
        InputError: `output` is in use; nothing was written.
        ExportError: too little disk, or the folder could not be written.
    """
    require_model(model)
    check_kind("report", report, (Report, NoneType), "a grail.Report")
    size = sum(tensor.nbytes for tensor in _tensors(model).values())
    with complete(output, ExportError, size=size) as folder:
        write(model, folder)
        if report is not None:
            describe(report, folder, card(report, "saved"))
    return Path(output).resolve()


def describe(report: Report, folder: Path, words: str) -> None:
    """Writes the report of a run, its recipe, and the model card into a folder that is there."""
    report.files = hashes(folder)
    report.save(folder / "report.json")
    save_beside(report.settings, folder)
    if not (folder / "README.md").exists():  # of a tokenizer
        (folder / "README.md").write_text(words, encoding="utf-8")


def write(model: nn.Module, folder: Path) -> None:
    """Writes weights and widths into a folder that exists."""
    tied = {name: source for name, source in _sources(model).items() if source != name}
    try:
        buffers = {name: buffer.contiguous() for name, buffer in _unsaved(model).items()}
        save_file({**_tensors(model), **buffers}, folder / WEIGHTS)
    except SafetensorError as error:
        raise ExportError(f"the weights could not be written: {error}") from error
    widths = {
        "format": FORMAT,
        "class": type(model).__name__,
        "sha256": file_hash(folder / WEIGHTS),
        "tied": tied,
        "strides": _strides(model),
        "buffers": {name: _name(buffer.dtype) for name, buffer in _unsaved(model).items()},
        **_numbers(model),
    }
    (folder / WIDTHS).write_text(json.dumps(widths, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode(False)  # parameters made in it could never be trained
def load(
    folder: str | Path, factory: Callable[[], nn.Module], device: torch.device | str = "cpu"
) -> nn.Module:
    """Loads a network of any kind that `grail.save` wrote.

    Language models that `grail.export` or the command line wrote are read by `grail.load_model`;
    the sums of one site by `grail.Gram.load`.

    Args:
        folder: written by `grail.save`.
        factory: makes the dense network, with weights of any value.
        device: where the network goes.

    Returns:
        The network of `factory`, narrowed to the saved widths and with the saved weights, in
        evaluation mode.

    Raises:
        InputError: no such folder, or one that `grail.save` did not write.
        ExportError: damaged files, or a factory that makes another network.
    """
    folder = as_path("folder", folder)
    device = require_usable(device)
    if not callable(factory):
        raise InputError(
            f"factory must be a function that makes the dense network; got {kind_of(factory)}"
        )
    widths, tensors = _read(folder)
    buffers = {name: tensors.pop(name) for name in widths["buffers"] if name in tensors}
    model = factory()
    require_model(model)
    # Narrowing may have untied tensors that the factory ties; the saved ties count.
    sources = _sources(model) | widths.get("tied", {}) | {name: name for name in tensors}
    places = _places(model)
    odd = [name for name in sources if name not in places or sources[name] not in tensors]
    if odd:
        raise ExportError(
            f"the factory makes a {type(model).__name__} of other layers than the saved "
            f"{widths.get('class')}: they differ in {', '.join(sorted(odd)[:3])}"
        )
    _set_tensors(model, sources, tensors)
    _set_numbers(model, widths["modules"], widths["config"])
    _set_configs(model, widths.get("configs", {}))
    for name, buffer in _unsaved(model).items():
        dtype = getattr(torch, widths["buffers"].get(name, _name(buffer.dtype)))
        buffer.data = buffers.get(name, buffer.to(dtype))
    return model.to(device).eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads widths, and weights into memory of their own; checks that they belong together."""
    for name in (WEIGHTS, WIDTHS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; give a folder that grail.save wrote")
    try:
        widths = json.loads((folder / WIDTHS).read_text(encoding="utf-8"))
        if not isinstance(widths, dict) or widths.get("format") != FORMAT:
            raise ValueError(f"{WIDTHS} is not of format {FORMAT}")
        if missing := {"modules", "config", "buffers"} - widths.keys():
            raise ValueError(f"{WIDTHS} has no {min(missing)}")
        if widths["sha256"] != file_hash(folder / WEIGHTS):
            raise ValueError(f"{WEIGHTS} does not match its hash")
        strides = widths.get("strides", {})
        weights = load_file(folder / WEIGHTS)
        return widths, {
            name: _in_memory_of_its_own(tensor, strides.get(name))
            for name, tensor in weights.items()
        }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ExportError(f"{folder} is damaged: {error}") from error


def _strides(model: nn.Module) -> dict[str, list[int]]:
    """Returns the strides of tensors that are dense in memory, but in another order of axes."""
    return {
        name: list(tensor.stride())
        for name, tensor in model.state_dict().items()
        if tensor.stride() != torch.empty_like(tensor, **_USUAL).stride()
        and tensor.permute(_axes(tensor)).is_contiguous()
    }


def _axes(tensor: Tensor) -> list[int]:
    """Returns the axes by stride, the largest first."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _in_memory_of_its_own(tensor: Tensor, strides: Sequence[int] | None) -> Tensor:
    """Returns a copy in the saved order of axes and at an aligned address, see `alignment`."""
    if strides is None:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _sources(model: nn.Module) -> dict[str, str]:
    """Maps each parameter and stored buffer to the first that is the same tensor, by name."""
    seen: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {name: seen.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and stored buffers by name; of tied ones the first."""
    sources, stored, found = _sources(model), set(), {}
    for name, tensor in model.state_dict().items():
        if sources[name] == name:
            tensor = tensor.contiguous()
            place = tensor.untyped_storage().data_ptr()
            # safetensors refuses two tensors of one storage, as after `b.data = a.data`.
            found[name] = tensor.clone() if place in stored else tensor
            stored.add(place)
    return found


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Returns floating-point buffers outside of the state, which are cast with the model."""
    stored = model.state_dict().keys()
    found = {name: b for name, b in model.named_buffers() if name not in stored}
    return {name: buffer for name, buffer in found.items() if buffer.is_floating_point()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numbers(model: nn.Module) -> dict[str, Any]:
    """Returns every integer attribute of modules, and integers and booleans of configurations."""
    modules = {name: _integers(vars(module)) for name, module in model.named_modules()}
    configs = {name: _config(module) for name, module in model.named_modules()}
    return {
        "modules": {name: numbers for name, numbers in modules.items() if numbers},
        "config": _integers(vars(_config(model)), bool),
        "configs": {
            name: _integers(vars(config), bool)
            for name, config in configs.items()
            if config is not _config(model) and vars(config)
        },
    }


def _config(module: nn.Module) -> Any:
    """Returns a module's configuration; an empty one if it has none."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "__dict__") else SimpleNamespace()


def _integers(attributes: Mapping[str, Any], *further: type) -> dict[str, int]:
    kinds = (int, *further)
    return {k: v for k, v in attributes.items() if type(v) in kinds and not k.startswith("_")}


def _places(model: nn.Module) -> set[str]:
    """Returns the names of parameters and stored buffers, and of biases that a layer could have."""
    modules = model.named_modules(remove_duplicate=False)
    own = {
        f"{path}.{key}".removeprefix(".") for path, module in modules for key in module._parameters
    }
    return own | model.state_dict().keys()


def _set_tensors(
    model: nn.Module, sources: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    placed: dict[str, Tensor] = {}
    before = model.state_dict(keep_vars=True)
    for name, source in sources.items():
        owner, _, key = name.rpartition(".")
        old = before.get(name)  # None: a bias that the factory's layer lacks
        if source not in placed:
            new = tensors[source]
            if old is None or isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old is None or old.requires_grad)
            placed[source] = new
        setattr(model.get_submodule(owner), key, placed[source])


def _set_numbers(
    model: nn.Module, modules: Mapping[str, Mapping[str, int]], config: Mapping[str, int]
) -> None:
    owners = {name: vars(module) for name, module in model.named_modules()}
    for name, numbers in modules.items():
        owners[name].update({k: v for k, v in numbers.items() if k in owners[name]})
    if config:
        _own_config(model)
        vars(_config(model)).update(config)


def _own_config(model: nn.Module) -> None:
    """Gives a model a configuration that other models of the factory do not share."""
    own_configuration(model, Transaction())
    shared = _config(model)
    own = copy.copy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own


def _set_configs(model: nn.Module, configs: Mapping[str, Mapping[str, int]]) -> None:
    """Gives modules of other widths than the rest a configuration of their own."""
    for name, numbers in configs.items():
        module = model.get_submodule(name)
        if _integers(vars(_config(module)), bool) != numbers:
            own = copy.copy(_config(module))
            vars(own).update(numbers)
            module.config = own
