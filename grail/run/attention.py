"""Correction of the drift that attention reads.

Drift that sites leave in the residual stream reaches the next block's attention, which was trained
on the dense network's x and reads x̃. With the best linear estimate of x, M x̃, the weights of
queries, keys and values become W M,

    M = I + β C (G + λI)⁻¹,   G = Σ x̃ x̃ᵀ,  C = Σ (x − x̃) x̃ᵀ

which at β = 1 minimises Σ‖x − M x̃‖² + λ‖M − I‖². It is the problem of a site with W = I and no
lost channel (`grail.algebra.problem`); λ and β are chosen likewise. In quantisation it is error
propagation (Arai, Ichikawa, NeurIPS 2025, arXiv 2504.09629).

The first layers of an MLP stay as they are, so an MLP corrects only the drift that its hidden
channels show.
"""

import math

from grail.algebra._fit import Fit
from grail.calibrate.hidden_states import HiddenStates
from grail.errors import ModelError
from grail.networks import AttentionInput
from grail.report.report import InputReport
from grail.run.blocks import Blocks
from grail.run.exchange import Exchange
from grail.run.narrower import BlockReport
from grail.run.solver import SiteSolver
from grail.runtime.transaction import Transaction
from grail.statistics.collector import Advance


class AttentionCorrection:
    """Rewrites the layers of attention that read a stream with drift; W becomes W M."""

    def __init__(
        self, blocks: Blocks, solver: SiteSolver, exchange: Exchange, transaction: Transaction
    ):
        self._blocks, self._solver = blocks, solver
        self._exchange, self._transaction = exchange, transaction

    def applies_to(self, block: int) -> bool:
        """Returns whether the attention of a block is corrected."""
        # There is no drift before the first narrowed block.
        return self._blocks.recipe.correct_attention and block > self._blocks.first_active

    def inputs(self, block: int) -> list[AttentionInput]:
        """Returns the points where the attention of a block reads a stream with drift."""
        return self._blocks.architecture.attention_inputs(block) if self.applies_to(block) else []

    def correct(
        self, point: AttentionInput, target: HiddenStates, advance: Advance, report: BlockReport
    ) -> None:
        """Fits M at one point and rewrites its layers; the report notes where it cannot.

        Args:
            target: what the dense network's layers read there.
        """
        collect = self._blocks.collector.collect
        try:
            collected = collect(point.block, [point], {point: target}, advance, finish=False)
        except ModelError as error:  # it runs more than once, or a mask does not fit its tokens
            report.notes.append(f"{point.name} was not corrected: {error}")
            return
        ((_, decision),) = self._exchange.decided(
            collected, lambda _, parts: [self._solver.corrected(part) for (part,) in parts]
        )
        ((fit,), (tokens,)) = decision.fits, decision.tokens
        report.inputs.append(_row(point, fit, tokens))
        if math.isinf(fit.alpha) or not fit.drift_correction:
            return
        with self._blocks.clock("absorb"):
            for layer in point.layers:
                weight = layer.by_channel.to(fit.weight) @ fit.weight
                layer.rewrite(weight, layer.channels, False, None, self._transaction)


def _row(point: AttentionInput, fit: Fit, tokens: int) -> InputReport:
    return InputReport(
        name=point.name,
        block=point.block,
        layers=[layer.name for layer in point.layers],
        tokens=tokens,
        alpha=None if math.isinf(fit.alpha) else fit.alpha,
        drift_correction=fit.drift_correction,
        error=fit.error,
        baseline_error=fit.baseline_error,
    )
