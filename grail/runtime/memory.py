"""Memory in use, the peak of a stretch of work, and the remedies when there is too little.

In use is the resident set on a CPU, and what the allocator handed out on a GPU. `Meter` counts the
tensors alone, on either.
"""

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grail.errors import OutOfMemoryError
from grail_kernels import OPERATOR_FUNCTIONS

_C = ctypes.CDLL(None)
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMINFO, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def in_use(device: torch.device) -> int:
    """Returns the bytes in use on `device`; 0 where the platform has no figure."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _trim()
    return _status("VmRSS")


def free(device: torch.device) -> int:
    """Returns the bytes that a GPU can still hand out, those that torch has reserved included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def available() -> int | None:
    """Returns the bytes of the host that new processes can take; None where it is not known.

    That is the kernel's estimate, or what the limit of the container leaves, if that is less.
    """
    with suppress(OSError, ValueError, IndexError):
        estimate = _MEMINFO.read_text().split("MemAvailable:")[1]
        free, left = int(estimate.split()[0]) << 10, _left_in_container()
        return free if left is None else min(free, left)
    return None


def _left_in_container() -> int | None:
    """Returns the bytes that the limit of a control group (version 2) leaves; None without one."""
    with suppress(OSError, ValueError):
        limit, used = (int((_GROUP / f"memory.{n}").read_text()) for n in ("max", "current"))
        fields = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(fields.get("inactive_file", 0))
    return None


class Peak:
    """The highest use inside `with Peak(device) as peak`: `peak.bytes`, 0 where unknown."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif os.access(_CLEAR_REFS, os.W_OK):
            _trim()
            _CLEAR_REFS.write_text("5")  # resets the high-water mark, see proc(5)
        return self

    def update(self) -> None:
        """Takes in the peak so far, before a `Meter` resets that of a GPU."""
        if self.device.type == "cuda":
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self.device))
        else:
            self.bytes = _status("VmHWM")

    def __exit__(self, *error: Any) -> None:
        self.update()


class Meter:
    """Bytes of the tensors that this thread allocates inside `with Meter(device) as meter`.

    On a GPU the allocator counts. Elsewhere the results of torch's operations are counted, without
    the scratch memory inside of one operation; a profiler would count that too, but cannot run
    inside another one.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._results = None if device.type == "cuda" else _Results(device)
        self._before = 0

    def __enter__(self) -> "Meter":
        if self._results is None:
            self._before = torch.cuda.memory_allocated(self._device)
            self.restart()
        else:
            self._results.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._results is not None:
            self._results.__exit__(*error)

    @property
    def use(self) -> int:
        """The bytes in use, beyond those at the start."""
        if self._results is None:
            return torch.cuda.memory_allocated(self._device) - self._before
        return self._results.use

    @property
    def peak(self) -> int:
        """The highest use since the start or the last restart."""
        if self._results is None:
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return self._results.peak

    def restart(self) -> None:
        """Begins a new peak at the present use."""
        if self._results is None:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._results.peak = self._results.use


class _Results(TorchDispatchMode):
    """Counts the storages of what operations return, from their allocation until they are freed."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._kind = device.type
        self._sizes: dict[int, int] = {}  # by address of the storage
        self._references: dict[int, Any] = {}
        self.use = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        kernel = OPERATOR_FUNCTIONS.get(func._schema.name)
        if kernel is None:
            result = func(*args, **kwargs)
        else:  # with what it allocates inside
            with self:
                result = kernel(*args, **kwargs)
        for storage in self._storages(result):
            if storage._cdata in self._sizes or storage._cdata not in given:
                self._count(storage)
        return result

    def _storages(self, tree: Any) -> Iterator[torch.UntypedStorage]:
        for leaf in tree_leaves(tree):
            if (
                isinstance(leaf, Tensor)
                and leaf.layout is torch.strided
                and leaf.device.type == self._kind
            ):
                yield leaf.untyped_storage()

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._sizes:
            self._references[address] = weakref.ref(storage, lambda _: self._free(address))
        self.use += size - self._sizes.get(address, 0)
        self._sizes[address] = size
        self.peak = max(self.peak, self.use)

    def _free(self, address: int) -> None:
        self.use -= self._sizes.pop(address)
        del self._references[address]


# What needs less memory, by phase of a run.
REMEDIES = {
    "forward": "give smaller batches or shorter sequences",
    "gram": "give smaller batches, or narrow one kind of site at a time",
    "select": "choose a selector that searches less, such as wanda",
    "solve": "fix alpha and drift_correction, which takes half of what choosing them takes",
}


@contextmanager
def explain_oom(
    device: torch.device,
    phase: Callable[[], str],
    movable: bool,
    remedies: Mapping[str, str] = REMEDIES,
) -> Iterator[None]:
    """Turns running out of memory into an OutOfMemoryError that names remedies.

    Args:
        device: of the work.
        phase: returns the phase in which the work failed.
        movable: whether hidden states and model could stay on the host, and do not yet.
        remedies: by phase.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        advice = [remedies.get(phase(), "use a machine with more memory")]
        if device.type == "cuda" and movable:
            advice.append("leave the hidden states on the CPU: storage='cpu'")
            advice.append("leave the model there as well: onload='cuda'")
        raise OutOfMemoryError(
            f"out of memory on {device} ({phase()}); the model is as it was; to need less, "
            f"{'; or '.join(advice)}"
        ) from error


def ran_out(error: BaseException) -> bool:
    """Returns whether an error reports too little memory."""
    # On a CPU torch raises a plain RuntimeError.
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error)


def _trim() -> None:
    if hasattr(_C, "malloc_trim"):  # else what glibc kept of freed memory would count, too
        _C.malloc_trim(0)


def _status(field: str) -> int:
    if not _STATUS.exists():
        return 0
    found = (line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    line = next(found, "")
    return int(line.split()[1]) * 1024 if line else 0
