"""The correction of a consumer whose producer keeps a selection of its channels: W_D G_DP.

With kept channels P and dropped ones D, the ridge's right-hand side needs only the dropped columns
of W [O, H] and the part of G that couples them to the kept ones: 2·O·D·K FLOPs instead of 2·O·H·K
for all rows. G_DP is gathered from the packed Gram a slice of dropped channels at a time, and a
library's GEMM adds the slice's product; neither a dense G (4·H² bytes) nor G_DP (4·D·K) is formed.

**fp32 on tensor cores.** A slice of G_DP is gathered as three bf16 that add up to it (8 + 8 + 8
bits, exact from 2⁻¹¹⁰ up), the smallest first, one below the other. A bf16 W is exact as it is, so
that one product of bf16 a slice has the quality of fp32:

    W_D G_DP ≈ Σ_slices [W W W] [G₃; G₂; G₁]

Tensor cores truncate when they accumulate, in proportion to the sum so far: small parts first, that
is as exact as G₁ alone. Between slices the result is added to in fp32, rounded to nearest. An fp16
or fp32 W has parts as well, W₂ with [G₂; G₁] and W₃ with G₁: five or six blocks where bf16 has
three. The fused Triton kernel of `absorb_triton` does the same without memory for a slice, but at
70 TFLOP/s of bf16 on an H100 where that chip's library runs at 735 to 815 (bench/results/gpu): the
launch table says where "auto" takes it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grail_kernels import arguments, checks, tiles, tuning
from grail_kernels._gather import gather
from grail_kernels.backend import check_backend, resolve_backend
from grail_kernels.errors import BackendError, InputError
from grail_kernels.operators import operator
from grail_kernels.precision import full_fp32
from grail_kernels.products import bf16_parts, has_tensor_cores

# Dropped channels that a product takes at a time: enough for a GEMM, few to allocate.
_DROPPED_ROWS = 1024

# The same where tensor cores sum: cut off every 16 products, sums of one sign lose 6 to 10 eps
# over 512 channels and 10 to 21 over 1024 (simulated; with the largest part first 36 over 512).
_TRUNCATED_ROWS = 512

# bf16 parts of an fp32 value.
_PARTS = 3


def absorb(
    weight: Tensor,
    gram: Tensor,
    keep: Tensor | Sequence[int],
    backend: str = "auto",
    *,
    drop: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the correction of a consumer for its dropped channels: W_D G_DP.

    Consumers that read the same channels are rows of one `weight`. Leading dimensions [E] of all
    tensors are a batch, such as a layer's experts.

    Args:
        weight: [O, H], floating point, any strides; with `drop` only the columns of those, [O, D].
        gram: the packed accumulator [packed_numel(H)], or a dense symmetric [H, H]; fp32 or fp64.
        keep: [K] int64, distinct channels; the columns of the result follow their order. A list,
            tuple, range or numpy array of integers is copied to the device of `weight`.
        backend: "auto", "torch" or "triton"; see `resolve_backend`. Triton multiplies in its own
            fused kernel, for a result of fp32, an fp32 gram and a weight of bf16, fp16 or fp32.
            "auto" leaves that to the library unless the launch table's row says "fused".
        drop: [D] int64, the rows of G in the order of the columns of `weight`. None takes all
            channels outside of `keep`, which are then checked: one read of a GPU. With `drop`
            nothing is read of a GPU and the caller answers for both; any two sets will do.
        dtype: of the products, their sums and the result, float32 or float64; None for that of
            `gram`.

    Returns:
        [O, K] in `dtype`. In fp32 each element is within 16 eps of Σ|w||g|.

    Raises:
        InputError: a dtype, shape or device does not fit, or `keep` repeats or leaves [0, H).
        BackendError: the backend asked for cannot run.

    FLOPs: 2·O·D·K, on tensor cores in fp32 three times that in bf16 (fp16: five, fp32: six).
    Memory besides W_D and the result: a slice of D' ≤ 1024 dropped channels, D'·K·itemsize bytes
    and D'·O·itemsize; on tensor cores in fp32 D' ≤ 512, 6·D'·(K + O). Fused: nothing.

    Source: Tang et al. (CPAL 2026, arXiv 2602.23795), with the identity on P split off:
        W G_:P = W_P G_PP + W_D G_DP.
    """
    arguments.check_tensors(weight=weight, gram=gram)
    arguments.check_optional(drop=drop)
    if not isinstance(keep, Tensor):
        keep = _as_channels(keep).to(weight.device)
    check_backend(backend)
    _check_dtype(dtype)
    return _absorb_op(weight.detach(), gram.detach(), keep, backend, drop, dtype)


