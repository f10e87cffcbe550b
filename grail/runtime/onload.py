"""Blocks of a model on the host, brought to the computing device one at a time.

    host     the model, its narrowed weights, hidden states of the calibration set
    device   the block that runs and the next one on its way; the statistics of one site, one
             solve, the activations of one batch

So the device's peak is 2·(largest block) + statistics + working set, for any number of blocks. Each
block is transferred once: all passes over it are made while it is on the device.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grail.arguments import is_quantised, require_usable
from grail.errors import InputError, ModelError


@dataclass
class _Fetched:
    """Copies of a block's tensors on the device, and the event after which they are complete."""

    copies: dict[Tensor, Tensor]
    arrived: torch.cuda.Event | None


class Onloader:
    """Brings blocks to a device, the next one while this one runs.

    Args:
        blocks: of the model, on the host.
        device: where they run; None: where they are, and nothing is moved.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device | None):
        self._blocks, self._device = blocks, device
        self._ahead: dict[int, Future[_Fetched]] = {}
        if device is not None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grail-onload")
            self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self, number: int) -> Iterator[None]:
        """Inside, a block is on the device; afterwards it is on the host, with its new weights.

        A parameter remains the same object, only its memory moves. So a change that is undone later
        puts back a parameter of the host.
        """
        if self._device is None:
            yield
            return
        fetched = self._ahead.pop(number, None) or self._fetch(number)
        copies = self._arrived(fetched.result())
        if number + 1 < len(self._blocks):
            self._ahead[number + 1] = self._fetch(number + 1)
        home = {tensor: tensor.data for tensor in copies}
        host = next(iter(home.values())).device
        for tensor, copy in copies.items():
            tensor.data = copy
        try:
            yield
        finally:
            for tensor, data in home.items():
                tensor.data = data
            for tensor in _tensors(self._blocks[number]):
                tensor.data = tensor.data.to(host)

    def _fetch(self, number: int) -> "Future[_Fetched]":
        return self._thread.submit(self._copy, list(_tensors(self._blocks[number])))

    @torch.no_grad()
    def _copy(self, tensors: Sequence[Tensor]) -> _Fetched:
        with torch.cuda.stream(self._side):  # does nothing without a stream
            copies = {t: t.data.to(self._device, copy=True) for t in tensors}
            return _Fetched(copies, self._side.record_event() if self._side else None)

    def _arrived(self, fetched: _Fetched) -> dict[Tensor, Tensor]:
        if fetched.arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(fetched.arrived)
            for copy in fetched.copies.values():
                copy.record_stream(current)
        return fetched.copies


def largest_block(blocks: Sequence[nn.Module]) -> int:
    """Returns the bytes of the largest block: parameters and buffers."""
    return max(sum(tensor.nbytes for tensor in _tensors(block)) for block in blocks)


def computing_device(model: nn.Module, onload: torch.device | str | None) -> torch.device:
    """Returns the device where a model's blocks run.

    Raises:
        InputError: a model on several devices, or one on a GPU with `onload`.
        ModelError: a model without parameters.
    """
    places = {parameter.device for parameter in model.parameters()}
    if len(places) > 1 or torch.device("meta") in places:
        found = ", ".join(sorted(map(str, places)))
        raise InputError(
            f"the model's weights are on {found}: load it on one device, or on the CPU with "
            "onload='cuda', which brings one block at a time to the GPU"
        )
    if not places:
        raise _no_parameters(model)
    (home,) = places
    if onload is None:
        return home
    if home.type != "cpu":
        raise InputError(f"onload brings blocks from the CPU; the model is on {home} already")
    return require_usable(onload)


def _no_parameters(model: nn.Module) -> ModelError:
    """Returns the error for a model without parameters."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        if is_quantised(module):
            where = f"{kind} has a quantised layer, {name or kind} ({type(module).__name__})"
            return ModelError(f"{where}, and no parameters: load the model without quantisation")
    return ModelError(f"{kind} has no parameters; give a network of layers with weights")


def _tensors(block: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(block.parameters(), block.buffers())
