"""NVIDIA's Model Optimizer: the Hessians of its GPTQ are summed up by grail's kernels.

from grail.adapters import modelopt
with modelopt.installed():
    mtq.quantize(model, config, forward_loop)
"""

import numbers
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import grail_kernels as gk
from grail.adapters._library import Library, attached
from grail.algebra.sums import as_activations
from grail.errors import InputError

LIBRARY = Library("nvidia-modelopt", ("0.47.0",))
_calib_utils: Any = LIBRARY.module("modelopt.torch.quantization.utils.calib_utils")
LIBRARY.attribute(_calib_utils, "update_hessian")


def install() -> Callable[[], None]:
    """Attaches to Model Optimizer in this process; returns a function that detaches.

    Raises:
        AdapterError: it is attached already, or this version lacks what it attaches to.
    """
    return LIBRARY.replace(_calib_utils, "update_hessian", update_hessian)


def installed() -> AbstractContextManager[None]:
    """Attaches to Model Optimizer inside of a `with` block; see `install`."""
    return attached(install)


def update_hessian(input: Tensor, hessian: Tensor, n_samples: int) -> tuple[Tensor, int]:
    """Adds tokens to the running mean H = 2/n·Σ x xᵀ: `calib_utils.update_hessian`.

    H ← n/(n + T)·H + 2/(n + T)·Σ x xᵀ, for T tokens. The product is packed, a temporary of
    2·C·(C + 256) bytes where Model Optimizer's has 4·C²; nothing is kept between calls.

    Args:
        input: [..., C], read in its own dtype.
        hessian: [C, C] fp32, written in place, on any device.
        n_samples: n, the number of tokens that it is of.

    Returns:
        `hessian` and n + T; both as they came where T is 0, as for an expert without tokens.

    Raises:
        InputError: shapes, dtypes or a count that do not fit; nothing was changed.
    """
    x = gk.as_tensor("input", input).detach()
    if not x.dim() or not x.shape[-1]:
        raise InputError(f"input must be [..., C]; got {tuple(x.shape)}")
    if not isinstance(n_samples, numbers.Real) or n_samples < 0:
        raise InputError(f"n_samples must be a number of tokens ≥ 0; got {n_samples!r}")
    channels, tokens = x.shape[-1], x.shape[:-1].numel()
    if not tokens:
        return hessian, n_samples
    x = as_activations(x)
    packed = torch.zeros(gk.packed_numel(channels), dtype=torch.float32, device=x.device)
    gk.gram_(packed, x)
    total = n_samples + tokens
    there = packed.to(gk.as_tensor("hessian", hessian).device)
    gk.unpack(there, channels, hessian, alpha=2 / total, beta=n_samples / total)
    return hessian, total
