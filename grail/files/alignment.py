"""Weights at addresses for which a CPU's kernels always round alike.

Kernels for vectors sum in another order where a weight does not start at a multiple of 64 bytes.
A safetensors file is mapped into memory as it is, and its data start wherever its header ends, so
the same weights may give other bits once they are saved and loaded. Files are therefore written
with headers of a multiple of 64 bytes, and what is loaded is moved where that is not enough.
"""

import os
import shutil
import struct
from pathlib import Path

from torch import nn

ALIGNMENT = 64  # bytes, what torch's own allocator on the CPU gives

_LENGTH = struct.Struct("<Q")  # of the header, before it


def align_weights(model: nn.Module) -> None:
    """Moves each parameter of a model on the CPU that starts at an odd address."""
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
