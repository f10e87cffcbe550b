"""Swaps of channels after greedy selection: squared errors of single sites, in closed form.

    python -m bench.quality.swaps

Greedy selection never drops a channel again. Here a kept channel is swapped for a dropped one, the
best of all pairs each time, while that lowers the error of the best weights. SmolLM2-135M, half of
each MLP, 16 sequences of passages, by the defaults. A row of bench/results/swaps.csv is a site with
and without swaps: squared errors of a ridge toward plain pruning, whose α is the best on held-out
passages, relative to the target's energy, drift included. Held-out texts pass through networks that
keep the same channels.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.quality.endtoend import Subject
from bench.tools.commandline import CommandLine
from bench.tools.measuring import Row, Table
from bench.tools.texts import LENGTH
from grail import select
from grail.select.elimination import DAMPING

KEY = ("block", "choice")
BLOCKS = (2, 6, 10, 14, 18, 22, 26, 29)
TEXTS, HELD_OUT = ("passages", "brown"), 8  # held-out texts, and sequences of each
ALPHAS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
LEAST = 1e-7  # of the target's energy, that a swap must gain


class Sums(NamedTuple):
    """Sums over the tokens x of a site's consumer and its targets t, and its weight; fp64."""

    gram: Tensor  # Σ x xᵀ [H, H]
    cross: Tensor  # Σ t xᵀ [O, H]
    energy: float  # Σ |t|²
    weight: Tensor  # [O, H]

    @classmethod
    def of(cls, view: select.View) -> "Sums":
        """Returns the sums of what a selector gets: t = (1 − β)·W·x + β·(W·x + δ)."""
        gram, weight, share = view.gram.matrix(), view.consumer.float(), view.drift_correction
        cross = view.add_drift(gram @ weight.mT).mT.double()
        gram, weight, drift = gram.double(), weight.double(), view.gram.drift
        energy = ((2 * cross - weight @ gram) * weight).sum()  # but for β²·Σ|δ|²
        if drift is not None:
            lost = view.gram.drift_scale * drift.energy
            if drift.of_target:  # Σ|W·x + δ|² was recorded
                lost += ((weight @ gram - 2 * drift.cross) * weight).sum()
            energy += share**2 * lost
        return cls(gram, cross, float(energy), weight)

    def error(self, kept: Tensor, weight: Tensor) -> float:
        """Returns Σ |t − W'·x|² / Σ |t|² of weights [O, K] for the channels `kept`."""
        change = (weight @ self.gram[kept][:, kept] - 2 * self.cross[:, kept]) * weight
        return 1 + float(change.sum()) / self.energy

    def ridge(self, kept: Tensor, alpha: float) -> Tensor:
        """Returns the weights [O, K] of a ridge toward plain pruning."""
        gram, plain = self.gram[kept][:, kept], self.weight[:, kept]
        damped = gram + alpha * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        return plain + torch.linalg.solve(damped, self.cross[:, kept] - plain @ gram, left=False)


def best_swap(matrix: Tensor, cross: Tensor, kept: Tensor) -> tuple[float, int, int]:
    """Returns how much the best swap lowers the error, the channel it drops and the one it adds.

    With P kept, Q = M_PP⁻¹·M_P: and W' = A_P·M_PP⁻¹, a channel j has the rest R_j = A_j − W'·M_Pj
    and S_jj = M_jj − M_jP·Q_j. Without i of P, and b = [M_PP⁻¹]_ii, they are R_j + W'_i·Q_ij/b and
    S_jj + Q_ij²/b, and ‖W'_i‖²/b is lost. Adding j then gains ‖R_j‖²/S_jj.

    Args:
        matrix: M [H, H], G and some damping.
        cross: A [O, H].
        kept: mask [H].
    """
    inside, outside = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix[inside][:, inside]))
    between = matrix[inside][:, outside]
    weight, coupling = cross[:, inside] @ inverse, inverse @ between
    rest = cross[:, outside] - weight @ between
    schur = matrix.diagonal()[outside] - (between * coupling).sum(0)
    own, pivot = weight.square().sum(0)[:, None], inverse.diagonal()[:, None]
    share = coupling / pivot
    gained = rest.square().sum(0) + 2 * (weight.mT @ rest) * share + own * share.square()
    gains = gained / (schur + coupling * share) - own / pivot
    row, column = divmod(int(gains.argmax()), len(outside))
    return float(gains[row, column]), int(inside[row]), int(outside[column])


