"""Weights at addresses for which a CPU's kernels always round alike.

Vector kernels sum in another order if a weight does not start at a multiple of 64 bytes. A
safetensors file is mapped into memory as it is, and its data start where its header ends. So the
same weights may give other bits after they were saved and loaded. Files are therefore written with
headers of a multiple of 64 bytes, and loaded weights are moved if that is not enough.
"""

import os
import shutil
import struct
from pathlib import Path

from torch import nn

ALIGNMENT = 64  # bytes, as in torch's own allocator on the CPU

_LENGTH = struct.Struct("<Q")  # of the header, before it


def align_weights(model: nn.Module) -> None:
    """Moves each parameter on the CPU that starts at an unaligned address."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def align_file(path: Path) -> None:
    """Pads the header of a safetensors file, as the format allows, so that its data are aligned."""
    with path.open("rb") as old:
        (length,) = _LENGTH.unpack(old.read(_LENGTH.size))
        header = old.read(length)
        missing = -(_LENGTH.size + length) % ALIGNMENT
        if not missing:
            return
        padded = path.with_suffix(".padded")
        with padded.open("wb") as new:
            new.write(_LENGTH.pack(length + missing) + header + b" " * missing)
            shutil.copyfileobj(old, new, 1 << 24)
            new.flush()
            os.fsync(new.fileno())
    padded.replace(path)
