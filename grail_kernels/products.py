"""Products of 16-bit activations with fp32 values at tensor cores' rate, summed in fp32.

A product of two bf16 is exact in fp32, and tensor cores add such products up in fp32. An fp32 value
is the sum of bf16 parts, each rounded to nearest from what those before it leave:

    leftᵀ right ≈ Σ_i left_iᵀ right        one product of 2·T·O·H FLOPs a part

Two parts leave at most 2⁻¹⁷ of a value, three nothing (but below fp32's own range of exponents).
Two are enough for a cross moment with activations: what is left of them has random signs, and so
adds up to 2⁻¹⁷ of the noise that the draw of the tokens leaves in the moment; and sums that
truncate, as tensor cores' do, err by as much over the tokens of a batch. It is not for Grams, which
must stay positive semi-definite and whose two operands are exact anyway.

An fp16 is exactly two parts.
"""

import torch
from torch import Tensor

from grail_kernels.arguments import check_tensors
from grail_kernels.precision import full_fp32

# Of an fp32 value; see above.
PARTS = 2


@torch.no_grad()
def add_products(
    total: Tensor,  # [O, H] fp32, contiguous
    left: Tensor,  # [T, O]
    right: Tensor,  # [T, H]
) -> None:
    """Adds leftᵀ right to `total`: to 2⁻¹⁷ of each product on tensor cores, else in fp32."""
    check_tensors(total=total, left=left, right=right)
    if right.dtype == torch.float32 or not has_tensor_cores(total.device):
        with full_fp32(total.device):
            total.addmm_(left.float().mT, right.float())
        return
    lefts, rights = bf16_parts(left, PARTS), bf16_parts(right, 2)
    for right_part in reversed(rights):  # small products first
        for left_part in reversed(lefts):
            torch.addmm(total, left_part.mT, right_part, out_dtype=torch.float32, out=total)


def bf16_parts(values: Tensor, count: int) -> list[Tensor]:
    """Up to `count` bf16 tensors that add up to `values`, the largest part first.

    A bf16 tensor is its own only part. NaN and infinities stay non-finite in the sum.
    """
    if values.dtype == torch.bfloat16:
        return [values]
    parts, rest = [], values.float()
    for _ in range(count):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return parts


def has_tensor_cores(device: torch.device) -> bool:
    """Returns whether the library multiplies bf16 into fp32 there."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
