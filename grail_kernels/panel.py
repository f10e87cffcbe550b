"""A panel of pivots: the choices that `grail.select.pivots` makes among a few candidates.

For a batch of symmetric S [p, p] and B = AᵀA [p, p] of the same candidates, each choice j projects
its channel out of the others. With v = S_:j/√S_jj, c = B_:j/√S_jj and d = c − v·c_j/(2·√S_jj):

    S ← S − v·vᵀ        B ← B − v·dᵀ − d·vᵀ

The next choice is the candidate with the largest, or the least, B_jj / S_jj. Neither matrix is
rewritten: choice n computes its own columns of both from those of the n choices before it, kept as
the rows of V and D [n, p], and updates the two diagonals:

    v·√S_jj = S_j: − V_:j·V        c·√S_jj = B_j: − V_:j·D − D_:j·V

That is 6·n·p FLOPs a choice, on matrices that fit a first-level cache. A choice depends on the one
before, so a GPU runs one program a matrix (`grail_kernels.panel_triton`) and a CPU runs NumPy
without BLAS: hundreds of parallel products of this size would wait at their threads' barriers. On a
two-core EPYC a choice takes 20 µs for one matrix and 3.3 µs a matrix for a batch of 64.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from grail_kernels.arguments import check_count, check_tensors
from grail_kernels.backend import resolve_backend
from grail_kernels.errors import InputError


def choose_panel(
    schur: Tensor,  # [E, p, p] fp32
    products: Tensor,  # [E, p, p] fp32
    floor: Tensor,  # [E, p] fp32
    limits: Tensor,  # [E] int64
    count: int,
    *,
    least: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns the places [E, count] of the choices among the candidates, and their triangle.

    Of equals the first is chosen. A candidate is possible once, and only while its S_jj is above
    its `floor`; the largest ratio must also be above 0. Where none is possible the place is -1.

    Args:
        schur: S; only read.
        products: B; only read.
        floor: infinite for a candidate that must not be chosen.
        limits: how many choices each matrix may have, at most `count`.
        count: n.
        least: choose the least ratio, not the largest.
        backend: "auto" (Triton on a GPU, NumPy on a CPU), "torch" for the latter or "triton".

    Returns:
        The places, int64, and the Cholesky factor L [E, n, n] of S among the choices in their
        order, lower triangular with rows of the identity for places of -1. No value is read by the
        host.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    check_tensors(schur=schur, products=products, floor=floor, limits=limits)
    check_count("count", count)
    _check(schur, products, floor, limits, count)
    if resolve_backend(schur, backend) == "triton":
        from grail_kernels.panel_triton import launch_panel

        return launch_panel(schur, products, floor, limits, count, least)
    return _on_the_host(schur, products, floor, limits, count, least)


def _check(schur: Tensor, products: Tensor, floor: Tensor, limits: Tensor, count: int) -> None:
    matrices, candidates = floor.shape if floor.dim() == 2 else (0, 0)
    square = (matrices, candidates, candidates)
    fits = schur.shape == products.shape == square and limits.shape == (matrices,)
    fp32 = {schur.dtype, products.dtype, floor.dtype} == {torch.float32}
    if not (fits and fp32 and candidates and limits.dtype == torch.int64 and count > 0):
        given = (
            f"{name} {tuple(tensor.shape)} {tensor.dtype}"
            for name, tensor in zip(
                ("schur", "products", "floor", "limits"),
                (schur, products, floor, limits),
                strict=True,
            )
        )
        raise InputError(
            "choose_panel takes schur and products [E, p, p] and floor [E, p] in fp32, limits [E] "
            f"in int64 and a count from 1; got {', '.join(given)} and {count}"
        )


def _on_the_host(
    schur: Tensor, products: Tensor, floor: Tensor, limits: Tensor, count: int, least: bool
) -> tuple[Tensor, Tensor]:
    """Chooses for all matrices at once, in NumPy."""
    matrices, p = floor.shape
    rows = np.concatenate([_array(schur), _array(products)], 2)  # of S and B side by side
    rows = rows.reshape(matrices * p, 2 * p)
    bound, most = _array(floor).copy(), _array(limits)
    left, squares = (np.einsum("epp->ep", _array(m)).copy() for m in (schur, products))
    sign, clamped = (np.float32(-1), np.minimum) if least else (np.float32(1), np.maximum)
    squares *= sign
    # Rows of V and D side by side, and where the first column of each lies.
    known = np.zeros((matrices, count, 2 * p), np.float32)
    starts = np.arange(0, known.size, p).reshape(matrices, count, 2)
    first = np.arange(0, matrices * p, p)
    best = np.zeros((count, matrices), np.int64)
    found = np.zeros((count, matrices), bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        for n in range(count):
            ratios = np.where(left > bound, squares / left, -np.inf)
            j = best[n] = ratios.argmax(1)
            at = first + j
            found[n] = (ratios.take(at) > (-np.inf if least else 0)) & (n < most)
            continuing = np.count_nonzero(found[n])
            if not continuing:
                break
            root = np.sqrt(left.take(at))[:, None]
            before = known.take(starts[:, :n] + j[:, None, None])
            row = rows.take(at, 0)
            row -= np.einsum("en,enp->ep", before[:, :, 0], known[:, :n])
            v, d = row[:, :p], row[:, p:]
            d -= np.einsum("en,enp->ep", before[:, :, 1], known[:, :n, :p])
            row /= root
            d -= v * (row.take(at + first + p)[:, None] / (2 * root))
            if continuing < matrices:
                row[~found[n]] = 0
            known[:, n] = row
            left -= v * v
            squares -= v * (2 * sign * d)
            clamped(squares, 0, out=squares)
            bound.put(at, np.inf)
    # Row n of the factor: of the rows of V up to n, their values at choice n.
    factor = np.take_along_axis(known, best.T[:, None], 2)
    triangle = torch.from_numpy(factor).mT.tril()
    places = torch.from_numpy(np.where(found, best, -1).T)
    triangle = triangle.where(places[:, :, None] >= 0, torch.eye(count, dtype=torch.float32))
    return places.to(schur.device), triangle.to(schur.device)


def _array(values: Tensor) -> Any:
    return values.cpu().numpy()
