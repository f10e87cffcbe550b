"""Quantises the blocks of a network one after the other, on GGUF's grids, with Grams.

For each block two passes of the calibration set: one collects the Gram of what each layer reads, in
the block as it is, and one moves the set through the block whose weights are rounded. So the Grams
of the next block are of what its layers read in the quantised network.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grail.algebra.gptq import inverse_factor, quantize
from grail.algebra.gram import Gram
from grail.algebra.grids import FORMATS, Format, Grid, require_blocks, round_to_nearest
from grail.calibrate.stream import Stream
from grail.errors import GrailError, ModelError
from grail.files.grids import ATTRIBUTE, grid_of
from grail.networks import Architecture
from grail.recipe import Recipe
from grail.report.report import LayerReport
from grail.run._accumulate import SharedGrams
from grail.run.blocks import Blocks
from grail.run.exchange import Exchange
from grail.runtime.hooks import input_of
from grail.runtime.transaction import Transaction
from grail.statistics.collector import Advance

EMBEDDING = FORMATS["q8_0"]  # of embedding and output matrix, which are rounded to nearest


class BlockQuantizer:
    """Quantises the linear layers of blocks.

    Args:
        blocks: the network and its calibration set.
        transaction: through which the model is changed.

    Phases of the clock: "forward", "gram" and "quantise".
    """

    def __init__(self, blocks: Blocks, transaction: Transaction):
        self._blocks, self._transaction = blocks, transaction
        self._stream, self._clock = blocks.stream, blocks.clock
        self._kind = FORMATS[blocks.recipe.quantize or "q8_0"]
        self._exchange = Exchange(blocks.stream.processes)

    def finish(self, block: int, advance: Advance) -> list[LayerReport]:
        """Quantises a block that is narrow, and moves the calibration set past it.

        Args:
            advance: called with the number of tokens after each batch.
        """
        layers = linear_layers(
            self._stream.blocks[block], self._blocks.architecture.block_names[block]
        )
        grams = self._collect(block, layers, advance)
        with self._clock("quantise"):
            rows = [row for group in grams.groups for row in self._quantize(group, layers, grams)]
        if self._blocks.has_next(block):
            self._blocks.collector.collect(block, [], {}, advance, finish=True)
        places = list(layers)
        return sorted(
            (LayerReport(name, block, self._kind.name, *errors) for name, *errors in rows),
            key=lambda row: places.index(row.name),
        )

    def _collect(
        self, block: int, layers: Mapping[str, nn.Linear], advance: Advance
    ) -> SharedGrams[str]:
        """Returns the Gram of what each layer of a block reads; layers of one input share it."""
        stream, reader = self._stream, _Reader(self._stream)
        grams = SharedGrams[str](convert=reader.counted)
        for name, layer in layers.items():

            def make(name: str = name, columns: int = layer.in_features) -> Gram:
                non_finite = self._blocks.recipe.non_finite
                return Gram(columns, stream.device, name, non_finite=non_finite)

            grams.enter(name, layer, make)
        with self._clock("forward"), self._observed(layers, grams):
            for batch in range(len(stream)):
                reader.batch = batch
                if stream.fits(batch):
                    stream.run(block, batch)
                    with self._clock("gram"):
                        grams.finish()
                advance(stream.tokens_of(batch))
        self._blocks.stream.processes.require_equal("the layers that share a Gram", grams.groups)
        for names in grams.groups:
            self._exchange.reduce(grams[names[0]])
        return grams

    @contextmanager
    def _observed(self, layers: Mapping[str, nn.Linear], grams: SharedGrams[str]) -> Iterator[None]:
        def observe(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            with self._clock("gram"):
                grams.observe(name, module, input_of(name, args, kwargs))

        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: observe(name, module, args, kwargs),
                with_kwargs=True,
            )
            for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _quantize(
        self, names: Sequence[str], layers: Mapping[str, nn.Linear], grams: SharedGrams[str]
    ) -> Iterator[tuple[str, float, float]]:
        """Quantises the layers of one input; yields name and errors of each."""
        gram = grams[names[0]].matrix()
        factor = inverse_factor(gram)
        weights = [layers[name].weight.detach() for name in names]
        try:
            found = quantize(weights, gram, factor, self._kind)
        except GrailError as error:
            raise type(error)(f"{', '.join(names)}: {error}", page=error.page) from error
        for name, rounded in zip(names, found, strict=True):
            _put(layers[name], rounded.grid, rounded.values, self._transaction)
            yield name, rounded.error, rounded.nearest_error


class _Reader:
    """Takes from a layer's input the tokens that count."""

    def __init__(self, stream: Stream):
        self._stream, self.batch = stream, 0

    def counted(self, _: Gram, x: Tensor) -> Tensor:
        """Returns x [tokens, C] of the batch that runs."""
        if x.dim() != 3:
            return x
        mask = self._stream.mask(self.batch, length=x.shape[1])
        return x if mask is None else x[mask]


