"""Comparison of tensors up to rounding."""

from torch import Tensor


def is_close(found: Tensor, expected: Tensor, rtol: float) -> bool:
    """Returns whether ‖found − expected‖ ≤ rtol·‖expected‖; NaN and infinities count as 0."""
    if found.shape != expected.shape:
        return False
    found, expected = (x.float().nan_to_num(0, 0, 0) for x in (found, expected))
    return bool((found - expected).norm() <= rtol * expected.norm())
