"""Magnitude: the norm of everything that writes a channel, reads it, or both. Needs no data.

"magnitude" is the L2 norm of the producers' rows, "magnitude-l1" their L1 norm,
"magnitude-consumers" the L2 norm of the consumer's columns, "magnitude-both" that of all of them.

Source: Li et al., "Pruning filters for efficient ConvNets" (ICLR 2017): the L1 norm of the filters
that write a channel. With L2 norms, He et al., "Soft filter pruning" (IJCAI 2018).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grail.select import View, scores


def _read(view: View) -> Tensor:
    return view.consumer.float().T


def _both(view: View) -> Tensor:
    return torch.cat([view.rows, _read(view)], 1)


def _register(name: str, weights: Callable[[View], Tensor], order: int) -> None:
    scores(name)(lambda view: torch.linalg.vector_norm(weights(view), ord=order, dim=1))


_register("magnitude", lambda view: view.rows, 2)
_register("magnitude-l1", lambda view: view.rows, 1)
_register("magnitude-consumers", _read, 2)
_register("magnitude-both", _both, 2)
