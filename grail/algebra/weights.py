"""Consumers given as a tensor or as a layer."""

import math
from typing import Any

from torch import Tensor, nn

from grail.algebra.kinds import MAPS, as_matrix, as_stored, require_plain
from grail.errors import InputError, ModelError
from grail_kernels import as_tensor


def consumer_matrix(weight: object) -> Tensor:
    """Returns the weight [O, H] of a consumer.

    Args:
        weight: a tensor or numpy array [O, H]; or a Linear, a Conv1D of transformers, or a
            convolution of one tap without groups.

    Raises:
        InputError: anything else.
    """
    if not isinstance(weight, nn.Module):
        return as_tensor("a consumer", weight)
    layer: Any = weight
    try:
        require_plain("a consumer", layer)
    except ModelError as error:
        raise InputError(f"{error}; or give its weight as a tensor [O, H]") from error
    found = as_matrix(layer, layer.weight.detach())
    if getattr(layer, "groups", 1) != 1 or math.prod(found.shape[2:]) != 1:
        raise InputError(
            f"a convolution that is a consumer must have one tap and no groups; got a weight "
            f"{tuple(found.shape)} in {layer.groups} groups: grail.compress fits every tap"
        )
    return found.flatten(1)


def as_given(matrix: Tensor, weight: object) -> Tensor:
    """Returns a rewritten matrix [O, K] in the form in which its layer stores a weight."""
    if not isinstance(weight, nn.Module):
        return matrix
    if isinstance(weight, MAPS):
        matrix = matrix.reshape(*matrix.shape, *weight.weight.shape[2:])
    return as_stored(weight, matrix).contiguous()
