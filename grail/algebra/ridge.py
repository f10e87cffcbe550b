"""The ridge solve: X (A + λI) = C by a batched Cholesky, with bounded, reported damping.

    A [.., K, K] symmetric positive semi-definite, C [.., O, K]  →  X = C (A + λI)⁻¹ [.., O, K]

K³/3 + 2·O·K² FLOPs a problem, in fp64 on devices that are fast at it: a Gram's condition number is
its data matrix's squared, so fp32 loses half of the digits of an fp32 Gram. Elsewhere the factor is
an fp32 one of the scaled system D (A + λI) D, D = diag(A + λI)^-½, and refinement brings X to
fp32's precision: each step is one fp64 product of 2·O·K² FLOPs, and the first is mostly enough. A
problem that does not converge is solved in fp64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grail.errors import InputError, NonFiniteError, SolveError
from grail_kernels import full_fp32

Precision = Literal["auto", "fp64", "refined"]

GROWTH = 10.0
ATTEMPTS = 12
# Rounding of an fp32 Gram can push an eigenvalue of a singular A this far (relative to the mean
# diagonal) below 0; a first retry below it would be wasted.
FLOOR = 1e-10
# Steps of refinement. A system that needs more is so ill-conditioned that fp64 is cheaper.
REFINEMENTS = 5


@dataclass(frozen=True)
class Solution:
    """`x` [.., O, K]; `damping` [..], the λ that held; `retries` [..], how often λ had to grow."""

    x: Tensor
    damping: Tensor
    retries: Tensor


def attempt(
    normal: Tensor, right: Tensor, damping: Tensor, *, rounding: Tensor
) -> tuple[Tensor, Tensor]:
    """Solves X (A + λI) = C once, without a look at the result: X [E, O, K], and where it holds.

    In fp64 no value is read from the device. A problem whose A is zero and C too gives X = 0.

    Args:
        normal: A [E, K, K] fp64, symmetric; overwritten.
        right: C [E, O, K].
        damping: λ [E].
        rounding: [E, K]; see `solve`.
    """
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    diagonal += (damping + (diagonal == 0).all(-1))[:, None]
    method = _direct if precision_of(normal.device) == "fp64" else _refined
    return method(normal, right, rounding)


def solve(
    normal: Tensor | Callable[[], Tensor],
    right: Tensor,
    damping: Tensor | float,
    *,
    rounding: Tensor | None = None,
    precision: Precision = "auto",
) -> Solution:
    """Solves X (A + λI) = C for a batch of problems.

    A factorisation that fails, or has a pivot that is only rounding, is repeated with λ ten times
    larger (at least 1e-10 of the mean diagonal), at most 12 times. A problem whose A is zero has
    nothing to explain and gives X = 0.

    Args:
        normal: A [.., K, K], symmetric; or a function that makes it anew at every call. What a
            function returns is overwritten, so that a large problem needs no second K·K matrix.
        right: C [.., O, K].
        damping: λ ≥ 0, a number or [..].
        rounding: [.., K], what rounding may have left on the diagonal of A; zeros by default. A
            pivot below it belongs to a channel that the ones before it explain up to rounding; its
            fit would be to noise.
        precision: "fp64"; "refined", fp32 with refinement to a relative error of 6e-8; "auto", fp64
            on CPUs and on GPUs of compute capability 8.0 and 9.0, gfx90a and gfx942, else refined.

    Returns:
        A `Solution` in fp64.

    Raises:
        InputError: shapes that do not fit, a negative λ or an unknown precision.
        NonFiniteError: NaN or Inf in A or C.
        SolveError: still indefinite after the last retry.

    Memory: 8·(K² + O·K) bytes a problem, refined 12·K² + 40·O·K, in addition to A (if given as a
    tensor) and C. X is part of it.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision must be one of {', '.join(get_args(Precision))}")
    a = _made(normal)
    _require_shapes(a, right)
    *batch, _, kept = a.shape
    # No view, which would hold A.
    diagonal = a.diagonal(dim1=-2, dim2=-1).to(torch.float64, copy=True).reshape(-1, kept)
    scale, empty = diagonal.mean(-1), (diagonal == 0).all(-1)
    c = right.reshape(-1, *right.shape[-2:])
    lam = torch.as_tensor(damping, dtype=torch.float64, device=c.device)
    lam = lam.expand(batch).reshape(-1).clone()
    least = torch.zeros_like(diagonal) if rounding is None else rounding.expand(*batch, -1).double()
    least = least.reshape(diagonal.shape)
    chosen = precision_of(c.device) if precision == "auto" else precision
    method = _direct if chosen == "fp64" else _refined

    def attempted(a: Tensor, todo: Tensor) -> tuple[Tensor, Tensor]:
        a = _picked(a.reshape(-1, kept, kept), todo)
        a = a.to(torch.float64, copy=isinstance(normal, Tensor))
        added = lam[:, None] + empty[:, None]  # the identity where A is 0
        a.diagonal(dim1=-2, dim2=-1).add_(added[todo])
        return method(a, _picked(c, todo), least[todo])

    # A sum is finite only if every value is, and needs no memory.
    checks = [values.sum(dtype=torch.float64) for values in (a, right)] + [lam.amin()]
    x, good = attempted(a, torch.arange(len(c), device=c.device))
    del a
    found = torch.cat([torch.stack(checks), good.double()]).tolist()
    _require_sound(found[:3], normal, right)  # first: cholesky_ex may report success on NaN
    failed = [number for number, held in enumerate(found[3:]) if not held]
    retries = torch.zeros_like(lam, dtype=torch.int64)
    for _ in range(ATTEMPTS):
        if not failed:
            break
        todo = torch.tensor(failed, dtype=torch.int64, device=c.device)
        lam[todo] = torch.maximum(lam[todo] * GROWTH, FLOOR * scale[todo])
        retries[todo] += 1
        x[todo], good = attempted(_made(normal), todo)
        failed = [number for number, held in zip(failed, good.tolist(), strict=True) if not held]
    if failed:
        raise SolveError(
            f"{len(failed)} ridge problem(s) stayed indefinite after {ATTEMPTS} dampings up to "
            f"{lam[failed].max().item():g}: no Gram matrix, or its sums overflowed"
        )
    x.masked_fill_(empty[:, None, None], 0)
    return Solution(x.reshape(right.shape), lam.reshape(batch), retries.reshape(batch))


