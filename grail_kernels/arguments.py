"""The kinds of arguments that public calls take; others are refused by the name of their type."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grail_kernels.errors import InputError


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuses an argument that is of none of `kinds`, which `wanted` puts into words."""
    if not isinstance(value, kinds):
        raise InputError(f"{name} must be {wanted}; got {kind_of(value)}")


def kind_of(value: object) -> str:
    """Returns the name of a value's type; None is None."""
    return "None" if value is None else type(value).__name__


def check_tensors(**tensors: object) -> None:
    """Refuses what is no tensor."""
    for name, value in tensors.items():
        check_kind(name, value, Tensor, "a torch.Tensor")


def check_optional(**tensors: object) -> None:
    """Refuses what is neither None nor a tensor."""
    check_tensors(**{name: value for name, value in tensors.items() if value is not None})


def check_count(name: str, value: object) -> None:
    """Refuses what is no integer; sizes that torch traces are integers."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, torch.SymInt)):
        raise InputError(f"{name} must be an integer; got {kind_of(value)}")


def as_tensor(name: str, value: object) -> Tensor:
    """Returns a tensor as it is, a numpy array copied into one; refuses anything else."""
    if isinstance(value, Tensor):
        return value
    check_kind(name, value, np.ndarray, "a torch.Tensor or a numpy array")
    return _copied(name, value)


def as_vector(name: str, values: object) -> Tensor:
    """Numbers as a tensor: a tensor itself, a numpy array, or a list, tuple or range of numbers."""
    if isinstance(values, Tensor):
        return values.detach()
    numbers = isinstance(values, (np.ndarray, Sequence)) and not isinstance(values, (str, bytes))
    if not numbers:
        raise InputError(
            f"{name} must be a tensor, a numpy array or a list of numbers; got {kind_of(values)}"
        )
    return _copied(name, values)


def _copied(name: str, values: Any) -> Tensor:
    # By way of numpy, whose dtypes do not follow torch's default. A copy, for torch takes no
    # negative strides and warns of arrays that cannot be written to.
    try:
        return torch.from_numpy(np.array(values, order="C"))
    except (TypeError, ValueError) as error:
        held = getattr(values, "dtype", "a list of something else")
        raise InputError(
            f"{name} must hold numbers that torch has a dtype for; got {held}"
        ) from error