def _as_channels(keep: object) -> Tensor:
    """A list or array of integers [K] as int64; other numbers stay, to be refused by dtype."""
    vector = arguments.as_vector("keep", keep)
    is_index = vector.dtype != torch.bool and not vector.is_floating_point()
    return vector.to(torch.int64) if is_index else vector


@operator(
    "grail::absorb",
    mutates_args=(),
    schema=(
        '(Tensor weight, Tensor gram, Tensor keep, str backend="auto", Tensor? drop=None, '
        "ScalarType? dtype=None) -> Tensor"
    ),
)
def _absorb_op(
    weight: Tensor,
    gram: Tensor,
    keep: Tensor,
    backend: str = "auto",
    drop: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.ops.grail.absorb`: opaque to torch.compile, which only sees the shape it gives."""
    _check(weight, gram, keep, drop, dtype)
    dtype = dtype or gram.dtype
    chosen = _resolve(weight, gram, backend, dtype)
    if drop is None:
        drop = _complement(keep, weight.shape[-1])
        weight = _columns(weight, drop)
    if chosen == "triton":
        from grail_kernels.absorb_triton import launch_absorb

        return launch_absorb(weight, gram, keep, drop)
    return _absorb_gathered(weight, gram, keep, drop, dtype)


@_absorb_op.register_fake
def _(
    weight: Tensor,
    gram: Tensor,
    keep: Tensor,
    backend: str = "auto",
    drop: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check(weight, gram, keep, drop, dtype)
    return gram.new_empty(*weight.shape[:-1], keep.shape[-1], dtype=dtype or gram.dtype)


def _resolve(weight: Tensor, gram: Tensor, backend: str, dtype: torch.dtype) -> str:
    """The backend of a call: as `resolve_backend`, but the fused kernel has to fit.

    Without an explicit backend its row of the launch table has to ask for it as well.
    """
    chosen = resolve_backend(weight, backend)
    if chosen == "torch":
        return chosen
    fits = (
        weight.dim() == 2
        and gram.dtype == dtype == torch.float32
        and weight.dtype in checks.ACTIVATION_DTYPES
    )
    if backend == "triton" and not fits:
        raise BackendError(
            "backend='triton' takes one weight of bfloat16, float16 or float32 with a float32 gram "
            f"and gives float32; got {weight.dtype} {tuple(weight.shape)}, {gram.dtype} and "
            f"{dtype}; use backend='auto'"
        )
    if backend == "triton":
        return chosen
    architecture = tuning.architecture_of(weight.device)
    config = tuning.absorb_config(weight.dtype, _channels(weight, gram), architecture)
    return "triton" if fits and config.method == "fused" else "torch"


def _absorb_gathered(
    weight: Tensor,  # [.., O, D]
    gram: Tensor,  # [.., P] or [.., H, H]
    keep: Tensor,  # [.., K]
    drop: Tensor,  # [.., D]
    dtype: torch.dtype,
) -> Tensor:
    """Returns [.., O, K], the sum of a library's products over slices of the dropped channels."""
    result = weight.new_zeros(*weight.shape[:-1], keep.shape[-1], dtype=dtype)
    truncates = dtype == torch.float32 and has_tensor_cores(weight.device)
    size = _TRUNCATED_ROWS if truncates else _DROPPED_ROWS
    slices = zip(weight.split(size, -1), drop.split(size, -1), strict=True)
    with full_fp32(gram.device):
        for columns, rows in slices:
            if not truncates:
                coupling = _coupling(gram, rows, keep, dtype)
                _add_product(result, columns.to(dtype), coupling)
                continue
            parts = _coupling_parts(gram, rows, keep)  # [.., 3, D', K]
            for number, part in reversed(list(enumerate(bf16_parts(columns, _PARTS)))):
                below = parts[..., number:, :, :].flatten(-3, -2)
                beside = torch.cat([part] * (_PARTS - number), -1)
                _add_product(result, beside, below)
    return result


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left [.., O, D] @ right [.., D, K] to `total`, in its dtype."""
    add = torch.addmm if total.dim() == 2 else torch.baddbmm
    if left.dtype == total.dtype:
        add(total, left, right, out=total)
    else:
        add(total, left, right, out_dtype=total.dtype, out=total)


def _coupling(gram: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns rows [.., R] and columns [.., C] of a packed or dense G, [.., R, C]."""
    if gram.dim() == rows.dim():
        return gather(gram, tiles.channels_of(gram), rows, columns, dtype)
    if rows.dim() == 1:
        return gram.index_select(0, rows).index_select(1, columns).to(dtype)
    return _columns(_columns(gram.mT, rows).mT, columns).to(dtype)


def _coupling_parts(gram: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns rows and columns of G as three bf16 that add up to them, [.., 3, R, C].

    The smallest part comes first.
    """
    if gram.dim() == rows.dim() and resolve_backend(gram) == "triton":
        from grail_kernels.gather_triton import launch_gather

        shape = (*rows.shape[:-1], _PARTS, rows.shape[-1], columns.shape[-1])
        parts = gram.new_empty(shape, dtype=torch.bfloat16)
        launch_gather(parts, gram, tiles.channels_of(gram), rows, columns)
        return parts
    values = _coupling(gram, rows, columns, torch.float32)
    return torch.stack(bf16_parts(values, _PARTS)[::-1], -3)


def _columns(matrix: Tensor, index: Tensor) -> Tensor:
    """Returns columns [.., C] of a matrix [.., R, H], [.., R, C]."""
    if index.dim() == 1:
        return matrix.index_select(1, index)
    return matrix.gather(-1, index[..., None, :].expand(*matrix.shape[:-1], -1))


def _complement(keep: Tensor, channels: int) -> Tensor:
    """Returns the channels [.., D] outside of `keep` [.., K], ascending; refuses a bad `keep`."""
    host = keep.cpu()  # a GPU is asked once
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= channels:
        raise InputError(f"keep must lie in [0, {channels}); got {low} to {high}")
    is_dropped = torch.ones(*host.shape[:-1], channels, dtype=torch.bool)
    is_dropped.scatter_(-1, host, False)
    dropped = channels - host.shape[-1]
    if int(is_dropped.sum()) != dropped * is_dropped[..., 0].numel():
        raise InputError("keep names a channel more than once")
    found = is_dropped.nonzero()[:, -1].view(*host.shape[:-1], dropped)
    return found.to(keep.device)


def _channels(weight: Tensor, gram: Tensor) -> int:
    """Returns H of a packed or dense G."""
    return tiles.channels_of(gram) if gram.dim() < weight.dim() else gram.shape[-1]


def _check(
    weight: Tensor, gram: Tensor, keep: Tensor, drop: Tensor | None, dtype: torch.dtype | None
) -> None:
    """Refuses arguments by their shapes, dtypes and devices."""
    if weight.dim() not in (2, 3) or not weight.is_floating_point():
        raise InputError(
            f"weight must be a floating point [outputs, channels], or a batch of them; got "
            f"{weight.dtype} {tuple(weight.shape)}; flatten the kernel of a convolution first"
        )
    if gram.dtype not in (torch.float32, torch.float64):
        raise InputError(f"gram must be float32 or float64; got {gram.dtype}")
    _check_dtype(dtype)
    _check_gram(weight, gram, drop)
    batch = weight.shape[:-2]
    for name, index in (("keep", keep), ("drop", drop)):
        if index is None:
            continue
        of_batch = index.dim() == weight.dim() - 1 and index.shape[:-1] == batch
        if index.dtype != torch.int64 or not of_batch:
            raise InputError(
                f"{name} must be a 1-D int64 tensor of channels, one for each weight of a batch; "
                f"got {index.dtype} {tuple(index.shape)}"
            )
    if not keep.shape[-1]:
        raise InputError("keep must be a 1-D int64 tensor of channels; got none")
    if drop is not None and drop.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"weight must have the columns of drop alone, {drop.shape[-1]}; got "
            f"{tuple(weight.shape)}"
        )
    checks.check_devices(weight=weight, gram=gram, keep=keep, drop=drop)


def _check_dtype(dtype: object) -> None:
    if dtype not in (None, torch.float32, torch.float64):
        raise InputError(f"dtype must be float32, float64 or None for that of gram; got {dtype}")


def _check_gram(weight: Tensor, gram: Tensor, drop: Tensor | None) -> None:
    """Refuses a G whose form does not fit the weight."""
    batch, channels = weight.shape[:-2], weight.shape[-1]
    if gram.dim() == weight.dim():
        channels = gram.shape[-1] if drop is not None else channels
        fits = gram.shape == (*batch, channels, channels)
    else:
        fits = gram.dim() == weight.dim() - 1 and gram.shape[:-1] == batch
        if fits and drop is None:
            tiles.check_packed(gram, channels)
    if not fits:
        raise InputError(
            f"gram must be packed or [{channels}, {channels}] for a weight of {channels} "
            f"channels, one for each weight of a batch; got {tuple(gram.shape)}"
        )
