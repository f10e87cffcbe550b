"""Memory: what is in use, the peak of a stretch of work, and what to do when there is too little.

In use is the resident set on a CPU, what the allocator handed out on a GPU.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

from grail.errors import OutOfMemoryError

_C = ctypes.CDLL(None)
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_use(device: torch.device) -> int:
    """Bytes in use now on `device`; 0 where the platform does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _trim()
    return _status("VmRSS")


def free(device: torch.device) -> int:
    """Bytes that a GPU can still hand out, those that torch keeps for itself among them."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class Peak:
    """`with Peak(device) as peak: …`; then `peak.bytes` is the highest use, 0 where unknown."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif os.access(_CLEAR_REFS, os.W_OK):
            _trim()
            _CLEAR_REFS.write_text("5")  # resets the high-water mark, see proc(5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = _status("VmHWM")


# What needs less of it, by phase of a run.
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
    """Turns running out of memory into an OutOfMemoryError that says what would need less.

    Args:
        device: where the work is.
        phase: in which it was when it failed.
        movable: whether hidden states and model may be told to stay on the host, and do not yet.
        remedies: what needs less of it, by phase.
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
    """Whether an error says that there was not enough memory."""
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
