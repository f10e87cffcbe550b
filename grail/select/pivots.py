"""The search that `greedy` runs forward and `elimination` backward, by blocks of channels.

Each chosen channel j is projected out of all others, for a symmetric S [H, H] and A [O, H]:

    S ← S − S_:j·S_j: / S_jj        A ← A − A_:j·S_j: / S_jj

S itself is not rewritten: a pivoted partial Cholesky S ≈ V·Vᵀ gives S − V·Vᵀ where it is needed,
and A is updated by the outer products of V. To work with matrices, not vectors, the order is exact
among the candidates only, those of best score, and all scores are updated after a block of choices.

A score needs only ‖A_:j‖² of A, so the choices within a block are made on two matrices of the p
candidates alone, S_PP and B = A_Pᵀ·A_P. With v = S_:j/√S_jj, c = B_:j/√S_jj and
d = c − v·c_j/(2·√S_jj) they become

    S_PP − v·vᵀ        B − v·dᵀ − d·vᵀ

That runs on the CPU, wherever S is: a choice takes a few passes over [p, p], where a GPU would wait
for a dozen launches and a synchronisation. Then one triangular solve gives the columns of V and the
updates of A for the whole block.

FLOPs for N channels in blocks of b with p candidates: H·N² for V, 2·N·O·H for A, 2·N·O·p²/b for B,
and N passes over [p, p]. Bytes: N/b times A read twice and written once, V read once.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Channels that are chosen between two updates of all scores, and candidates for each of them.
BLOCK, POOL = 16, 8

# From ‖A_:j‖² [n], diag S [n] and the initial diag S [n]: a score [n], the highest is next.
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def working_numbers(channels: int, count: int, outputs: int) -> int:
    """Returns the most fp64 numbers held while `count` channels are chosen, without S, A and V."""
    h, o, pool = channels, outputs, min(POOL * BLOCK, channels)
    # The candidates' columns of A or rows of V and two matrices among them, or two forms of a
    # block's columns. In both cases also the previous block's, and the vectors by channel.
    among = pool * (max(o, count) + 2 * pool)
    return BLOCK * (h + o) + max(among, 2 * BLOCK * (h + o)) + 5 * h


def pivots(
    matrix: Tensor, outputs: Tensor, count: int, score: Score, block: int = BLOCK
) -> list[int]:
    """Returns up to `count` channels in the order of their choice; of equals the first.

    Stops before a channel whose score is -inf.

    Args:
        matrix: S [H, H] fp64.
        outputs: Aᵀ [H, O] fp64, so that a channel's numbers are contiguous; overwritten.
        block: channels chosen between two updates of all scores; 1 is the exact greedy order.
    """
    first = matrix.diagonal()
    left = first.clone()  # diag S
    factor = matrix.new_zeros(matrix.shape[0], count)  # V
    chosen = torch.zeros_like(first, dtype=torch.bool)
    order: list[int] = []
    while len(order) < count:
        known = factor[:, : len(order)]
        squares = torch.linalg.vector_norm(outputs, dim=1).square()
        scores = score(squares, left, first).where(~chosen, -math.inf)
        pool = scores.argsort(descending=True, stable=True)[: POOL * block]
        among, triangle = _chosen_among(
            _schur_complement(matrix, known, pool).cpu(),
            _products(outputs[pool]).cpu(),
            (first[pool].cpu(), chosen[pool].cpu()),
            min(block, count - len(order)),
            score,
        )
        if not among:
            break
        picked = pool[among]
        rows = torch.cat([_rows(matrix, known, picked), outputs[picked]], 1)
        rows = torch.linalg.solve_triangular(triangle.to(rows.device), rows, upper=False)
        of_matrix, of_outputs = rows.split([len(matrix), outputs.shape[1]], 1)
        factor[:, len(order) : len(order) + len(among)] = of_matrix.mT
        outputs.addmm_(of_matrix.mT, of_outputs, alpha=-1)
        left = (left - of_matrix.square().sum(0)).clamp_min(0)
        chosen[picked] = True
        order += picked.tolist()
    return order


def _chosen_among(
    schur: Tensor, products: Tensor, state: tuple[Tensor, Tensor], count: int, score: Score
) -> tuple[list[int], Tensor]:
    """Chooses up to `count` of p candidates, exactly one after another.

    Args:
        schur: S_PP [p, p]; overwritten.
        products: A_Pᵀ·A_P [p, p]; overwritten.
        state: the initial diag S_PP [p], and the mask [p] of those chosen before.

    Returns:
        Their places among the candidates, and their rows of their own columns of V: the lower
        triangle [n, n] of a Cholesky of their part of S.
    """
    first, chosen = state
    waiting = ~chosen
    places: list[int] = []
    columns = schur.new_zeros(count, len(schur))  # of V, as rows
    # B = half + halfᵀ takes one outer product for its two. Halves of squares compare as squares do.
    half = products.div_(2)
    squares, left = half.diagonal(), schur.diagonal()  # views, which follow every update
    for column in columns:
        left.clamp_min_(0)
        values = score(squares.clamp_min_(0), left, first).where(waiting, -math.inf)
        best = int(values.argmax())
        if values[best].item() == -math.inf:
            break
        root = math.sqrt(left[best].item())
        torch.div(schur[best], root, out=column)
        output = (half[best] + half[:, best]).div_(root)
        output.sub_(column, alpha=output[best].item() / (2 * root))
        schur.addr_(column, column, alpha=-1)
        half.addr_(column, output, alpha=-1)
        waiting[best] = False
        places.append(best)
    return places, columns[: len(places), places].mT.tril()


def _schur_complement(matrix: Tensor, factor: Tensor, index: Tensor) -> Tensor:
    """Returns (S − V·Vᵀ) [n, n] of the channels `index` [n]."""
    rows = factor[index]
    return torch.addmm(matrix[index[:, None], index], rows, rows.mT, alpha=-1)


def _rows(matrix: Tensor, factor: Tensor, index: Tensor) -> Tensor:
    """Returns (S − V·Vᵀ) [n, H] of the channels `index` [n]."""
    return torch.addmm(matrix[index], factor[index], factor.mT, alpha=-1)


def _products(rows: Tensor) -> Tensor:
    """Returns the inner products [n, n] of rows [n, O]."""
    return rows @ rows.mT
