"""Products of fp32 in fp32, whatever the caller has allowed for its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Keeps a library's fp32 products from TF32 or bf16, and leave the setting as it was found.

    `torch.set_float32_matmul_precision("medium")`, common in training scripts, would otherwise
    round activations to 8 bits on CPUs with AMX, and "high" to 11 bits on GPUs.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    if before in ("ieee", "none"):
        yield
        return
    backend.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before
