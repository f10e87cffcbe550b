"""Many processes: each calibrates its share of the batches, the sums meet where they are solved.

    torchrun --nproc-per-node 4 -m grail compress …

Every process holds the whole model and is given all batches, of which it runs every n-th. A site's
sums are reduced to one of the processes, the packed triangle only, 2·H·(H + 256) bytes; that one
selects, solves and sends the reduction and the rewritten weights, O·K values, to all others, which
narrow their models alike. The sums of tokens are integers and so the same for any number of
processes; the others differ by the rounding of fp32 sums in another order.

What fails in one process fails in all: before each exchange every process says whether it is well,
and one that is not says why. A process that is lost ends the others as soon as the group's backend
notices: at once with gloo, by the group's timeout at the latest.

`Processes` is one process alone, for which all of this is nothing; `ProcessGroup` is several.
"""

import heapq
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from grail.algebra._fit import Fit
from grail.algebra.gram import Gram
from grail.algebra.reduction import Reduction
from grail.errors import InputError, RankError

# A solve of a large site may keep the others waiting.
TIMEOUT = timedelta(minutes=30)

Item = TypeVar("Item")
Key = TypeVar("Key")


@dataclass(frozen=True)
class Decision:
    """What becomes of a site: its reduction, and its consumers' fits, if they are known already.

    `tokens`: how many each consumer read. `notes`: what a person should know.
    """

    reduction: Reduction
    fits: tuple[Fit, ...]
    tokens: tuple[int, ...]
    notes: tuple[str, ...] = ()


class Processes:
    """One process alone.

    `number` of `count`, its own; `sent`: bytes that it gave to others.
    """

    number, count, sent = 0, 1, 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Lets what fails in one process fail in all."""
        yield

    def share(self, items: Iterable[Item]) -> Iterable[Item]:
        """Those of `items` that are this process's."""
        return items

    def interleaved(self, own: list[Item]) -> list[Item]:
        """The items of all processes, in the order in which `share` dealt them out."""
        return own

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return tensor

    def require_equal(self, what: str, value: Any) -> None:
        """Raises InputError in all processes where `value` differs between them."""

    def decided(
        self,
        keys: Sequence[Key],
        grams: Callable[[Key], Sequence[Gram]],
        decide: Callable[[Key, Any], Decision],
        prepare: Callable[[Key], Any],
        cost: Callable[[Key], float],
    ) -> Iterator[tuple[Key, Decision]]:
        """Each key and what was decided for it, in order.

        Args:
            grams: the sums that `decide` reads; here those of the own tokens only.
            decide: called in one process for each key, with what `prepare` gave.
            prepare: called in all processes, because it may exchange something.
            cost: of a decision, in any unit, for an even share of the work.
        """
        for key in keys:
            yield key, decide(key, prepare(key))


