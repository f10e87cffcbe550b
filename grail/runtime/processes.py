"""Many processes: each calibrates its share of the batches; sums and results are exchanged.

    torchrun --nproc-per-node 4 -m grail compress …

Every process holds the whole model and is given all batches. Process k of n runs batches k, k + n,
k + 2n, …. Sums of integers are the same for any number of processes; other sums differ by the
rounding of fp32 sums in another order.

An error in one process is raised in all: before each exchange every process sends its state, and
the others raise RankError with the cause. A process that is lost ends the others as soon as the
group's backend notices: at once with gloo, by the group's timeout at the latest.

`Processes` is one process alone, without any exchange; `ProcessGroup` is several. Grams and fits
are exchanged by `grail.run.exchange`.
"""

import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grail.errors import InputError, RankError

# A solve of a large site may keep the others waiting.
TIMEOUT = timedelta(minutes=30)

Item = TypeVar("Item")


class Processes:
    """One process alone.

    `number`: its own, from 0 to `count` − 1. `sent`: bytes sent to other processes.
    """

    number, count, sent = 0, 1, 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises an error of one process in all."""
        yield

    def share(self, items: Iterable[Item]) -> Iterable[Item]:
        """Returns this process's share of `items`."""
        return items

    def interleaved(self, own: list[Item]) -> list[Item]:
        """Returns the items of all processes, in the order before `share`."""
        return own

    def total(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all processes."""
        return tensor

    def require_equal(self, what: str, value: Any) -> None:
        """Raises InputError in all processes where `value` differs between them."""

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by number."""
        return [value]

    def add_up(self, tensor: Tensor, owner: int | None = None) -> None:
        """Replaces a tensor by the sum over all processes, in one of them or in all.

        In the others its content is undefined afterwards.
        """

    def broadcast(
        self, value: Any, tensors: Sequence[Tensor], owner: int
    ) -> tuple[Any, Sequence[Tensor]]:
        """Returns the value and the tensors that process `owner` gave; the others give nothing."""
        return value, tensors


class ProcessGroup(Processes):
    """The processes of a `torch.distributed` group."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.number, self.count, self.sent = dist.get_rank(group), dist.get_world_size(group), 0
        # Such a backend takes tensors of one kind of device only.
        backend = dist.get_backend(group)
        self._device = {"gloo": "cpu", "nccl": "cuda"}.get(backend)

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
        # The first process to end closes connections on which others may still be waiting.
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
        self._agree()
        return self._gathered(value)

    def add_up(self, tensor: Tensor, owner: int | None = None) -> None:
        self._moved(tensor, self._all_reduce if owner is None else self._reduce_to(owner))

    def broadcast(
        self, value: Any, tensors: Sequence[Tensor], owner: int
    ) -> tuple[Any, Sequence[Tensor]]:
        self._agree()
        mine = owner == self.number
        tensors = [tensor.contiguous() for tensor in tensors]
        header = [(value, [(t.shape, t.dtype, t.device) for t in tensors]) if mine else None]
        self._guarded(
            lambda: dist.broadcast_object_list(header, group=self._group, group_src=owner)
        )
        assert header[0] is not None
        value, forms = header[0]
        if mine:
            self.sent += _bytes(tensors)
        else:
            tensors = [torch.empty(s, dtype=d, device=_here(where)) for s, d, where in forms]
        for tensor in tensors:
            self._moved(tensor, lambda t: dist.broadcast(t, group=self._group, group_src=owner))
        return value, tensors

    def _all_reduce(self, tensor: Tensor) -> None:
        self.sent += _bytes([tensor])
        dist.all_reduce(tensor, group=self._group)

    def _reduce_to(self, owner: int) -> Callable[[Tensor], None]:
        def reduce(tensor: Tensor) -> None:
            self.sent += _bytes([tensor]) * (owner != self.number)
            dist.reduce(tensor, group=self._group, group_dst=owner)

        return reduce

    def _agree(self, failure: str | None = None) -> None:
        """Exchanges failures; raises RankError in a process without one if another has one."""
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
        """Exchanges a tensor in place, through a copy on the backend's device if needed."""
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


def current_processes() -> Processes:
    """Returns the processes of the default group, or this process alone without a group."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ProcessGroup() if several else Processes()


def launched_together() -> bool:
    """Returns whether torchrun, or a launcher with its variables, started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def launched(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started; yields the device of this one."""
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


def checksum(tensors: Iterable[Tensor]) -> int:
    """Returns a checksum of the shapes, dtypes and contents of tensors in order."""
    found = 0
    for tensor in tensors:
        content = torch.hash_tensor(tensor.detach()).item() if tensor.numel() else 0
        found = zlib.crc32(f"{tensor.shape} {tensor.dtype} {content}".encode(), found)
    return found


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _here(device: torch.device) -> torch.device:
    """Returns this process's device of the same kind."""
    return (
        torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" else device
    )
