"""The quantised matrices of a GGUF file: grids of a folder, or of an export that quantises it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from grail.algebra.grids import FORMATS, Format, Grid
from grail.errors import InputError
from grail.files import grids as grid_files
from grail.files.mixture import AnyText
from grail.files.text import Text
from grail.networks import find
from grail.recipe import Quantize
from grail.report._evaluate import evaluate
from grail.report.report import LayerReport, mean_errors
from grail.run._quantize import quantize
from grail.run.quantizer import round_all
from grail.runtime.transaction import Transaction
from grail.serving.calibration import read_calibration, text_of_folder
from grail_kernels import check_kind


@dataclass(frozen=True)
class Rounding:
    """The cost of rounding a folder's matrices, by GPTQ and to nearest."""

    format: str
    layers: tuple[LayerReport, ...] = ()  # none of a folder that was quantised before
    calibration: dict[str, Any] = field(default_factory=dict)  # source and hashes of the text
    # On held-out text: "before", "nearest" and "gptq"; empty without one.
    perplexity: dict[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[float, float] | None:
        """Means over the layers: the error of GPTQ, and of rounding to nearest."""
        return mean_errors(self.layers)

    @property
    def recovered(self) -> float | None:
        """Share of the log-perplexity lost by rounding to nearest that GPTQ recovers."""
        if not self.perplexity:
            return None
        before, nearest, gptq = (log(self.perplexity[k]) for k in ("before", "nearest", "gptq"))
        return (nearest - gptq) / (nearest - before) if nearest > before else None


@dataclass(frozen=True)
class Texts:
    """The texts of an export that quantises: to quantise with, and held out to compare on."""

    calibration: AnyText | None = None
    evaluate: str | Path | Text | None = None

    def refuse(self, reason: str) -> None:
        """Raises InputError if one was given."""
        if given := [name for name, text in vars(self).items() if text is not None]:
            raise InputError(f"{' and '.join(given)} are for an export that quantises: {reason}")

    def checked(self, folder: Path) -> "Texts":
        """Returns them with the split that is read, and refuses what cannot be read."""
        calibration = text_of_folder(folder, self.calibration)
        evaluate = self.evaluate
        if isinstance(evaluate, (str, Path)):
            evaluate = calibration.compared_on(str(evaluate), {}, "evaluate")
        check_kind("evaluate", evaluate, (Text, NoneType), "a text")
        if evaluate is not None:
            evaluate = evaluate.checked(str(folder))
        return Texts(self.calibration, evaluate)

    def batches(self, folder: Path, model: Any, tokenizer: Any) -> tuple[Any, list[Tensor]]:
        """Returns the calibration with its origin, and the held-out sequences."""
        calibration = read_calibration(folder, self.calibration, model, tokenizer)
        if not isinstance(self.evaluate, Text):
            return calibration, []
        return calibration, self.evaluate.batches(model, tokenizer)


def grids_for(
    folder: Path, model: Any, tokenizer: Any, asked: Quantize | None, texts: Texts, progress: bool
) -> tuple[Mapping[str, Grid], Rounding | None]:
    """Returns the grids on which the weights of a folder's model are, or are now.

    Args:
        folder: of the model.
        model: changed in place where it is quantised.
        tokenizer: of the folder.
        asked: the format; None takes the folder as it is.
        texts: to quantise with, and to compare on.
        progress: shows a progress bar.

    Raises:
        InputError: the folder was edited, or is quantised before.
        ModelError: the model cannot be quantised.
    """
    found = grid_files.read(folder, model)
    if found:
        (own, *_) = grid_files.formats(found)
        if asked not in (None, own):
            raise InputError(
                f"{folder} is quantised as {own}, and {asked} was asked for: leave quantize out, "
                "or compress the model again"
            )
        texts.refuse(f"{folder} is quantised")
        return found, Rounding(own)
    if asked is None:
        return found, None
    return _quantized(folder, model, tokenizer, FORMATS[asked], texts, progress)


def _quantized(
    folder: Path, model: Any, tokenizer: Any, kind: Format, texts: Texts, progress: bool
) -> tuple[Mapping[str, Grid], Rounding]:
    """Quantises a model and compares it with one that is rounded to nearest."""
    (batches, origin), heldout = texts.batches(folder, model, tokenizer)
    perplexity: dict[str, float] = {}

    def note(name: str) -> None:
        if heldout:
            perplexity[name] = evaluate(model, heldout, progress=False).perplexity

    note("before")
    if heldout:
        with Transaction() as transaction:
            round_all(model, find(model), kind, transaction)
            note("nearest")
            transaction.undo()
    report = quantize(model, batches, kind.name, progress=progress)  # type: ignore[arg-type]
    note("gptq")
    rounding = Rounding(kind.name, tuple(report.quantized), origin, perplexity)
    return grid_files.grids_of(model), rounding
