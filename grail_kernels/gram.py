"""Streaming symmetric Gram accumulation: G += Σ w x xᵀ over tokens, lower triangle only.

With X [T, H] the update is the BLAS routine syrk, G += Xᵀ diag(w) X. Only the strips of
`grail_kernels.tiles` are touched: T·H·(H + STRIP_ROWS) FLOPs of a full product's 2·T·H², and half
of its accumulator traffic. Products of 16-bit inputs are exact in fp32; the sums are fp32.

One operator, `torch.ops.grail.gram_`, serves four public functions: a matrix, a batch of matrices,
a batch of uneven experts, and the hidden activation of a gated MLP. Where nothing compiles, traces
or watches a call, they skip it.
"""

from typing import Any

from torch import Tensor

from grail_kernels.arguments import check_optional, check_tensors
from grail_kernels.backend import check_backend
from grail_kernels.errors import InputError
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_serve import serve
from grail_kernels.operators import mark_written, needs_operator, operator


def gram_(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
    nonfinite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds the Gram matrix of `x` to a packed accumulator, in place.

    A token whose mask is False or whose weight is 0 does not take part, whatever it contains.

    Args:
        out: [packed_numel(H)] fp32, contiguous; see `grail_kernels.tiles`.
        x: [..., H] bf16, fp16 or fp32 activations, any strides; never copied as a whole.
        mask: [...] bool, True where the token counts. All count if None.
        weights: [...] floating point, the weight of each token. 1 if None.
        sums: [H] fp32, += Σ w x.
        nonfinite: [H] int64, += number of NaN or infinite values of each channel, over the tokens
            that take part. They still enter `out` and `sums`; the caller has to refuse them.
        backend: "auto", "torch" or "triton"; see `resolve_backend`.

    Returns:
        `out`.

    Raises:
        InputError: a dtype, shape or device does not fit, or a written tensor overlaps another
            argument. Nothing was changed.
        BackendError: the backend asked for cannot run. Nothing was changed.
    """
    return _run(GramCall(out, x, mask, weights, sums, nonfinite, backend=backend))


def gram_batched_(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
    nonfinite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds the Gram matrix of each x[e] to its packed accumulator out[e], in place.

    A matrix of 64 to 256 channels has a few tiles, which leave a GPU idle; a batch of them is one
    launch. The heads of [tokens, heads, head_dim] are batched in place, by `x.transpose(0, 1)`.

    Args:
        out: [E, packed_numel(H)] fp32, contiguous.
        x: [E, ..., H], else as in `gram_`.
        mask, weights: [...] as in `gram_`, shared by all matrices.
        sums: [E, H] fp32, += Σ w x.
        nonfinite: [E, H] int64, += number of NaN or infinite values over the tokens that take part.
        backend: as in `gram_`.

    Returns and raises: as `gram_`.
    """
    call = GramCall(out, x, mask, weights, sums, nonfinite, backend=backend)
    return _run(call, "matrices")


def gram_ragged_(
    out: Tensor,
    x: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    nonfinite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds the Gram matrix of every expert's tokens to its packed accumulator, in place.

    The tokens are sorted by expert: expert e owns rows offsets[e] to offsets[e + 1]. One launch
    serves all experts, so that those of a few tokens do not leave a GPU idle one after another.

    Args:
        out: [E, packed_numel(H)] fp32, contiguous.
        x: [T, H] bf16, fp16 or fp32, any strides.
        offsets: [E + 1] int64, never decreasing, from 0 to at most T. They are checked on the host:
            pass them on the CPU, or the call waits for the GPU.
        sums, nonfinite: [E, H] as in `gram_batched_`.
        backend: as in `gram_`.

    Returns:
        `out`. The accumulator of an expert without tokens is left as it is.

    Raises: as `gram_`; InputError also where the offsets decrease or leave [0, T].
    """
    check_tensors(offsets=offsets)
    call = GramCall(out, x, None, None, sums, nonfinite, None, offsets, backend)
    return _run(call, "experts")


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
    """Adds the Gram matrix of silu(gate)·up to a packed accumulator, in place.

    The hidden activation of a gated MLP is formed on the way into the products and never stored:
    2·T·H·itemsize bytes of memory and of traffic less than `gram_` of it.

    Args:
        out: [packed_numel(H)] fp32, contiguous.
        gate: [..., H] bf16, fp16 or fp32, any strides.
        up: like `gate`, of the same shape and dtype. Where the two have the same strides a GPU
            forms the activation inside the kernel, else block by block before it.
        mask, weights, sums, nonfinite, backend: as in `gram_`.

    Returns and raises: as `gram_`.

    Numerics:
        silu and the product are rounded to the dtype of `gate`, each, as eager models round them.
    """
    check_tensors(gate=gate)
    return _run(GramCall(out, up, mask, weights, sums, nonfinite, gate, backend=backend))


def _run(call: GramCall, *leading: str) -> Tensor:
    """Serves a call if `out` has the leading dimensions and a last one of packed elements."""
    written = (call.out, call.sums, call.nonfinite)
    through_operator = needs_operator(call.tensors, written)
    if through_operator or call.out is None or call.x is None:
        check_tensors(out=call.out, **call.activations)
        check_optional(
            **call.per_token, sums=call.sums, nonfinite=call.nonfinite, offsets=call.offsets
        )
    check_backend(call.backend)
    axes = (*leading, "packed_numel(channels)")
    if call.out.dim() != len(axes):
        raise InputError(
            f"out must have shape [{', '.join(axes)}], a packed accumulator for each matrix; got "
            f"{tuple(call.out.shape)}: allocate it with torch.zeros(..., dtype=torch.float32)"
        )
    if through_operator:
        gate = None if call.gate is None else call.gate.detach()
        _gram_op(*call._replace(x=call.x.detach(), gate=gate))
    else:
        serve(call)
        mark_written(written)
    return call.out


@operator(
    "grail::gram_",
    mutates_args=("out", "sums", "nonfinite"),
    schema="(Tensor(a!) out, Tensor x, Tensor? mask, Tensor? weights, Tensor(b!)? sums, "
    "Tensor(c!)? nonfinite, Tensor? gate=None, Tensor? offsets=None, "
    'str backend="auto") -> ()',
)
def _gram_op(*arguments: Any) -> None:
    """`torch.ops.grail.gram_`: opaque to torch.compile, which sees only what it mutates.

    `GramCall` names the arguments; any of them go together.
    """
    call = GramCall(*arguments)
    call.check_forms()  # of what has no addresses as well
    serve(call)


@_gram_op.register_fake
def _(*arguments: Any) -> None:
    GramCall(*arguments).check_forms()