def swapped(sums: Sums, index: Tensor) -> tuple[Tensor, int]:
    """Returns the channels [K] after all swaps that lower the error, and the number of swaps."""
    kept = torch.zeros(len(sums.gram), dtype=torch.bool).scatter_(0, index, True)
    identity = torch.eye(len(kept), dtype=torch.float64)
    matrix = sums.gram + DAMPING * sums.gram.diagonal().mean() * identity
    count = 0
    while True:
        gain, dropped, added = best_swap(matrix, sums.cross, kept)
        if gain < LEAST * sums.energy:
            return kept.nonzero()[:, 0], count
        kept[dropped], kept[added] = False, True
        count += 1


def captured() -> list[tuple[Sums, dict[str, Sums], Tensor]]:
    """Returns of each of the blocks its sums, those of the held-out texts, and greedy's choice."""
    subject, greedy = Subject(), select.get("greedy")
    calibration = subject.batches("passages", "calibration", 16 * LENGTH)
    places = {block - 1: number for number, block in enumerate(BLOCKS)}
    choices: list[Tensor] = []
    found: dict[str, list[Sums]] = {}

    def run(name: str, repeats: bool, **texts: Any) -> None:
        numbers = itertools.count()

        def choose(view: select.View) -> Any:
            number = next(numbers)
            if number in places:
                found.setdefault(name, []).append(Sums.of(view))
            if not repeats:
                choices.append(greedy(view).index)
            return choices[number]

        subject.compressed(calibration, keep=0.5, sites=("mlp",), selector=choose, **texts)

    run("calibration", repeats=False)
    for text in TEXTS:
        heldout = subject.batches(text, "heldout", HELD_OUT * LENGTH)
        run(text, repeats=True, select_on=heldout)
    return [
        (
            found["calibration"][number],
            {text: found[text][number] for text in TEXTS},
            choices[place],
        )
        for place, number in places.items()
    ]


def errors(seen: Sums, held_out: dict[str, Sums], kept: Tensor) -> dict[str, float]:
    """Returns the best α, and the error of its ridge on fitted and held-out tokens."""
    fits = {alpha: seen.ridge(kept, alpha) for alpha in ALPHAS}
    alpha = min(ALPHAS, key=lambda alpha: held_out[TEXTS[0]].error(kept, fits[alpha]))
    every = {"fitted": seen, **held_out}
    found = {name: sums.error(kept, fits[alpha]) for name, sums in every.items()}
    return {"alpha": alpha, **{name: round(error, 6) for name, error in found.items()}}


def change(rows: Sequence[Row], tokens: str) -> float:
    """Returns the mean over sites of the relative change of an error by swaps.

    Args:
        rows: of the CSV.
        tokens: "fitted", or one of `TEXTS`.
    """
    found = {(row["block"], row["choice"]): float(row[tokens]) for row in rows}
    blocks = dict.fromkeys(row["block"] for row in rows)
    return statistics.mean(found[b, "swaps"] / found[b, "greedy"] - 1 for b in blocks)


def main() -> None:
    """Measures the sites, unless the CSV has them."""
    options = CommandLine(__doc__, rows="swaps", takes="10 minutes on 1 core").read()
    table = Table(options.output, KEY)
    if all(table.measured(block, "swaps") for block in BLOCKS):
        return
    for block, (seen, held_out, index) in zip(BLOCKS, captured(), strict=True):
        for choice, (kept, count) in {"greedy": (index, 0), "swaps": swapped(seen, index)}.items():
            if (block, choice) not in table:
                row = {"block": block, "choice": choice, "swaps": count}
                table.add(row | errors(seen, held_out, kept))


if __name__ == "__main__":
    main()
