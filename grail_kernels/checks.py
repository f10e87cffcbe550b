"""Checks of the kernels' arguments; all run before anything is written."""

import torch
from torch import Tensor

from grail_kernels.arguments import check_tensors
from grail_kernels.errors import InputError

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_activations(name: str, x: Tensor) -> None:
    """Refuses activations that are not a strided [..., H] tensor of a supported dtype."""
    check_tensors(**{name: x})
    if x.dtype not in ACTIVATION_DTYPES:
        raise InputError(
            f"{name} must be bfloat16, float16 or float32; got {x.dtype}; convert it first"
        )
    if x.layout != torch.strided:
        raise InputError(f"{name} must be a dense (strided) tensor; got layout {x.layout}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise InputError(
            f"{name} must be [..., channels] with at least 1 channel; got {tuple(x.shape)}"
        )


def check_vector(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuses an in-place target that is not contiguous, of this dtype and of this shape."""
    if tensor.dtype != dtype:
        raise InputError(f"{name} must be {dtype}; got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise InputError(f"{name} is updated in place and must be contiguous")


def check_per_token(tokens: tuple[int, ...], mask: Tensor | None, weights: Tensor | None) -> None:
    """Refuses a mask or weights that are not of the shape of the tokens, one entry for each."""
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask must be torch.bool (True = the token counts); got {mask.dtype}")
    if weights is not None and not weights.is_floating_point():
        raise InputError(f"weights must be floating point; got {weights.dtype}")
    for name, tensor in (("mask", mask), ("weights", weights)):
        if tensor is not None and tensor.shape != tokens:
            raise InputError(
                f"{name} must have one entry per token, shape {tuple(tokens)}; "
                f"got {tuple(tensor.shape)}"
            )


def check_devices(**tensors: Tensor | None) -> None:
    """Refuses tensors that are not all on one device."""
    found = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(found.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise InputError(f"all tensors must be on one device; got {listing}")


def check_no_overlap(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """Refuses a written tensor that shares memory with any other argument."""
    everything = [(n, t) for n, t in (*written.items(), *read.items()) if t is not None]
    targets = [(n, t) for n, t in written.items() if t is not None]
    for position, (name, target) in enumerate(targets):
        for other_name, other in everything[position + 1 :]:
            if _share_memory(target, other):
                raise InputError(
                    f"{name} is updated in place and overlaps {other_name} in memory; "
                    "give it a tensor of its own"
                )


def _share_memory(first: Tensor, second: Tensor) -> bool:
    """Returns whether the address ranges of two tensors overlap."""
    if first.device != second.device or not first.numel() or not second.numel():
        return False
    first_start, first_end = _address_range(first)
    second_start, second_end = _address_range(second)
    return first_start < second_end and second_start < first_end


def _address_range(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + reach(tensor)


def reach(tensor: Tensor) -> int:
    """The bytes from the first element of a tensor to the end of its last; 0 without elements."""
    if not tensor.numel():
        return 0
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()
