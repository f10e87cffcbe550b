"""The correction of a consumer whose producer keeps a selection of its channels: W_D G_DP.

With kept channels P and dropped ones D, the ridge's right-hand side needs only the dropped columns
of W [O, H] and the part of G that couples them to the kept ones: 2·O·D·K FLOPs instead of 2·O·H·K
for all rows. The packed Gram is read in place; neither a dense G (4·H² bytes) nor G_DP (4·D·K) is
formed. Besides W_D and the result torch allocates one strip, Triton nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grail_kernels import arguments, checks, tuning
from grail_kernels.backend import check_backend, resolve_backend
from grail_kernels.errors import BackendError, InputError
from grail_kernels.operators import operator
from grail_kernels.precision import full_fp32
from grail_kernels.tiles import check_packed, strips

# Dropped channels that a dense product takes at a time: enough for a GEMM, few to allocate.
_DROPPED_ROWS = 1024


def absorb(
    weight: Tensor, gram: Tensor, keep: Tensor | Sequence[int], backend: str = "auto"
) -> Tensor:
    """Returns the correction of a consumer for its dropped channels: W_D G_DP.

    Args:
        weight: [O, H], floating point, any strides.
        gram: the packed accumulator [packed_numel(H)], or a dense symmetric [H, H]; fp32 or fp64.
        keep: [K] int64, distinct channels; the columns of the result follow their order. A list,
            tuple, range or numpy array of integers is copied to the device of `weight`.
        backend: "auto", "torch" or "triton"; see `resolve_backend`. Triton takes a gram of fp32 and
            a weight of bf16, fp16 or fp32; "auto" leaves others to torch.

    Returns:
        [O, K] in the dtype of `gram`, in which the products are also summed.

    Raises:
        InputError: a dtype, shape or device does not fit, or `keep` repeats or leaves [0, H).
        BackendError: the backend asked for cannot run.

    Source: Tang et al. (CPAL 2026, arXiv 2602.23795), with the identity on P split off:
        W G_:P = W_P G_PP + W_D G_DP.
    """
    arguments.check_tensors(weight=weight, gram=gram)
    if not isinstance(keep, Tensor):
        keep = _as_channels(keep).to(weight.device)
    check_backend(backend)
    return _absorb_op(weight.detach(), gram.detach(), keep, backend)


def _as_channels(keep: object) -> Tensor:
    """A list or array of integers [K] as int64; other numbers stay, to be refused by dtype."""
    vector = arguments.as_vector("keep", keep)
    is_index = vector.dtype != torch.bool and not vector.is_floating_point()
    return vector.to(torch.int64) if is_index else vector


@operator(
    "grail::absorb",
    mutates_args=(),
    schema='(Tensor weight, Tensor gram, Tensor keep, str backend="auto") -> Tensor',
)
def _absorb_op(weight: Tensor, gram: Tensor, keep: Tensor, backend: str = "auto") -> Tensor:
    """`torch.ops.grail.absorb`: opaque to torch.compile, which only sees the shape it gives."""
    _check(weight, gram, keep)
    device, keep = keep.device, keep.cpu()  # a GPU is asked once
    _check_distinct(keep, weight.shape[1])
    chosen = _resolve(weight, gram, backend)
    is_dropped = torch.ones(weight.shape[1], dtype=torch.bool)
    is_dropped[keep] = False
    kept, order = keep.sort()
    selections = (kept, is_dropped.nonzero().flatten(), order)
    kept, dropped, order = (selection.to(device) for selection in selections)
    if chosen == "triton":
        from grail_kernels.absorb_triton import launch_absorb

        return launch_absorb(weight, gram, kept, dropped, order)
    return _absorb_torch(weight, gram, kept, dropped, order)


@_absorb_op.register_fake
def _(weight: Tensor, gram: Tensor, keep: Tensor, backend: str = "auto") -> Tensor:
    _check(weight, gram, keep)
    return gram.new_empty(weight.shape[0], keep.shape[0])


def _resolve(weight: Tensor, gram: Tensor, backend: str) -> str:
    """The backend of a call: as `resolve_backend`, but fp64 is for torch.

    So are, without an explicit backend, the shapes where the library's GEMM was measured faster.
    """
    chosen = resolve_backend(weight, backend)
    fits = gram.dtype == torch.float32 and weight.dtype in checks.ACTIVATION_DTYPES
    if backend == "auto" and chosen == "triton" and fits:
        architecture = tuning.architecture_of(weight.device)
        config = tuning.absorb_config(weight.dtype, weight.shape[1], architecture)
        return "triton" if config.method == "fused" else "torch"
    if chosen == "torch" or fits:
        return chosen
    if backend == "triton":
        raise BackendError(
            "backend='triton' takes a float32 gram and a bfloat16, float16 or float32 weight; got "
            f"{gram.dtype} and {weight.dtype}; use backend='auto'"
        )
    return "torch"


def _absorb_torch(
    weight: Tensor,  # [O, H]
    gram: Tensor,  # [P] or [H, H]
    kept: Tensor,  # [K], ascending
    dropped: Tensor,  # [D], ascending
    order: Tensor,  # [K], the column of the result that belongs to each of `kept`
) -> Tensor:
    """The torch twin: one or two GEMMs a strip."""
    by_position = gram.new_zeros(weight.shape[0], kept.numel())  # [O, K]
    # Gathered once: columns of a row-major weight are the slow direction.
    of_dropped = weight.index_select(1, dropped).to(gram.dtype)  # [O, D]
    add = _add_dense if gram.dim() == 2 else _add_packed
    with full_fp32(gram.device):
        add(by_position, of_dropped, gram, kept, dropped)
    result = torch.empty_like(by_position)
    result[:, order] = by_position
    return result


def _add_packed(
    result: Tensor, of_dropped: Tensor, packed: Tensor, kept: Tensor, dropped: Tensor
) -> None:
    """Adds W_D G_DP strip by strip: a strip couples its rows to the columns before, both ways."""
    every = list(strips(kept.numel() + dropped.numel()))
    edges = torch.tensor([0, *(strip.high for strip in every)], dtype=torch.int64)
    kept_edges, dropped_edges = (
        torch.searchsorted(selection.cpu(), edges).tolist() for selection in (kept, dropped)
    )
    for number, strip in enumerate(every):
        kept_low, kept_high = kept_edges[number : number + 2]
        dropped_low, dropped_high = dropped_edges[number : number + 2]
        rows = strip.view(packed)
        block = rows[:, strip.low :].tril()
        rows = torch.cat([rows[:, : strip.low], block + block.tril(-1).mT], dim=1)

        own_dropped = dropped[dropped_low:dropped_high]
        coupling = rows[own_dropped - strip.low].index_select(1, kept[:kept_high])
        result[:, :kept_high].addmm_(of_dropped[:, dropped_low:dropped_high], coupling)

        own_kept, before = kept[kept_low:kept_high], dropped[:dropped_low]
        coupling = rows[own_kept - strip.low].index_select(1, before)
        result[:, kept_low:kept_high].addmm_(of_dropped[:, :dropped_low], coupling.mT)


def _add_dense(
    result: Tensor, of_dropped: Tensor, gram: Tensor, kept: Tensor, dropped: Tensor
) -> None:
    """Adds W_D G_DP for a block of dropped channels at a time, so that G_DP is never held whole."""
    blocks = zip(of_dropped.split(_DROPPED_ROWS, dim=1), dropped.split(_DROPPED_ROWS), strict=True)
    for columns, rows in blocks:
        coupling = gram.index_select(0, rows).index_select(1, kept)
        result.addmm_(columns, coupling)


def _check(weight: Tensor, gram: Tensor, keep: Tensor) -> None:
    """Refuses arguments by their shapes, dtypes and devices."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputError(
            f"weight must be a floating point [outputs, channels]; got {weight.dtype} "
            f"{tuple(weight.shape)}; flatten the kernel of a convolution first"
        )
    channels = weight.shape[1]
    if gram.dtype not in (torch.float32, torch.float64):
        raise InputError(f"gram must be float32 or float64; got {gram.dtype}")
    if gram.dim() != 2:
        check_packed(gram, channels)
    if gram.dim() > 2 or (gram.dim() == 2 and tuple(gram.shape) != (channels, channels)):
        raise InputError(
            f"gram must be packed or [{channels}, {channels}] for a weight of {channels} "
            f"channels; got {tuple(gram.shape)}"
        )
    if keep.dim() != 1 or keep.dtype != torch.int64 or not keep.numel():
        raise InputError(
            f"keep must be a 1-D int64 tensor of channels; got {keep.dtype} {tuple(keep.shape)}"
        )
    checks.check_devices(weight=weight, gram=gram, keep=keep)


def _check_distinct(keep: Tensor, channels: int) -> None:
    """Refuses a selection by the channels that it names."""
    low, high = int(keep.min()), int(keep.max())
    if low < 0 or high >= channels:
        raise InputError(f"keep must lie in [0, {channels}); got {low} to {high}")
    if keep.unique().numel() != keep.numel():
        raise InputError("keep names a channel more than once")
