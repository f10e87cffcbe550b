"""A Gram call on a GPU: cut into parts that kernels can walk, and served by one of the kernels.

A kernel is a module with two functions:

    takes(part) -> bool               whether it can serve calls of that form
    add(plan, parts, config) -> None  adds to the plan what it launches for each part of a call

A part has x and gate [E, outer, inner, H], mask [outer * inner] uint8, weights [outer * inner] fp32
and offsets on the GPU. The launch table lists kernels by name, the fastest first; the first that
takes a call serves it. "formed" is none of them: it stores silu(gate)·up, which the row of ordinary
activations then serves. Launches go through the plan only, and what they need in between is the
plan's scratch: the plan runs them again for other calls.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from grail_kernels import gram_gate, gram_halves, gram_tma, gram_triton, gram_wide, tuning
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_plan import Plan

# By the names of the launch table.
KERNELS: dict[str, ModuleType] = {
    tuning.EVERY_CALL: gram_triton,
    "tma": gram_tma,
    "halves": gram_halves,
    "wide": gram_wide,
}


def plan_of(call: GramCall) -> Plan:
    """The launches for a checked call with offsets, if any, on the GPU."""
    plan = Plan(call)
    if call.x.numel() and call.out.numel():
        batch = call.as_batch()
        _add(plan, list(_parts(batch)) if batch.offsets is None else [_ragged(batch)])
    return plan


def _add(plan: Plan, parts: list[GramCall]) -> None:
    """Adds the launches for the parts of a call, all by the kernel that suits the first."""
    config = config_of(parts[0])
    if config.kernel == tuning.FORMED:
        for part in parts:
            _add(plan, [gram_gate.form(plan, part, config)])
        return
    KERNELS[config.kernel].add(plan, parts, config)


def config_of(part: GramCall) -> tuning.GramConfig:
    """The launch of the first kernel in the table's row that takes a call."""
    gated = part.gate is not None
    if part.gate is not None and part.gate.stride() != part.x.stride():
        return tuning.FORMING
    launches = tuning.gram_launches(
        part.x.dtype,
        part.x.shape[-1],
        weighted=part.weights is not None,
        gated=gated,
        aligned=_is_aligned(part.x),
        architecture=tuning.architecture_of(part.out.device),
    )
    return next(config for config in launches if _takes(config, part))


def _takes(config: tuning.GramConfig, part: GramCall) -> bool:
    """Returns whether that launch can serve a call."""
    if config.kernel == tuning.FORMED:
        return part.gate is not None
    return bool(KERNELS[config.kernel].takes(part))


def _ragged(batch: GramCall) -> GramCall:
    """The one part of a call with offsets: each expert sees all tokens and takes its own."""
    return _flat(batch, lambda x: x.expand(batch.out.shape[0], 1, -1, -1))


def _parts(batch: GramCall) -> Iterator[GramCall]:
    """A flat call for each launch: views that a kernel can walk, of no more tokens than suit it."""
    shape = _mergeable_shape(*batch.activations.values())
    if shape is None:
        for index in range(batch.x.shape[1]):
            yield from _parts(
                batch.at((slice(None), index), "x", "gate").at(index, *batch.per_token)
            )
        return
    flat = _flat(batch, lambda x: x.view(shape))
    for part, tokens in _launches(flat.x):
        yield flat.at(part, "x", "gate").at(tokens, *flat.per_token)


def _flat(batch: GramCall, view: Callable[[Tensor], Tensor]) -> GramCall:
    """The call with x and gate as `view` makes them, [E, outer, inner, H], and flat tokens [T]."""
    return batch._replace(
        x=view(batch.x),
        gate=None if batch.gate is None else view(batch.gate),
        mask=None if batch.mask is None else batch.mask.reshape(-1).view(torch.uint8),
        weights=None if batch.weights is None else batch.weights.reshape(-1).float(),
    )


def _launches(x: Tensor) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """The index into `x` [E, outer, inner, H] of each launch, and the slice of its tokens."""
    _, outer, inner, _ = x.shape
    most = tuning.LAUNCHED_TOKENS
    each = max(1, most // inner)
    for first in range(0, outer, each):
        of_outer = slice(first, min(first + each, outer))
        for start in range(0, inner, most):  # more than one only where `each` is 1
            of_inner = slice(start, min(start + most, inner))
            end = (of_outer.stop - 1) * inner + of_inner.stop
            yield (slice(None), of_outer, of_inner), slice(first * inner + start, end)


def _mergeable_shape(*activations: Tensor) -> tuple[int, int, int, int] | None:
    """[E, outer, inner, H] such that all [E, ..., H] have that view; None if more are needed."""
    x = activations[0]
    matrices, channels = x.shape[0], x.shape[-1]
    tokens = x.numel() // (matrices * channels)
    for outer in (1, x.shape[1]):
        shape = (matrices, outer, tokens // outer, channels)
        try:
            for tensor in activations:
                tensor.view(shape)
        except RuntimeError:
            continue
        return shape
    return None


def _is_aligned(x: Tensor) -> bool:
    """Returns whether a kernel can read 16 bytes of `x` [E, outer, inner, H] at once."""
    _, _, inner, channels = x.shape
    run = channels if x.stride(3) == 1 else inner if x.stride(2) == 1 else 1
    lengths = (run, *(stride for stride in x.stride() if stride != 1))
    return x.data_ptr() % 16 == 0 and all(length % 16 == 0 for length in lengths)