def linear_layers(block: nn.Module, name: str) -> dict[str, nn.Linear]:
    """Returns the linear layers of a block by their names in the network.

    Raises:
        ModelError: the block has matrices in other layers.
    """
    found: dict[str, nn.Linear] = {}
    for path, module in block.named_modules(prefix=name):
        if isinstance(module, nn.Linear):
            found[path] = module
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                raise ModelError(
                    f"quantize rounds the matrices of linear layers; {path}.{key} is of a "
                    f"{type(module).__name__}: leave quantize out"
                )
    return found


def require_quantisable(architecture: Architecture, recipe: Recipe, model: Any) -> None:
    """Raises an error for a model that cannot be quantised, before work starts.

    Raises:
        InputError: a row that blocks of 32 weights do not divide, once the model is narrow.
        ModelError: matrices that are not those of linear layers, or no language model.
    """
    if not hasattr(model, "get_input_embeddings") or model.get_output_embeddings() is None:
        raise ModelError(
            f"quantize is for language models of transformers; {type(model).__name__} has no "
            "output matrix: leave quantize out"
        )
    if not architecture.block_names:
        raise ModelError(
            f"quantize runs the blocks of a transformer one by one; {architecture.name} has none "
            "that are known: leave quantize out"
        )
    widths = recipe.widths(architecture)
    kept = {
        consumer.module: widths[site.name].kept
        for site in recipe.all_sites(architecture)
        for consumer in site.consumers
    }
    for block, name in zip(architecture.blocks, architecture.block_names, strict=True):
        for path, layer in linear_layers(block, name).items():
            require_blocks(path, kept.get(layer, layer.in_features))
    for name, module in _ends(model).items():
        require_blocks(name, module.weight.shape[1])


def round_embeddings(model: Any, transaction: Transaction) -> list[LayerReport]:
    """Rounds embedding and output matrix of a language model to nearest, in Q8_0."""
    rows = []
    done: dict[int, nn.Module] = {}
    for name, module in _ends(model).items():
        weight = module.weight
        if (first := done.setdefault(id(weight), module)) is not module:  # tied
            transaction.set_attribute(module, "weight", first.weight)
            continue
        grid, codes = round_to_nearest(weight.detach(), EMBEDDING)
        _put(module, grid, grid.values(codes), transaction)
        rows.append(LayerReport(name, None, EMBEDDING.name, None, None))
    return rows


@torch.no_grad()
def round_all(model: Any, architecture: Architecture, kind: Format, undo: Transaction) -> None:
    """Rounds all that a run quantises to nearest: what the Grams are compared with."""
    for block, name in zip(architecture.blocks, architecture.block_names, strict=True):
        for layer in linear_layers(block, name).values():
            grid, codes = round_to_nearest(layer.weight.detach(), kind)
            _put(layer, grid, grid.values(codes), undo)
    round_embeddings(model, undo)


def forget_grids(model: nn.Module, transaction: Transaction) -> None:
    """Removes the grids of an earlier run, which other weights would not be on."""
    for module in model.modules():
        if grid_of(module) is not None:
            transaction.set_attribute(module, ATTRIBUTE, None)


def _ends(model: Any) -> dict[str, Any]:
    """Returns the layers of the embedding and of the output matrix, by name."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: module for module in ends}


def _put(layer: nn.Module, grid: Grid, values: Tensor, transaction: Transaction) -> None:
    """Gives a layer its rounded weight, and the grid of it."""
    transaction.set_parameter(layer, "weight", values)
    transaction.set_attribute(layer, ATTRIBUTE, grid.table)
