"""Tensors that wait between passes: hidden states, and outputs that need no second computation."""

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grail.runtime.hooks import replaced_forward


class HiddenStates:
    """One tensor for each batch, or for some, in memory that is allocated once.

    Args:
        storage: where they wait.
        grows: whether more batches take more memory (see `created_hidden_states`).

    Long-lived tensors allocated between those of a forward pass would fragment the allocator's
    memory: a quarter of a run's peak.
    """

    def __init__(self, storage: torch.device, grows: bool = True):
        self._storage = storage
        self._tensors: dict[int, Tensor] = {}
        if grows and (created := _created.get()) is not None:
            created.add(self)

    @property
    def nbytes(self) -> int:
        """The bytes of all batches."""
        return sum(tensor.nbytes for tensor in self)

    @property
    def batches(self) -> list[int]:
        """The numbers of the batches, in the order in which they came."""
        return list(self._tensors)

    def put(self, batch: int, tensor: Tensor) -> None:
        """Keeps a copy of one batch's tensor."""
        own = self._tensors.get(batch)
        if own is None or own.shape != tensor.shape:
            self._tensors[batch] = tensor.detach().to(self._storage, copy=True)
        else:
            own.copy_(tensor)

    def __getitem__(self, batch: int) -> Tensor:
        return self._tensors[batch]

    def __contains__(self, batch: int) -> bool:
        return batch in self._tensors

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors.values())

    def __len__(self) -> int:
        return len(self._tensors)

    def copy(
        self, storage: torch.device | None = None, batches: Iterable[int] | None = None
    ) -> "HiddenStates":
        """Returns a copy of all batches or of some, in the same storage or another."""
        other = HiddenStates(storage or self._storage)
        for batch in self.batches if batches is None else batches:
            other.put(batch, self[batch])
        return other

    def part(self, batches: Iterable[int]) -> "HiddenStates":
        """Returns the same tensors of some batches."""
        other = HiddenStates(self._storage, grows=False)  # they are counted here
        other._tensors = {batch: self[batch] for batch in batches}
        return other


_created: ContextVar["weakref.WeakSet[HiddenStates] | None"] = ContextVar("created", default=None)


@contextmanager
def created_hidden_states() -> Iterator["weakref.WeakSet[HiddenStates]"]:
    """Collects the hidden states that are created inside and grow, while they are in use."""
    created: weakref.WeakSet[HiddenStates] = weakref.WeakSet()
    token = _created.set(created)
    try:
        yield created
    finally:
        _created.reset(token)


class OutputCache:
    """Outputs of modules that the next pass over the same batches would only compute again.

    Of a tuple only the first entry is kept: attention's second, its weights [B, heads, L, L], is
    dropped by the blocks of transformers too. A module of another library that returns more runs
    again. Each recording replaces the one before it and uses its memory.

    Args:
        device: where the modules run.
        storage: where their outputs wait.
        batches: how many are recorded, from the first on; None is all.
    """

    def __init__(self, device: torch.device, storage: torch.device, batches: int | None = None):
        self._device, self._storage, self._batches = device, storage, batches
        self._memory: list[HiddenStates] = []
        self._outputs: dict[nn.Module, HiddenStates] = {}
        self._tuple_lengths: dict[nn.Module, int] = {}

    @contextmanager
    def recording(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Keeps what the modules return."""
        grows = self._batches is None
        self._memory += [HiddenStates(self._storage, grows) for _ in modules[len(self._memory) :]]
        self._outputs = dict(zip(modules, self._memory, strict=False))
        self._tuple_lengths = {}
        with ExitStack() as hooks:
            for module in modules:
                keep = partial(self._keep, itertools.count())
                hooks.enter_context(module.register_forward_hook(keep))
            yield

    def forget(self) -> None:
        """Frees what was kept."""
        self._memory, self._outputs = [], {}

    @contextmanager
    def replaying(self, batches: Iterable[int] | None = None) -> Iterator[None]:
        """Lets the modules return what was kept of some batches, in that order, or of all."""
        chosen = None if batches is None else list(batches)
        with ExitStack() as replaced:
            for module, outputs in self._outputs.items():
                order = outputs.batches if chosen is None else chosen
                replay = partial(self._next, module, map(outputs.__getitem__, order))
                replaced.enter_context(replaced_forward(module, replay))
            yield

    def _next(self, module: nn.Module, outputs: Iterator[Tensor], *_: Any, **__: Any) -> Any:
        # A copy: what reads it may write over it, and it may be replayed again.
        output = next(outputs).to(self._device, copy=True)
        if module not in self._tuple_lengths:
            return output
        return (output, *[None] * (self._tuple_lengths[module] - 1))

    def _keep(self, batches: Iterator[int], module: nn.Module, args: Any, output: Any) -> None:
        outputs, batch = self._outputs.get(module), next(batches)
        limit = self._batches
        if outputs is None or (limit is not None and batch >= limit):  # it runs again
            return
        if isinstance(output, tuple):
            self._tuple_lengths[module] = len(output)
            others = any(entry is not None for entry in output[1:])
            if others and not type(module).__module__.startswith("transformers."):
                del self._outputs[module]
                return
            output = output[0]
        outputs.put(batch, output)
