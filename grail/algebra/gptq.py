"""GPTQ: rounds a matrix to a grid, column by column, and corrects the columns that are left.

Minimises ‖(W − Q) X‖² over points Q of the grid, greedily: with H = G + λI and the upper Cholesky
factor U of H⁻¹ = UᵀU, column j's rounding error e = (w_j − q_j) / U_jj is undone as well as the
columns k > j can, by w_k ← w_k − e·U_jk. What is left of it costs e². So the grid of 32 columns is
chosen when they are reached, for the weights as they are by then, with importance 1 / U_jj².

Source: GPTQ (arXiv 2210.17323), algorithm 1. U is had from one factorisation: reversed, H = RRᵀ
with R upper triangular, so U = R⁻¹.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grail.algebra.grids import BLOCK, Format, Grid, require_blocks, round_to_nearest
from grail.algebra.ridge import ATTEMPTS, GROWTH, precision_of
from grail.errors import InputError, SolveError
from grail_kernels import full_fp32

DAMPING = 0.01  # λ, as a share of the mean diagonal of G: GPTQ's default
_PANEL = 4 * BLOCK  # columns after which all that follow are corrected, by one product


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid, with its codes [O, C] int8 and the relative error of its output.

    `error`: ‖(W − Q) X‖ / ‖W X‖; `nearest_error`: the same of rounding to nearest. 0 where W X is.
    """

    grid: Grid
    codes: Tensor
    error: float
    nearest_error: float

    @property
    def values(self) -> Tensor:
        """The weights [O, C] fp32."""
        return self.grid.values(self.codes)


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Returns U [C, C] fp32, upper triangular, with UᵀU = (G + λI)⁻¹.

    A channel that is always 0 has no error to weigh: it gets the mean diagonal, and is rounded to
    nearest. A G that rounding has left indefinite gets a λ ten times larger, at most 12 times.

    Args:
        gram: G [C, C], symmetric.
        damping: λ, as a share of the mean diagonal of G.

    Raises:
        SolveError: still indefinite.
    """
    fast = precision_of(gram.device) == "fp64"
    system = gram.to(torch.float64 if fast else torch.float32, copy=True).flip(0, 1)
    diagonal = system.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean))
    added = 0.0
    for attempt in range(ATTEMPTS):
        share = damping * GROWTH**attempt
        diagonal += (share - added) * mean
        added = share
        with full_fp32(gram.device):
            factor, info = torch.linalg.cholesky_ex(system)
            if int(info) == 0 and bool(factor.diagonal().isfinite().all()):
                upper = factor.flip(0, 1)
                identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
                return torch.linalg.solve_triangular(upper, identity, upper=True).float()
    raise SolveError(
        f"a Gram of {len(gram)} channels stayed indefinite after {ATTEMPTS} dampings up to "
        f"{added:g} of its mean diagonal: no Gram matrix, or its sums overflowed"
    )


def round_with(weight: Tensor, factor: Tensor, kind: Format) -> tuple[Grid, Tensor]:
    """Returns the grid of a matrix and its codes [O, C] int8, by GPTQ.

    Args:
        weight: W [O, C].
        factor: U [C, C] of `inverse_factor`.
        kind: of the grid.

    Raises:
        InputError: 32 does not divide C.
        ModelError: a weight beyond the range of fp16.

    O·C² FLOPs. Memory: 4·O·C bytes for the weights, and as many for the codes.
    """
    outputs, columns = weight.shape
    require_blocks("a matrix", columns)
    left = weight.T.to(torch.float32, copy=True).contiguous()  # a row is a column of W
    codes = torch.empty_like(left)
    importance = factor.diagonal().square().reciprocal()
    table = left.new_empty(1 + kind.has_minimum, columns // BLOCK, outputs)
    with full_fp32(weight.device):
        for start in range(0, columns, _PANEL):
            end = min(start + _PANEL, columns)
            errors = left.new_empty(end - start, outputs)
            for at in range(start, end, BLOCK):
                of_block, stop = slice(at, at + BLOCK), at + BLOCK
                grid = kind.search(left[of_block], importance[of_block])
                table[:, at // BLOCK] = grid
                own = errors[at - start : stop - start]
                codes[of_block] = _rounded_block(
                    left[of_block], factor[of_block, of_block], grid, kind, own
                )
                left[stop:end].addmm_(factor[of_block, stop:end].T, own, alpha=-1)
            left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    whole = Grid(table.transpose(1, 2).half().contiguous())
    return whole, codes.T.to(torch.int8).contiguous()


def _rounded_block(
    left: Tensor, factor: Tensor, grid: Tensor, kind: Format, errors: Tensor
) -> Tensor:
    """Returns the codes [32, O] of one block; writes its errors, and corrects `left` in place."""
    codes = torch.empty_like(left)
    pivots = factor.diagonal().tolist()
    for row, pivot in enumerate(pivots):
        codes[row] = kind.codes(left[row], grid)
        torch.sub(left[row], kind.values(codes[row], grid), out=errors[row]).div_(pivot)
        left[row + 1 :].addr_(factor[row, row + 1 :], errors[row], alpha=-1)
    return codes


def quantize(
    weights: Sequence[Tensor], gram: Tensor, factor: Tensor, kind: Format
) -> list[Rounded]:
    """Rounds matrices of layers that read the same by GPTQ, and measures each.

    Args:
        weights: W [O, C] of each.
        gram: G [C, C] of what the layers read.
        factor: U [C, C] of `inverse_factor`.
        kind: of the grid.

    Raises:
        InputError: shapes that do not fit, or 32 does not divide C.
        ModelError: a weight beyond the range of fp16.
    """
    for weight in weights:
        if gram.shape != (weight.shape[1],) * 2 or factor.shape != gram.shape:
            raise InputError(
                f"weights must be [O, C], gram and factor [C, C]; got {tuple(weight.shape)}, "
                f"{tuple(gram.shape)} and {tuple(factor.shape)}"
            )
    rows = [len(weight) for weight in weights]
    grid, codes = round_with(torch.cat([weight.float() for weight in weights]), factor, kind)
    tables = grid.table.split(rows, dim=1)
    return [
        _measured(weight.float(), Grid(table.contiguous()), of_weight, gram)
        for weight, table, of_weight in zip(weights, tables, codes.split(rows), strict=True)
    ]


def _measured(weight: Tensor, grid: Grid, codes: Tensor, gram: Tensor) -> Rounded:
    """Returns a rounded matrix with its errors."""
    nearest, nearest_codes = round_to_nearest(weight, grid.format)
    whole = _energy(weight, gram)
    return Rounded(
        grid,
        codes,
        _share(_energy(weight - grid.values(codes), gram), whole),
        _share(_energy(weight - nearest.values(nearest_codes), gram), whole),
    )


def _energy(weight: Tensor, gram: Tensor) -> float:
    """Returns ‖W X‖² = tr(W G Wᵀ)."""
    with full_fp32(weight.device):
        return float((weight @ gram.float()).mul_(weight).sum(dtype=torch.float64))


def _share(error: float, whole: float) -> float:
    return math.sqrt(max(error, 0.0) / whole) if whole > 0 else 0.0