def precision_of(device: torch.device) -> Precision:
    """Returns the precision that "auto" stands for on a device."""
    if device.type != "cuda":
        fast = True
    elif torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        fast = name.split(":")[0] in ("gfx90a", "gfx942")
    else:
        fast = torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))
    return "fp64" if fast else "refined"


def _made(normal: Tensor | Callable[[], Tensor]) -> Tensor:
    return normal if isinstance(normal, Tensor) else normal()


def _picked(batch: Tensor, todo: Tensor) -> Tensor:
    return batch if todo.numel() == len(batch) else batch[todo]


def _require_shapes(normal: Tensor, right: Tensor) -> None:
    if normal.shape[-1] != normal.shape[-2] or right.shape[-1] != normal.shape[-1]:
        raise InputError(
            f"normal must be [.., K, K] and right [.., O, K]; got {tuple(normal.shape)} "
            f"and {tuple(right.shape)}"
        )


def _require_sound(
    found: Sequence[float], normal: Tensor | Callable[[], Tensor], right: Tensor
) -> None:
    """Raises an error for A or C whose sums are not finite, or a negative lowest λ."""
    normal_sum, right_sum, lowest = found
    if not math.isfinite(normal_sum):
        _require_finite(_made(normal), "the normal matrix of a ridge")
    if not math.isfinite(right_sum):
        _require_finite(right, "the right-hand side of a ridge")
    if lowest < 0:
        raise InputError(f"damping must not be negative; got {lowest:g}")


def _require_finite(values: Tensor, what: str) -> None:
    bad = ~values.isfinite()
    if bool(bad.any()):
        channels = bad.flatten(0, -2).any(0).nonzero().flatten().tolist()
        raise NonFiniteError(what, channels, int(bad.sum()))


def _direct(system: Tensor, right: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Solves X·system = right, [n, O, K] in fp64; also returns the mask [n] of success.

    Args:
        system: [n, K, K] fp64, symmetric; becomes the factor.
        right: [n, O, K].
        least: [n, K], what each pivot must reach.
    """
    factor, positive = _factor(system, least)
    x = _substitute(factor, right.to(torch.float64, copy=True))
    return x, positive & x.sum((-2, -1)).isfinite()


def _refined(system: Tensor, right: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Solves as `_direct`, by an fp32 factor and refinement; scales `system` in place.

    A step's correction d measures the error e before it, and with the rate r = ‖d‖/‖d before‖ what
    is left is r·‖d‖: a row is done when that is below eps·‖row‖. (As LAPACK's dsposv, which
    continues to fp64's eps; the system comes from an fp32 Gram, which is no more exact.)
    """
    eps = torch.finfo(torch.float32).eps
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    system.mul_(scale[:, :, None]).mul_(scale[:, None, :])
    target, least = right.double() * scale[:, None, :], least * scale.square()
    factor, positive = _factor(system.float(), least)
    x = change = _substitute_normalised(factor, target)
    good = torch.zeros_like(positive)
    for _ in range(REFINEMENTS):
        before = _norms(change)
        change = _substitute_normalised(factor, torch.baddbmm(target, x, system, alpha=-1))
        x = x + change
        good = positive & (_norms(change).square() <= eps * before * _norms(x)).all(-1)
        if bool((good | ~positive).all()):
            break
    if not bool(good.all()):
        x[~good], good[~good] = _direct(system[~good], target[~good], least[~good])
    return x * scale[:, None, :], good


def _factor(system: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Factorises matrices [n, K, K] in place (lower Cholesky); returns the mask [n] of success.

    That is where they exist and their pivots reach `least` [n, K].
    """
    columns = system.mT  # LAPACK's order, of a symmetric matrix
    info = torch.empty(len(system), dtype=torch.int32, device=system.device)
    factor, info = torch.linalg.cholesky_ex(columns, out=(columns, info))
    pivots = factor.diagonal(dim1=-2, dim2=-1).double().square()
    return factor, (info == 0) & (pivots >= least).all(-1)


def _substitute(factor: Tensor, right: Tensor) -> Tensor:
    """Solves X·factor·factorᵀ = right in place of `right` [n, O, K]."""
    torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False, out=right)
    return torch.linalg.solve_triangular(factor, right, upper=False, left=False, out=right)


def _substitute_normalised(factor: Tensor, right: Tensor) -> Tensor:
    """Runs `_substitute` in fp32, with rows scaled into its range; fp64 in and out."""
    size = right.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    with full_fp32(right.device):
        return _substitute(factor, (right / size).float()).double() * size


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)
