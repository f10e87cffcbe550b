"""Calibration batches as the arguments of a model's forward."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from grail.arguments import require_dense
from grail.calibrate.embedding import check_token_ids
from grail.errors import InputError

Batch = Tensor | Sequence[Any] | Mapping[str, Any]


def model_inputs(
    model: nn.Module, batch: Batch, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of the model's forward, on a device.

    Raises:
        InputError: a batch that the model does not take.
    """
    args, kwargs = _arguments(batch)
    _require_samples(batch)
    signature = inspect.signature(model.forward)
    known = signature.parameters
    if isinstance(batch, Tensor) and "input_ids" in known:
        if batch.dim() != 2 or batch.is_floating_point():
            raise InputError(
                f"a batch of token ids must be integers [B, L]; "
                f"got {batch.dtype} {tuple(batch.shape)}"
            )
        args, kwargs = (), {"input_ids": batch}
    check_token_ids(model, kwargs or args)
    if kwargs.get("past_key_values") is not None:
        raise InputError(
            "a batch holds past_key_values, which the model would write to; leave them out"
        )
    if "use_cache" in known or "use_cache" in kwargs:
        kwargs = {**kwargs, "use_cache": False}
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{type(model).__name__} does not take this batch: {error}; a tuple holds the model's "
            "arguments in order, a mapping its keyword arguments; leave labels out"
        ) from error
    return on_device(args, device), on_device(kwargs, device)


def on_device(tree: Any, device: torch.device) -> Any:
    """Returns the same with tensors on a device, none of them of inference mode."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device)
        return tensor.clone() if tensor.is_inference() else tensor

    return tree_map_only(Tensor, moved, tree)


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return tuple(batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise InputError(
        "a batch must be a tensor (token ids [B, L], images [B, C, H, W]), a tuple of the "
        f"model's arguments, or a mapping of its keyword arguments; got {type(batch).__name__}"
    )


def _require_samples(batch: Batch) -> None:
    """Raises InputError for tensors that are not dense, or of which none has an axis of samples."""
    given = dict(batch) if isinstance(batch, Mapping) else batch
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        require_dense("a batch", tensor)
    if tensors and not any(tensor.dim() for tensor in tensors):
        raise InputError(
            "a batch must have its samples along the first axis of a tensor; got a tensor without "
            "axes"
        )
