"""The loss of a network: how far its output is from that of the dense network.

Where a model returns logits, the loss is the Kullback-Leibler divergence of the dense network's
predictions from the narrow network's. Elsewhere it is the squared error of the output relative to
the dense output. No labels, no gradients.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grail.calibrate.batches import Batch, model_inputs
from grail.calibrate.samples import (
    Change,
    Order,
    changed_arguments,
    find_orders,
    first_tensor,
    masks_of,
)
from grail.errors import InputError, ModelError
from grail.runtime.clock import Clock

# Values of an output that are in fp32 at once: 64 MiB.
FP32_VALUES = 1 << 24


class NetworkLoss:
    """The dense network's outputs for a few batches, and the network's distance from them later.

    Args:
        model: dense at first.
        batches: on which the loss is measured.
        clock: phase "probe".
        trusted: whether the architecture is known to keep samples along the first axis.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], clock: Clock, trusted: bool):
        self._model, self._clock = model, clock
        device = next(model.parameters()).device
        with clock("probe"):
            self._inputs = [model_inputs(model, batch, device) for batch in batches]
            self._order = Order() if trusted else self._order_of_output()
            self._dense = [self._output(*inputs) for inputs in self._inputs]
        if not all(bool(dense.values.isfinite().all()) for dense in self._dense):
            raise ModelError("the dense network's output is not finite")
        if self._dense and not any(dense.values.numel() for dense in self._dense):
            raise InputError("the batches to probe with, the first ones, hold no token that counts")

    def measure(self) -> float:
        """Returns the mean divergence per token or sample, or the relative squared error."""
        found = size = 0.0
        with self._clock("probe"):
            for inputs, dense in zip(self._inputs, self._dense, strict=True):
                for expected, got in zip(dense.rows(), self._output(*inputs).rows(), strict=True):
                    if dense.logits:
                        found += divergence(expected, got)
                        size += len(expected)
                    else:
                        found += _squares(got.float() - expected.float())
                        size += _squares(expected)
        if not math.isfinite(found):
            raise ModelError("the network's output is not finite where a site is narrow")
        # By rounding, the divergence of equal predictions may be negative.
        return max(0.0, found / size) if size else 0.0

    def _order_of_output(self) -> Order:
        """Returns the order of the tokens in the network's output, if a mask needs it."""
        for args, kwargs in self._inputs:
            mask = masks_of(self._model, args, kwargs).of_output
            if mask is None or len(mask) < 2:
                continue
            observe = functools.partial(self._changed_output, args, kwargs)
            first = find_orders(observe, len(mask))["output"]
            if first is None:
                raise ModelError(
                    "which sample each token of the network's output belongs to could not be "
                    "found out by replacing samples along the first axis; give batches without "
                    "padding, and without a mask"
                )
            return Order(first)
        return Order()

    def _changed_output(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Change
    ) -> dict[str, Tensor]:
        names = inspect.signature(self._model.forward).parameters
        args, kwargs = changed_arguments(names, args, kwargs, change)
        return {"output": self._compared(self._model(*args, **kwargs))[0]}

    def _output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Output":
        tensor, classes = self._compared(self._model(*args, **kwargs))
        mask = masks_of(self._model, args, kwargs).of_output
        if mask is not None:
            tensor = self._order.by_sample(tensor, len(mask))
            if mask.shape == tensor.shape[:-1]:
                tensor = tensor[mask]
        return _Output(tensor.reshape(-1, tensor.shape[-1]), classes)

    def _compared(self, output: Any) -> tuple[Tensor, bool]:
        """Returns the tensor of an output that is compared, and whether it is logits."""
        logits = getattr(output, "logits", None)
        tensor = first_tensor(output if logits is None else logits)
        if tensor is None:
            raise ModelError(f"{type(self._model).__name__} returns no tensor to compare")
        # One class is no prediction; in maps of classes [B, classes, H, W] they are not last.
        return tensor, logits is not None and tensor.shape[-1] > 1 and tensor.dim() < 4


@dataclass(frozen=True)
class _Output:
    """[N, D], of samples or of tokens that count; `logits`: whether they are logits."""

    values: Tensor
    logits: bool

    def rows(self) -> Sequence[Tensor]:
        """Returns chunks of rows, which limit the memory that fp32 copies take."""
        return self.values.split(max(1, FP32_VALUES // self.values.shape[-1]))


def divergence(dense: Tensor, narrow: Tensor) -> float:
    """Returns Σ KL(dense ‖ narrow) over rows of logits [N, D], in nats."""
    p, q = (logits.float().log_softmax(-1) for logits in (dense, narrow))
    return F.kl_div(q, p, reduction="sum", log_target=True).item()


def _squares(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square().item()
