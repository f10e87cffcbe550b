"""Peak memory of a stretch of work: resident set on a CPU, the allocator's peak on a GPU."""

import ctypes
import os
from pathlib import Path
from types import TracebackType

import torch

_C = ctypes.CDLL(None)
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_use(device: torch.device) -> int:
    """Bytes in use now on `device`; 0 where the platform does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _trim()
    return _status("VmRSS")


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


def _trim() -> None:
    if hasattr(_C, "malloc_trim"):  # else what glibc kept of freed memory would count, too
        _C.malloc_trim(0)


def _status(field: str) -> int:
    if not _STATUS.exists():
        return 0
    found = (line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    line = next(found, "")
    return int(line.split()[1]) * 1024 if line else 0
