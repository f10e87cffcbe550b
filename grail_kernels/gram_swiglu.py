"""Gram matrix of silu(gate) * up, for callers that hold the two halves of a gated MLP.

The hidden activation that the consumer would read is formed on the way into the products and never
stored: 2*T*H*itemsize bytes of memory and as much traffic less than `gram_` of it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from grail_kernels import checks
from grail_kernels.arguments import check_optional, check_tensors
from grail_kernels.backend import check_backend, resolve_backend
from grail_kernels.errors import InputError
from grail_kernels.gram import add_gram, block_indices, block_tokens, check_gram
from grail_kernels.operators import operator


def gram_swiglu_(
    out: Tensor,
    gate: Tensor,
    up: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
    nonfinite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add the Gram matrix of silu(gate) * up to a packed accumulator, in place.

    Args:
        out: [packed_numel(H)] fp32, contiguous.
        gate: [..., H] bf16, fp16 or fp32, any strides.
        up: like `gate`, of the same shape and dtype. Where the two have the same strides a GPU
            forms the activation inside the kernel, else block by block before it.
        mask, weights, sums, nonfinite, backend: as in `gram_`.

    Returns:
        `out`.

    Raises:
        InputError: a dtype, shape or device does not fit, or a written tensor overlaps another
            argument. Nothing was changed.
        BackendError: the backend asked for cannot run. Nothing was changed.

    Numerics:
        silu and the product are rounded to the dtype of `gate`, each, as eager models round them.
    """
    check_tensors(out=out, gate=gate, up=up)
    check_optional(mask=mask, weights=weights, sums=sums, nonfinite=nonfinite)
    check_backend(backend)
    _gram_swiglu_op(out, gate.detach(), up.detach(), mask, weights, sums, nonfinite, backend)
    return out


@operator(
    "grail::gram_swiglu_",
    mutates_args=("out", "sums", "nonfinite"),
    schema="(Tensor(a!) out, Tensor gate, Tensor up, Tensor? mask, Tensor? weights, "
    'Tensor(b!)? sums, Tensor(c!)? nonfinite, str backend="auto") -> ()',
)
def _gram_swiglu_op(
    out: Tensor,
    gate: Tensor,
    up: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    backend: str = "auto",
) -> None:
    _check(out, gate, up, mask, weights, sums, nonfinite)
    checks.check_no_overlap(
        written={"out": out, "sums": sums, "nonfinite": nonfinite},
        read={"gate": gate, "up": up, "mask": mask, "weights": weights},
    )
    backend = resolve_backend(up, backend)
    if backend == "triton" and gate.stride() == up.stride():
        from grail_kernels.gram_triton import launch_gram

        launch_gram(out, up[None], mask, weights, sums, nonfinite, gate[None])
        return
    for index in block_indices(up.shape[:-1], block_tokens(up.shape[-1])):
        add_gram(
            out,
            F.silu(gate[index]) * up[index],
            None if mask is None else mask[index],
            None if weights is None else weights[index],
            sums,
            nonfinite,
            backend,
        )


@_gram_swiglu_op.register_fake
def _(
    out: Tensor,
    gate: Tensor,
    up: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    backend: str = "auto",
) -> None:
    _check(out, gate, up, mask, weights, sums, nonfinite)


def _check(
    out: Tensor,
    gate: Tensor,
    up: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
) -> None:
    checks.check_activations("gate", gate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise InputError(
            "gate and up must have one shape and dtype; "
            f"got {tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        )
    check_gram(out, up, mask, weights, sums, nonfinite)
    checks.check_devices(gate=gate, up=up)
