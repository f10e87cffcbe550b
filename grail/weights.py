"""Weights of layers as matrices [outputs, inputs, ...], whatever order a layer stores them in."""

import math
from typing import Any

from torch import Tensor, nn

from grail.errors import InputError
from grail_kernels.arguments import as_tensor, kind_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def transposed(module: Any) -> bool:
    """Transformers' Conv1D, of GPT-2: a linear layer that stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_plain(module: Any) -> bool:
    """Whether a layer is a Linear, a Conv1D of transformers or a convolution, and no subclass."""
    return type(module) in (nn.Linear, *CONVOLUTIONS) or transposed(module)


def matrix(module: Any) -> Tensor:
    """A layer's weight as [outputs, inputs, ...]."""
    weight = module.weight.detach()
    return weight.T if transposed(module) else weight


def consumer_matrix(weight: object) -> Tensor:
    """What a person gives as a consumer, as its weight [O, H].

    Args:
        weight: a tensor or numpy array [O, H]; or a Linear, a Conv1D of transformers, or a
            convolution of one tap without groups.

    Raises:
        InputError: anything else.
    """
    if not isinstance(weight, nn.Module):
        return as_tensor("a consumer", weight)
    if not is_plain(weight):
        raise InputError(
            f"a consumer must be a plain Linear, Conv1D or convolution; got {kind_of(weight)}: "
            "give its weight as a tensor [O, H]"
        )
    found = matrix(weight)
    if getattr(weight, "groups", 1) != 1 or math.prod(found.shape[2:]) != 1:
        raise InputError(
            f"a convolution that is a consumer must have one tap and no groups; got a weight "
            f"{tuple(found.shape)} in {weight.groups} groups: grail.compress fits every tap"
        )
    return found.flatten(1)


def as_given(matrix: Tensor, weight: object) -> Tensor:
    """A rewritten matrix [O, K] in the form in which its layer stores a weight."""
    if transposed(weight):
        return matrix.T.contiguous()
    if isinstance(weight, CONVOLUTIONS):
        return matrix.reshape(*matrix.shape, *weight.weight.shape[2:])
    return matrix
