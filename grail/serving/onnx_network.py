"""Networks that are written as ONNX: loaded from a folder, and an example of what they read."""

import ast
import importlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grail.errors import GrailError, InputError, ModelError, one_line
from grail.files.saving import WIDTHS, load

_PAGE = "docs/serving/onnx.md#what-is-refused"  # of errors

Factory = Callable[[], nn.Module]

_EXAMPLE = "torchvision.models:resnet18"


def load_network(folder: Path, factory: Factory | None) -> nn.Module:
    """Loads a network of any kind but a language model, in fp32 and evaluation mode.

    Args:
        folder: of `grail.save`, or of `save_pretrained` with a stock class of transformers.
        factory: makes the dense network, for a folder of `grail.save`.

    Raises:
        InputError: no such folder, one of another kind, or a factory that is missing or not needed.
        ModelError: a language model, or a folder that transformers cannot read.
        ExportError: damaged files, or a factory that makes another network.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder that grail.save wrote")
    architecture = _architecture(folder)
    refuse_language_model(architecture, str(folder))
    if (folder / WIDTHS).is_file():
        if factory is None:
            raise InputError(
                f"{folder} was written by grail.save, which stores no code: name the function that "
                f"makes the dense network (--network {_EXAMPLE}, factory=make)"
            )
        return load(folder, factory).float()
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} has neither {WIDTHS} nor config.json; give a folder that grail.save or "
            "save_pretrained wrote"
        )
    if factory is not None:
        raise InputError(
            f"{folder} names its own class of transformers: leave out --network (factory)"
        )
    return _from_transformers(folder, architecture)


def refuse_language_model(architecture: str, name: str) -> None:
    """Raises ModelError if a class of transformers is a causal language model."""
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(
            f"{name} is a language model ({architecture}), which needs a cache of keys and values "
            "that grail does not write as ONNX; use onnxruntime-genai, which reads folders of even "
            f"widths: python -m onnxruntime_genai.models.builder -i {name} -o onnx/ -p fp32 -e cpu",
            page=_PAGE,
        )


def _architecture(folder: Path) -> str:
    """Returns the class that a folder's configuration names; "" if none."""
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["architectures"][0])
    return ""


def _from_transformers(folder: Path, architecture: str) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"reading {folder} needs transformers: pip install 'grail-kernels[llm]'",
            page=_PAGE,
        ) from error
    cls: Any = getattr(transformers, architecture, None) if architecture else None
    if cls is None:
        raise ModelError(
            f"{folder} names {architecture or 'no class'} in config.json, which is not a class of "
            "transformers; load the network in Python and give it to grail.export_onnx",
            page=_PAGE,
        )
    try:
        model, found = cls.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # transformers can raise anything
        raise ModelError(
            f"transformers cannot read {folder}: {one_line(error)}",
            page=_PAGE,
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{folder} lacks weights of {architecture}, such as {missing[0]}",
            page=_PAGE,
        )
    return model.eval()


def read_factory(text: str) -> Factory:
    """Returns the function that `module:function` names, or its call with constants.

    The module is imported, from the current folder as well.

    Args:
        text: such as `torchvision.models:resnet18`, or `timm:create_model("resnet18",
            num_classes=10)`.

    Raises:
        InputError: another form, or a module or function that is not there.
    """
    name, _, call = text.partition(":")
    arguments: list[Any] = []
    options: dict[str, Any] = {}
    try:
        found = ast.parse(call, mode="eval").body
        if isinstance(found, ast.Call):
            arguments = [ast.literal_eval(given) for given in found.args]
            options = {given.arg or "**": ast.literal_eval(given.value) for given in found.keywords}
            found = found.func
        path = ast.unparse(found)
        if not all(map(str.isidentifier, [*name.split("."), *path.split("."), *options])):
            raise ValueError("it is no name")
    except (ValueError, SyntaxError) as error:
        raise InputError(
            f"a network is given as module:function, such as {_EXAMPLE}, or "
            f"'timm:create_model(\"resnet18\", num_classes=10)'; got {text!r}"
        ) from error
    function = _imported(name, path)
    return lambda: _made(text, function, arguments, options)


def _imported(name: str, path: str) -> Any:
    """Imports a module, from the current folder as well, and returns what it has at a path."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(name)
        for word in path.split("."):
            found = getattr(found, word)
    except Exception as error:  # a module can raise anything
        raise InputError(
            f"{name}:{path} cannot be imported: {one_line(error)}; name a module that is installed "
            "or lies in the current folder"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise InputError(f"{name}:{path} is a {type(found).__name__}, not a function")
    return found


def _made(text: str, function: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    try:
        made = function(*arguments, **options)
    except GrailError:
        raise
    except Exception as error:  # a function can raise anything
        raise InputError(f"{text} makes no network: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{text} makes a {type(made).__name__}, not a torch.nn.Module")
    return made


def read_shape(text: str) -> tuple[int, ...]:
    """Parses the shape of one sample, such as 3,224,224 or 3x224x224.

    Raises:
        InputError: another form.
    """
    sizes = text.replace("x", ",").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(
            "--input is the shape of one sample, such as 3,224,224 for channels, rows and "
            f"columns; got {text!r}"
        )
    return tuple(int(size) for size in sizes)


def example_of(model: Any) -> Tensor:
    """Returns a batch of random images of the size that a vision network names.

    Networks of transformers name it in their configuration, those of timm in `pretrained_cfg`.

    Raises:
        InputError: it names none.
    """
    shape = _of_transformers(model) or _of_timm(model)
    if shape is None:
        raise InputError(
            f"{type(model).__name__} does not say what it reads: give the shape of an image "
            "(--input 3,224,224), or a batch (example=torch.zeros(1, 3, 224, 224))"
        )
    return random_batch(shape)


def random_batch(shape: tuple[int, ...], samples: int = 5) -> Tensor:
    """Returns samples of a shape, drawn from a normal distribution, the same for each call."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(samples, *shape, generator=draw, dtype=torch.float32)


def _of_transformers(model: Any) -> tuple[int, ...] | None:
    config, size = getattr(model, "config", None), None
    if getattr(model, "main_input_name", None) == "pixel_values":
        size = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", None)
    if isinstance(size, int) and isinstance(channels, int):
        return channels, size, size
    if isinstance(size, (tuple, list)) and len(size) == 2 and isinstance(channels, int):
        return channels, int(size[0]), int(size[1])
    return None


def _of_timm(model: Any) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    return tuple(map(int, size)) if size else None
