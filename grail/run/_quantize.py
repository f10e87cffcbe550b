"""`quantize`: rounds a language model to a grid of GGUF, by GPTQ with Grams."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from grail.algebra.grids import format_of
from grail.calibrate.batches import Batch
from grail.recipe import Quantize
from grail.report.report import Report
from grail.run._compress import compress
from grail.runtime.settings import Runtime, refuse_unknown


def quantize(
    model: nn.Module,
    batches: Iterable[Batch],
    format: Quantize = "q4_1",
    *,
    runtime: Runtime | None = None,
    **overrides: Any,
) -> Report:
    """Rounds the matrices of a language model in place to a grid of GGUF, block by block.

    The linear layers of the blocks are rounded by GPTQ, each with the Gram of what it reads in the
    network that is quantised up to there. Embedding and output matrix are rounded to nearest, in
    Q8_0. The weights keep their dtype and have the values that llama.cpp computes with; each layer
    keeps its grid, which `grail.export` writes beside them. `grail.compress(…, quantize="q4_1")`
    narrows, restores and quantises in one run.

    Args:
        model: a language model of transformers, whose blocks have their matrices in linear layers
            with a multiple of 32 inputs.
        batches: calibration, see `grail.compress`.
        format: "q4_1", 5 bits a weight, or "q8_0", 8.5.
        runtime: how the run is computed; default `grail.Runtime()`.
        overrides: single settings of the runtime by name, and `non_finite` of a recipe.

    Returns:
        A `Report`, whose `quantized` has a row for each matrix: the error of its output, beside
        that of rounding to nearest.

    Raises:
        InputError, ModelError, EmptyCalibrationError, NonFiniteError: the model is as it was.
        SolveError, StateError, OutOfMemoryError, RankError: the model is as it was.

    Source: GPTQ (arXiv 2210.17323).
    """
    kind = format_of(format).name
    refuse_unknown(overrides, [field.name for field in fields(Runtime)] + ["non_finite"])
    return compress(model, batches, keep=1.0, runtime=runtime, quantize=kind, **overrides)