class ProcessGroup(Processes):
    """The processes of a `torch.distributed` group."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.number, self.count, self.sent = dist.get_rank(group), dist.get_world_size(group), 0
        # A backend that knows one kind of device only gets tensors there.
        backend = dist.get_backend(group)
        self._device = {"gloo": "cpu", "nccl": "cuda"}.get(backend)
        self._work = [(0.0, number) for number in range(self.count)]  # a heap

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            self._agree(f"{type(error).__name__}: {error}")
            raise
        self._agree()
        # Who ends first closes connections on which others may still wait for that answer.
        with suppress(RuntimeError):
            dist.barrier(self._group)

    def share(self, items: Iterable[Item]) -> Iterable[Item]:
        return itertools.islice(items, self.number, None, self.count)

    def interleaved(self, own: list[Item]) -> list[Item]:
        dealt: list[list[Item]] = self.gather(own)
        return [
            items[turn] for turn in range(len(dealt[0])) for items in dealt if turn < len(items)
        ]

    def total(self, tensor: Tensor) -> Tensor:
        self._agree()
        return self._moved(tensor.clone(), self._all_reduce)

    def require_equal(self, what: str, value: Any) -> None:
        if any(other != value for other in self.gather(value)):
            raise InputError(f"{what} must be the same in all {self.count} processes")

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by number."""
        self._agree()
        return self._gathered(value)

    def decided(
        self,
        keys: Sequence[Key],
        grams: Callable[[Key], Sequence[Gram]],
        decide: Callable[[Key, Any], Decision],
        prepare: Callable[[Key], Any],
        cost: Callable[[Key], float],
    ) -> Iterator[tuple[Key, Decision]]:
        owners = [self._next_owner(cost(key)) for key in keys]
        decisions: dict[int, Decision] = {}
        for place, (key, owner) in enumerate(zip(keys, owners, strict=True)):
            prepared = prepare(key)
            for gram in grams(key):
                self.reduce(gram, owner)
            if owner == self.number:
                decisions[place] = decide(key, prepared)
        for place, (key, owner) in enumerate(zip(keys, owners, strict=True)):
            yield key, self._broadcast(decisions.pop(place, None), owner)

    def reduce(self, gram: Gram, owner: int | None = None) -> None:
        """Brings the sums of all processes to one, or to all; in the others they are lost."""
        outputs = 0 if gram.drift is None else gram.drift.outputs
        shapes = self.gather((gram.channels, outputs))
        if len({channels for channels, _ in shapes}) > 1 or len({o for _, o in shapes if o}) > 1:
            raise InputError(
                f"the processes hold sums of different sites: (channels, outputs) are {shapes}"
            )
        for tensor in gram.parts(max(o for _, o in shapes)).values():
            self._moved(tensor, self._all_reduce if owner is None else self._reduce_to(owner))

    def _next_owner(self, cost: float) -> int:
        """The process with the least work so far."""
        work, number = heapq.heappop(self._work)
        heapq.heappush(self._work, (work + cost, number))
        return number

    def _broadcast(self, decision: Decision | None, owner: int) -> Decision:
        """The decision of its owner, in all processes; its weights go as they are."""
        self._agree()
        header: list[Any] = [None]
        weights: list[Tensor] = []
        if decision is not None:
            weights = [weight.contiguous() for fit in decision.fits for weight in _tensors(fit)]
            bare = [replace(fit, weights=(), shifts=None) for fit in decision.fits]
            forms = [[(t.shape, t.dtype, t.device) for t in _tensors(fit)] for fit in decision.fits]
            shifts = [fit.shifts is not None for fit in decision.fits]
            header = [(replace(decision, fits=tuple(bare)), forms, shifts)]
        self._guarded(
            lambda: dist.broadcast_object_list(header, group=self._group, group_src=owner)
        )
        sent, forms, shifts = header[0]
        if decision is None:
            flat = [form for of_fit in forms for form in of_fit]
            weights = [torch.empty(s, dtype=d, device=_here(where)) for s, d, where in flat]
        else:
            self.sent += _bytes(weights)
        for weight in weights:
            self._moved(weight, lambda t: dist.broadcast(t, group=self._group, group_src=owner))
        if decision is not None:
            return decision
        parts = iter(weights)
        fits = []
        for fit, of_fit, shifted in zip(sent.fits, forms, shifts, strict=True):
            tensors = tuple(itertools.islice(parts, len(of_fit)))
            half = len(tensors) // 2 if shifted else len(tensors)
            fits.append(
                replace(fit, weights=tensors[:half], shifts=tensors[half:] if shifted else None)
            )
        return replace(sent, fits=tuple(fits))

    def _all_reduce(self, tensor: Tensor) -> None:
        self.sent += _bytes([tensor])
        dist.all_reduce(tensor, group=self._group)

    def _reduce_to(self, owner: int) -> Callable[[Tensor], None]:
        def reduce(tensor: Tensor) -> None:
            self.sent += _bytes([tensor]) * (owner != self.number)
            dist.reduce(tensor, group=self._group, group_dst=owner)

        return reduce

    def _agree(self, failure: str | None = None) -> None:
        """Says whether this process is well; raises where it is and another is not."""
        failures = self._gathered(failure)
        if failure is None:
            for number, other in enumerate(failures):
                if other is not None:
                    raise RankError(f"process {number} of {self.count} failed: {other}")

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        self._guarded(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def _moved(self, tensor: Tensor, exchange: Callable[[Tensor], None]) -> Tensor:
        """Exchanges a tensor in its place, if need be by a copy where the backend can."""
        there = tensor if self._device is None else tensor.to(self._device)
        self._guarded(lambda: exchange(there))
        return tensor if there is tensor else tensor.copy_(there)

    def _guarded(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise RankError(
                f"process {self.number} of {self.count} lost touch with another, which may have "
                f"ended: {error}"
            ) from error


def all_reduce(gram: Gram, group: dist.ProcessGroup | None = None) -> None:
    """Sums a Gram over the processes of a group: afterwards each holds that of all tokens.

    Only the packed triangle is sent. Token counts are integers, and exact. To be called by all
    processes, also those that saw no token, once after the last update: a second call counts
    everything again.

    Raises:
        InputError: Grams of different sites.
        RankError: another process failed or was lost.
    """
    processes = ProcessGroup(group)
    with processes.together():
        processes.reduce(gram)


def current_processes() -> Processes:
    """The processes of the default group, or this one alone where there is none."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ProcessGroup() if several else Processes()


def launched_together() -> bool:
    """Whether torchrun, or what sets its variables, started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def launched(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started; gives the device of this one."""
    if not launched_together() or dist.is_initialized():
        yield device
        return
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def refuse_sharded(model: nn.Module) -> None:
    """Raises InputError for a model whose parameters are spread over processes (DTensor)."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise InputError(
                f"{name} is a DTensor: each process must hold the whole model; gather it first "
                "(full_tensor), or load it without tensor parallelism"
            )


def watched(batches: Iterable[Item], seen: list[int]) -> Iterator[Item]:
    """The same batches, a checksum of each in `seen`."""
    for batch in batches:
        leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
        seen.append(checksum(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        yield batch


def checksum(tensors: Iterable[Tensor]) -> int:
    """Of the shapes and contents of tensors in order."""
    found = 0
    for tensor in tensors:
        content = torch.hash_tensor(tensor.detach()).item() if tensor.numel() else 0
        found = zlib.crc32(f"{tensor.shape} {tensor.dtype} {content}".encode(), found)
    return found


def _tensors(fit: Fit) -> tuple[Tensor, ...]:
    return (*fit.weights, *(fit.shifts or ()))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _here(device: torch.device) -> torch.device:
    """This process's device of the same kind."""
    return (
        torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" else device
    )
