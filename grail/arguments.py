"""Checks of the arguments of public calls; other kinds are refused by the name of their type."""

import difflib
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import nn

from grail.errors import InputError, one_line
from grail_kernels import check_kind, kind_of

_SEEDS = 2**63  # of torch.Generator
# Attributes of the layers of libraries for quantisation.
_QUANTISED = ("qweight", "W_q", "_packed_params", "weight_fake_quant", "weight_scale_inv")


def require_model(model: object) -> None:
    """Raises InputError unless `model` is a network."""
    check_kind("model", model, nn.Module, "a torch.nn.Module")


def require_language_model(model: Any) -> None:
    """Raises InputError unless `model` is a causal language model of transformers."""
    require_model(model)
    if not (hasattr(model, "config") and hasattr(model, "get_output_embeddings")):
        raise InputError(
            f"model must be a causal language model of transformers; got {kind_of(model)}"
        )


def require_batches(batches: object) -> None:
    """Raises InputError for one batch, or anything else that is no iterable of batches."""
    try:
        several = not isinstance(batches, (torch.Tensor, Mapping, str))
        iter(cast("Iterable[object]", batches))
    except TypeError:
        several = False
    if not several:
        kind = type(batches).__name__
        raise InputError(f"batches must be a list, or any iterable, of batches; got one {kind}")


def require_dense(name: str, tensor: torch.Tensor) -> None:
    """Raises InputError for a tensor that is sparse, nested or on the meta device."""
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise InputError(f"{name} must be a dense (strided) tensor; got {kind}: make it dense")
    if tensor.is_meta:
        raise InputError(f"{name} is on the meta device, where tensors hold no values; load it")


def require_switches(**switches: object) -> None:
    """Raises InputError for a value that is neither True nor False."""
    for name, value in switches.items():
        check_kind(name, value, bool, "True or False")


def require_whole(name: str, value: object, least: int) -> None:
    """Raises InputError unless `value` is a whole number ≥ `least`."""
    if not is_whole(value) or value < least:
        raise InputError(f"{name} must be a whole number ≥ {least}; got {value!r}")


def require_seed(value: object) -> None:
    """Raises InputError unless `value` is a seed of torch's generators."""
    require_whole("seed", value, 0)
    if cast("int", value) >= _SEEDS:
        raise InputError(f"seed must be less than 2**63; got {value!r}")


def require_number(name: str, value: object) -> None:
    """Raises InputError unless `value` is a number."""
    if not is_number(value):
        raise InputError(f"{name} must be a number; got {kind_of(value)}")


def is_whole(value: object) -> TypeGuard[int]:
    """Returns whether a value is an integer of Python or numpy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Returns whether a value is a real number of Python or numpy, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Returns a scalar or array of numpy, or a number such as a fraction, as Python's own.

    Anything else is returned unchanged, also a number too large for a float.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        with suppress(OverflowError):
            return float(value)
    return value


def as_path(name: str, value: object) -> Path:
    """Returns a path given as a string or a path."""
    check_kind(name, value, (str, os.PathLike), "a path")
    if not str(value) or "\0" in str(value):
        raise InputError(f"{name} must be a path; got {value!r}")
    return Path(str(value))


def is_quantised(module: nn.Module) -> bool:
    """Returns whether a layer stores its weight in a quantised form."""
    return any(hasattr(module, mark) for mark in _QUANTISED)


def require_usable(device: torch.device | str, name: str = "device") -> torch.device:
    """Returns a device of this machine; raises InputError for any other."""
    check_kind(name, device, (str, torch.device), "the name of a device, such as 'cuda'")
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        return torch.empty(0, dtype=torch.float32, device=found).device
    except (RuntimeError, AssertionError) as error:
        reason = _why_not(str(device), error)
        raise InputError(
            f"device {str(device)!r} cannot be used here: {reason}; choose cpu"
        ) from error


def _why_not(device: str, error: Exception) -> str:
    """Returns the reason why a device cannot be used, explained for GPUs."""
    kind, _, index = device.partition(":")
    if kind not in ("cuda", "gpu"):
        return one_line(error).split(". ")[0]
    if kind == "gpu":
        return "torch calls a GPU cuda"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built for the CPU alone; install a build for the GPU"
    count = torch.cuda.device_count()
    if not count:
        return f"torch sees no GPU or no driver for one ({one_line(error).split('. ')[0]})"
    if index.isdecimal() and int(index) >= count:
        return f"there are {count} GPUs, cuda:0 to cuda:{count - 1}"
    return one_line(error)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a question with the known name nearest to an unknown one; "" if none is near."""
    in_any_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), in_any_case, n=1)
    return f"did you mean {in_any_case[near[0]]!r}? " if near else ""


def as_paths(name: str, paths: object) -> list[Path]:
    """Returns the paths of a list."""
    check_kind(name, paths, (list, tuple), "a list of paths")
    return [as_path(name, path) for path in cast("Sequence[object]", paths)]
