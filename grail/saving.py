"""Saves a narrowed network of any kind, and loads it into what the dense one is made by.

For networks without `save_pretrained`. A folder holds the weights as safetensors and a JSON of the
widths: no code, no pickle.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grail.errors import ExportError, InputError
from grail.folder import complete
from grail.report import Report

FORMAT = 1
WEIGHTS, WIDTHS = "model.safetensors", "grail.json"


def save(model: nn.Module, output: str | Path, report: Report | None = None) -> Path:
    """Writes `model` into a new folder that is complete, or is not there at all.

    Args:
        model: any network.
        output: folder to create; one that exists must be empty.
        report: written as `report.json`.

    Returns:
        The path of the folder.

    Raises:
        InputError: `output` is in use; nothing was written.
        ExportError: too little disk, or the folder could not be written.
    """
    tensors = _tensors(model)
    widths = {"format": FORMAT, "class": type(model).__name__, **_numbers(model)}
    with complete(output, ExportError, size=sum(t.nbytes for t in tensors.values())) as folder:
        try:
            save_file(tensors, folder / WEIGHTS)
        except SafetensorError as error:
            raise ExportError(f"{output} could not be written: {error}") from error
        (folder / WIDTHS).write_text(json.dumps(widths, indent=1) + "\n", encoding="utf-8")
        if report is not None:
            report.save(folder / "report.json")
    return Path(output).resolve()


def load(
    folder: str | Path, factory: Callable[[], nn.Module], device: torch.device | str = "cpu"
) -> nn.Module:
    """The network that `save` wrote.

    Args:
        folder: the folder.
        factory: makes the dense network, with weights of any value.
        device: where the network goes.

    Returns:
        What `factory` made, narrowed to the saved widths and with the saved weights, in evaluation
        mode.

    Raises:
        InputError: no such folder, or one that `save` did not write.
        ExportError: damaged files, or a factory that makes another network.
    """
    folder = Path(folder)
    for name in (WEIGHTS, WIDTHS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; give a folder that grail.save wrote")
    try:
        widths = json.loads((folder / WIDTHS).read_text(encoding="utf-8"))
        if not isinstance(widths, dict) or widths.get("format") != FORMAT:
            raise ValueError(f"{WIDTHS} is not of format {FORMAT}")
        modules, config = widths["modules"], widths["config"]
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ExportError(f"{folder} is damaged: {error}") from error
    model = factory()
    expected, found = set(_tensors(model)), set(tensors)
    if expected != found:
        odd = ", ".join(sorted(expected ^ found)[:3])
        raise ExportError(
            f"the factory makes a {type(model).__name__} of other layers than the saved "
            f"{widths.get('class')}: they differ in {odd}"
        )
    _set_tensors(model, tensors)
    _set_numbers(model, modules, config)
    return model.to(device).eval()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers by name; of tied ones the first."""
    seen: dict[int, str] = {}
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if seen.setdefault(id(tensor), name) == name
    }


def _numbers(model: nn.Module) -> dict[str, Any]:
    """Every whole number that a module, or the configuration, keeps as an attribute."""
    modules = {name: _integers(vars(module)) for name, module in model.named_modules()}
    return {
        "modules": {name: numbers for name, numbers in modules.items() if numbers},
        "config": _integers(getattr(getattr(model, "config", None), "__dict__", {})),
    }


def _integers(attributes: Mapping[str, Any]) -> dict[str, int]:
    return {k: v for k, v in attributes.items() if type(v) is int and not k.startswith("_")}


def _set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    shared: dict[int, Tensor] = {}  # what stands for a tied tensor of the factory's
    for name, old in model.state_dict(keep_vars=True).items():
        owner, _, key = name.rpartition(".")
        if name in tensors:
            new = tensors[name]
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            shared[id(old)] = new
        setattr(model.get_submodule(owner), key, shared[id(old)])


def _set_numbers(
    model: nn.Module, modules: Mapping[str, Mapping[str, int]], config: Mapping[str, int]
) -> None:
    owners = {name: vars(module) for name, module in model.named_modules()}
    for name, numbers in modules.items():
        owners[name].update({k: v for k, v in numbers.items() if k in owners[name]})
    if config:
        vars(getattr(model, "config", nn.Module())).update(config)
