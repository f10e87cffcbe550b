"""The choice of an implementation: Triton where it can run, its torch twin everywhere."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from grail_kernels.arguments import check_tensors
from grail_kernels.errors import BackendError, InputError

BACKENDS = ("auto", "torch", "triton")
_OLDEST_CAPABILITY = (8, 0)  # bf16 tensor cores


def interpreting() -> bool:
    """Returns whether Triton interprets its kernels, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve_backend(x: Tensor, backend: str = "auto") -> str:
    """Returns the backend that a call on `x` uses: "torch" or "triton".

    Args:
        x: the activations.
        backend: "auto" (Triton on a GPU that it supports, else torch), "torch" or "triton".

    Raises:
        InputError: `backend` is none of these.
        BackendError: "triton" was asked for and cannot run on `x`.
    """
    check_tensors(x=x)
    check_backend(backend)
    if backend == "torch":
        return "torch"
    obstacle = _triton_obstacle(x)
    if backend == "triton" and obstacle:
        raise BackendError(f"backend='triton' cannot run: {obstacle}; use backend='auto'")
    if backend == "triton" or (not obstacle and x.is_cuda):
        return "triton"
    return "torch"


def check_backend(backend: str) -> None:
    """Refuses what names no backend."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


@functools.cache
def _has_triton() -> bool:
    """Returns whether Triton is installed; cached, as the search takes as long as a small call."""
    return importlib.util.find_spec("triton") is not None


def _triton_obstacle(x: Tensor) -> str:
    """The reason that Triton cannot run on `x`, or "" if it can."""
    if not _has_triton():
        return "triton is not installed"
    if interpreting():
        return ""
    if not x.is_cuda:
        return f"the tensor is on {x.device}, not on a GPU"
    if (
        torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) < _OLDEST_CAPABILITY
    ):
        return f"{torch.cuda.get_device_name(x.device)} is older than compute capability 8.0"
    return ""
