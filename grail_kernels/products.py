"""Products of 16-bit activations with fp32 values at tensor cores' rate, summed in fp32.

A product of two bf16 is exact in fp32, and tensor cores add such products up in fp32. An fp32 value
is the sum of bf16 parts, each rounded to nearest from what those before it leave:

    leftᵀ right ≈ Σ_i left_iᵀ right        one product of 2·T·O·H FLOPs a part

One part leaves at most 2⁻⁸ of a value, two 2⁻¹⁷, three nothing (but below fp32's own range of
exponents). One is enough for a cross moment with activations: what is left of them has random
signs, so that the moment of a Llama-2-7B block errs by 1.1e-3 of its size, where the draw of the
tokens leaves 0.65. It is not for Grams, which must stay positive semi-definite and whose two
operands are exact anyway.

An fp16 is exactly two parts.
"""

import torch
from torch import Tensor

from grail_kernels import cpu_blas
from grail_kernels.arguments import check_count, check_tensors
from grail_kernels.precision import full_fp32
from grail_kernels.tuning import BUFFER_TOKENS

# Of an fp32 value; see above.
PARTS = 1


class Products:
    """Adds leftᵀ right to a total in blocks of many tokens, which read and write it once each.

    On tensor cores the operands of `add` wait until there are `capacity` tokens; elsewhere they are
    added at once. `flush` before the total is read.

    Args:
        total: [O, H] fp32, contiguous.
        capacity: tokens that wait, in capacity·(O + H)·2 bytes.
    """

    def __init__(self, total: Tensor, capacity: int = BUFFER_TOKENS) -> None:
        check_tensors(total=total)
        check_count("capacity", capacity)
        self._total, self._capacity, self._waiting = total, capacity, 0
        self._left: Tensor | None = None
        self._right: Tensor | None = None

    @torch.no_grad()
    def add(self, left: Tensor, right: Tensor) -> None:
        """Adds left [T, O] and right [T, H], as `add_products` does."""
        check_tensors(left=left, right=right)
        tokens = left.shape[0]
        waits = takes_parts(self._total, right) and tokens < self._capacity
        if self._waiting and not (waits and self._fits(tokens, right)):
            self.flush()
        if not waits:
            add_products(self._total, left, right)
            return
        if self._right is None or self._right.dtype != right.dtype:
            self._left = left.new_empty(self._capacity, left.shape[1], dtype=torch.bfloat16)
            self._right = right.new_empty(self._capacity, right.shape[1])
        assert self._left is not None
        place = slice(self._waiting, self._waiting + tokens)
        self._left[place], self._right[place] = left, right
        self._waiting += tokens

    def flush(self) -> None:
        """Adds what waits, and frees its memory."""
        if self._waiting:
            assert self._left is not None
            assert self._right is not None
            waiting, self._waiting = self._waiting, 0
            add_products(self._total, self._left[:waiting], self._right[:waiting])
            self._left = self._right = None

    def _fits(self, tokens: int, right: Tensor) -> bool:
        assert self._right is not None
        return self._waiting + tokens <= self._capacity and self._right.dtype == right.dtype


@torch.no_grad()
def add_products(
    total: Tensor,  # [O, H] fp32, contiguous
    left: Tensor,  # [T, O]
    right: Tensor,  # [T, H]
) -> None:
    """Adds leftᵀ right to `total`: to 2⁻⁸ of each product on tensor cores, else in fp32."""
    check_tensors(total=total, left=left, right=right)
    if not takes_parts(total, right):
        left, right = left.float(), right.float()
        if not cpu_blas.add_product(total, left, right):
            with full_fp32(total.device):
                total.addmm_(left.mT, right)
        return
    lefts, rights = bf16_parts(left, PARTS), bf16_parts(right, 2)
    for right_part in reversed(rights):  # small products first
        for left_part in reversed(lefts):
            torch.addmm(total, left_part.mT, right_part, out_dtype=torch.float32, out=total)


def takes_parts(total: Tensor, right: Tensor) -> bool:
    """Returns whether products with `right` are those of bf16 parts."""
    return right.dtype != torch.float32 and has_tensor_cores(total.device)


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
