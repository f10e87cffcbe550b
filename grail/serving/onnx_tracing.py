"""Traces a network for batches of any size, and makes the batches that it is compared on."""

import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from grail.calibrate.batches import model_inputs
from grail.errors import InputError, ModelError, one_line
from grail.runtime.transaction import eval_no_grad
from grail.serving.onnx_check import Call, named_tensors
from grail.serving.onnx_network import random_batch

AXIS = "batch"  # the name of the axis of samples
# File, number and text of the line of code that torch names in its message.
_LINE = re.compile(r'raised this error:\n\s*File "([^"]+)", line (\d+), in .*\n\s*(.+)')


def call_of(network: nn.Module, batch: Any, samples: int) -> Call:
    """Returns the arguments of a network for a number of samples, repeated or cut from a batch.

    Repeated samples differ: noise of a tenth of their deviation is added to real numbers.

    Raises:
        InputError: the network does not take such a batch.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    args, kwargs = model_inputs(network, batch, device)
    given = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    sizes = [len(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes or not sizes[0]:
        raise InputError("example has no samples; give a tensor with samples along the first axis")

    def is_batch(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == sizes[0]

    def resized(leaf: Any) -> Any:
        return _repeated(leaf, samples) if is_batch(leaf) else leaf

    axis = torch.export.Dim(AXIS)
    dynamic = tree_map(lambda leaf: {0: axis} if is_batch(leaf) else None, dict(given))
    args, kwargs = tree_map(resized, args), tree_map(resized, kwargs)
    leaves = named_tensors(dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments))
    inputs = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return Call(args, kwargs, inputs, samples, dynamic)


def _repeated(tensor: Tensor, samples: int) -> Tensor:
    """Returns so many samples of a batch; those beyond its own with noise, if they are real."""
    index = torch.arange(samples, device=tensor.device) % len(tensor)
    found = tensor[index].clone()
    if samples > len(tensor) and tensor.is_floating_point():
        noise = random_batch(tuple(tensor.shape[1:]), samples).to(found)
        noise[: len(tensor)] = 0.0
        found += 0.1 * tensor.std(correction=0) * noise
    return found


def traced(network: nn.Module, call: Call) -> torch.export.ExportedProgram:
    """Traces a network for batches of any size.

    Raises:
        ModelError: its computation depends on values of the batch, or holds the number of samples;
            torch's own message is quoted.
    """
    try:
        with eval_no_grad(network), silent():
            return torch.export.export(network, call.args, call.kwargs, dynamic_shapes=call.dynamic)
    except Exception as error:  # torch raises errors of many classes
        raise ModelError(
            f"torch cannot trace {type(network).__name__} for batches of any size: "
            f"{_said(error)}; grail.export_onnx needs a forward without branches on values of the "
            "batch, and without its number of samples",
            page="docs/serving/onnx.md#what-is-refused",
        ) from error


def _said(error: Exception) -> str:
    """Returns what torch says: the first sentence that names a cause, and the line of code."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    named = [line for line in lines if line.startswith("- ")]
    first = named[0][2:] if named and lines[0].startswith("Constraints") else lines[0]
    told = one_line(Exception(first.split(". ")[0]))
    if line := _LINE.search(text):
        told += f" ({Path(line[1]).name}, line {line[2]}: {line[3].strip()})"
    return told


@contextmanager
def silent() -> Iterator[None]:
    """Lets torch's exporters print and log nothing: errors carry what matters."""
    before = logging.root.manager.disable
    nowhere = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
