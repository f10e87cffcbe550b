"""GPTQ in a loop of your own, with the Hessians that `grail.accumulate` collects.

    python examples/own_calibration_loop.py --layers mlp.down_proj --bits 4

The loop runs the model as it likes; each layer that was asked for has its Gram afterwards, and
`hessian(scale=2)` is H = 2·Σ x xᵀ as GPTQ defines it (arXiv 2210.17323). The weights of each layer
are rounded to nearest and by GPTQ, and the relative errors of the layer's output are printed. The
defaults need no network after `make environment`.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grail


def smollm2_and_text() -> tuple[Path, list[str]]:
    """A GGUF file, and documents for calibration."""
    sys.path.append(str(Path(__file__).parents[1]))  # bench is of this clone, not installed
    from bench.tools.assets import python_reference, smollm2

    return smollm2(), list(python_reference().values())


class Grid:
    """2^bits levels between the smallest and the largest weight of each row [O, H]."""

    def __init__(self, weight: Tensor, bits: int):
        low = weight.amin(1).clamp_max(0)
        self.step = (weight.amax(1).clamp_min(0) - low).clamp_min(1e-12) / (2**bits - 1)
        self.zero, self.levels = (-low / self.step).round(), 2**bits - 1

    def nearest(self, column: Tensor) -> Tensor:
        """The nearest values of the grid to a column [O]."""
        code = (column / self.step).round() + self.zero
        return (code.clamp(0, self.levels) - self.zero) * self.step


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Rounds a weight [O, H] in fp64, column by column; later columns take up each error."""
    left = weight.clone()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rounded = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = grid.nearest(left[:, j])
        error = (left[:, j] - rounded[:, j]) / upper[j, j]
        left[:, j:] -= torch.outer(error, upper[j, j:])
    return rounded


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """‖(W − Q)·X‖ / ‖W·X‖ from H = 2·X·Xᵀ."""

    def squared(matrix: Tensor) -> float:
        return float(((matrix @ hessian) * matrix).sum())

    return (squared(weight - rounded) / squared(weight)) ** 0.5


def main(arguments: Iterable[str] | None = None) -> list[tuple[str, float, float]]:
    """Returns for each layer the errors of rounding to nearest and of GPTQ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, hub name or GGUF file; default: SmolLM2-135M")
    parser.add_argument("--text", help="calibration text; default: the Python language reference")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="of a sequence (%(default)s)")
    parser.add_argument("--layers", default="mlp.down_proj", help="end of the names (%(default)s)")
    parser.add_argument("--count", type=int, default=2, help="of layers, first ones (%(default)s)")
    parser.add_argument("--bits", type=int, default=4, help="of a weight (%(default)s)")
    options = parser.parse_args(None if arguments is None else list(arguments))

    source: Any = options.model
    text: Any = options.text
    if source is None or text is None:
        usual = smollm2_and_text()
        source, text = source or usual[0], text or usual[1]
    model, tokenizer = grail.load_model(source)
    batches = grail.token_batches(
        text, tokenizer, tokens=options.tokens, sequence_length=options.length
    )
    ends = options.layers
    wanted = [name for name, _ in model.named_modules() if name.endswith(ends)][: options.count]

    with grail.accumulate(model, wanted) as grams, torch.no_grad():
        for batch in batches:  # any loop: several models, other orders, tokens that are masked
            model.base_model(batch)

    rows = []
    for name in wanted:
        weight = model.get_submodule(name).weight.detach().double()
        hessian = grams[name].hessian(scale=2).double()
        grid = Grid(weight, options.bits)
        nearest = torch.stack([grid.nearest(column) for column in weight.T], 1)
        rounded = gptq(weight, hessian, grid)
        row = name, *(output_error(weight, each, hessian) for each in (nearest, rounded))
        print("{}: error to nearest {:.4f}, by GPTQ {:.4f}".format(*row))
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
